"""Memory and time of a RevNet trunk's forward and backward pass, or of a whole training step, plain and reversible.

Each runs in a process of its own, on one thread. `kept` is what the graph holds between the two passes, beside weights;
`peak` is how far the process rose above its size with weights and gradients in place, or for the whole step above its
size after a first one: weights, gradients, moments and averages (Linux).

python -m tests.benchmarks.revnet_memory [--steps 3]
python -m tests.benchmarks.revnet_memory --whole-step  # of bigbigan-revnet50x4, 8 images: 12 GB, some minutes
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bigbigan.config import EncoderConfig
from bigbigan.layers import Layers
from bigbigan.revnet import RevNet
from bigbigan.training.recipes import RECIPES
from bigbigan.training.step import Batch, TrainingState, train_step

RESOLUTION = 256
CASES = {  # width, depths, batch
    "RevNet-50x4": (256, (3, 4, 6, 3), 2),
    "RevNet-50": (64, (3, 4, 6, 3), 8),
    "RevNet-50 of twice the depth": (64, (6, 8, 12, 6), 8),
}


WHOLE = "a step of bigbigan-revnet50x4"


def resident(field: str) -> int:
    """MiB of VmRSS (now) or VmHWM (at most so far)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def measure(name: str, reversible: bool, steps: int) -> str:
    """One line of results, from this process."""
    torch.set_num_threads(1)
    width, depths, batch = CASES[name]
    config = EncoderConfig(RESOLUTION, architecture="revnet", depths=depths, base_channels=width)
    trunk = RevNet(config, Layers()).train()
    trunk.reversible = reversible
    for parameter in trunk.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)  # in memory, so that the peak is of activations
    x = torch.rand(batch, 3, RESOLUTION, RESOLUTION) * 2 - 1
    before = resident("VmRSS")
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seconds = []
    for _ in range(steps):
        kept.clear()
        start = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trunk(x).square().mean()
        loss.backward()
        seconds.append(time.process_time() - start)
    weights = {p.untyped_storage().data_ptr() for p in trunk.parameters()}
    saved = sum(size for pointer, size in kept.items() if pointer not in weights)
    return f"kept {saved >> 20:5d} MiB, peak {resident('VmHWM') - before:5d} MiB, {min(seconds):6.2f} s of CPU a step"


def measure_whole_step(reversible: bool, images: int = 8) -> str:
    torch.set_num_threads(1)
    config = replace(RECIPES["bigbigan-revnet50x4"], batch_size=images, reversible=reversible)
    state, z_dim = TrainingState(config), config.model.z_dim

    def batch(_: int) -> Batch:
        x = torch.rand(images, 3, RESOLUTION, RESOLUTION).contiguous(memory_format=torch.channels_last)
        return Batch(x * 2 - 1, torch.randn(images, z_dim), torch.randn(images, z_dim))

    train_step(state, batch, images)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    start = time.process_time()
    train_step(state, batch, 2 * images)
    seconds = time.process_time() - start
    return f"state {before:5d} MiB, peak {resident('VmHWM') - before:5d} MiB more, {seconds:6.1f} s of CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--whole-step", action="store_true", help="of training all parts, instead of trunks alone")
    parser.add_argument("--case", choices=[*CASES, WHOLE], help=argparse.SUPPRESS)
    parser.add_argument("--reversible", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        whole = args.case == WHOLE
        print(measure_whole_step(args.reversible) if whole else measure(args.case, args.reversible, args.steps))
        return
    for name in [WHOLE] if args.whole_step else CASES:
        for flags in ([], ["--reversible"]):
            command = [sys.executable, "-m", "tests.benchmarks.revnet_memory", "--case", name, *flags]
            command += ["--steps", str(args.steps)]
            exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back, and leave no holes
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=exact).stdout.strip()
            what = f"{name}, {CASES[name][2] if name in CASES else 8} images of {RESOLUTION} pixels"
            print(f"{what}, {'reversible' if flags else 'plain':10}: {line}", flush=True)


if __name__ == "__main__":
    main()
