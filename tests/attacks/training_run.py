"""A training run of seconds for the attacks: its data, its command, what it left; and faults planted in its process.

As a program (`python -m tests.attacks.training_run FAULTS train …`) it is `bigbigan`, with FAULTS (JSON) planted:
{"slow": seconds, "marker": path}: saves take long, and `marker` exists while one goes on.
{"rank": 1, "kind": "kill|raise|hang|nan", "where": "step|save|data", "step": 3}: one fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # which Adam takes a second to import: once, in a fork server
from PIL import Image
from tqdm import tqdm

from bigbigan import cli
from bigbigan.data.batches import Batches
from bigbigan.presets import PRESETS
from bigbigan.schema import to_dict
from bigbigan.training import checkpoint, cost, loop, runstate

tqdm.get_lock()  # a semaphore, which a killed child would leave behind: theirs is that of the fork server
ROOT = Path(__file__).parents[2]
BATCH = 4
SETTINGS = {
    "model": to_dict(PRESETS["bigbigan-tiny"].config),
    "name": "tiny",
    "batch_size": BATCH,
    "seed": 0,
    "standing_passes": 1,
    "probe_images": 0,
    "log_images": BATCH,
    "checkpoint_images": 2 * BATCH,
    "snapshot_images": 6 * BATCH,
    "total_images": 6 * BATCH,
}
CROPS = {"augmentation.crop_scale": [0.5, 1.0]}  # images are then decoded by worker processes


def make_data(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    for i in range(16):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def arguments(data: Path, run: Path, *options: str, **settings: Any) -> list[str]:
    """Of `bigbigan`."""
    command = ["train", "bigbigan-fashion-mnist-32", "--data", str(data), "--run-folder", str(run), "--device", "cpu"]
    changes = [f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **settings}.items()]
    return [*command, "--threads", "1", *changes, *options]


def shell_command(processes: int, faults: dict[str, Any], train: list[str]) -> list[str]:
    """The same as a command; of torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = ["-m", "tests.attacks.training_run", json.dumps(faults), *train]
    return [sys.executable, *(launcher if processes > 1 else []), *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def result(run: Path) -> dict[str, str]:
    """sha256 of what a run's newest checkpoint and newest snapshot hold, and of its metrics but for times."""
    loaded = checkpoint.load_checkpoint(run / "checkpoints")
    assert loaded is not None
    newest = loaded.path
    snapshot = max((run / "snapshots").iterdir())
    files = [*sorted(newest.glob("*.safetensors")), *sorted(snapshot.glob("*.safetensors"))]
    found = {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    return found | {"metrics": hashlib.sha256(json.dumps(values).encode()).hexdigest()}


def strays(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*") if path != run / ".lock")


def plant(faults: dict[str, Any]) -> None:
    """Plants faults in this process for good, and leaves out the estimate of the cost, most of a tiny run's time."""
    cost.estimate = lambda config: cost.Cost({}, 0, 0, 0)
    if "slow" in faults:
        _slow_saves(faults["slow"], Path(faults["marker"]))
    if faults.get("rank") == int(os.environ.get("RANK", "0")):
        _plant_one(faults["kind"], faults["where"], faults["step"])


def _slow_saves(seconds: float, marker: Path) -> None:
    save, replace, rmtree = runstate.save_checkpoint, os.replace, shutil.rmtree

    def slow_write(path: Path, data: bytes) -> None:
        with open(path, "xb") as file:
            for start in range(0, len(data), 10_000):
                file.write(data[start : start + 10_000])
                file.flush()
                time.sleep(seconds / 20)
            os.fsync(file.fileno())

    def slow_replace(source: Any, target: Any) -> None:
        replace(source, target)
        time.sleep(seconds / 10)

    def slow_rmtree(path: Any, **options: Any) -> None:
        for file in list(Path(path).iterdir()):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            time.sleep(seconds / 40)
        rmtree(path, **options)

    def marked_save(*values: Any, **options: Any) -> Path:
        marker.touch()
        os.replace, shutil.rmtree = slow_replace, slow_rmtree
        try:
            return save(*values, **options)
        finally:
            os.replace, shutil.rmtree = replace, rmtree
            marker.unlink()

    checkpoint._write_file, runstate.save_checkpoint = slow_write, marked_save


def _plant_one(kind: str, where: str, step: int) -> None:
    train_step, write, save, at = loop.train_step, checkpoint._write_file, loop.Run.checkpoint, Batches.at
    now = {"step": -1}

    def strike() -> None:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(10**6)
        elif kind == "raise":
            raise RuntimeError("injected fault")

    def poison(state: Any) -> None:
        next(state.discriminator.parameters()).data.fill_(float("nan"))

    def faulty_step(state: Any, batches: Callable[[int], Any], num_images: int) -> Any:
        now["step"] = num_images // BATCH
        if (where, now["step"]) == ("step", step):
            poison(state) if kind == "nan" else strike()
        return train_step(state, batches, num_images)

    def faulty_at(self: Batches, k: int, *rest: Any) -> torch.Tensor:
        if now["step"] < step:
            return at(self, k, *rest)
        strike()
        return at(self, k, *rest) * float("nan")

    def faulty_save(self: Any) -> None:
        if self.step >= step:
            if kind == "nan":
                poison(self.training)
            elif self.processes.is_main:  # halfway
                checkpoint._write_file = lambda *values: (write(*values), strike())
            else:
                strike()
        save(self)

    loop.train_step = faulty_step
    if where == "data":
        Batches.at = faulty_at
    if where == "save":
        loop.Run.checkpoint = faulty_save


def main() -> int:
    plant(json.loads(sys.argv[1]))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
