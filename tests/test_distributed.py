"""Runs of several processes (real ones, over gloo) against the same run in one process."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bigbigan.presets import PRESETS
from bigbigan.training import loop
from bigbigan.training.augment import AugmentationConfig
from bigbigan.training.config import TrainConfig
from bigbigan.training.data import open_dataset
from bigbigan.training.distributed import Processes

CONFIG = TrainConfig(
    "tiny",
    PRESETS["bigbigan-tiny"].config,
    total_images=24,
    batch_size=8,
    d_steps=2,
    encoder_lr_multiplier=10.0,
    augmentation=AugmentationConfig(crop_scale=(0.5, 1.0), flip=True, shift=2),
    precision="fp64",
    standing_passes=2,
    log_images=8,
    checkpoint_images=24,
    snapshot_images=24,
    probe_images=0,
)

CHILD = """
import hashlib, json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_distributed import CONFIG, loop, open_dataset
runs, build = [], loop._Run.__init__
def remember(self, *arguments):
    runs.append(self)
    build(self, *arguments)
loop._Run.__init__ = remember
loop.train(CONFIG, open_dataset(sys.argv[1]), sys.argv[2], workers=0, **json.loads(sys.argv[4]))
digest = hashlib.sha256()
for name, network in sorted(runs[0]._networks().items()):
    for key, value in network.state_dict().items():
        digest.update(value.numpy().tobytes())
print(f"DIGEST {digest.hexdigest()}\\n", end="", flush=True)  # in one write: ranks share a pipe
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(draws.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def torchrun(processes: int, photos: Path, run: Path, **options: Any) -> list[str]:
    """What each rank's weights and averages hash to."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = run.parent / "child.py"
    script.write_text(CHILD)
    command += [str(script), str(photos), str(run), str(Path(__file__).parent), json.dumps(options)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall("DIGEST ([0-9a-f]{64})", done.stdout)


def newest(run: Path) -> dict[str, torch.Tensor]:
    folder = max((run / "checkpoints").iterdir())
    return {f"{f.stem}.{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 100
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.mark.parametrize("processes", [2, 4])
def test_same_weights_as_one_process_after_three_steps(processes: int, photos: Path, tmp_path: Path) -> None:
    loop.train(CONFIG, open_dataset(photos), tmp_path / "one", workers=0)
    digests = torchrun(processes, photos, tmp_path / "several")
    assert len(digests) == processes and len(set(digests)) == 1  # networks and averages, on all ranks
    assert largest_difference(newest(tmp_path / "one"), newest(tmp_path / "several")) < 1e-9
    models = [load_file(tmp_path / run / "snapshots" / "images-0000000024" / "encoder.safetensors")
              for run in ("one", "several")]  # fmt: skip
    assert max((models[0][key] - models[1][key]).abs().max().item() for key in models[0]) < 1e-5  # in float32


def test_a_run_goes_on_with_another_number_of_processes(photos: Path, tmp_path: Path) -> None:
    torchrun(2, photos, tmp_path / "run", max_minutes=1e-9)  # one step
    loop.train(CONFIG, open_dataset(photos), tmp_path / "run", workers=0)
    loop.train(CONFIG, open_dataset(photos), tmp_path / "one", workers=0)
    assert largest_difference(newest(tmp_path / "one"), newest(tmp_path / "run")) < 1e-9


def test_a_batch_that_does_not_split_is_refused() -> None:
    pair = Processes(0, 2)
    with pytest.raises(ValueError, match=r"a batch of 7 does not split into 2 pieces.*multiple of 2"):
        loop.check_split(dataclasses.replace(CONFIG, batch_size=7), pair)
    with pytest.raises(ValueError, match="8 does not split into 16 pieces"):
        loop.check_split(dataclasses.replace(CONFIG, batch_size=8, accumulate=8), pair)
    with pytest.raises(ValueError, match="batch_size 8 is one image a micro-batch"):
        loop.check_split(dataclasses.replace(CONFIG, batch_size=8, accumulate=8), Processes())
    assert (pair.share(8), Processes(1, 2).share(8)) == (slice(0, 4), slice(4, 8))
