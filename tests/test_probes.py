"""`evaluate linear` and `knn`: one table of any models, features and baselines, and what it says of bad input."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import home, one_thread, run  # noqa: F401 (fixtures for every test here)
from PIL import Image
from torch import Tensor, nn

from bigbigan import BigBiGAN, create_model
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.evaluation.cache import TensorImages, compute_features
from bigbigan.evaluation.linear_probe import linear_probe
from bigbigan.evaluation.representations import model_features


def write_split(folder: Path, classes: tuple[str, ...], number: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            low = 255 * label // len(classes)
            pixels = draws.integers(low, low + 255 // len(classes), (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of different brightness."""
    root = tmp_path_factory.mktemp("data")
    write_split(root / "train", ("a", "b", "c"), 30, 0)
    write_split(root / "test", ("a", "b", "c"), 6, 1)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two of one architecture, of different seeds."""
    folders = {name: tmp_path_factory.mktemp("models") / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values(), 1):  # the untrained baseline has seed 0
        create_model("bigbigan-tiny", parts=("encoder",), seed=seed).save(folder)
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbigan.evaluation.protocols.comparison.STANDING_PASSES", 3)


def record(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json", str(tmp_path / "record.json"), "--quiet"]) == 0
    return json.loads((tmp_path / "record.json").read_text())


def linear(tmp_path: Path, data: Path, model: str, *arguments: object) -> dict[str, Any]:
    command = ("linear", "--data", data, "--model", model, "--l2", 0.1, "--features", "avepool_feat")
    return record(tmp_path, *command, *arguments)


def rows(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["representation"], row["feature"]): row for row in found["results"]}


def test_any_encoder_is_a_row_of_one_table(
    tmp_path: Path,
    data: Path,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.ones_(net[0].bias)  # so that no image gets a row of zeros, which has no cosine

    class Timm(nn.Module):
        __version__ = "1"
        data = type("data", (), {})

        @staticmethod
        def create_model(name: str, **options: Any) -> nn.Module:
            return net

    config = {
        "input_size": (3, 24, 24),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1,
    }
    Timm.data.resolve_model_data_config = staticmethod(lambda model: config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", Timm)
    for split in ("train", "test"):
        command = ["encode", str(data / split), "--model", models["two"], "-o", str(tmp_path / f"{split}.npz")]
        assert main([*command, "--outputs", "avepool_feat", "--quiet"]) == 0
    compared = ["pixels", "pca:4", "untrained", "supervised:2", "timm:net", models["two"]]
    compared += [f"file:{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"]
    options = [word for spec in compared for word in ("--compare", spec)]
    capsys.readouterr()
    found = linear(tmp_path, data, models["one"], *options)
    table = rows(found)
    assert [(name, feature, row["num_features"]) for (name, feature), row in table.items()] == [
        ("bigbigan-tiny", "avepool_feat", 32),
        ("raw pixels", "pixels", 3072),
        ("pca:4", "4 principal components", 4),
        ("untrained encoder, initial statistics", "avepool_feat", 32),
        ("untrained encoder, estimated statistics", "avepool_feat", 32),
        ("supervised network, 2 epochs", "last hidden layer", 2048),
        ("supervised network, 2 epochs", "its own classifier", 2048),
        ("timm:net", "features", 5),
        (models["two"], "avepool_feat", 32),
        (f"file:{tmp_path / 'train.npz'}", "avepool_feat", 32),
    ]
    assert (
        table["raw pixels", "pixels"]["accuracy"]
        == table["supervised network, 2 epochs", "last hidden layer"]["accuracy"]
        == 1
    )
    assert 0.5 < table["supervised network, 2 epochs", "its own classifier"]["accuracy"] <= 1
    same = [table[name, "avepool_feat"]["accuracy"] for name in (models["two"], f"file:{tmp_path / 'train.npz'}")]
    assert same[0] == same[1]
    digests = {name: facts["digest"] for name, facts in found["representations"].items()}
    assert len(set(digests.values())) == len(digests) == 9
    assert found["representations"]["timm:net"]["preprocess"]["size"] == 24
    lines = capsys.readouterr().out.splitlines()
    assert lines[8].endswith("| - | - |") and "its own classifier" in lines[8]
    neighbours = record(tmp_path, "knn", "--data", data, "--model", models["one"], "--k", 3, *options)
    assert len(neighbours["results"]) == 9 * 2 + 1


def test_crelu_of_what_is_compared(tmp_path: Path, data: Path, models: dict[str, str]) -> None:
    for name, number in (("train", 90), ("test", 18)):
        np.save(tmp_path / f"{name}.npy", np.abs(np.arange(number) % (number // 3) - np.arange(number) // 3.0)[:, None])
    files = f"file:{tmp_path / 'train.npy'},{tmp_path / 'test.npy'}"
    found = rows(linear(tmp_path, data, models["one"], "--crelu", "--compare", files, "--compare", models["two"]))
    assert found[files.split(",")[0], "features, BN+CReLU"]["num_features"] == 2
    for name in ("bigbigan-tiny", models["two"]):
        assert found[name, "avepool_feat, BN+CReLU"]["num_features"] == 64
    assert len(found) == 6


def test_untrained_networks_are_those_that_training_begins_with(tmp_path: Path, data: Path) -> None:
    model = create_model("bigan-mnist-mlp", parts=("encoder",), seed=1)
    model.save(tmp_path / "mlp")
    found = record(tmp_path, "knn", "--data", data, "--model", tmp_path / "mlp", "--compare", "untrained", "--k", 1)
    wanted = create_model("bigan-mnist-mlp", parts=("encoder",), seed=0, initializer="normal")
    digest = model_features(wanted, ["avepool_feat"]).digest
    assert found["representations"]["untrained encoder, initial statistics"]["digest"] == digest


def test_a_table_does_not_depend_on_how_images_are_read(
    tmp_path: Path, data: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in pieces, into a cache and out of it: the very same, also where an unreadable image moves a label."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "train" / "a" / "029.png").write_bytes(b"no picture")  # the next readable one is of class b
    lenient = functools.partial(open_dataset, max_bad_fraction=0.5)
    monkeypatch.setattr("bigbigan.evaluation.protocols.comparison.open_dataset", lenient)
    options = ("--compare", "untrained", "--batch-size", 16)
    plain = linear(tmp_path, folder, models["one"], *options)
    assert plain["data"]["train"]["unreadable"] == 1
    with monkeypatch.context() as patch:
        patch.setattr("bigbigan.evaluation.protocols.comparison.MAX_DECODED", 0)
        assert linear(tmp_path, folder, models["one"], *options)["results"] == plain["results"]
        cached = linear(tmp_path, folder, models["one"], *options, "--feature-cache", tmp_path / "cache")
        assert cached["results"] == plain["results"]
    with monkeypatch.context() as patch:
        patch.setattr(BigBiGAN, "encode", None)  # nothing is computed any more
        again = linear(tmp_path, folder, models["one"], *options, "--feature-cache", tmp_path / "cache")
    assert again["results"] == plain["results"] and again["data"] == plain["data"]


def test_few_labels(tmp_path: Path, data: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = linear(tmp_path, data, models["one"], "--labels", 0.001, 0.2, 1, "--seed", 3)
    assert [row["labels"] for row in found["results"]] == [3, 18, 90]
    assert [row["n_train"] for row in found["results"]] == [3, 18, 90]
    assert [entry["images a class"] for entry in found["protocol"]["labels"]] == [[1, 1], [6, 6], [30, 30]]
    assert [entry["holdout"] for entry in found["protocol"]["labels"]] == [1, 3, 15]
    assert "| Width | Labels | Top-1 % |" in capsys.readouterr().out


@pytest.mark.parametrize("augment", ["none", "resnet"])
def test_the_papers_protocol(tmp_path: Path, data: Path, models: dict[str, str], augment: str) -> None:
    """On features that are computed once, and on those of augmented images."""
    options = ["--protocol", "paper", "--augment", augment, "--steps", 60, "--probe-batch-size", 16, "--lr", 0.01, 0.1]
    compared = ("--compare", "pixels", "--crelu", "--workers", 1, "--ema", 0.9)
    found = linear(tmp_path, data, models["one"], *options, *compared)
    table = rows(found)
    assert len(table) == 4 and table["raw pixels", "pixels, BN+CReLU"]["num_features"] == 6144
    assert table["raw pixels", "pixels, BN+CReLU"]["accuracy"] > 0.9  # brightness
    for row in table.values():
        assert row["n_train"] == 75 and list(row["holdout_accuracy"]) == ["0.01", "0.1"] and row["lr"] in (0.01, 0.1)
    assert found["protocol"]["augmentation"] == augment and found["protocol"]["steps"] == 60
    few = linear(tmp_path, data, models["one"], *options, "--labels", 0.2)
    assert few["results"][0]["n_train"] == 15


def test_augmented_images_are_crops_of_training_images_alone(
    data: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class by class of one brightness, every crop tells its label; none comes from the held-out images."""
    from bigbigan.evaluation.protocols import linear as module

    seen: list[tuple[Tensor, Tensor]] = []
    inner = module._augmented

    def watched(*arguments: Any) -> Any:
        for features, y in inner(*arguments):
            if "pixels" in features:
                seen.append((features["pixels"], y))
            yield features, y

    monkeypatch.setattr(module, "_augmented", watched)
    options = ("--protocol", "paper", "--steps", 20, "--probe-batch-size", 30, "--workers", 1, "--compare", "pixels")
    linear(tmp_path, data, models["one"], *options)
    pixels, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    brightness = ((pixels.mean(1) + 1) / 2 * 3).floor().long()
    assert torch.equal(brightness, labels)
    assert len(pixels.unique(dim=0)) > 500  # of 600: crops, not the 75 images


