"""Time of `import bigbigan` over `import torch`, in turn, each in a process of its own.

python -m tests.benchmarks.imports [--runs 11]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys


def cpu_seconds(module: str) -> float:
    """User and system time of a fresh interpreter that imports `module`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    for module in ("torch", "bigbigan"):  # fill the file cache
        cpu_seconds(module)
    pairs = [(cpu_seconds("bigbigan"), cpu_seconds("torch")) for _ in range(runs)]
    ours, torch = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"import bigbigan {ours:.2f} s, import torch {torch:.2f} s of CPU; median ratio of {runs} pairs {ratio:.3f}")


if __name__ == "__main__":
    main()
