"""A run as one of its processes has it in memory: its data, its networks, how far it is, and what it writes."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigbigan._version import __version__
from bigbigan.config import ModelInfo
from bigbigan.data.batches import Batches, Images
from bigbigan.data.latents import draw_latents
from bigbigan.schema import ConfigError
from bigbigan.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from bigbigan.training.config import TrainConfig
from bigbigan.training.diffaugment import NUM_DIFF_DRAWS
from bigbigan.training.distributed import Processes
from bigbigan.training.export import inference_model
from bigbigan.training.monitor import Monitor
from bigbigan.training.runfolder import check_same_run, keep_snapshot, snapshot_name
from bigbigan.training.signals import Interrupted, Signals
from bigbigan.training.step import Batch, TrainingState
from bigbigan.training.tensorboard import TensorBoard

logger = logging.getLogger(__name__)

VERSIONS = {"bigbigan": __version__, "torch": str(torch.__version__)}


class Run:
    """Progress counts images; one integer, the step, says where a run stands.

    Args:
        description: what makes the run this one (`runfolder.describe`).
        keep: newest checkpoints that stay.
        keep_snapshots: all of them stay, not the newest and the best alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        description: dict[str, Any],
        processes: Processes,
        images: Images,
        *,
        keep: int,
        keep_snapshots: bool,
    ):
        self.config, self.folder, self.description = config, folder, description
        self.processes, self.images = processes, images
        self.keep, self.keep_snapshots = keep, keep_snapshots
        self.batches: Batches = images.batches(
            config.batch_size, config.seed, rank=processes.rank, world_size=processes.world_size
        )
        self.monitor = Monitor(images, images.labels, config) if processes.is_main else None
        self.training = TrainingState(config, processes.device)
        self.tensorboard: TensorBoard | None = None
        self.metrics = folder / "metrics.jsonl"
        self.step, self.total = 0, -(-config.total_images // config.batch_size)
        self.seconds, self.tick, self.tick_step = 0.0, time.monotonic(), 0  # trained for; since the last record
        self.best: dict[str, Any] | None = None  # snapshot
        self.lacks_snapshot = False

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

    def snapshot(self, signals: Signals) -> None:
        """In the main process: exports a model, scores it, and keeps it beside the best, unless a signal comes."""
        try:
            self._snapshot(signals)
        except Interrupted:
            logger.warning("the snapshot at %d images was interrupted: it is redone on resume", self.num_images)

    def _snapshot(self, signals: Signals) -> None:
        assert self.monitor is not None
        hours = (self.seconds + time.monotonic() - self.tick) / 3600 * self.processes.world_size
        facts = {"num_images": self.num_images, "hours": round(hours, 2)}
        info = ModelInfo(self.config.name, source="trained with the bigbigan package", provenance=facts)
        # Large encoders would take hours on the CPU, while the others wait. (mps has no float64, as probes need.)
        device, samples = self.training.device, self.folder / "samples"
        with signals.interrupting(), self.processes.borrowed_threads():
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
        """Saves everything that the run needs to resume; all processes have to call it.

        Raises:
            FloatingPointError: a tensor is not finite; nothing is saved.
        """
        self._pause()
        places = self.processes.gather(self.batches.state())
        with self.processes.main_first():
            if self.processes.is_main:
                self._save(places)

    def _save(self, places: list[Any]) -> None:
        tensors = {name: dict(network.state_dict()) for name, network in self.networks().items()}
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
        save_checkpoint(self.folder / "checkpoints", self.step, tensors, extra, keep=self.keep, protect=protect)

    def resume(self) -> bool:
        """Takes up the newest intact checkpoint, if there is one; whether there was.

        Raises:
            ConfigError: it belongs to another run.
            CheckpointError: none is intact, or the processes see different ones.
        """
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
        for name, network in self.networks().items():
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

    def networks(self) -> dict[str, nn.Module]:
        averages = {f"ema_{name}": average.module for name, average in self.training.ema.items()}
        return self.training.networks | averages

    def _optimizers(self) -> dict[str, torch.optim.Adam]:
        return {"optimizer_d": self.training.optimizer_d, "optimizer_ge": self.training.optimizer_ge}

    def start_clock(self) -> None:
        self.tick, self.tick_step = time.monotonic(), self.step

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
