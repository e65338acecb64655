"""Thousands of steps with many stops and resumptions leak neither memory nor files.

    python -m tests.attacks.soak --steps 10000 --cycles 20

All in one process, which is what shows a leak. Each cycle ends by SIGTERM and goes on from the checkpoint that it left.
Resident memory grows by less than 2 % after the first quarter, open files do not, and on the disk there are never
more than keep + 1 checkpoints besides the best snapshot's. No stop takes more than 30 seconds, no resumption 60.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bigbigan.data.opening import open_dataset
from bigbigan.training import loop, runstate
from tests.attacks.silent_resume import configuration
from tests.attacks.training_run import BATCH, make_data

KEEP = 2


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(work: Path, steps: int, cycles: int) -> dict[str, Any]:
    """Measurements; an assertion fails if the promise is broken."""
    data, run = make_data(work / "data"), work / "run"
    each = steps // cycles
    config = configuration(
        total_images=steps * BATCH,
        log_images=10 * BATCH,
        checkpoint_images=max(1, each // 5) * BATCH,
        snapshot_images=max(1, each // 2) * BATCH,
    )
    step, save = loop.train_step, runstate.save_checkpoint
    times: dict[str, list[float]] = {"save": [], "resume": [], "stop": []}
    now = {"done": 0, "begin": 0.0, "signal": 0.0, "most": 0}

    def watched_step(*arguments: Any) -> Any:
        if now["begin"]:
            times["resume"].append(time.monotonic() - now["begin"])
        now["begin"], now["done"] = 0.0, now["done"] + 1
        if now["done"] % each == 0 and now["done"] < steps:
            now["signal"] = time.monotonic()
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    def watched_save(folder: Path, *arguments: Any, **options: Any) -> Path:
        begin = time.monotonic()
        path = save(folder, *arguments, **options)
        times["save"].append(time.monotonic() - begin)
        now["most"] = max(now["most"], len(list(folder.iterdir())))
        return path

    loop.train_step, runstate.save_checkpoint = watched_step, watched_save
    memory, files, stopped, start = [], [], 0, time.monotonic()
    try:
        for _ in range(cycles):
            now["begin"] = time.monotonic()
            try:
                loop.train(config, open_dataset(data), run, keep=KEEP)
            except loop.TrainingStopped as stop:
                assert stop.exit_code == 143
                times["stop"].append(time.monotonic() - now["signal"])
                stopped += 1
            gc.collect()
            memory.append(resident())
            files.append(len(os.listdir("/proc/self/fd")))
    finally:
        loop.train_step, runstate.save_checkpoint = step, save
    seconds = time.monotonic() - start
    assert (now["done"], stopped) == (steps // cycles * cycles, cycles - 1)
    growth = max(memory[-3:]) / max(memory[: max(1, cycles // 4)]) - 1
    assert growth < 0.02, f"memory grew by {growth:.1%}: {memory}"
    assert len(set(files[1:])) == 1, f"open files: {files}"
    assert now["most"] <= KEEP + 2, f"{now['most']} checkpoints"
    assert max(times["resume"]) < 60 and max(times["stop"]) <= 30, times
    return {
        "steps": now["done"],
        "cycles": cycles,
        "memory_growth_percent": round(100 * growth, 2),
        "resident_mib": round(memory[-1] / 2**20),
        "open_files": files[-1],
        "most_checkpoints": now["most"],
        "saves": len(times["save"]),
        "step_ms": round(1000 * (seconds - sum(times["save"])) / now["done"], 1),
        "save_ms": round(1000 * sum(times["save"]) / len(times["save"]), 1),
        "slowest_resume_s": round(max(times["resume"]), 2),
        "slowest_stop_s": round(max(times["stop"]), 2),
        "seconds": round(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(soak(Path(work), options.steps, options.cycles)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
