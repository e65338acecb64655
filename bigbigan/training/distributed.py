"""Processes of one run: torchrun's environment, agreement between ranks, networks wrapped for data parallelism."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bigbigan.collectives import gather
from bigbigan.layers import synchronize_batch_norm
from bigbigan.training.step import TrainingState

ECHO_SECONDS = 2.0  # torchrun looks after its processes every 0.1 seconds
BEAT_SECONDS = 2.0  # between two signs of life of a main process that the others wait for


class PeerError(RuntimeError):
    """Another process of the run failed."""


@dataclass(frozen=True)
class Processes:
    """Those that train together, as one of them sees it; the default is a process alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    waiting: dist.ProcessGroup | None = None  # on the host, for signs of life alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one of the processes; all of them have to ask."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    @contextmanager
    def main_first(self, *, long: bool = False) -> Iterator[None]:
        """The others wait at the end of the block for the main process, whose error there ends them all.

        They give up after the run's timeout; with `long` only if the main process stops showing signs of life.

        Raises:
            PeerError: in the other processes, if the main one failed.
        """
        if self.is_main:
            try:
                with self._signs_of_life() if long else contextlib.nullcontext():
                    yield
            except Exception as error:
                with contextlib.suppress(RuntimeError):  # the others gave up waiting; this error matters more
                    self.gather(f"{type(error).__name__}: {error}")
                raise
        else:
            yield
            while long and self._is_busy(False):
                pass
        if failure := self.gather(None)[0]:
            raise PeerError(f"the main process failed with {failure}")

    def _is_busy(self, busy: bool) -> bool:
        """Whether the main process is still at work; what the others pass does not matter."""
        value = torch.tensor([float(busy)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.waiting)
        return bool(value.item())

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """A thread of the main process that tells the others every BEAT_SECONDS to wait on, and at the end not to."""
        done = threading.Event()

        def beat() -> None:
            # Another process is gone: the main one learns of it by its next collective.
            with contextlib.suppress(RuntimeError):
                while not done.wait(BEAT_SECONDS):
                    self._is_busy(True)
                self._is_busy(False)

        thread = threading.Thread(target=beat, daemon=True)
        if self.world_size > 1:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self.world_size > 1:
                thread.join()

    @contextmanager
    def borrowed_threads(self) -> Iterator[None]:
        """Gives the main process the threads of those on its machine that wait; torchrun leaves each of them one."""
        own, local = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.world_size > 1 and local > 1:
            torch.set_num_threads(max(own, min(own * local, os.cpu_count() or 1)))
        try:
            yield
        finally:
            torch.set_num_threads(own)

    def gather(self, value: Any) -> list[Any]:
        """JSON-able values of all processes, in order of rank."""
        return [value] if self.world_size == 1 else gather(value, self.device)

    def share(self, size: int, what: str = "batch_size") -> slice:
        """This process's rows of `size` that are dealt evenly.

        Raises:
            ValueError: they cannot be.
        """
        if size % self.world_size:
            raise ValueError(f"{what} {size} does not split evenly over {self.world_size} processes")
        own = size // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)

    def parallelize(self, state: TrainingState) -> None:
        """Wraps the networks: compiled if the run says so, gradients averaged, batch norm over all processes."""
        for name, network in state.networks.items():
            if state.config.compile:
                network.compile()
            parallel = network
            if self.world_size > 1:
                synchronize_batch_norm(network, dist.group.WORLD)
                devices = [self.device] if self.device.type == "cuda" else None
                parallel = DistributedDataParallel(
                    parallel,
                    device_ids=devices,
                    broadcast_buffers=False,  # every process computes the same ones
                    # There are none. But looking for them keeps gradients from being grouped anew after the first
                    # step: a resumed run would do so at another step, and sums of more than two round by their place.
                    find_unused_parameters=devices is None,
                )
            state.parallel[name] = parallel
        state.all_finite = self._all_finite  # type: ignore[method-assign]

    def _all_finite(self, loss: torch.Tensor) -> bool:
        own = bool(torch.isfinite(loss))
        if self.any(not own) and own:
            raise PeerError("a loss is not finite in another process")
        return own


@contextmanager
def join_processes(device: str = "cpu", timeout_minutes: float = 30.0) -> Iterator[Processes]:
    """The processes that torchrun started (WORLD_SIZE and its kin in the environment), or this one alone.

    A process group that the caller has begun is taken, and stays: needed to train more than once in one process, which
    torch cannot join twice under one torchrun. Its own timeout counts, then.

    On "cuda" each takes the device of its local rank. After `timeout_minutes` without an answer a collective fails.
    A process that fails only because another one did waits a moment, so that torchrun names the other.
    """
    begun = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if begun else int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(device=torch.device(device))
        return
    rank, own = dist.get_rank() if begun else int(os.environ["RANK"]), torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(own)
    timeout = timedelta(minutes=timeout_minutes)
    if not begun:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timeout)
    waiting = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield Processes(rank, world_size, own, waiting)
    except RuntimeError as error:  # of a collective, as a rule
        time.sleep(ECHO_SECONDS)
        if re.search("(?i)timed out|timeout", str(error)) and not isinstance(error, PeerError):
            raise PeerError(
                f"another process did not answer within {timeout_minutes:g} minutes; where it only was slow, "
                f"allow more (--timeout-minutes, in Python timeout_minutes=). {error}"
            ) from error
        raise
    finally:
        if not begun:
            dist.destroy_process_group()
