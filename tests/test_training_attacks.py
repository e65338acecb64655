"""Training loses no work: the attacks in small, and what a run does when it is stopped, full of NaN or out of disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.presets import PRESETS
from bigbigan.schema import ConfigError, to_dict
from bigbigan.training import checkpoint, cost, loop, runfolder, runstate, signals
from bigbigan.training.checkpoint import CheckpointError, load_checkpoint
from bigbigan.training.config import TrainConfig
from bigbigan.training.distributed import Processes
from bigbigan.training.monitor import Monitor

CONFIG = TrainConfig(
    "tiny",
    PRESETS["bigbigan-tiny"].config,
    total_images=24,
    batch_size=4,
    standing_passes=1,
    log_images=4,
    checkpoint_images=4,
    snapshot_images=8,
    probe_images=0,
)


def attack(script: str, *options: str) -> dict[str, Any]:
    """What a script of tests/attacks counts; it fails by itself."""
    command = [sys.executable, "-m", f"tests.attacks.{script}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_cost_nothing_that_was_saved() -> None:
    assert attack("kill_sweep", "--kills", "3")["inside_a_save"] >= 2


def test_a_failing_call_costs_no_checkpoint_and_is_not_kept_quiet() -> None:
    assert attack("syscall_faults", "--scope", "save", "--errors", "ENOSPC", "--every", "34")["faults"] >= 3


def test_no_resumption_is_silent() -> None:
    assert attack("silent_resume", "--every", "9")["attacks"] >= 15


def test_a_failure_of_one_rank_ends_all_and_is_named() -> None:
    options = ("--ranks", "2", "--kinds", "raise", "--places", "save", "--faulty", "0", "--ends-only")
    assert attack("rank_faults", *options)["faults"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("kill_sweep", "--kills 50"),
        ("kill_sweep", "--kills 50 --processes 2"),
        ("syscall_faults", "--scope save"),
        ("syscall_faults", "--scope run --errors ENOSPC --every 3"),
        ("silent_resume", ""),
        ("rank_faults", "--ranks 4"),
        ("soak", ""),
    ],
)
def test_attacks_at_length(script: str, options: str) -> None:
    attack(script, *options.split())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def train(photos: Path, run: Path, **options: Any) -> Path:
    return loop.train(CONFIG, open_dataset(photos), run, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def metrics(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def scores(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    given = iter(values)
    monkeypatch.setattr(Monitor, "__call__", lambda *_: {"linear_avepool_feat": next(given)})


def test_newest_checkpoints_stay_and_that_of_the_best_snapshot(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [0.9, 0.5, 0.7])  # at steps 2, 4, 6
    assert steps(train(photos, tmp_path / "early", keep=1)) == [2, 6]
    scores(monkeypatch, [0.5, 0.9, 0.7])
    assert steps(train(photos, tmp_path / "later", keep=1)) == [4, 6]
    scores(monkeypatch, [0.5, 0.7, 0.9])
    assert steps(train(photos, tmp_path / "last", keep=2)) == [4, 5, 6]  # 4 was the best when 6 was saved
    assert [path.name for path in (tmp_path / "last" / "snapshots").iterdir()] == ["images-0000000024"]


def test_a_class_too_rare_to_learn_does_not_end_a_run() -> None:
    """Of 24 labelled images one class has a single one, which is held out."""
    config = dataclasses.replace(CONFIG, probe_images=18)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(config.seed))
    labels = torch.arange(24) % 2
    labels[order[20]] = 7
    images = torch.zeros(24, 3, 32, 32, dtype=torch.uint8)
    monitor = Monitor(images, labels, config)
    assert monitor.chosen is not None and len(monitor.chosen) == 18 + 5 and order[20] not in monitor.chosen
    assert Monitor(images, labels, dataclasses.replace(config, probe_images=1)).chosen is None  # none to score


def test_probes_of_few_labelled_images_take_those_there_are(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.arange(40) % 2
    config = dataclasses.replace(CONFIG, probe_images=15_000)
    monitor = Monitor(images, labels, config)
    assert monitor.chosen is not None and (monitor.fitted, len(monitor.chosen.unique())) == (30, 40)
    assert "has 40 labelled images of 2 classes: the snapshots' probes fit on 30 and score 10" in caplog.text
    assert Monitor(images, torch.full((40,), -1), config).chosen is None
    assert "has 0 labelled images of 0 classes: the snapshots' probes are left out" in caplog.text
    assert Monitor(images, labels, dataclasses.replace(CONFIG, probe_images=30)).fitted == 30


def test_a_run_of_another_version_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose configuration lacks fields that came later, and which says what may be different."""
    run = tmp_path / "run"
    older = {key: value for key, value in to_dict(CONFIG).items() if key not in ("separate_passes", "lr_decay")}
    del older["augmentation"]["filter"]
    with monkeypatch.context() as then:
        then.setattr(runstate, "VERSIONS", {"bigbigan": "0.0.1", "torch": "2.4.0"})
        then.setattr(runfolder, "to_dict", lambda _: older)
        train(photos, run, max_minutes=1e-9)
    assert metrics(train(photos, run)) == metrics(train(photos, tmp_path / "whole"))
    assert "step-00000001 was written by bigbigan 0.0.1, torch 2.4.0: with bigbigan " in caplog.text
    assert runfolder.read_run_config(run) == CONFIG
    assert caplog.text.count("was written by") == 1
    with pytest.raises(ConfigError, match=r"train\.lr_decay was 1\.0, now 0\.5"):
        loop.train(dataclasses.replace(CONFIG, lr_decay=0.5), open_dataset(photos), run)


