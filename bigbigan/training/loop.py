"""The training loop; progress counts images, and one integer (the step) says where a run stands."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from tqdm import tqdm

from bigbigan.data.batches import Images
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.streaming import ImageStream
from bigbigan.model import BigBiGAN
from bigbigan.schema import ConfigError
from bigbigan.training.config import TrainConfig
from bigbigan.training.distributed import Processes, join_processes
from bigbigan.training.finetuning import load_model
from bigbigan.training.runfolder import claim_run, describe, prepare, write_config
from bigbigan.training.runstate import Run
from bigbigan.training.signals import RESUME, Signals, TrainingStopped
from bigbigan.training.step import train_step
from bigbigan.training.tensorboard import TensorBoard

__all__ = ["TrainingStopped", "check_split", "train"]

logger = logging.getLogger(__name__)

LINE_SECONDS = 60.0  # at most between two lines of progress where no bar is shown


def train(
    config: TrainConfig,
    data: ImageDataset | ImageStream,
    run: str | os.PathLike[str],
    *,
    device: str = "cpu",
    max_minutes: float | None = None,
    keep: int = 2,
    keep_snapshots: bool = False,
    workers: int | None = None,
    timeout_minutes: float = 30.0,
    init: BigBiGAN | None = None,
    tensorboard: bool = False,
) -> Path:
    """Trains until `config.total_images`, or for `max_minutes`, in the folder `run`; resumes from its checkpoint.

    Under torchrun all its processes train together, to the same result as one. After `max_minutes` a checkpoint and a
    snapshot are written; on SIGTERM or SIGINT the step is finished and checkpointed. Returns the run folder.

    A run may be resumed with other values of `runfolder.CHANGEABLE`, which decide no weights: more `total_images`, say.

    Args:
        keep: newest checkpoints that stay; that of the best snapshot stays beside them.
        keep_snapshots: all of them, not the newest and the best alone.
        workers: processes that decode images, for each training process; None: by the number of cores.
        timeout_minutes: without an answer from another process, after which a process gives up (snapshots may take
            longer); in a process group that the caller has begun, its own timeout counts instead.
        init: a model that the run starts from; at step 0 its networks compute exactly what this one does.
        tensorboard: also write `tensorboard/` in the run folder.

    Raises:
        ConfigError: the folder holds a run with another configuration or other data, or is neither new, nor empty, nor
            a run; `init` has other networks; or another process trains there.
        ValueError: an argument is out of range; the batch does not split over the processes; too many images are
            unreadable.
        FloatingPointError: a loss or a weight is not finite; the last checkpoint stands.
        OSError: from the disk; the last checkpoint stands.
        PeerError: another process failed.
        TrainingStopped: after a signal.
    """
    # Options, before any work.
    max_minutes = float("inf") if max_minutes is None else max_minutes
    _check_options(keep, workers, max_minutes, timeout_minutes)
    if isinstance(data, ImageDataset) and len(data) < 2:
        raise ConfigError(f"the data is {len(data)} image; training needs two or more")
    deadline, folder, model = time.monotonic() + 60 * max_minutes, Path(run), config.model
    with join_processes(device, timeout_minutes) as processes, contextlib.ExitStack() as stack:
        check_split(config, processes)

        # The folder: one owner, one configuration, one data set.
        description = describe(config, data, init)
        with processes.main_first():
            if processes.is_main:
                stack.enter_context(claim_run(folder))
        _check_same_data(data, processes)
        with processes.main_first():
            if processes.is_main:
                prepare(folder, description)

        # Data. Of a stream, the main process holds as many images as its snapshots' probes and statistics take.
        head = max(10_000, config.probe_images + config.probe_images // 3) if processes.is_main else 0
        images = Images(
            data,
            model.preprocess,
            model.image_channels,
            augmentation=config.augmentation,
            workers=workers,
            head=head,
        )

        # Networks, averages and optimisers: from the last checkpoint, from `init`, or anew.
        state = Run(config, folder, description, processes, images, keep=keep, keep_snapshots=keep_snapshots)
        stack.callback(state.batches.close)
        if not state.resume() and init is not None and (fresh := load_model(state.training, init)):
            logger.warning("%s has no %s: initialised anew", init.info.name, ", ".join(fresh))
        with processes.main_first():
            if processes.is_main:
                write_config(folder, description)
        processes.parallelize(state.training)
        # The wrappers must not outlive the process group: the last of its owners waits for its thread, and one that
        # holds Python's lock meanwhile, as these do, may wait forever.
        stack.callback(state.training.parallel.clear)

        # What a person sees: a bar on a terminal, lines elsewhere, TensorBoard if asked for.
        bar = tqdm(total=state.total * config.batch_size, initial=state.num_images, unit="img", desc=config.name,
                   disable=None if processes.is_main else True)  # fmt: skip
        stack.enter_context(bar)
        if tensorboard and processes.is_main:
            state.tensorboard = stack.enter_context(TensorBoard(folder, state.num_images))
        signals = stack.enter_context(Signals())

        # A snapshot that an earlier call was kept from.
        state.start_clock()
        if state.lacks_snapshot:
            _snapshot(state, signals)
        last_line = time.monotonic()
        while state.step < state.total:
            # One step: D's updates, then one of G and E.
            metrics = train_step(state.training, state.make_batch, state.num_images + config.batch_size)
            state.step += 1
            bar.update(config.batch_size)

            # Log.
            if state.crosses(config.log_images):
                state.log(metrics, bar.disable)
                last_line = time.monotonic()
            elif bar.disable and processes.is_main and time.monotonic() - last_line > LINE_SECONDS:
                logger.info("%s", state.progress())
                last_line = time.monotonic()

            # Checkpoint: first, so that a signal need not wait for the snapshot.
            stopping = processes.any(bool(signals.received) or time.monotonic() > deadline)
            if stopping or state.crosses(config.checkpoint_images) or state.crosses(config.snapshot_images):
                state.checkpoint()
            if stopping:
                signals.stop_if_received(processes, state.place)

            # Snapshot.
            if stopping or state.crosses(config.snapshot_images):
                _snapshot(state, signals)
            if stopping:
                break

        # What was done, and what to do next.
        if processes.is_main:
            ended = "finished" if state.step == state.total else "stopped by the limit of minutes"
            best = f"; best snapshot: {state.best['snapshot']}" if state.best else ""
            again = f". {RESUME}" if state.step < state.total else ""
            logger.info("%s after %s%s%s", ended, state.place, best, again)
    return folder


def _snapshot(state: Run, signals: Signals) -> None:
    """One of the main process, which may take longer than the others wait for anything else.

    Raises:
        TrainingStopped: in all processes, after a signal to one.
    """
    with state.processes.main_first(long=True):
        if state.processes.is_main:
            state.snapshot(signals)
    signals.stop_if_received(state.processes, state.place)


def _check_same_data(data: ImageDataset | ImageStream, processes: Processes) -> None:
    """
    Raises:
        ConfigError: the processes see different data.
    """
    if len(digests := set(processes.gather(data.digest))) > 1:
        raise ConfigError(
            f"the processes see different data: their digests are {', '.join(sorted(digests))}. That of image "
            "files holds their times: copy folders with cp -p or rsync -t"
        )


def _check_options(keep: int, workers: int | None, max_minutes: float, timeout_minutes: float) -> None:
    """Before any work: `keep` would be refused by the first checkpoint only, and NaN minutes never pass."""
    for name, value, fits, wanted in (
        ("keep", keep, keep >= 1, "at least 1"),
        ("workers", workers, workers is None or workers >= 0, "at least 0"),
        ("max_minutes", max_minutes, max_minutes > 0, "above 0"),
        ("timeout_minutes", timeout_minutes, 0 < timeout_minutes < float("inf"), "above 0, and finite"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}; it must be {wanted}")


def check_split(config: TrainConfig, processes: Processes) -> None:
    """Refuses a batch that processes and micro-batches cannot share evenly, and one image for batch norm to normalise.

    Raises:
        ValueError: names the batch, and by what it has to be divisible.
    """
    pieces = processes.world_size * config.accumulate
    every = 4 * config.batch_size // config.rotated_batch_size if config.rotated_batch_size else 1
    if config.batch_size % (pieces * every):
        raise ValueError(
            f"a batch of {config.batch_size} does not split into {pieces} pieces ({processes.world_size} processes, "
            f"accumulate {config.accumulate}) of multiples of {every}; set batch_size to a multiple of {pieces * every}"
        )
    if config.batch_size == config.accumulate:
        raise ValueError(f"batch_size {config.batch_size} is one image a micro-batch; batch norm needs two or more")
