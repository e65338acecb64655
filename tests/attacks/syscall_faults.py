"""A disk that fails at any single call never costs an earlier checkpoint, and is never kept quiet.

    python -m tests.attacks.syscall_faults

Every open, write, flush, close, fsync, mkdir, rename, unlink and rmdir below the run folder fails once, with ENOSPC,
EIO and EACCES in turn, in a process of its own: while it saves (after one intact checkpoint), or during a whole run.
The process has to end with an exit code other than 0 and name the error, an intact checkpoint has to be there, and
the same command has to come to the weights of a run without faults. The order of calls within a save is checked too:
each file's fsync, then the folder's, then the rename, then the parent folder's fsync, then the first removal.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigbigan.training import runstate
from bigbigan.training.checkpoint import PARTIAL, load_checkpoint
from tests.attacks import training_run
from tests.attacks.training_run import BATCH, arguments, make_data, result, strays

ERRORS = ("ENOSPC", "EIO", "EACCES")


class Disk:
    """Counts the calls that change `root`, and lets one of them fail."""

    def __init__(self, root: Path, fail: int = 0, number: int = errno.ENOSPC, active: bool = True):
        self.root, self.fail, self.number, self.active = str(root.resolve()), fail, number, active
        self.calls: list[tuple[str, str]] = []

    def call(self, name: str, path: Any) -> None:
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fspath(path))
        if self.active and place.startswith(self.root):
            self.calls.append((name, place))
            if len(self.calls) == self.fail:
                raise OSError(self.number, os.strerror(self.number), place)

    def install(self) -> None:
        self._wrap(os, "fsync"), self._wrap(os, "rename"), self._wrap(os, "replace")
        self._wrap(os, "truncate"), self._wrap(os, "open")
        for name in ("unlink", "rmdir"):
            self._wrap_at(name)
        self._wrap(os, "mkdir", lambda path: not os.path.isdir(path))  # else it does nothing
        plain = builtins.open

        def faulty_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+") or isinstance(file, int):
                return plain(file, mode, *rest, **options)
            self.call("open", file)
            return _File(plain(file, mode, *rest, **options), self)

        builtins.open = io.open = faulty_open

    def _wrap(self, module: Any, name: str, applies: Callable[[Any], bool] = lambda path: True) -> None:
        plain = getattr(module, name)

        def faulty(path: Any, *rest: Any, **options: Any) -> Any:
            if applies(path):
                self.call(name, path)
            return plain(path, *rest, **options)

        setattr(module, name, faulty)

    def _wrap_at(self, name: str) -> None:
        plain = getattr(os, name)

        def faulty(path: Any, *rest: Any, dir_fd: int | None = None, **options: Any) -> Any:
            parent = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            self.call(name, os.path.join(parent, os.fspath(path)))
            return plain(path, *rest, dir_fd=dir_fd, **options)

        setattr(os, name, faulty)


class _File:
    """A file whose writes count."""

    def __init__(self, file: Any, disk: Disk):
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name not in ("write", "flush"):
            return value

        def faulty(*arguments: Any) -> Any:
            self._disk.call(name, self._file.name)
            return value(*arguments)

        return faulty

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._disk.call("close", self._file.name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _run(train: list[str], run: Path, log: Path, scope: str, fail: int, number: int, calls: Path) -> None:
    """Child: trains with the `fail`-th call failing, within saves ("save") or at any time ("run")."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    disk = Disk(run, fail, number, active=scope == "run")
    save = runstate.save_checkpoint

    def watched(*values: Any, **options: Any) -> Path:
        disk.active = True
        try:
            return save(*values, **options)
        finally:
            disk.active = scope == "run"

    runstate.save_checkpoint = watched
    disk.install()
    training_run.plant({})
    code = training_run.cli.main(train)
    disk.active = False
    calls.write_text(json.dumps(disk.calls))
    sys.exit(code)


def check_order(calls: list[tuple[str, str]], checkpoints: Path) -> int:
    """Of one save that replaces an older checkpoint; returns how many files were synced before the rename."""
    names = [name for name, _ in calls]
    renames = [i for i, (name, path) in enumerate(calls) if name == "replace" and PARTIAL in path]
    put = renames[0]
    partial = calls[put][1]
    files = {path for name, path in calls[:put] if name == "open" and path.startswith(f"{partial}/")}
    assert len(files) > 1, calls[:put]
    for file in files:
        last_write = max(i for i, call in enumerate(calls) if call in (("write", file), ("flush", file)))
        assert last_write < calls.index(("fsync", file)) < calls.index(("fsync", partial)) < put, file
    parent = calls.index(("fsync", str(checkpoints.resolve())), put)
    removal = min(i for i, name in enumerate(names) if name in ("unlink", "rmdir") or (name == "replace" and i != put))
    assert put < parent < removal, names
    return len(files)


def sweep(work: Path, scope: str, errors: Sequence[str] = ERRORS, every: int = 1) -> dict[str, Any]:
    """Counts; an assertion fails if the promise is broken. Of the calls, each `every`-th fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([training_run.__name__, __name__])
    data, log, calls = make_data(work / "data"), work / "log", work / "calls"
    settings = {"total_images": 3 * BATCH, "checkpoint_images": BATCH, "snapshot_images": 2 * BATCH}
    first = [*arguments(data, work / "first", "--keep", "1", **settings), "--max-minutes", "1e-9"]

    def train(run: Path, fail: int = 0, number: int = 0, command: list[str] | None = None) -> int:
        command = command or arguments(data, run, "--keep", "1", **settings)
        child = context.Process(target=_run, args=(command, run, log, scope, fail, number, calls))
        child.start(), child.join()
        return int(child.exitcode or 0)

    def start(run: Path) -> None:  # with one checkpoint, to which nothing may happen
        assert (
            scope == "run" or train(run, command=[*arguments(data, run, "--keep", "1", **settings), *first[-2:]]) == 0
        )

    start(work / "whole")
    assert train(work / "whole") == 0, log.read_text()
    wanted, found = result(work / "whole"), [tuple(call) for call in json.loads(calls.read_text())]
    count = {"calls": len(found)}
    if scope == "save":
        second = next(i for i, (name, path) in enumerate(found) if name == "mkdir" and path.endswith("step-00000003"))
        count["synced_before_rename"] = check_order(found[:second], work / "whole" / "checkpoints")
    faults = 0
    for fail in range(1, len(found) + 1, every):
        for number in (getattr(errno, name) for name in errors):
            run, faults = work / f"run-{fail}-{number}", faults + 1
            start(run)
            code = train(run, fail, number)
            text, where = log.read_text(), (fail, os.strerror(number), found[fail - 1])
            assert code != 0, f"{where} was swallowed"
            assert os.strerror(number) in text.splitlines()[-1], f"{where}: {text[-300:]}"
            kept = load_checkpoint(run / "checkpoints")
            assert scope == "run" or (kept is not None and kept.step >= 1), where
            assert train(run) == 0, f"{where}: {log.read_text()[-300:]}"
            assert result(run) == wanted, where
            assert not strays(run), (where, strays(run))
    return {"scope": scope, **count, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", nargs="+", choices=("save", "run"), default=("save", "run"))
    parser.add_argument("--errors", nargs="+", default=ERRORS)
    parser.add_argument("--every", type=int, default=1, help="take each N-th call only")
    options = parser.parse_args()
    logging.disable()
    for scope in options.scope:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            counts = sweep(Path(work), scope, options.errors, options.every)
        print(json.dumps({**counts, "seconds": round(time.monotonic() - start)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
