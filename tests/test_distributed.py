"""Runs of several processes (real ones, over gloo) against the same run in one process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from bigbigan.data.augment import AugmentationConfig
from bigbigan.data.opening import open_dataset
from bigbigan.presets import PRESETS
from bigbigan.training import loop
from bigbigan.training.config import TrainConfig
from bigbigan.training.distributed import Processes
from bigbigan.training.recipes import RECIPES
from bigbigan.training.step import Batch

SHORT: dict[str, Any] = {
    "total_images": 24,
    "batch_size": 8,
    "precision": "fp64",
    "standing_passes": 2,
    "log_images": 8,
    "checkpoint_images": 24,
    "snapshot_images": 24,
    "probe_images": 0,
}
TINY = PRESETS["bigbigan-tiny"].config
CONFIG = TrainConfig(
    "tiny",
    TINY,
    d_steps=2,
    encoder_lr_multiplier=10.0,
    augmentation=AugmentationConfig(crop_scale=(0.5, 1.0), flip=True, shift=2),
    **SHORT,
)


def change(config: Any, **parts: dict[str, Any]) -> Any:
    """`config` with changed fields of its parts."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items()})


_NARROW = {"width": 16}
_MLP = change(PRESETS["bigan-mnist-mlp"].config, generator=_NARROW, encoder=_NARROW, discriminator=_NARROW)
_GAN = change(replace(TINY, encoder=None), discriminator={"scores": ("x",), "rotation_head": True})
_REVNET = {"architecture": "revnet", "block": "bottleneck", "depths": (1, 2)}
CONFIGS = {
    "pairs used twice": CONFIG,
    "fresh batches": replace(CONFIG, reuse_batch=False),
    "micro-batches": replace(CONFIG, accumulate=2),
    "BiGAN": replace(RECIPES["bigan-mnist-mlp"], model=_MLP, lr_decay_images=16, **SHORT),
    "SS-GAN": replace(CONFIG, model=_GAN, rotated_batch_size=16),
    "reversible": replace(CONFIG, model=change(TINY, encoder=_REVNET), reversible=True),
}
STOP = {"max_minutes": 1e-9}  # after one step
STOPPED = ("micro-batches", "stream")

