"""Rows of files belong to images by name: in any order, and never to images of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import home, make_classes, one_thread, pixels  # noqa: F401 (fixtures for every test here)
from safetensors.numpy import save_file
from test_training_data import png

from bigbigan import create_model
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.evaluation.pairing import row_order

SUFFIXES = (".npz", ".safetensors", ".parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data"), {"train": 20, "test": 10})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    create_model("bigbigan-tiny", seed=7).save(folder)
    return str(folder)


def names_of(data: Path, split: str) -> list[str]:
    return sorted(path.relative_to(data / split).as_posix() for path in (data / split).rglob("*.png"))


def write(path: Path, rows: np.ndarray, names: list[str] | None) -> Path:
    if path.suffix == ".npz":
        np.savez(path, avepool_feat=rows, **({} if names is None else {"paths": np.array(names)}))
    elif path.suffix == ".safetensors":
        save_file({"avepool_feat": rows}, path, None if names is None else {"paths": json.dumps(names)})
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns: dict[str, Any] = {"avepool_feat": list(rows)}
        parquet.write_table(pyarrow.table(columns if names is None else {"path": names, **columns}), path)
    return path


def features(data: Path, split: str, shuffled: bool, prefix: str = "") -> tuple[np.ndarray, list[str]]:
    """Rows that tell the class, in another order than the images."""
    names = names_of(data, split)
    order = np.random.default_rng(1).permutation(len(names)) if shuffled else np.arange(len(names))
    rows = np.array([[name.startswith("dark"), 1] for name in names], np.float32)[order]
    return rows, [prefix + names[i] for i in order]


def compare(data: Path, tiny: str, tmp_path: Path, train: Path, test: Path) -> float:
    options = ["--compare", f"file:{train},{test}", "--k", "1", "--metric", "l2", "--json", str(tmp_path / "r.json")]
    assert main(["evaluate", "knn", "--data", str(data), "--model", tiny, *options]) == 0
    return json.loads((tmp_path / "r.json").read_text())["results"][-1]["accuracy"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shuffled_features_are_matched_by_name(tmp_path: Path, data: Path, tiny: str, suffix: str) -> None:
    prefixes = {"": "", "a": "{}/", "b": f"{data.name}/{{}}/", "c": f"{data}/{{}}/"}
    for key, prefix in prefixes.items():
        files = [
            write(tmp_path / f"{key}{split}{suffix}", *features(data, split, True, prefix.format(split)))
            for split in ("train", "test")
        ]
        assert compare(data, tiny, tmp_path, *files) == 1.0, key
    unnamed = [
        write(tmp_path / f"u{split}{suffix}", features(data, split, False)[0], None) for split in ("train", "test")
    ]
    assert compare(data, tiny, tmp_path, *unnamed) == 1.0
    jpg = tmp_path / f"jpg{suffix}"
    rows, names = features(data, "train", True)
    write(jpg, rows, [name.replace(".png", ".jpg") for name in names])
    assert compare(data, tiny, tmp_path, jpg, files[1]) == 1.0


def test_other_names_are_refused(tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, names = features(data, "train", True)
    test = write(tmp_path / "test.npz", *features(data, "test", True))
    for change, message in (
        (["dark/new.png", *names[1:]], f"1 of 40 have no row, such as {names[0]}, and 1 rows are of no image, such as"),
        ([names[1], *names[1:]], f"names '{names[1]}' more than once"),
        ([f"elsewhere/{name}" for name in names], "40 of 40 have no row"),
    ):
        train = write(tmp_path / "train.npz", rows, change)
        command = ["evaluate", "knn", "--data", str(data), "--model", tiny, "--compare", f"file:{train},{test}"]
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_rows_of_parquet_are_known_by_stored_paths_or_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def data(paths: list[str | None]) -> Any:
        rows = [{"bytes": png(number), "path": path} for number, path in enumerate(paths)]
        parquet.write_table(pyarrow.table({"image": rows, "label": [0] * len(rows)}), tmp_path / "x.parquet")
        return open_dataset(tmp_path / "x.parquet")

    named = data(["c.png", "a.png", "b.png"])
    assert row_order(named, ["a.png", "b.png", "c.png"], "f").tolist() == [2, 0, 1]
    assert row_order(named, ["000002.png", "000000.png", "000001.png"], "f").tolist() == [1, 2, 0]
    assert row_order(named.select(torch.tensor([2, 0])), ["c.png", "b.png"], "f").tolist() == [1, 0]
    with pytest.raises(ValueError, match="names other images"):
        row_order(named, ["a.png", "b.png", "d.png"], "f")
    for paths in ([None, None, None], ["x.png", "x.png", "x.png"]):
        nameless = data(paths)
        assert row_order(nameless, ["2", "0", "1"], "f").tolist() == [1, 2, 0]
        caplog.clear()
        assert row_order(nameless, ["p", "q", "r"], "f") is None
        assert "f names its rows, and the images have no names: rows are taken in their order" in caplog.text
    assert row_order(named, None, "f") is None


def test_features_of_parquet_find_their_labels_and_pictures(tmp_path: Path, tiny: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(number), "path": None} for number in range(6)]
    parquet.write_table(pyarrow.table({"image": images, "label": list("xxyyzz")}), tmp_path / "train.parquet")
    rows = np.arange(6, dtype=np.float32)[:, None]
    order = [5, 0, 3, 1, 4, 2]
    file = write(tmp_path / "f.npz", rows[order], [f"{number:06d}" for number in order])
    options = ["--features", str(file), "--k", "1", "--metric", "l2", "--model", tiny, "-o", str(tmp_path / "p.png")]
    record = tmp_path / "r.json"
    command = ["evaluate", "retrieval", "--data", str(tmp_path / "train.parquet"), *options, "--json", str(record)]
    assert main(command) == 0
    (row,) = json.loads(record.read_text())["results"]
    assert row["precision"] == pytest.approx(4 / 6)  # of 0 to 5, the next below but for 0: xx yx zy
    first = row["neighbours"][0]
    assert first["query"].endswith("train.parquet row 0") and first["names"][0].endswith("row 1")


def test_reconstructions_with_names(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of(data, "test")
    order = np.random.default_rng(2).permutation(len(names))
    again = np.stack([pixels(data / "test" / names[i]) for i in order])
    command = ["evaluate", "reconstruction", "--data", str(data), "--epochs", "1", "--json", str(tmp_path / "r.json")]
    command += ["--reconstructions", str(tmp_path / "again.npz"), "--quiet"]
    np.savez(tmp_path / "again.npz", again, paths=np.array([names[i] for i in order]))
    assert main(command) == 0
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["pixel_l1"] == 0
    np.savez(tmp_path / "again.npz", again, paths=np.array(["x.png", *(names[i] for i in order[1:])]))
    assert main(command) == 2
    assert "again.npz names other images than the data: 1 of 20 have no row" in capsys.readouterr().err