def knn_options(model: str) -> list[str]:
    return ["evaluate", "knn", "--model", model, "--k", "1", "--quiet"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", ["--k", "91"], "--k 91 of 90 training images; give that many at most"),
        ("", ["--train-split", "train[:91]"], "0:91 was asked for, and there are 90 images"),
        ("", ["--test-split", "val"], "holds no 'val' split"),
        ("no test", [], "holds no 'test' split"),
        ("empty test", [], "no pictures in it"),
        ("one class", [], "all 30 images of train have the one label 0; give images of two classes or more"),
        ("new class", [], r"test has labels that train lacks: \['z'\]; choose other splits"),
        ("other class", [], r"test has labels that train lacks: \['aa'\]; choose other splits"),
        (
            "",
            ["--test-split", "train"],
            "train and train are the same images; name two parts of them, as --train-split 'train",
        ),
        ("flat test", [], r"1 of 19 images of test have no label, the first is .*loose.png; give images in a folder"),
        ("", ["--compare", "pca:9999"], "pca:9999 of 90 images of 3072 pixels; give 1 to 90"),
        ("", ["--compare", "nosuch"], "nosuch"),
        ("", ["--compare", "file:{d}/short.npy,{d}/short.npy"], "short.npy: features has 3 rows for 90 images"),
        ("", ["--compare", "file:{d}/gone.npy,{d}/short.npy"], "gone.npy: no such file"),
        (
            "",
            ["--compare", "file:{d}/train.npy,{d}/test.npy"],
            r"features is 2 wide in .*train.npy and 3 wide in .*test.npy",
        ),
        ("", ["--features", "pool"], "no output 'pool'; an encoder gives"),
    ],
)
def test_knn_names_what_does_not_fit(
    tmp_path: Path,
    data: Path,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    change: str,
    arguments: list[str],
    message: str,
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    np.save(tmp_path / "short.npy", np.ones((3, 2)))
    np.save(tmp_path / "train.npy", np.ones((90, 2)))
    np.save(tmp_path / "test.npy", np.ones((18, 3)))
    if change in ("no test", "empty test"):
        shutil.rmtree(folder / "test")
    if change == "empty test":
        (folder / "test" / "a").mkdir(parents=True)
    if change == "one class":
        shutil.rmtree(folder / "train" / "b")
        shutil.rmtree(folder / "train" / "c")
    if change == "new class":
        shutil.copytree(folder / "test" / "a", folder / "test" / "z")
    if change == "other class":
        (folder / "test" / "b").rename(folder / "test" / "aa")
    if change == "flat test":
        shutil.copy(folder / "test" / "a" / "000.png", folder / "test" / "loose.png")
    arguments = [argument.replace("{d}", str(tmp_path)) for argument in arguments]
    assert main([*knn_options(models["one"]), "--data", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err


def test_a_row_of_zeros_costs_its_cosine_alone(
    tmp_path: Path, data: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("train", 90), ("test", 18)):
        np.save(tmp_path / f"{name}.npy", np.arange(2 * number).reshape(number, 2))
    command = ["knn", "--data", data, "--model", models["one"], "--k", 1, "--compare"]
    found = record(tmp_path, *command, f"file:{tmp_path / 'train.npy'},{tmp_path / 'test.npy'}")["results"]
    assert [row["metric"] for row in found] == ["l2", "cosine"] * 2  # the first rows are [0, 1]
    np.save(tmp_path / "test.npy", np.zeros((18, 2)))
    found = record(tmp_path, *command, f"file:{tmp_path / 'train.npy'},{tmp_path / 'test.npy'}")["results"]
    assert [row["metric"] for row in found] == ["l2", "cosine", "l2"]
    assert "train.npy, features: a row of zeros has no angle, so cosine is left out" in capsys.readouterr().err


def test_classes_of_folders_go_by_their_names(tmp_path: Path, data: Path, models: dict[str, str]) -> None:
    """Without the first in the test split, where the others are numbered from 0 again."""
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/a")
    options = ("--data", tmp_path / "data", "--model", models["one"])
    for arguments in (("knn", "--k", 1), ("linear", "--l2", 0.1, "--features", "avepool_feat")):
        assert all(row["accuracy"] == 1.0 for row in record(tmp_path, *arguments, *options)["results"])
    found = record(tmp_path, "retrieval", "--query-split", "test", "--k", 1, *options)
    assert found["results"][0]["precision"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "2"], "a share of labels is 2.0; give numbers above 0, at most 1"),
        (["--holdout", "90"], "holdout is 90; of 90 training rows, hold out 1 to 89"),
        (["--protocol", "paper", "--holdout", "40", "--labels", "0.1"], "holdout is 40; of 9 training rows"),
        (["--compare", "pca:91"], "pca:91 of 90 images of 3072 pixels; give 1 to 90"),
        (
            ["--protocol", "paper", "--compare", "file:{d}/train.npy,{d}/test.npy"],
            "no images to augment; add --augment none",
        ),
    ],
)
def test_linear_names_what_does_not_fit(
    tmp_path: Path,
    data: Path,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(
        "bigbigan.evaluation.protocols.comparison._computed", None
    )  # all is told before anything is computed
    np.save(tmp_path / "train.npy", np.ones((90, 2)))
    np.save(tmp_path / "test.npy", np.ones((18, 2)))
    arguments = [argument.replace("{d}", str(tmp_path)) for argument in arguments]
    command = ["evaluate", "linear", "--data", str(data), "--model", models["one"], "--steps", "2", "--quiet"]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_supervised_networks_need_decoded_images(
    data: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbigan.evaluation.protocols.comparison._computed", None)
    monkeypatch.setattr("bigbigan.data.dataset.ImageDataset.decoded_bytes", lambda *_: 1 << 40)
    assert main([*knn_options(models["one"]), "--data", str(data), "--compare", "supervised"]) == 2
    assert "90 images of 32 pixels take 1024.0 GiB decoded" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--l2", "0"), ("--lr", "-1"), ("--lr", "inf"), ("--ema", "1")])
def test_settings_are_checked_before_anything_is_opened(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "linear", "--data", "nowhere", option, value])
    assert stopped.value.code == 2 and f"argument {option}: {value} is not" in capsys.readouterr().err


def test_weights_that_give_nan_are_named(
    tmp_path: Path,
    data: Path,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "bigbigan.evaluation.representations.BatchEncoder.__call__",
        lambda self, x, start: {"avepool_feat": x.mean((2, 3)) / 0},
    )
    assert main([*knn_options(models["one"]), "--data", str(data)]) == 2
    assert "bigbigan-tiny: avepool_feat of image 0 (from 0) holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["pca:x", "pca:0", "supervised:", "timm:", "file:a.npz", "hf:"])
def test_specs_are_checked_before_anything_is_opened(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "knn", "--data", "nowhere", "--compare", spec])
    assert stopped.value.code == 2 and f"{spec!r}: give" in capsys.readouterr().err