CHILD = """
import hashlib, json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from bigbigan.data.opening import open_training_data
from test_distributed import CONFIGS, loop
runs, build = [], loop.Run.__init__
def remember(self, *arguments, **options):
    runs.append(self)
    build(self, *arguments, **options)
loop.Run.__init__ = remember
rank = int(os.environ["RANK"])
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
for number, (processes, name, data, run, options) in enumerate(json.loads(sys.argv[1])):
    if rank >= processes:
        continue
    # torchrun's store still holds where the processes of the last run met
    met = dist.PrefixStore(str(number), store)
    dist.init_process_group("gloo", None, timedelta(minutes=2), processes, rank, met)
    loop.train(CONFIGS[name], open_training_data(data), run, workers=0, **options)
    dist.destroy_process_group()
    digest = hashlib.sha256()
    for _, network in sorted(runs[-1].networks().items()):
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
    print(f"DIGEST {number} {digest.hexdigest()}\\n", end="", flush=True)  # in one write: ranks share a pipe
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(draws.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


Job = tuple[int, str, str, Path, dict[str, Any]]  # processes, configuration, data, run folder, options


def torchrun(script: Path, jobs: list[Job]) -> dict[str, set[str]]:
    """What the weights and averages hash to in the processes of each run folder's last run."""
    script.write_text(CHILD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(script)]
    command += [json.dumps(jobs, default=str), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall("DIGEST ([0-9]+) ([0-9a-f]{64})", done.stdout)
    assert len(lines) == sum(job[0] for job in jobs)
    return {job[3].name: {digest for i, digest in lines if int(i) == number} for number, job in enumerate(jobs)}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint or snapshot in a folder."""
    files = sorted(max(folder.iterdir()).glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def largest_difference(one: Path, other: Path) -> float:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and len(a) > 10
    return max((a[key] - b[key]).abs().max().item() for key in a)


@dataclass
class Several:
    """A number of processes, the folder of their runs, and what `torchrun` found."""

    processes: int
    folder: Path
    digests: dict[str, set[str]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Several:
    folder = tmp_path_factory.mktemp("several")
    images = [file.read_bytes() for file in sorted(photos.iterdir())]
    for shard, rows in enumerate((slice(9), slice(9, 13), slice(13, 20))):
        parquet.write_table(pyarrow.table({"image": images[rows]}), folder / f"{shard}.parquet")
    stream = f"hf:parquet?data_files={folder}/*.parquet&label=&streaming=1&block=4"
    data = dict.fromkeys(CONFIGS, str(photos)) | {"stream": stream}

    def job(name: str, run: str, options: dict[str, Any], processes: int = request.param) -> Job:
        return processes, name if name in CONFIGS else "fresh batches", data[name], folder / run, options

    jobs = [job(name, name, {}) for name in data]
    jobs += [job(name, f"stopped {name}", options) for name in STOPPED for options in (STOP, {})]
    jobs += [job("pairs used twice", "changing", STOP, processes) for processes in (4, 2, 4)]
    return Several(request.param, folder, torchrun(folder / "child.py", jobs))


def split_like(processes: int) -> Callable[[Batch, int], Iterator[Batch]]:
    """Batch norm sees each micro-batch alone, and several processes make it up of a piece of each one's share."""

    def split(batch: Batch, pieces: int) -> Iterator[Batch]:
        for rows in torch.arange(len(batch.x)).view(processes, pieces, -1).unbind(1):
            yield Batch(batch.x[rows.flatten()], batch.z[rows.flatten()], batch.noise[rows.flatten()])

    return split


@pytest.mark.filterwarnings("ignore:this model was trained on grey images")
@pytest.mark.parametrize("name", CONFIGS)
def test_same_weights_as_one_process_after_three_steps(
    name: str, several: Several, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(several.digests[name]) == 1
    monkeypatch.setattr(Batch, "split", split_like(several.processes))
    loop.train(CONFIGS[name], open_dataset(photos), tmp_path, workers=0)
    assert largest_difference(tmp_path / "checkpoints", several.folder / name / "checkpoints") < 1e-9
    assert largest_difference(tmp_path / "snapshots", several.folder / name / "snapshots") < 1e-5  # in float32


def test_a_run_goes_on_bit_for_bit(several: Several) -> None:
    for name in STOPPED:
        assert checkpoints(several.folder / f"stopped {name}") == ["step-00000001", "step-00000003"]
        assert several.digests[f"stopped {name}"] == several.digests[name] and len(several.digests[name]) == 1


def test_a_run_goes_on_with_another_number_of_processes(several: Several, photos: Path, tmp_path: Path) -> None:
    loop.train(CONFIG, open_dataset(photos), tmp_path, workers=0)
    assert checkpoints(several.folder / "changing") == ["step-00000002", "step-00000003"]
    assert largest_difference(tmp_path / "checkpoints", several.folder / "changing" / "checkpoints") < 1e-9


def test_a_batch_that_does_not_split_is_refused() -> None:
    pair = Processes(0, 2)
    with pytest.raises(ValueError, match=r"a batch of 7 does not split into 2 pieces.*multiple of 2"):
        loop.check_split(replace(CONFIG, batch_size=7), pair)
    with pytest.raises(ValueError, match="8 does not split into 16 pieces"):
        loop.check_split(replace(CONFIG, batch_size=8, accumulate=8), pair)
    with pytest.raises(ValueError, match="batch_size 8 is one image a micro-batch"):
        loop.check_split(replace(CONFIG, batch_size=8, accumulate=8), Processes())
    assert (pair.share(8), Processes(1, 2).share(8)) == (slice(0, 4), slice(4, 8))


WAITING = """
import os, signal, sys, time
from bigbigan.training.distributed import PeerError, join_processes
def stop():
    if sys.argv[1] == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)  # as a process on a machine that hangs: it shows no sign of life
    time.sleep(5)
with join_processes("cpu", timeout_minutes=3 / 60) as processes:
    with processes.main_first(long=sys.argv[1] != "short"):
        if processes.is_main:
            stop()
print("waited", flush=True)
"""


@pytest.mark.parametrize("work", ["long", "short", "stopped"])
def test_a_long_snapshot_outlasts_the_timeout_and_nothing_else_does(work: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    variables = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WAITING, work]
    ranks = [subprocess.Popen(command, env={**variables, "RANK": rank}, **options) for rank in "01"]
    try:
        out, err = ranks[1].communicate(timeout=60)
    finally:
        ranks[0].kill()
        ranks[0].communicate()
        ranks[1].kill()
    if work == "long":
        assert out == "waited\n", err
    else:
        last = err.strip().splitlines()[-1]
        assert "PeerError: another process did not answer within 0.05 minutes" in err and out == "", last
        assert "--timeout-minutes" in err
