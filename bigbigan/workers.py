"""Jobs done ahead by worker processes, with results in the order of the jobs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Job = TypeVar("Job")
Result = TypeVar("Result")


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
        ChildProcessError: a worker died. Where this process is busy with something else at that moment, torch raises
            RuntimeError there ("DataLoader worker … is killed").
    """
    failure: Exception | None = None

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
        worker_init_fn=_leave_signals if workers else None,
        # Workers inherit what is in memory; started otherwise, as by Python 3.14, each gets a pickled copy.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # without one, torch's global state would move
    )
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # Torch's word for it; or a broken pipe, when it died while it handed a result over.
        died = str(error).startswith("DataLoader worker")
        if not isinstance(error, RuntimeError):
            died = workers > 0 and error is not failure and not str(error).startswith("Caught ")
        if not died:
            raise
        hint = "It decodes images; too little memory is the usual cause: try fewer workers"
        raise ChildProcessError(f"a DataLoader worker died ({error}). {hint}") from error


class _Results(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, job: Any) -> Any:
        return self.function(job)


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Ctrl-C and `kill` reach a whole group of processes, but only the parent may end a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
