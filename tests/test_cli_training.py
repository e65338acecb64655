"""The command line from images to figures: settings, runs, signals, export, evaluation."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cells, home, make_classes, one_thread, run  # noqa: F401 (fixtures for every test here)

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.config import PreprocessConfig
from bigbigan.data.batches import Images
from bigbigan.data.opening import open_dataset
from bigbigan.images import to_uint8
from bigbigan.presets import PRESETS
from bigbigan.schema import to_dict
from bigbigan.training.recipes import RECIPES
from bigbigan.training.runfolder import read_run_config

RECIPE = "bigbigan-fashion-mnist-32"
TINY = PRESETS["bigbigan-tiny"].config


def settings(**fields: object) -> list[str]:
    """A run of seconds, by `--set`."""
    base = {"model": to_dict(TINY), "total_images": 32, "batch_size": 8, "standing_passes": 2, "probe_images": 0}
    return [f"--set={key}={json.dumps(value)}" for key, value in {**base, **fields}.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data"), {"train": 30, "test": 10})


def test_train_settings(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "model.encoder.base_channels=48", "--set", "augmentation.flip=true", "--set", "name=mine"]
    assert main(["train", RECIPE, "--dry-run", *changes, "--set", "model.encoder.depths=[2,1,1,1]"]) == 0
    captured = capsys.readouterr()
    assert main(["recipes", RECIPE]) == 0
    found, expected = json.loads(captured.out), json.loads(capsys.readouterr().out)
    expected["model"]["encoder"] |= {"base_channels": 48, "depths": [2, 1, 1, 1]}
    expected["augmentation"]["flip"] = True
    expected["name"] = "mine"
    assert found == expected
    assert "discriminator 1,137,731" in captured.err
    for setting, message in (
        ("model.encoder.base_chanels=3", "close: model.encoder.base_channels"),
        ("lr=3", "no field 'lr'"),
        ("lr_g.x=3", "no field 'lr_g.x'"),
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "at least 1"),
        ("batch_size", "is not KEY=VALUE"),
        ("precision=fp8", "precision"),
    ):
        assert main(["train", RECIPE, "--dry-run", "--set", setting]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_train_then_export(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "run", tmp_path / "model"
    command = ["train", RECIPE, "--data", str(data), "--run", str(folder), *settings(snapshot_images=16, name="mine")]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    begin, end = shown.err.splitlines()[:10], shown.err.splitlines()[-1]
    assert "60 images in train, 2 classes (bright, dark)" in begin[0]
    assert begin[1].endswith("mine: G 32, E 32 pixels, colour, 8 latents, fp32, seed 0")
    assert 'changed from the recipe: name="mine"' in begin[2] and "batch_size=8" in begin[2]
    assert any(f"run folder: {folder}" in line for line in begin) and any("memory: " in line for line in begin)
    assert f"finished after step 4 of 4 (32 images) in {folder}" in end and "best snapshot: images-" in end
    assert main([*command, "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "config.json").read_text())["train"] == printed
    snapshots = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert snapshots[-1] == "images-0000000032"
    changed = [*command, "--set", "lr_g=1"]
    assert main(changed) == 2
    assert "lr_g was 0.0001, now 1.0" in capsys.readouterr().err

    assert (
        main(
            ["export", str(folder), "-o", str(output), "--license", "MIT", "--note", "purpose=a test", "--note", "n=3"]
        )
        == 0
    )
    model = load(output)
    assert (model.info.name, model.info.license) == ("mine", "MIT")
    assert model.info.provenance["purpose"] == "a test"
    assert (model.info.provenance["n"], model.info.provenance["num_images"]) == (3, 32)
    assert model.info.provenance["training"]["total_images"] == 32
    expected = load(folder / "snapshots" / "images-0000000032").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert main(["export", str(folder), "-o", str(tmp_path / "b"), "--snapshot", "17"]) == 2
    assert "give best, last, or one of" in capsys.readouterr().err
    assert main(["export", str(folder), "-o", str(folder / "snapshots" / snapshots[-1])]) == 2
    capsys.readouterr()
    assert main(["export", str(output), "-o", str(tmp_path / "c")]) == 2
    assert "is not of a run" in capsys.readouterr().err


def test_export_takes_the_best_snapshot(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", RECIPE, "--data", str(data), "--run", str(folder), *settings()]) == 0
    newest = folder / "snapshots" / "images-0000000032"
    model = load(newest)
    for number, score in ((8, 0.5), (16, 0.7), (24, 0.7), (32, 0.6)):
        model.info.provenance.update(num_images=number, held_out={"linear_avepool_feat": score})
        model.save(folder / "snapshots" / f"images-{number:010d}")
    for which, number in (("best", 16), ("last", 32), ("24", 24)):
        assert main(["export", str(folder), "-o", str(tmp_path / which), "--snapshot", which]) == 0
        assert load(tmp_path / which).info.provenance["num_images"] == number
    capsys.readouterr()


def test_a_loss_that_is_not_finite_ends_with_1(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = settings(lr_g=1e30, lr_d=1e30, total_images=800)
    assert main(["train", RECIPE, "--data", str(data), "--run", str(tmp_path / "run"), *changes]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("bigbigan train: the ")


def test_a_run_has_one_process_and_sigterm_ends_it_with_a_checkpoint_and_143(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = settings(total_images=10**6, log_images=8, checkpoint_images=10**6, snapshot_images=10**6)
    command = ["train", RECIPE, "--data", str(data), "--run", str(tmp_path / "run"), *changes]
    process = run(*command, "--threads", "1")
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None
        assert main([*command, "--max-minutes", "1e-9"]) == 2
        assert f"another process trains in {tmp_path / 'run'}" in capsys.readouterr().err
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert re.search("stopped by SIGTERM after step .*: run the same command again to resume", err.splitlines()[-1])
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_run_that_time_ends_says_so_shows_progress_and_can_be_exported_and_extended(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbigan.training.loop.LINE_SECONDS", 0.0)
    folder, output = tmp_path / "run", str(tmp_path / "model")
    changes = settings(log_images=10**6, checkpoint_images=10**6, snapshot_images=10**6)
    command = ["train", RECIPE, "--data", str(data), "--run", str(folder), *changes]
    assert main([*command, "--max-minutes", "1e-9"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(re.search(r"step 1 of 4, [\d.]+ images/s, \d+ minutes left", line) for line in lines)
    assert "stopped by the limit of minutes after step 1 of 4 (8 images)" in lines[-1]
    assert "run the same command again to resume" in lines[-1]
    assert main(["export", str(folder), "-o", output]) == 0
    assert load(output).info.provenance["num_images"] == 8
    assert main([*command, "--set", "total_images=16", "--set", "log_images=8", "--set", "standing_passes=1"]) == 0
    assert main([*command, "--set", "total_images=24", "--set", "checkpoint_images=8"]) == 0  # though it was finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["num_images"] for record in records] == [16, 16, 24, 24]  # losses, then the snapshot
    assert max(path.name for path in (folder / "snapshots").iterdir()) == "images-0000000024"
    capsys.readouterr()
    assert main([*command, "--set", "total_images=8"]) == 2
    assert "has seen 24 images already; total_images 8 is less" in capsys.readouterr().err
    assert main([*command, "--set", "lr_g=0.1"]) == 2
    assert "only total_images, standing_passes, log_images" in capsys.readouterr().err


def test_a_run_whose_rates_fall_keeps_its_length(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = settings(lr_decay_images=16, lr_decay=0.1)
    command = ["train", RECIPE, "--data", str(data), "--run", str(tmp_path / "run"), *changes]
    assert main([*command, "--max-minutes", "1e-9"]) == 0
    assert main([*command, "--set", "total_images=40", "--max-minutes", "1e-9"]) == 0  # they fall from 24 on
    assert main([*command, "--set", "total_images=40"]) == 0
    capsys.readouterr()
    assert main([*command, "--set", "total_images=48"]) == 2
    assert "total_images was 40, now 48, but the learning rates have begun to fall" in capsys.readouterr().err


def test_evaluate_linear(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbigan.evaluation.protocols.comparison.STANDING_PASSES", 5)
    folder = str(tmp_path / "tiny")
    create_model("bigbigan-tiny", seed=7).save(folder)
    record = tmp_path / "record.json"
    command = ["evaluate", "linear", "--data", str(data), "--model", folder, "--holdout", "12", "--l2", "0.1"]
    assert main([*command, "--baselines", "--json", str(record)]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["Representation", "Feature", "Width", "Top-1 %", "Top-5 %", "L2"]
    found = json.loads(record.read_text())
    names = [(row["representation"], row["feature"]) for row in found["results"]]
    assert [(row[0], row[1]) for row in table[2:]] == names
    assert len(names) == 7
    accuracy = {name: row["accuracy"] for name, row in zip(names, found["results"], strict=True)}
    assert accuracy["raw pixels", "pixels"] == 1.0  # brightness is linear in them
    assert accuracy["bigbigan-tiny", "avepool_feat"] == 1.0
    assert found["data"]["train"]["images"] == 60
    assert found["protocol"]["holdout"] == 12
    assert len(found["model"]["encoder_digest"]) == 64
    assert main([*command, "0.01", "--features", "z_mean"]) == 0
    _, text = capsys.readouterr().out.split("\n\n")
    (result,) = json.loads(text)["results"]
    assert (result["num_features"], sorted(result["holdout_accuracy"])) == (TINY.z_dim, ["0.01", "0.1"])


def test_evaluate_rotation(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = str(tmp_path / "ssgan"), tmp_path / "record.json"
    tiny = dataclasses.replace(TINY.discriminator, scores=("x",), rotation_head=True)
    create_model(dataclasses.replace(TINY, discriminator=tiny, encoder=None), seed=1).save(folder)
    command = ["evaluate", "rotation", "--data", str(data), "--model"]
    assert main([*command, folder, "--json", str(record)]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (found,) = json.loads(record.read_text())["results"]
    assert found["num_images"] == 20 and found["accuracy"] == pytest.approx(sum(found["per_turn"]) / 4)
    assert table[2] == ["all", f"{100 * found['accuracy']:.2f}"] and table[4][0] == "90 degrees"
    assert main([*command, RECIPE]) == 2
    assert "has no rotation head" in capsys.readouterr().err


def test_train_mirrors_its_metrics_to_tensorboard(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ["train", RECIPE, "--data", str(data), "--run", str(run), "--tensorboard", *settings(log_images=8)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    monkeypatch.undo()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(command) == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [(line["num_images"], line["loss_d"]) for line in lines if "loss_d" in line]
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss_d")] == wanted
    assert {"samples", "reconstructions"} <= set(events.Tags()["images"])


def test_evaluate_reconstruction(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "padded")
    create_model(dataclasses.replace(TINY, preprocess=PreprocessConfig(28, pad=2)), seed=1).save(folder)
    record, grid = tmp_path / "record.json", tmp_path / "pairs.png"
    command = ["evaluate", "reconstruction", "--data", str(data), "--model", str(folder), "--batch-size", "10"]
    assert main([*command, "--json", str(record), "--grid", str(grid), "--epochs", "30"]) == 0
    found = json.loads(record.read_text())
    (row,) = found["results"]
    assert row["classifier_accuracy"] == 1.0  # brightness again
    assert row["num_images"] == 20
    assert set(row["per_class"]) == {"bright", "dark"}
    files = sorted((data / "test").rglob("*.png"))
    x = load(folder).preprocess(files)
    again = load(folder).reconstruct(files)
    assert row["pixel_l1"] == pytest.approx((x - again).abs().mean().item(), rel=1e-4)
    shown = cells(grid, 8, 64).reshape(3, 2, 8, 64, 64, 3)[:, :, :, ::2, ::2]
    assert np.array_equal(shown[:, 0].reshape(-1, 32, 32, 3)[:20], to_uint8(x))
    assert abs(shown[:, 1].reshape(-1, 32, 32, 3)[:20].astype(int) - to_uint8(again)).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| Measure | Value |"
    assert "| num_images | 20 |" in lines


@pytest.mark.parametrize(
    ("recipe", "shape", "told"),
    [
        ("bigbigan-fashion-mnist-32", (8, 8, 3), "32 of 32 images looked at are in colour, and the networks take grey"),
        ("bigbigan-cifar10-32", (8, 8), "the images are grey, and the networks take colour"),
        ("bigbigan-fashion-mnist-32", (8, 8), ""),
        ("bigbigan-cifar10-32", (8, 8, 3), ""),
    ],
)
def test_colour_and_grey_are_told_apart(
    tmp_path: Path, recipe: str, shape: tuple[int, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first step, once, and without a word on the wrong remedy."""
    caplog.set_level("INFO", "bigbigan")
    data = open_dataset(make_classes(tmp_path, {"train": 20}, shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            Images(data, RECIPES[recipe].model.preprocess, RECIPES[recipe].model.image_channels)
    found = [message for message in caplog.messages if "networks take" in message]
    assert [message[: len(told)] for message in found] == ([told] if told else [])


def test_runs_of_older_versions_lack_newer_fields(tmp_path: Path) -> None:
    """Fields with tuples among them, which a file has as lists."""
    recipe = to_dict(RECIPES[RECIPE])
    for field in dataclasses.fields(RECIPES[RECIPE]):
        if field.default is not dataclasses.MISSING:
            older = {key: value for key, value in recipe.items() if key != field.name}
            (tmp_path / "config.json").write_text(json.dumps({"train": older, "data": {}}))
            assert getattr(read_run_config(tmp_path), field.name) == field.default
