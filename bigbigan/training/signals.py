"""SIGTERM and SIGINT while training: the step is finished and checkpointed first."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bigbigan.training.distributed import Processes

REPEAT_SECONDS = 1.0  # `timeout`, torchrun and schedulers send a signal to the process and to its group
RESUME = "Checkpoint saved: run the same command again to resume"


class TrainingStopped(Exception):
    """A signal asked the run to stop; its checkpoint is written. `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, place: str):
        super().__init__(f"stopped by {signal.Signals(signum).name} after {place}. {RESUME}")
        self.exit_code = 128 + signum


class Interrupted(BaseException):
    """A signal came during work that may be given up; no Exception, which that work might handle."""


class Signals:
    """Collects SIGTERM and SIGINT so that the step can be finished; a second signal acts at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}
        self._first, self._interrupting = float("inf"), False

    def __enter__(self) -> Signals:
        for signum in map(int, (signal.SIGTERM, signal.SIGINT)):
            self._previous[signum] = signal.getsignal(signum)
            signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: object) -> None:
        self._first = min(self._first, time.monotonic())
        if time.monotonic() - self._first > REPEAT_SECONDS:
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
        self.received.append(signum)
        if self._interrupting:
            self._interrupting = False  # its echo must not disturb the cleaning up
            raise Interrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that a signal, even an earlier one, ends by `Interrupted` wherever it is."""
        self._interrupting = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def stop_if_received(self, processes: Processes, place: str) -> None:
        """
        Raises:
            TrainingStopped: one of the processes, which all have to ask, was sent a signal.
        """
        if processes.any(bool(self.received)):
            raise TrainingStopped(self.received[0] if self.received else signal.SIGTERM, place)
