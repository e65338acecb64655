"""A process that dies, raises, hangs or diverges ends the whole run soon, with its name, and costs no checkpoint.

    python -m tests.attacks.rank_faults --ranks 4

Processes under torchrun, over gloo, each with a worker that decodes images. One of them is killed, raises, hangs or
gets NaN in a step, in a save or in its data, after the first checkpoint. Nothing may be left of the process tree
after the timeout, 30 seconds of torchrun's and the time of a whole run without faults (5 seconds with --ends-only);
the last 20 lines have to say why; the same command has to come to the weights of a run without faults. Last, SIGTERM
to torchrun: a checkpoint of the step that all processes had reached, and nothing left, within 30 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bigbigan.training.checkpoint import load_checkpoint
from tests.attacks.training_run import BATCH, CROPS, ROOT, arguments, environment, make_data, result, shell_command

KINDS, PLACES = ("kill", "raise", "hang", "nan"), ("step", "save", "data")
TIMEOUT = 6.0  # seconds without an answer
SETTINGS = {**CROPS, "total_images": 4 * BATCH, "checkpoint_images": BATCH, "snapshot_images": 4 * BATCH}
NAMES = {  # what the last lines have to say
    "kill": r"Signal 9 \(SIGKILL\) received",
    "raise": "injected fault",
    "hang": "(?i)timed out|timeout",
    "nan": "not finite|loss is nan",
}


def group_members(tag: str) -> list[int]:
    """Processes with `tag` in their environment, dead ones not counted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            alive = entry.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and tag.encode() in entry.joinpath("environ").read_bytes():
                found.append(int(entry.name))
    return found


def start(ranks: int, faults: dict[str, Any], train: list[str], log: Path, tag: str) -> subprocess.Popen[bytes]:
    command = shell_command(ranks, faults, [*train, "--workers", "1", "--timeout-minutes", str(TIMEOUT / 60)])
    with open(log, "w") as file:
        variables = {**environment(), "ATTACK": tag}
        return subprocess.Popen(command, stdout=file, stderr=file, env=variables, cwd=ROOT)


def finish(process: subprocess.Popen[bytes], tag: str, seconds: float) -> float:
    """Seconds until nothing is left of the tree."""
    begin = time.monotonic()
    try:
        process.wait(seconds)
        while group_members(tag) and time.monotonic() - begin < seconds:
            time.sleep(0.1)
        assert not group_members(tag), f"still there after {seconds} seconds: {group_members(tag)}"
    finally:
        for pid in group_members(tag):
            os.kill(pid, signal.SIGKILL)
    return time.monotonic() - begin


def attack(work: Path, ranks: int, rank: int, kind: str, where: str, *, slack: float, again: bool = True) -> float:
    """One fault; returns how many seconds the run took to end: at most `slack` beyond the timeouts."""
    tag = f"attack-{os.getpid()}-{rank}-{kind}-{where}"
    run, log, data = work / tag, work / f"{tag}.log", work / "data"
    faults = {"rank": rank, "kind": kind, "where": where, "step": 3}
    process = start(ranks, faults, arguments(data, run, **SETTINGS), log, tag)
    step_2 = run / "checkpoints" / "step-00000002"
    while not step_2.exists() and process.poll() is None:
        time.sleep(0.05)
    seconds = finish(process, tag, TIMEOUT + 30 + slack)
    text = log.read_text()
    last = "\n".join(text.splitlines()[-20:])
    assert process.returncode != 0, tag
    assert re.search(NAMES[kind], last), f"{tag}: the last lines do not say why:\n{last}"
    kept = load_checkpoint(run / "checkpoints")
    assert kept is not None and 2 <= kept.step <= 3, tag
    assert all(value.isfinite().all() for group in kept.tensors.values() for value in group.values()), tag
    if again:
        process = start(ranks, {}, arguments(data, run, **SETTINGS), log, tag)
        finish(process, tag, 120)
        assert process.returncode == 0, log.read_text()[-3000:]
        assert result(run) == result(work / f"whole-{ranks}"), f"{tag}: not the weights of a run without faults"
    return seconds


def stop(work: Path, ranks: int) -> dict[str, Any]:
    """SIGTERM to torchrun in the middle of a long run."""
    tag, run, log = f"attack-{os.getpid()}-stop", work / "stop", work / "stop.log"
    long = {"total_images": 10**6, "checkpoint_images": 10**6, "snapshot_images": 10**6}
    process = start(ranks, {}, arguments(work / "data", run, **{**SETTINGS, **long}), log, tag)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    seconds = finish(process, tag, 30)
    text = log.read_text()
    assert len(re.findall("stopped by SIGTERM after step .*same command again to resume", text)) == ranks, text[-3000:]
    kept = load_checkpoint(run / "checkpoints")
    logged = json.loads(metrics.read_text().splitlines()[-1])["num_images"]
    assert kept is not None and kept.step * BATCH == logged, (kept and kept.step, logged)
    return {"sigterm_seconds": round(seconds, 1), "stopped_at_step": kept.step}


def whole(work: Path, ranks: int) -> float:
    """The run that nothing happens to; returns its seconds, which tell how busy the machine is."""
    tag, run = f"attack-{os.getpid()}-whole", work / f"whole-{ranks}"
    process = start(ranks, {}, arguments(work / "data", run, **SETTINGS), work / "log", tag)
    seconds = finish(process, tag, 120)
    assert process.returncode == 0, (work / "log").read_text()[-3000:]
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faulty", type=int, nargs="+", help="which of them fail (default: the first and the last)")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--places", nargs="+", default=PLACES)
    parser.add_argument("--ends-only", action="store_true", help="neither go on after a fault nor send SIGTERM")
    options = parser.parse_args()
    begin, seconds = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work / "data")
        slack = 5.0 if options.ends_only else max(5.0, whole(work, options.ranks))
        faulty = options.faulty or (0, options.ranks - 1)
        for kind, where, rank in itertools.product(options.kinds, options.places, faulty):
            seconds[kind, where, rank] = attack(
                work, options.ranks, rank, kind, where, slack=slack, again=not options.ends_only
            )
            print(kind, where, f"rank {rank}:", f"{seconds[kind, where, rank]:.1f} s", flush=True)
        stopped = {} if options.ends_only else stop(work, options.ranks)
    counts = {"ranks": options.ranks, "faults": len(seconds), "slowest_end_seconds": round(max(seconds.values()), 1)}
    print(
        json.dumps(
            {
                **counts,
                **stopped,
                "timeout_seconds": TIMEOUT,
                "slack_seconds": round(slack, 1),
                "seconds": round(time.monotonic() - begin),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
