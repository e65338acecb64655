"""The training loop; progress counts images, and one integer (the step) says where a run stands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bigbigan._version import __version__
from bigbigan.config import ModelInfo
from bigbigan.model import BigBiGAN
from bigbigan.schema import ConfigError
from bigbigan.training.batches import Images
from bigbigan.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from bigbigan.training.config import TrainConfig
from bigbigan.training.diffaugment import NUM_DIFF_DRAWS
from bigbigan.training.distributed import Processes, join_processes
from bigbigan.training.export import inference_model
from bigbigan.training.finetuning import load_model
from bigbigan.training.latents import draw_latents
from bigbigan.training.monitor import Monitor
from bigbigan.training.runfolder import (
    check_same_run,
    claim_run,
    describe,
    keep_snapshot,
    prepare,
    snapshot_name,
    write_config,
)
from bigbigan.training.sources import ImageDataset
from bigbigan.training.step import Batch, TrainingState, train_step
from bigbigan.training.streaming import ImageStream
from bigbigan.training.tensorboard import TensorBoard

logger = logging.getLogger(__name__)

VERSIONS = {"bigbigan": __version__, "torch": str(torch.__version__)}
REPEAT_SECONDS = 1.0  # `timeout`, torchrun and schedulers send a signal to the process and to its group
LINE_SECONDS = 60.0  # at most between two lines of progress where no bar is shown


class TrainingStopped(Exception):
    """A signal asked the run to stop; its checkpoint is written. `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, place: str):
        super().__init__(f"stopped by {signal.Signals(signum).name} after {place}. {RESUME}")
        self.exit_code = 128 + signum


RESUME = "Checkpoint saved: run the same command again to resume"


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
    max_minutes = float("inf") if max_minutes is None else max_minutes
    _check_options(keep, workers, max_minutes, timeout_minutes)
    deadline = time.monotonic() + 60 * max_minutes
    with join_processes(device, timeout_minutes) as processes, contextlib.ExitStack() as stack:
        check_split(config, processes)
        processes.on_main(lambda: stack.enter_context(claim_run(Path(run))))
        state = _Run(config, data, Path(run), processes, keep, keep_snapshots, workers, init)
        stack.callback(state.batches.close)
        if tensorboard and processes.is_main:
            state.tensorboard = stack.enter_context(TensorBoard(Path(run), state.num_images))
        # The wrappers must not outlive the process group: the last of its owners waits for its thread, and one that
        # holds Python's lock meanwhile, as these do, may wait forever.
        stack.callback(state.training.parallel.clear)
        # A bar on a terminal.
        bar = tqdm(total=state.total * config.batch_size, initial=state.num_images, unit="img", desc=config.name,
                   disable=None if processes.is_main else True)  # fmt: skip
        stack.enter_context(bar)
        signals = stack.enter_context(_Signals())
        if state.lacks_snapshot:
            state.snapshot(signals)
        last_line = time.monotonic()
        while state.step < state.total:
            metrics = train_step(state.training, state.make_batch, state.num_images + config.batch_size)
            state.step += 1
            bar.update(config.batch_size)
            if state.crosses(config.log_images):
                state.log(metrics, bar.disable)
                last_line = time.monotonic()
            elif bar.disable and processes.is_main and time.monotonic() - last_line > LINE_SECONDS:
                last_line = time.monotonic()
                logger.info("%s", state.progress())
            stopping = processes.any(bool(signals.received) or time.monotonic() > deadline)
            # First the checkpoint, so that a signal need not wait for the snapshot.
            if stopping or state.crosses(config.checkpoint_images) or state.crosses(config.snapshot_images):
                state.checkpoint()
            if stopping:
                signals.end_if_received(processes, state.place)
            if stopping or state.crosses(config.snapshot_images):
                state.snapshot(signals)
            if stopping:
                break
        if processes.is_main:
            ended = "finished" if state.step == state.total else "stopped by the limit of minutes"
            best = f"; best snapshot: {state.best['snapshot']}" if state.best else ""
            again = f". {RESUME}" if state.step < state.total else ""
            logger.info("%s after %s%s%s", ended, state.place, best, again)
    return Path(run)


class _Run:
    """A run as one of its processes has it in memory: data, networks, and how far it is."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageDataset | ImageStream,
        folder: Path,
        processes: Processes,
        keep: int,
        keep_snapshots: bool,
        workers: int | None,
        init: BigBiGAN | None,
    ):
        self.config, self.folder, self.processes, self.keep = config, folder, processes, keep
        self.keep_snapshots = keep_snapshots
        if isinstance(data, ImageDataset) and len(data) < 2:
            raise ConfigError(f"the data is {len(data)} image; training needs two or more")
        self.description = describe(config, data, init)
        self.tensorboard: TensorBoard | None = None
        if len(digests := set(processes.gather(data.digest))) > 1:
            raise ConfigError(
                f"the processes see different data: their digests are {', '.join(sorted(digests))}. That of image "
                "files holds their times: copy folders with cp -p or rsync -t"
            )
        processes.on_main(lambda: prepare(folder, self.description))
        model, augmentation = config.model, config.augmentation
        # Of a stream, the main process holds as many images as its snapshots' probes and statistics take.
        head = max(10_000, config.probe_images + config.probe_images // 3) if processes.is_main else 0
        self.images = Images(
            data, model.preprocess, model.image_channels, augmentation=augmentation, workers=workers, head=head
        )
        self.batches = self.images.batches(
            config.batch_size, config.seed, rank=processes.rank, world_size=processes.world_size
        )
        self.monitor = Monitor(self.images, self.images.labels, config) if processes.is_main else None
        self.training = TrainingState(config, processes.device)
        self.step, self.total = 0, -(-config.total_images // config.batch_size)
        self.metrics, self.lacks_snapshot = folder / "metrics.jsonl", False
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        if not self._resume() and init is not None and (fresh := load_model(self.training, init)):
            logger.warning("%s has no %s: initialised anew", init.info.name, ", ".join(fresh))
        processes.on_main(lambda: write_config(folder, self.description))
        processes.parallelize(self.training)
        self.tick, self.tick_step = time.monotonic(), self.step

    @property
    def num_images(self) -> int:
        return self.step * self.config.batch_size

    @property
    def place(self) -> str:
        return f"step {self.step:,} of {self.total:,} ({self.num_images:,} images) in {self.folder}"

    def progress(self) -> str:
        """A line for logs, without a look at any loss: those lie on the device."""
        seconds = time.monotonic() - self.tick
        rate = (self.step - self.tick_step) * self.config.batch_size / seconds
        left = (self.total - self.step) * self.config.batch_size / rate / 60
        return f"step {self.step:,} of {self.total:,}, {rate:.1f} images/s, {left:.0f} minutes left"

    def crosses(self, interval: int) -> bool:
        """Whether a multiple of `interval` images lies within the last step, or the run is over."""
        before = self.num_images - self.config.batch_size
        return self.num_images // interval > before // interval or self.step == self.total

    def make_batch(self, i: int) -> Batch:
        """The i-th batch of this step: this process's share of images, latents and noise, drawn by sample number."""
        config, training, size = self.config, self.training, self.config.batch_size
        x = self.batches.at((self.step * config.batches_per_step + i) * size, training.device)
        shape, prior = (size, config.model.z_dim), config.model.generator.prior  # type: ignore[union-attr]
        z = draw_latents(config.seed, self.step, 2 * i, shape, prior)
        noise = draw_latents(config.seed, self.step, 2 * i + 1, shape)
        own = self.processes.share(size)
        z, noise = (draw[own].to(training.device, training.dtype) for draw in (z, noise))
        draws = None
        if config.diff_augment:
            index, columns = 2 * config.batches_per_step + i, 2 * NUM_DIFF_DRAWS  # behind the latents' own
            draws = draw_latents(config.seed, self.step, index, (size, columns), "uniform")[own].unflatten(1, (2, -1))
            draws = draws.to(training.device, training.dtype)
        return Batch(x.to(training.dtype).contiguous(memory_format=torch.channels_last), z, noise, draws)

    def log(self, metrics: dict[str, torch.Tensor], lines: bool) -> None:
        """One record in metrics.jsonl, of this process's share; as a line too where no bar is shown."""
        images, rate = (self.step - self.tick_step) * self.config.batch_size, self._pause()
        record = {"num_images": self.num_images, "seconds": round(self.seconds, 1)}
        record |= {"images_per_second": round(images / rate, 1)}
        record |= {name: round(value.item(), 5) for name, value in metrics.items()}
        self._write(record)
        if lines and self.processes.is_main:
            left = (self.total * self.config.batch_size - self.num_images) * rate / images / 60
            logger.info("%s, %.0f minutes left", json.dumps(record), left)

    def snapshot(self, signals: _Signals) -> None:
        """Exports a model, looks at it, and keeps it beside the best; a signal to the main process gives it up.

        Raises:
            TrainingStopped: in all processes, after a signal to one.
        """

        def work() -> None:
            try:
                self._snapshot(signals)
            except _Interrupted:
                logger.warning("the snapshot at %d images was interrupted: it is redone on resume", self.num_images)

        self.processes.on_main(work, long=True)
        signals.end_if_received(self.processes, self.place)

    def _snapshot(self, signals: _Signals) -> None:
        assert self.monitor is not None
        hours = (self.seconds + time.monotonic() - self.tick) / 3600 * self.processes.world_size
        facts = {"num_images": self.num_images, "hours": round(hours, 2)}
        info = ModelInfo(self.config.name, source="trained with the bigbigan package", provenance=facts)
        # Large encoders would take hours on the CPU, while the others wait. (mps has no float64, as probes need.)
        device, samples = self.training.device, self.folder / "samples"
        with signals.interrupting(), _threads_of(self.processes):
            model = inference_model(self.training, self.images, info)
            scores = self.monitor(model.to(device if device.type == "cuda" else "cpu"), self.num_images, samples)
        model.cpu()
        self._write({"num_images": self.num_images, **scores})
        if self.tensorboard is not None:
            self.tensorboard.pictures(samples, self.num_images)
        logger.info("snapshot at %d images: %s", self.num_images, json.dumps(scores))
        snapshots = self.folder / "snapshots"
        self.best = keep_snapshot(model, snapshots, scores, self.best, self.step, keep_all=self.keep_snapshots)

    def checkpoint(self) -> None:
        self._pause()
        places = self.processes.gather(self.batches.state())

        def work() -> None:
            tensors = {name: dict(network.state_dict()) for name, network in self._networks().items()}
            extra: dict[str, Any] = {"run": self.description, "seconds": self.seconds, "best": self.best}
            extra |= {"versions": VERSIONS, "data": places}
            extra |= {"metrics_bytes": self.metrics.stat().st_size if self.metrics.exists() else 0}
            for name, optimizer in self._optimizers().items():
                tensors[name], extra[name] = optimizer_tensors(optimizer)
            for group, members in tensors.items():
                for name, tensor in members.items():
                    if not tensor.isfinite().all():
                        raise FloatingPointError(f"{name} of {group} is not finite after step {self.step}")
            protect = (self.best["step"],) if self.best else ()
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, self.step, tensors, extra, keep=self.keep, protect=protect)

        self.processes.on_main(work)

    def _resume(self) -> bool:
        checkpoint = load_checkpoint(self.folder / "checkpoints")
        steps = self.processes.gather(checkpoint.step if checkpoint else None)
        if len(set(steps)) > 1:
            raise CheckpointError(f"the processes read checkpoints of steps {steps} in {self.folder}: is it shared?")
        if checkpoint is None:
            if self.processes.is_main and self.metrics.exists():
                logger.warning("%s holds no checkpoint: starting from the beginning", self.folder)
                self.metrics.unlink()
            return False
        num_images = checkpoint.step * self.config.batch_size
        check_same_run(checkpoint.path, checkpoint.state["run"], self.description, num_images=num_images)
        for name, network in self._networks().items():
            network.load_state_dict(checkpoint.tensors[name], strict=True)
        for name, optimizer in self._optimizers().items():
            load_optimizer(optimizer, checkpoint.tensors[name], checkpoint.state[name])
        places = checkpoint.state["data"]
        if any(places):
            if len(places) != self.processes.world_size:
                raise ConfigError(
                    f"{checkpoint.path} was written by {len(places)} processes, and the order of a stream depends on "
                    f"their number: resume with as many, not {self.processes.world_size}"
                )
            self.batches.load_state(places[self.processes.rank])
        if self.processes.is_main:
            logger.info("resuming from %s", checkpoint.path)
            if (before := checkpoint.state.get("versions", {})) != VERSIONS:
                older = ", ".join(map(" ".join, before.items())) or "an earlier version"
                logger.warning(
                    "%s was written by %s: with %s, the rest of the run may differ a little",
                    *(checkpoint.path, older, ", ".join(map(" ".join, VERSIONS.items()))),
                )
        self.step, self.seconds, self.best = checkpoint.step, checkpoint.state["seconds"], checkpoint.state["best"]
        # A checkpoint is older than its step's snapshot, which may have been lost; only a finished run is known whole.
        done = self.step == self.total and (self.folder / "snapshots" / snapshot_name(self.num_images)).exists()
        done = self.processes.any(self.processes.is_main and done)
        # That of a finished run which is extended is known to no checkpoint yet: neither its score nor its record.
        extended = checkpoint.state["run"]["train"]["total_images"] <= self.num_images
        self.lacks_snapshot = not done and (extended or self.crosses(self.config.snapshot_images))
        if self.processes.is_main and not done and self.metrics.exists():
            # what was written after the checkpoint comes again
            os.truncate(self.metrics, min(self.metrics.stat().st_size, checkpoint.state["metrics_bytes"]))
        return True

    def _networks(self) -> dict[str, nn.Module]:
        averages = {f"ema_{name}": average.module for name, average in self.training.ema.items()}
        return self.training.networks | averages

    def _optimizers(self) -> dict[str, torch.optim.Adam]:
        return {"optimizer_d": self.training.optimizer_d, "optimizer_ge": self.training.optimizer_ge}

    def _pause(self) -> float:
        """Adds the seconds since the last pause to the run's, and returns them."""
        passed = time.monotonic() - self.tick
        self.seconds, self.tick, self.tick_step = self.seconds + passed, self.tick + passed, self.step
        return passed

    def _write(self, record: dict[str, Any]) -> None:
        if self.processes.is_main:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.tensorboard is not None:
                self.tensorboard.scalars(record)


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


@contextmanager
def _threads_of(processes: Processes) -> Iterator[None]:
    """Lends the main process the threads of those on its machine that wait; torchrun gives each of them one."""
    own, local = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes.world_size > 1 and local > 1:
        torch.set_num_threads(max(own, min(own * local, os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(own)


class _Interrupted(BaseException):
    """A signal came during work that may be given up; no Exception, which that work might handle."""


class _Signals:
    """Collects SIGTERM and SIGINT so that the step can be finished; a second signal acts at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}
        self._first, self._interrupting = float("inf"), False

    def __enter__(self) -> _Signals:
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
            raise _Interrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that a signal, even an earlier one, ends by `_Interrupted` wherever it is."""
        self._interrupting = True
        try:
            if self.received:
                raise _Interrupted
            yield
        finally:
            self._interrupting = False

    def end_if_received(self, processes: Processes, place: str) -> None:
        """
        Raises:
            TrainingStopped: one of the processes, which all have to ask, was sent a signal.
        """
        if processes.any(bool(self.received)):
            raise TrainingStopped(self.received[0] if self.received else signal.SIGTERM, place)
