"""SIGKILL at any moment, half of them inside a save, costs no more than the steps since the last checkpoint.

    python -m tests.attacks.kill_sweep --kills 50 --processes 1 --seed 0

Each run goes past the step at which the last one was killed, from a checkpoint that verifies. In the end weights,
averages, optimisers, the exported model and the metrics are those of a run that nobody killed, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from bigbigan.training.checkpoint import load_checkpoint
from tests.attacks import training_run
from tests.attacks.training_run import BATCH, ROOT, arguments, environment, make_data, result, shell_command, strays

SLOW = 0.2  # seconds, about, that a save takes longer


def _child(faults: dict[str, Any], train: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    training_run.plant(faults)
    sys.exit(training_run.cli.main(train))


class _Job:
    """A run that has been started: one process of a warm fork server, or torchrun and its processes."""

    def __init__(self, context: ForkServerContext | None, processes: int, faults: dict[str, Any], train: list[str],
                 log: Path):  # fmt: skip
        self.child: Any = None
        if context is not None and processes == 1:
            self.child = context.Process(target=_child, args=(faults, train, log))
            self.child.start()
            self.wait, self.running = self.child.join, self.child.is_alive
        else:
            with open(log, "a") as file:
                command = shell_command(processes, faults, train)
                popen = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), cwd=ROOT)
            self.child, self.wait, self.running = popen, popen.wait, lambda: popen.poll() is None

    def kill(self, moments: random.Random) -> None:
        """The whole tree, as when the power goes, or one of its processes."""
        workers = _children(self.child.pid)
        victims = [self.child.pid, *workers] if not workers or moments.random() < 0.5 else [moments.choice(workers)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        while any(map(_alive, workers)):
            time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _images(run: Path) -> int:
    """How far the metrics say that a run is."""
    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    with contextlib.suppress(ValueError):  # a line that is being written
        return int(json.loads(lines[-1])["num_images"]) if lines else 0
    return 0


def sweep(work: Path, kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Returns counts; an assertion fails if the promise is broken."""
    context = None
    if processes == 1:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([training_run.__name__, __name__])
    moments, data, log = random.Random(seed), make_data(work / "data"), work / "log"
    run, marker = work / "run", work / "saving"
    faults, steps = {"slow": SLOW, "marker": str(marker)}, 5 * kills + 6
    settings = {"total_images": steps * BATCH, "snapshot_images": (steps // 3 + 1) * BATCH}
    train = arguments(data, run, **settings)

    whole = _Job(context, processes, {}, arguments(data, work / "whole", **settings), log)
    inside, killed_at = 0, 0
    for number in range(kills):
        job = _Job(context, processes, faults, train, log)
        while _images(run) <= killed_at and job.running():  # past the step that was killed
            time.sleep(0.005)
        if number % 5 < 3:  # inside the next save
            while not marker.exists() and job.running():
                time.sleep(0.002)
        time.sleep(moments.uniform(0, SLOW))
        assert job.running(), log.read_text()[-3000:]
        inside += marker.exists()
        job.kill(moments)
        marker.unlink(missing_ok=True)
        killed_at = max(killed_at, _images(run))
        found = load_checkpoint(run / "checkpoints")  # raises if none is intact
        assert found is None or found.step * BATCH <= killed_at
    last = _Job(context, processes, {}, train, log)
    last.wait()
    whole.wait()
    killed, wanted = result(run), result(work / "whole")
    assert killed == wanted, f"not as in the run that nobody killed: {sorted(killed.items() ^ wanted.items())}"
    assert not strays(run), strays(run)
    text = log.read_text()
    assert "passing over a corrupt checkpoint" not in text, "a half checkpoint had a final name"
    return {"kills": kills, "inside_a_save": inside, "resumed": text.count("resuming from"), "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        counts = sweep(Path(work), options.kills, options.processes, options.seed)
    assert counts["inside_a_save"] >= 0.4 * options.kills, counts
    print(json.dumps({**counts, "processes": options.processes, "seconds": round(time.monotonic() - start)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
