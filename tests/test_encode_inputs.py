"""What `bigbigan encode` takes beside files and folders: Parquet, data sets, and lists of paths."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import home, make_images, one_thread  # noqa: F401 (fixtures for every test here)
from test_training_data import png

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    create_model("bigbigan-tiny", seed=7).save(folder)
    return str(folder)


def parquet_set(path: Path, number: int, start: int = 0) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(start + i), "path": None} for i in range(number)]
    parquet.write_table(pyarrow.table({"image": rows, "label": [str(i % 2) for i in range(number)]}), path)
    return path


def encode(model: str, output: Path, *arguments: object, code: int = 0) -> tuple[list[str], np.ndarray]:
    command = ["encode", *map(str, arguments), "-o", str(output), "--model", model, "--outputs", "avepool_feat"]
    assert main(command) == code
    with np.load(output) as archive:
        return archive["paths"].tolist(), archive["avepool_feat"]


def expected(model: str, dataset: Path, split: str = "train") -> np.ndarray:
    config = load(model).config
    images = open_dataset(dataset, split=split, label_column=None).decode_all(config.preprocess, 3)
    return load(model, fuse=True).encode(images.float() / 127.5 - 1, seed=0).avepool_feat.numpy()


def test_parquet_in_every_place(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "set"
    parquet_set(data / "data" / "train-00000-of-00001.parquet", 5)
    parquet_set(data / "data" / "test-00000-of-00001.parquet", 3, start=5)
    rows = [f"{i:06d}" for i in range(5)]
    file = data / "data" / "train-00000-of-00001.parquet"
    for number, given in enumerate((file, data, data / "data", f"{file}?label=", f"hf:parquet?data_files={file}")):
        names, features = encode(model, tmp_path / f"{number}.npz", given)
        assert names == rows
        np.testing.assert_allclose(features, expected(model, file), atol=1e-5)
        assert "5 images in train" in capsys.readouterr().err
    names, features = encode(model, tmp_path / "test.npz", data, "--split", "test")
    np.testing.assert_allclose(features, expected(model, data, "test"), atol=1e-5)
    assert encode(model, tmp_path / "part.npz", data, "--split", "train[1:3]")[0] == rows[:2]
    options = ["--compare", f"file:{tmp_path / '0.npz'},{tmp_path / 'test.npz'}", "--k", "1", "--metric", "l2"]
    record = tmp_path / "r.json"
    assert main(["evaluate", "knn", "--data", str(data), "--model", model, *options, "--json", str(record)]) == 0
    own, read = json.loads(record.read_text())["results"]
    assert own["accuracy"] == read["accuracy"]


def test_rows_that_cannot_be_read_are_named(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [png(0), b"no picture", None, png(3)]}), tmp_path / "x.parquet")
    names, features = encode(model, tmp_path / "f.npz", tmp_path / "x.parquet", code=1)
    assert names == ["000000", "000003"] and len(features) == 2
    err = capsys.readouterr().err
    assert "skipped 000001: cannot be decoded" in err and "skipped 000002: the row has no picture" in err


def test_a_folder_with_pictures_stays_a_folder_of_pictures(tmp_path: Path, model: str) -> None:
    make_images(tmp_path / "photos", 3)
    parquet_set(tmp_path / "photos" / "train.parquet", 2)  # a set, or the features of an earlier call
    assert encode(model, tmp_path / "f.npz", tmp_path / "photos")[0] == ["0000.png", "0001.png", "0002.png"]
    names, _ = encode(model, tmp_path / "g.npz", tmp_path / "photos", tmp_path / "photos" / "train.parquet")
    assert len(names) == 5 and names[-1].endswith("train.parquet/000001")


@pytest.mark.parametrize("between", ["\n", "\r\n", "\0", "\n\n"])
def test_lists(
    tmp_path: Path, model: str, between: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in make_images(tmp_path / "in", 4)]
    if between == "\0":
        (tmp_path / "in" / "a\nb.png").write_bytes(Path(files[0]).read_bytes())
        files.append(str(tmp_path / "in" / "a\nb.png"))
    text = between.join(files[1:]).encode()
    (tmp_path / "list.txt").write_bytes((b"\xef\xbb\xbf" if between == "\r\n" else b"") + text + between.encode())
    wanted = sorted(files[1:])
    assert encode(model, tmp_path / "f.npz", f"@{tmp_path / 'list.txt'}")[0] == wanted
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    assert encode(model, tmp_path / "g.npz", "-")[0] == wanted
    assert encode(model, tmp_path / "h.npz", files[0], f"@{tmp_path / 'list.txt'}")[0] == sorted(files)
    capsys.readouterr()
    options = ["-o", str(tmp_path / "x.npz"), "--model", model]
    (tmp_path / "empty.txt").write_text("\n \n")
    for given, message in (
        ("@nowhere.txt", "@nowhere.txt: the list nowhere.txt cannot be read (No such file"),
        (f"@{tmp_path / 'empty.txt'}", "the list names no images"),
    ):
        assert main(["encode", given, *options]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("in/gone.png")
    assert main(["encode", f"@{tmp_path / 'list.txt'}", *options]) == 2
    assert "in/gone.png: no such file or folder" in capsys.readouterr().err


def test_a_file_named_like_a_list_is_a_file(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (picture,) = make_images(tmp_path, 1)
    os.rename(picture, "@x.png")
    assert encode(model, tmp_path / "f.npz", "@x.png")[0] == ["@x.png"]


def test_a_killed_call_goes_on_with_the_rows_of_a_set(tmp_path: Path, model: str) -> None:
    """The same rows are known again, and other rows of the same number are not."""
    data = parquet_set(tmp_path / "x.parquet", 300)
    _, whole = encode(model, tmp_path / "whole.npz", data)
    partial = tmp_path / "f.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbigan.evaluation.encoding._rows", None)  # fails at the end, when all pieces are there
        with pytest.raises(TypeError):
            encode(model, partial, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbigan.evaluation.features.BatchEncoder.__call__", None)  # nothing is computed again
        _, again = encode(model, partial, data)
    assert np.array_equal(again, whole)
    assert torch.isfinite(torch.from_numpy(again)).all()
