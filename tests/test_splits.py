"""Splits in every usual spelling, never taken for classes; and the line that says what was found."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from test_training_data import png, write_images, write_parquet

from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.data.splits import looks_like_split


@pytest.mark.parametrize(
    ("train", "other", "asked"),
    [
        ("Train", "Val", "val"),
        ("training", "testing", "test"),
        ("TRAIN", "VALIDATION", "dev"),
        ("Training", "Eval", "test"),
        ("train", "valid", "validation"),
    ],
)
def test_folders_in_any_case_and_spelling(tmp_path: Path, train: str, other: str, asked: str) -> None:
    names = [f"{train}/a/1.png", f"{train}/b/1.png", f"{other}/b/2.png"]
    data = open_dataset(write_images(tmp_path, names))
    assert data.class_names == ("a", "b") and len(data) == 2  # not one image of the other split
    held = open_dataset(tmp_path, split=asked)
    assert held.class_names == ("b",) and Path(held.name(0)) == tmp_path / names[2]
    assert len(open_dataset(tmp_path, split=f"{asked}[:1]")) == 1


def test_parquet_in_any_case_and_spelling(tmp_path: Path) -> None:
    for number, name in enumerate(("Training.parquet", "validation-00000-of-00001.parquet", "Test.parquet")):
        write_parquet(tmp_path / name, [png(number)] * (number + 1), [0] * (number + 1))
    assert [len(open_dataset(tmp_path, split=split)) for split in ("train", "val", "test")] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"neither extra.parquet.*; there is Training, validation, Test: name one"):
        open_dataset(tmp_path, split="extra")


@pytest.mark.parametrize("layout", ["data/{}", "plain_text/{}", "{}"])
def test_a_download_from_the_hub(tmp_path: Path, layout: str) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for split, images in (("train", 3), ("test", 2)):
        name = layout.format(f"{split}-00000-of-00001.parquet")
        write_parquet(tmp_path / name, [png(i) for i in range(images)], list(range(images)))
    assert [len(open_dataset(tmp_path, split=split)) for split in ("train", "test")] == [3, 2]
    write_parquet(tmp_path / "other" / "train.parquet", [png(0)], [0])
    if "/" in layout:
        with pytest.raises(ValueError, match="holds several sets with a split 'train'; name one of"):
            open_dataset(tmp_path)


def test_parquet_elsewhere_below_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "half.parquet", [png(0)], [0])
    with pytest.raises(ValueError, match=rf"there is Parquet in {tmp_path}/data: name that folder"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=rf"no 'test' split.*there is half in {tmp_path}/data"):
        open_dataset(tmp_path, split="test")


def test_parquet_inside_folders_of_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train" / "0000.parquet", [png(0), png(1)], [0, 1])
    write_parquet(tmp_path / "test" / "0000.parquet", [png(2)], [1])
    assert [len(open_dataset(tmp_path, split=split)) for split in ("train", "test")] == [2, 1]


@pytest.mark.parametrize("name", ["Test", "val2017", "test_set", "training-images", "TestSet", "imagesTr/train"])
def test_a_split_is_no_class(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, ["cat/1.png", f"{name}/cat/1.png", f"{name}/dog/1.png"])
    with pytest.raises(ValueError, match=f"{name}/: these look like splits"):
        open_dataset(tmp_path)


def test_what_may_be_either_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "a", ["val/1.png", "dev/1.png"])
    with pytest.raises(ValueError, match=r"holds dev, val: 'validation' may mean any of them"):
        open_dataset(tmp_path / "a", split="validation")
    assert len(open_dataset(tmp_path / "a", split="dev")) == 1
    write_images(tmp_path / "b", ["car/1.png", "boat/1.png", "train/1.png"])  # the one with rails
    open_dataset(tmp_path / "b")
    assert "b/train is taken as the split train, and boat/, car/ beside it left out" in caplog.text
    with pytest.raises(ValueError, match=r"no 'test' split.*there is train, validation: name one"):
        open_dataset(write_images(tmp_path / "c", ["train/1.png", "validation/1.png"]), split="test")


def test_ordinary_names_are_classes(tmp_path: Path) -> None:
    for name in ("cat", "train station", "testudo", "valley", "evaluators", "device", "trainer", "set", "images"):
        assert not looks_like_split(name), name
    data = open_dataset(write_images(tmp_path, ["testudo/1.png", "valley/images/1.png"]))
    assert data.class_names == ("testudo", "valley")


def test_every_command_says_what_it_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    names = [f"Train/{name}/{i}.png" for name in "gfedcba" for i in range(300)] + ["Train/loose.png", "Test/a/1.png"]
    open_dataset(write_images(tmp_path, names))
    assert caplog.messages == [
        f"{tmp_path}/Train: 2,101 images in train, 7 classes, 1 image without a label (a, b, c, d, e, …); "
        "splits there: Train, Test"
    ]
    caplog.clear()
    open_dataset(f"{tmp_path}?label=", split="test")
    assert caplog.messages == [f"{tmp_path}/Test: 1 image in test, no labels; splits there: Train, Test"]
    assert main(["evaluate", "knn", "--data", str(tmp_path)]) == 2
    assert f"bigbigan evaluate: {tmp_path}/Train: 2,101 images in train, 7 classes" in capsys.readouterr().err
    assert main(["evaluate", "knn", "--data", str(tmp_path), "--quiet"]) == 2
    assert "2,101" not in capsys.readouterr().err
