"""Runs numbered cases in child processes, so that a crash, a hang or a swollen process is a result, not an end."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 5  # of processor time a case may take
HANG = 120  # seconds on the clock: the machine may be busy
MEMORY = 64 << 20  # beyond twice the file
BATCH = 5000  # cases a process


@dataclass
class Result:
    """How often each outcome came, and everything that should not have come."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0  # growth of a case beyond twice its file, in bytes

    def __str__(self) -> str:
        lines = [", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))]
        lines.append(f"slowest case {self.slowest:.2f} s, memory beyond twice the file {self.largest / 2**20:.1f} MiB")
        groups: dict[str, list[str]] = {}
        for finding in self.findings:
            case, _, text = finding.partition(": ")
            groups.setdefault(text, []).append(case)
        lines += [f"FINDING x{len(cases)}, first {cases[0]}: {text}" for text, cases in groups.items()]
        return "\n".join(lines)


def _resident(peak: bool) -> int:
    """Bytes in memory, now or at the most since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]) << 10


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then counts from the start of the process, which is stricter
        Path("/proc/self/clear_refs").write_text("5")


def run_here(attack: Callable[[int], tuple[str, int]], first: int, count: int) -> None:
    """In the child: `attack(case)` gives an outcome and the size of its file, or raises, which is a finding."""
    for case in range(first, first + count):
        print(json.dumps({"at": case}), flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        _reset_peak()
        before, start = _resident(peak=False), time.process_time()
        row: dict[str, object] = {}
        try:
            row["outcome"], size = attack(case)
            row["seconds"] = time.process_time() - start
            row["growth"] = _resident(peak=True) - before - 2 * size
        except Exception as error:  # whatever was not foreseen is what is looked for
            row["finding"] = f"{type(error).__name__} at {_place(error)}: {' '.join(str(error).split())[:200]}"
        print(json.dumps(row), flush=True)
    faulthandler.cancel_dump_traceback_later()


def _place(error: Exception) -> str:
    """The last line of the converter that the error came through."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.parent.name in ("weights_conversion", "attacks"):
            place = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def run_children(module: str, arguments: list[str], count: int, first: int = 0) -> Result:
    """`python -m MODULE ARGUMENTS --child FIRST COUNT` until all cases are through, over crashes."""
    result, end = Result(), first + count
    while first < end:
        command = [sys.executable, "-m", module, *arguments, "--child", str(first), str(min(BATCH, end - first))]
        with tempfile.TemporaryFile() as errors:
            at = None
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    row = json.loads(line)
                    at = row.get("at", at)
                    _count(result, at, row)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
        if process.returncode == 0:
            first += BATCH
        elif at is None:
            raise RuntimeError(f"{' '.join(command)} does not start:\n{text[-3000:]}")
        else:
            result.findings.append(f"case {at}: the process ended with {process.returncode}: {text.strip()[-300:]}")
            first = at + 1
    return result


def _count(result: Result, at: int | None, row: dict[str, object]) -> None:
    if finding := row.get("finding"):
        result.findings.append(f"case {at}: {finding}")
    if outcome := row.get("outcome"):
        result.outcomes[str(outcome)] += 1
        seconds, growth = float(str(row["seconds"])), int(str(row["growth"]))
        result.slowest, result.largest = max(result.slowest, seconds), max(result.largest, growth)
        if seconds > SECONDS:
            result.findings.append(f"case {at}: took {seconds:.0f} s")
        if growth > MEMORY:
            result.findings.append(f"case {at}: grew by {growth >> 20} MiB more than twice its file")
