"""Memory and time of a RevNet trunk's training step (forward and backward), plain and reversible.

Each step runs in a process of its own, on one thread. `kept` is what the graph holds between the two passes, beside
weights; `peak` is how far the process rose above its size with weights and gradients in place (Linux).

python -m tests.benchmarks.revnet_memory [--steps 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bigbigan.config import EncoderConfig
from bigbigan.layers import Layers
from bigbigan.revnet import RevNet

RESOLUTION = 256
CASES = {  # width, depths, batch
    "RevNet-50x4": (256, (3, 4, 6, 3), 2),
    "RevNet-50": (64, (3, 4, 6, 3), 8),
    "RevNet-50 of twice the depth": (64, (6, 8, 12, 6), 8),
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--reversible", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(measure(args.case, args.reversible, args.steps))
        return
    for name in CASES:
        for flags in ([], ["--reversible"]):
            command = [sys.executable, "-m", "tests.benchmarks.revnet_memory", "--case", name, *flags]
            command += ["--steps", str(args.steps)]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            how = "reversible" if flags else "plain"
            print(f"{name}, {CASES[name][2]} images of {RESOLUTION} pixels, {how:10}: {line}", flush=True)


if __name__ == "__main__":
    main()
