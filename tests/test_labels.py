"""Columns of labels of every kind with finitely many values, and how two splits share their classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import home, one_thread  # noqa: F401 (fixtures for every test here)
from test_training_data import png

from bigbigan import create_model
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset, open_training_data

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write(path: Path, labels: Any, column: str = "label") -> Path:
    table = pyarrow.table({"image": [png(i) for i in range(len(labels))], column: labels})
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["owl", "cat", None, "owl"], [1, 0, -1, 1], ("cat", "owl")),
        (pyarrow.array(["owl", "cat", None, "owl"]).dictionary_encode(), [1, 0, -1, 1], ("cat", "owl")),
        (pyarrow.array(["b", "a"], pyarrow.large_string()), [1, 0], ("a", "b")),
        (pyarrow.array([4, 2, None]).dictionary_encode(), [4, 2, -1], ("0", "1", "2", "3", "4")),
        ([True, False, None], [1, 0, -1], ("False", "True")),
        ([2.0, 0.0, float("nan"), None], [2, 0, -1, -1], ("0", "1", "2")),  # pandas, once a value is missing
        ([-1.0, 1.0], [-1, 1], ("0", "1")),
        ([0.5, 2.0, -3.0, 0.5], [1, 2, 0, 1], ("-3", "0.5", "2")),
        (pyarrow.array([3, 1, None], pyarrow.uint8()), [3, 1, -1], ("0", "1", "2", "3")),
        (pyarrow.array([None, None]), [-1, -1], ()),
    ],
    ids=["text", "categories", "large text", "categories of numbers", "truth", "floats", "none as -1", "ratings",
         "bytes", "nothing"],
)  # fmt: skip
def test_what_has_finitely_many_values_is_a_class(
    tmp_path: Path, labels: Any, numbers: list[int], names: tuple[str, ...]
) -> None:
    path = write(tmp_path / "x.parquet", labels)
    data = open_dataset(path)
    assert (data.labels.tolist(), data.class_names) == (numbers, names)
    datasets = pytest.importorskip("datasets")
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    again = open_dataset(f"hf:parquet?data_files={path}")
    assert (again.labels.tolist(), again.class_names) == (numbers, names)


def test_what_has_not_is_refused_with_a_way_round(tmp_path: Path) -> None:
    for number, labels in enumerate(([[0], [1, 2]], [{"a": 1}, {"a": 2}], [b"a", b"b"])):
        path = write(tmp_path / f"{number}.parquet", labels)
        with pytest.raises(ValueError, match=rf"has labels as .*leave labels out: {re.escape(str(path))}\?label=$"):
            open_dataset(path)
        assert open_dataset(f"{path}?label=").labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="infinite labels"):
        open_dataset(write(tmp_path / "inf.parquet", [1.0, float("inf")]))


def test_the_suggestion_keeps_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = {"id": ["u", "v"], "img": [png(0), png(1)], "fine_label": [3, 4], "size": [8, 8]}
    parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(ValueError, match=r"x\.parquet\?column=img&label=fine_label$") as caught:
        open_dataset(path)
    suggestion = str(caught.value).rpartition(" ")[2]
    assert open_dataset(suggestion).labels.tolist() == [3, 4]
    parquet.write_table(pyarrow.table({"img": [png(0)]}), path)
    with pytest.raises(ValueError, match=r"x\.parquet\?column=img&label=$"):
        open_dataset(path)


def test_shards_share_their_classes(tmp_path: Path) -> None:
    for shard, labels in enumerate((["b", "c"], pyarrow.array(["a", "c"]).dictionary_encode())):
        write(tmp_path / f"train-{shard:05d}-of-00002.parquet", labels)
    data = open_dataset(tmp_path)
    assert data.labels.tolist() == [1, 2, 0, 2] and data.class_names == ("a", "b", "c")


def knn(data: Path, tmp_path: Path) -> int:
    model = tmp_path / "model"
    if not model.exists():
        create_model("bigbigan-tiny", parts=("encoder",)).save(model)
    options = ["--model", str(model), "--k", "1", "--json", str(tmp_path / "r.json"), "--metric", "l2"]
    return main(["evaluate", "knn", "--data", str(data), *options])


def accuracy(tmp_path: Path) -> float:
    return json.loads((tmp_path / "r.json").read_text())["results"][0]["accuracy"]


def test_two_splits_are_brought_together_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test split lacks the first class: by number every label would be wrong."""
    write(tmp_path / "train.parquet", ["ant", "bee", "cat", "dog"])
    table = {"image": [png(1), png(2), png(3)], "label": ["bee", "cat", "dog"], "name": ["x"] * 3}
    parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")  # the very images 1 to 3 of training
    assert knn(tmp_path, tmp_path) == 0 and accuracy(tmp_path) == 1.0
    table["label"] = ["bee", "cat", "eel"]
    parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")
    assert knn(tmp_path, tmp_path) == 2
    assert "test has labels that train lacks: ['eel']" in capsys.readouterr().err
    table["label"] = [1, 2, 3]
    parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")
    assert knn(tmp_path, tmp_path) == 2
    assert "classes are ant, bee, cat in one split and 0, 1, 2 in the other" in capsys.readouterr().err


def test_names_in_another_order_are_the_same_classes(tmp_path: Path) -> None:
    """Two files whose ClassLabel lists differ: numbers alone would be swapped."""
    for split, names, labels in (("train", ("a", "b"), [0, 1, 0, 1]), ("test", ("b", "a"), [1, 0, 1, 0, 1])):
        images = [png(i % 4) for i in range(len(labels))]
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = pyarrow.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    assert knn(tmp_path, tmp_path) == 0 and accuracy(tmp_path) == 1.0


def test_reports_have_the_names(tmp_path: Path) -> None:
    for split, labels in (("train", ["ray", "eel"] * 8), ("test", ["eel", "ray"] * 3)):
        write(tmp_path / f"{split}.parquet", labels)
    create_model("bigbigan-tiny", parts=("generator", "encoder")).save(tmp_path / "model")
    options = ["--data", str(tmp_path), "--model", str(tmp_path / "model"), "--epochs", "1", "--batch-size", "4"]
    assert main(["evaluate", "reconstruction", *options, "--json", str(tmp_path / "r.json"), "--quiet"]) == 0
    assert list(json.loads((tmp_path / "r.json").read_text())["results"][0]["per_class"]) == ["eel", "ray"]


def test_streams_take_what_needs_no_counting(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for labels, wanted in (([True, False], [1, 0]), ([2.0, None], [2, -1]), ([3, 1], [3, 1])):
        spec = f"hf:parquet?data_files={write(tmp_path / 'x.parquet', labels)}&streaming=1"
        stream = open_training_data(spec)
        assert sorted(stream.head(9).labels.tolist()) == sorted(wanted)
    spec = f"hf:parquet?data_files={write(tmp_path / 'x.parquet', ['a', 'b'])}&streaming=1"
    with pytest.raises(ValueError, match="a stream cannot number texts .*leave streaming out.*label="):
        open_training_data(spec)
    assert open_training_data(f"{spec}&label=").head(9).labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match=r"has a label 0.5, and a stream cannot number such values"):
        open_training_data(f"hf:parquet?data_files={write(tmp_path / 'x.parquet', [0.5, 1.0])}&streaming=1").head(9)