def test_one_image_is_refused_before_a_run_is_made(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(next(photos.iterdir()), tmp_path / "one")
    with pytest.raises(ConfigError, match="the data is 1 image; training needs two or more"):
        train(tmp_path / "one", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    plain = loop.train_step

    def step_with_signal(state: Any, batches: Any, num_images: int) -> Any:
        if num_images == step * CONFIG.batch_size:
            for _ in range(times):
                signal.raise_signal(signal.SIGTERM)
        return plain(state, batches, num_images)

    monkeypatch.setattr(loop, "train_step", step_with_signal)


def test_a_signal_brings_a_checkpoint_before_the_snapshot_which_is_made_up_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    signal_at(monkeypatch, 4, times=2)  # as `timeout` does: to the process, and to its group
    with pytest.raises(loop.TrainingStopped):
        train(photos, run)
    assert steps(run)[-1] == 4
    assert [path.name for path in (run / "snapshots").iterdir()] == ["images-0000000008"]
    monkeypatch.undo()
    train(photos, run, max_minutes=1e-9, keep_snapshots=True)
    names = [path.name for path in (run / "snapshots").iterdir()]
    assert sorted(names) == ["images-0000000008", "images-0000000016", "images-0000000020"]  # that of the stop, too
    train(photos, run)
    whole = train(photos, tmp_path / "whole")
    assert metrics(run) == metrics(whole)
    before = (run / "metrics.jsonl").read_bytes()
    train(photos, run)  # finished: nothing to do
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_signal_does_not_wait_for_a_snapshot(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the one of its step, nor for one that is made up for."""
    run = tmp_path / "run"

    def long(*_: Any) -> None:
        with contextlib.suppress(Exception):  # as libraries do, to say what they were about
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("the snapshot went on")

    for _ in range(2):
        monkeypatch.setattr(Monitor, "__call__", long)
        with pytest.raises(loop.TrainingStopped):
            train(photos, run)
        assert steps(run) == [1, 2] and not any((run / "snapshots").iterdir())
    monkeypatch.undo()
    assert metrics(train(photos, run)) == metrics(train(photos, tmp_path / "whole"))


def test_a_signal_lets_a_snapshot_be_kept(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is measured, so that none stays that should have gone."""
    plain = runstate.keep_snapshot

    def keep(model: Any, folder: Path, *arguments: Any, **options: Any) -> Any:
        if model.info.provenance["num_images"] == 24:
            signal.raise_signal(signal.SIGTERM)
        return plain(model, folder, *arguments, **options)

    monkeypatch.setattr(runstate, "keep_snapshot", keep)
    with pytest.raises(loop.TrainingStopped):
        train(photos, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["images-0000000024"]


def test_a_second_signal_ends_a_stuck_step_at_once(photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3])\n"
        "from test_training_attacks import Path, loop, train\n"
        "plain = loop.train_step\n"
        "def step(state, batches, num_images):\n"
        "    if num_images == 8: print('stuck', flush=True); time.sleep(60)\n"
        "    return plain(state, batches, num_images)\n"
        "loop.train_step = step\n"
        "train(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    run = tmp_path / "run"
    command = [sys.executable, "-c", code, str(photos), str(run), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"stuck\n"
            child.terminate()
            time.sleep(signals.REPEAT_SECONDS + 0.5)
            assert child.poll() is None
            child.terminate()
            assert child.wait(10) == -signal.SIGTERM
        finally:
            child.kill()
    saved = load_checkpoint(run / "checkpoints")
    assert saved is not None and saved.step == 1


def test_a_snapshot_that_fails_is_made_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runstate.keep_snapshot

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    monkeypatch.setattr(runstate, "keep_snapshot", full)
    with pytest.raises(OSError, match="No space left"):
        train(photos, run)
    assert steps(run)[-1] == 2
    monkeypatch.setattr(runstate, "keep_snapshot", plain)
    assert metrics(train(photos, run)) == metrics(train(photos, tmp_path / "whole"))


def test_weights_that_are_not_finite_are_not_saved(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update can overflow after a finite loss; saved, it would replace the last good state."""
    plain = loop.train_step

    def step_that_overflows(state: Any, batches: Any, num_images: int) -> Any:
        found = plain(state, batches, num_images)
        if num_images == 12:
            next(state.ema["encoder"].module.parameters()).data.fill_(float("inf"))
        return found

    monkeypatch.setattr(loop, "train_step", step_that_overflows)
    with pytest.raises(FloatingPointError, match=r"of ema_encoder is not finite after step 3"):
        train(photos, tmp_path / "run", keep=1)
    saved = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 2
    assert all(value.isfinite().all() for group in saved.tensors.values() for value in group.values())


def test_processes_that_read_different_checkpoints_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(photos, tmp_path / "run", max_minutes=1e-9)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, 0] if isinstance(value, int) else [value])
    with pytest.raises(CheckpointError, match=r"steps \[1, 0\].*is it shared"):
        train(photos, tmp_path / "run")


def test_a_finite_loss_does_not_count_where_another_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "any", lambda self, flag: True)
    assert Processes()._all_finite(torch.tensor(float("nan"))) is False
    with pytest.raises(RuntimeError, match="not finite in another process"):
        Processes()._all_finite(torch.tensor(1.0))


def test_a_full_disk_ends_with_1_and_says_what_stands(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, run = checkpoint._write_file, tmp_path / "run"

    def write_until_full(path: Path, data: bytes) -> None:
        if path.parent.name.endswith("step-00000003"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", write_until_full)
    monkeypatch.setattr(cost, "estimate", lambda config: cost.Cost({}, 0, 0, 0))
    values = to_dict(CONFIG).items()
    settings = [f"--set={key}={json.dumps(value)}" for key, value in values]
    recipe = "bigbigan-fashion-mnist-32"
    assert main(["train", recipe, "--data", str(photos), "--run", str(run), "--device", "cpu", *settings]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in last and f"the last checkpoint in {run} stands" in last
    assert steps(run) == [1, 2]
    assert list(run.rglob(".*")) == []


@pytest.mark.parametrize(
    ("option", "value"), [("keep", 0), ("workers", -1), ("max_minutes", 0.0), ("max_minutes", float("nan"))]
)
def test_options_that_would_cost_work_are_refused_before_it(
    option: str, value: float, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be"):
        train(photos, tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_behind_goes_even_after_the_end(photos: Path, tmp_path: Path) -> None:
    run = train(photos, tmp_path / "run")
    for name in ("checkpoints/.partial-old-step-00000004", "snapshots/.images-0000000024.x.tmp"):
        (run / name).mkdir()
        (run / name / "generator.safetensors").touch()
    for name in (".config.json.x.tmp", "samples/.samples-0000000024.png.x.tmp"):
        (run / name).touch()
    train(photos, run)
    assert list(run.rglob(".*")) == []