def test_a_probe_of_the_embedded_model_on_real_images(tmp_path: Path, shared_data: Path) -> None:
    """The same figure from the command and from the library's functions."""
    from bigbigan import load

    folder, model = shared_data / "fashion_mnist", load(parts=("encoder",))
    options = ("--train-split", "train[:500]", "--test-split", "test[:200]", "--features", "avepool_feat", "--l2", 0.01)
    found = record(tmp_path, "linear", "--data", folder, *options)["results"][0]
    x, y = {}, {}
    for name, split in (("train", "train[:500]"), ("test", "test[:200]")):
        dataset = open_dataset(folder, split=split)
        images = dataset.decode_all(model.config.preprocess, 1)
        features = compute_features(model_features(model, ["avepool_feat"]), TensorImages(images))
        x[name], y[name] = features["avepool_feat"], dataset.labels
    expected = linear_probe(x["train"], y["train"], x["test"], y["test"], l2_grid=[0.01])
    assert (found["accuracy"], found["top5"]) == (expected.accuracy, expected.top5)
    assert found["accuracy"] > 0.7


@pytest.mark.slow
def test_kills_cost_a_piece_of_the_cache_at_most(tmp_path: Path, models: dict[str, str]) -> None:
    write_split(tmp_path / "data" / "train", ("a", "b"), 2000, 0)
    write_split(tmp_path / "data" / "test", ("a", "b"), 10, 1)
    draws, kills, progress = random.Random(0), 0, [0]
    command = ("evaluate", "knn", "--data", tmp_path / "data", "--model", models["one"], "--k", 1, "--threads", 1)
    while True:
        process = run(*command, "--feature-cache", tmp_path / "cache", "--json", tmp_path / "out.json")
        while process.poll() is None and not any(tmp_path.glob("cache/*/*.json")):
            time.sleep(0.01)
        if kills == 4:
            break
        time.sleep(draws.random())
        process.kill()
        process.communicate()
        kills += 1
        facts = [json.loads(path.read_text()) for path in tmp_path.glob("cache/*/avepool_feat.json")]
        progress.append(max((entry["rows"] for entry in facts), default=0))
        assert progress[-1] >= progress[-2]
    _, err = process.communicate()
    assert process.returncode == 0, err
    found = record(tmp_path, *command[1:])
    assert json.loads((tmp_path / "out.json").read_text())["results"] == found["results"]
