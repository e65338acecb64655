"""The evaluate functions, called from Python, give the records of their commands and print nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import home, make_classes, one_thread, pixels  # noqa: F401 (fixtures for every test here)

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.evaluation import (
    Evaluation,
    FeatureNetwork,
    evaluate_generation,
    evaluate_knn,
    evaluate_linear,
    evaluate_reconstruction,
    evaluate_retrieval,
    evaluate_rotation,
)
from bigbigan.presets import get_preset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data"), {"train": 20, "test": 8})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    create_model("bigbigan-tiny", seed=7).save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbigan.evaluation.protocols.comparison.STANDING_PASSES", 2)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """The record of a command, and the lines of the table that it prints."""

    def run(*arguments: object) -> tuple[dict[str, Any], list[str]]:
        assert not capsys.readouterr().out  # the function before it has printed nothing
        record = tmp_path / "record.json"
        assert main(["evaluate", *map(str, arguments), "--json", str(record), "--quiet"]) == 0
        return json.loads(record.read_text()), capsys.readouterr().out.splitlines()

    return run


def assert_same(evaluation: Evaluation, told: tuple[dict[str, Any], list[str]]) -> None:
    record, lines = told
    assert record.pop("command").startswith("bigbigan evaluate ")
    own = json.loads(json.dumps(evaluation.record))
    for found in (own, record):
        del found["date"], found["versions"]
    assert own == record
    shown = [" | ".join(line.strip("| ").split(" | ")) for line in lines]
    assert shown[0].split(" | ") == list(evaluation.header)
    assert [row.split(" | ") for row in shown[2:]] == [list(row) for row in evaluation.rows]


def test_linear(data: Path, tiny: str, command: Callable[..., Any]) -> None:
    """Of a path and a name, and of opened data and a model."""
    compare = ["pixels", "pca:4", "untrained", f"{tiny}"]
    options: dict[str, Any] = {"features": ["avepool_feat"], "l2": [0.1, 0.01], "labels": [0.5, 1.0], "seed": 3}
    told = command(
        "linear", "--data", data, "--model", tiny, "--features", "avepool_feat", "--l2", 0.1, 0.01, "--labels", 0.5, 1,
        "--seed", 3, *(word for one in compare for word in ("--compare", one)),
    )  # fmt: skip
    assert_same(evaluate_linear(data, tiny, compare=compare, **options), (dict(told[0]), told[1]))
    opened = open_dataset(data, split="train"), open_dataset(data, split="test")
    again = evaluate_linear(opened, load(tiny), compare=compare, **options)
    assert json.loads(json.dumps(again.record["results"])) == told[0]["results"]
    assert again.record["data"] == told[0]["data"] and again.record["representations"] == told[0]["representations"]


def test_the_papers_probe(data: Path, tiny: str, command: Callable[..., Any]) -> None:
    paper = ("--protocol", "paper", "--steps", 20, "--probe-batch-size", 8, "--lr", 0.01, "--ema", 0.9, "--workers", 1)
    found = evaluate_linear(
        data, tiny, protocol="paper", steps=20, probe_batch_size=8, lr=[0.01], ema=0.9, workers=1, crelu=True
    )
    assert_same(found, command("linear", "--data", data, "--model", tiny, "--crelu", *paper))


def test_knn(data: Path, tiny: str, command: Callable[..., Any], tmp_path: Path) -> None:
    features = {name: tmp_path / f"{name}.npy" for name in ("train", "test")}
    for name, number in (("train", 40), ("test", 16)):
        np.save(features[name], np.random.default_rng(0).normal(size=(number, 3)).astype(np.float32))
    file = "file:{train},{test}".format(**features)
    found = evaluate_knn(data, tiny, compare=[file], k=[1, 3], metric=["l2"], cache=tmp_path / "cache")
    options = ("--compare", file, "--k", 1, 3, "--metric", "l2")
    assert_same(found, command("knn", "--data", data, "--model", tiny, *options))
    assert [row["representation"] for row in found.record["results"]] == ["bigbigan-tiny"] * 2 + [
        f"file:{features['train']}"
    ] * 2


def test_opened_data_keep_their_labels(data: Path, tiny: str, tmp_path: Path) -> None:
    """Classes of the test split are numbered as those of training are, in a copy."""
    make_classes(tmp_path, {"train": 4})
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "dark").rename(tmp_path / "test" / "dark")
    (train, test) = open_dataset(data, split="train"), open_dataset(tmp_path, split="test")
    train.class_names, before = ("bright", "dark"), test.labels.clone()
    assert evaluate_knn((train, test), tiny, k=[1], metric=["l2"]).record["results"][0]["accuracy"] == 1.0
    assert torch.equal(test.labels, before) and test.class_names == ("dark",)


def test_generation(data: Path, tiny: str, command: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    (tmp_path / "network.py").write_text(
        "from bigbigan.evaluation.feature_networks import FeatureNetwork\n"
        "def means():\n"
        "    rows = lambda x: x.float().mean((1, 3)) / 64\n"
        "    return FeatureNetwork('means', 'd' * 64, 'as they are', lambda x: (rows(x), rows(x)[:, :4]))\n"
    )
    options: dict[str, Any] = {"number": 12, "kid_subset_size": 8, "kid_subsets": 3, "score_splits": 2, "seed": 1}
    network = f"{tmp_path / 'network.py'}:means"
    found = evaluate_generation(data, tiny, network=network, **options)
    words = ("-n", 12, "--kid-subset-size", 8, "--kid-subsets", 3, "--score-splits", 2, "--seed", 1)
    assert_same(found, command("generation", "--data", data, "--model", tiny, "--network", network, *words))

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.float().mean((1, 3)) / 64, x.float().mean((1, 3))[:, :4] / 64

    mine = FeatureNetwork("means", "d" * 64, "as they are", rows)
    again = evaluate_generation(open_dataset(data, split="train"), load(tiny), network=mine, **options)
    assert again.record["results"] == found.record["results"]


def test_reconstruction_and_its_picture(data: Path, tiny: str, command: Callable[..., Any], tmp_path: Path) -> None:
    found = evaluate_reconstruction(data, tiny, epochs=1, flip=True, batch_size=8)
    options = ("--epochs", 1, "--flip", "--batch-size", 8, "--grid", tmp_path / "pairs.png")
    assert_same(found, command("reconstruction", "--data", data, "--model", tiny, *options))
    assert found.draw is not None
    assert np.array_equal(np.asarray(found.draw(32)), pixels(tmp_path / "pairs.png"))


def test_retrieval_and_its_picture(data: Path, tiny: str, command: Callable[..., Any], tmp_path: Path) -> None:
    query, output = data / "test" / "dark" / "0.png", tmp_path / "neighbours.png"
    found = evaluate_retrieval(data, tiny, queries=[query], k=[2, 1], metric="l2")
    options = ("--k", 2, 1, "--metric", "l2", "-o", output)
    assert_same(found, command("retrieval", query, "--data", data, "--model", tiny, *options))
    assert found.draw is not None and np.array_equal(np.asarray(found.draw(8)), pixels(output))


def test_rotation(data: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    config = get_preset("bigbigan-tiny").config
    judge = dataclasses.replace(config.discriminator, scores=("x",), rotation_head=True)
    parts = {"generator": None, "encoder": None, "discriminator": judge}
    model = create_model(dataclasses.replace(config, **parts), seed=1)
    model.save(tmp_path / "ssgan")
    found = evaluate_rotation(data, str(tmp_path / "ssgan"), batch_size=5)
    told = command("rotation", "--data", data, "--model", tmp_path / "ssgan", "--batch-size", 5)
    assert_same(found, told)
    assert evaluate_rotation(open_dataset(data, split="test"), model).record["results"] == found.record["results"]


def test_the_documents_lines(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "fashion_mnist")
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "evaluate_linear" in block)
    exec(code, {})
    assert [line.rpartition(" ")[0] for line in capsys.readouterr().out.splitlines()][1:] == ["raw pixels", "pca:16"]
    assert pixels(tmp_path / "neighbours.png").shape[0] > 4 * 32


def test_earlier_names_of_options_work_and_warn(
    data: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "features.npz"
    assert main(["encode", str(data / "train"), "-o", str(features), "--model", tiny, "--quiet"]) == 0
    shared = ["evaluate", "retrieval", "--data", str(data / "train"), "--model", tiny, "--k", "1"]
    shown = []
    for option in ("--feature-file", "--features"):
        record = tmp_path / f"{option}.json"
        assert main([*shared, option, str(features), "--json", str(record)]) == 0
        shown.append((json.loads(record.read_text())["results"], capsys.readouterr().err))
    assert shown[0][0] == shown[1][0] and "--feature-file" not in shown[0][1]
    assert "--features is now called --feature-file; please use that name" in shown[1][1]
    assert main(["evaluate", "generation", "--splits", "2"]) == 2
    assert "--splits is now called --score-splits" in capsys.readouterr().err
