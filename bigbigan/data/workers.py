"""Jobs done ahead by worker processes, with results in the order of the jobs."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Job = TypeVar("Job")
Result = TypeVar("Result")

DESCRIPTORS = 8  # that a worker takes in this process, with those of a few results on their way
SPARE = 16  # descriptors that are needed besides


def default_workers() -> int:
    """One for each of this process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))  # torchrun's processes a machine


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, *, ahead: int = 2
) -> Generator[Result, None, None]:
    """Results in the order of the jobs, up to `ahead` a worker waiting to be taken (0 workers: here, when asked for).

    Jobs are taken from their iterator in this process, so the workers' number changes no result. Workers leave
    SIGINT and SIGTERM to this process, which may want to finish its step first.

    Raises:
        ChildProcessError: a worker cannot start, cannot pass on its results, or died. Where this process is busy with
            something else at that moment, torch raises RuntimeError there ("DataLoader worker … is killed").
    """
    failure: Exception | None = None
    _check_descriptors(workers)

    def watched() -> Generator[Job, None, None]:
        nonlocal failure
        try:
            yield from jobs
        except Exception as error:
            failure = error
            raise

    loader: Any = DataLoader(
        _Results(function),
        sampler=watched(),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=_prepare_worker if workers else None,
        # Workers inherit what is in memory; started otherwise, as by Python 3.14, each gets a pickled copy.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # without one, torch's global state would move
    )
    try:
        for result in loader:
            if isinstance(result, _Unsent):
                raise _too_few(workers, result.reason)
            yield result
    except (RuntimeError, OSError, EOFError) as error:
        if error is failure or isinstance(error, ChildProcessError) or str(error).startswith("Caught "):
            raise
        if str(error).startswith("Too many open files") or getattr(error, "errno", 0) in _LIMITS:  # torch's words
            raise _too_few(workers, str(error).partition(".")[0]) from error
        # Torch's words again; or a broken pipe, when it died while it handed a result over.
        lost = workers > 0 and isinstance(error, ConnectionError | EOFError | FileNotFoundError)
        if not lost and not str(error).startswith("DataLoader worker"):
            raise
        hint = "It decodes images; the usual cause is too little memory, or too few open files (`ulimit -n`)"
        raise ChildProcessError(
            f"a DataLoader worker died ({str(error) or type(error).__name__}). {hint}: try fewer workers"
        ) from error


_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)  # of open files and of processes


def _too_few(workers: int, reason: str) -> ChildProcessError:
    return ChildProcessError(
        f"{workers} worker processes do not fit into this system's limits ({reason}): allow more open files and "
        "processes (such as `ulimit -n 1024`), or use fewer workers"
    )


def _check_descriptors(workers: int) -> None:
    """Before torch starts workers, since one that fails halfway leaves the others behind."""
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(DESCRIPTORS * workers + SPARE if workers else 0):
                stack.enter_context(open(os.devnull, "rb"))
        except OSError as error:
            raise _too_few(workers, str(error.strerror)) from error


class _Unsent:
    """In place of a result that a worker could not pass on: the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Results(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, job: Any) -> Any:
        return self.function(job)


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    _leave_signals()
    # Results are sent by a thread, whose errors would be printed and the result dropped: who waits for it, waits on.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_reason  # type: ignore[attr-defined]
    sys.excepthook = _print_line  # of the thread that passes file descriptors on; the rest is raised in the parent


def _send_reason(results: Any, error: Exception, sent: tuple[int, Any]) -> None:
    results.put((sent[0], _Unsent(str(error).partition("\n")[0])))


def _print_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(f"a worker process cannot pass on its results: {error}", file=sys.stderr)


def _leave_signals() -> None:
    """Ctrl-C and `kill` reach a whole group of processes, but only the parent may end a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
