"""The training loop: one flat function; progress counts images, and one integer (the step) says where a run stands.

A run folder holds `config.json`, `metrics.jsonl`, `checkpoints/` (everything needed to go on), `samples/` (pictures)
and `snapshots/` (model folders as `load` reads them: the newest and the best).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bigbigan.config import ConfigError, ModelInfo, from_dict, to_dict
from bigbigan.files import atomic_write
from bigbigan.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from bigbigan.training.config import TrainConfig
from bigbigan.training.data import Batches, ImageDataset
from bigbigan.training.export import inference_model
from bigbigan.training.latents import draw_latents
from bigbigan.training.monitor import Monitor
from bigbigan.training.step import Batch, TrainingState, train_step

logger = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """A signal asked the run to stop; its checkpoint is written. `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command goes on")
        self.exit_code = 128 + signum


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    run: str | os.PathLike[str],
    *,
    device: str = "cpu",
    max_minutes: float | None = None,
    keep: int = 2,
) -> Path:
    """Trains until `config.total_images`, or for `max_minutes`, in the folder `run`; goes on from its checkpoint.

    On SIGTERM or SIGINT the step is finished and checkpointed. Returns the run folder.

    Raises:
        ConfigError: the folder holds a run with another configuration or other data.
        FloatingPointError: a loss is not finite; the last checkpoint stands.
        TrainingStopped: after a signal.
    """
    # Load the data and the state, or the checkpoint's.
    run, deadline = Path(run), time.monotonic() + 60 * (max_minutes or float("inf"))
    _prepare(run, config, dataset)
    images = dataset.decode_all(config.model.preprocess, config.model.image_channels)
    state = TrainingState(config, device)
    monitor = Monitor(images, dataset.labels, config)
    step, seconds, best = _resume(state, run)
    batches = Batches(images, config.batch_size, config.seed, augmentation=config.augmentation)
    size, total = config.batch_size, -(-config.total_images // config.batch_size)

    def make_batch(step: int, i: int) -> Batch:
        x = batches.at((step * config.batches_per_step + i) * size)
        shape, prior = (size, config.model.z_dim), config.model.generator.prior  # type: ignore[union-attr]
        z, noise = (
            draw_latents(config.seed, step, 2 * i, shape, prior),
            draw_latents(config.seed, step, 2 * i + 1, shape),
        )
        x, z, noise = (t.to(state.device) for t in (x, z, noise))
        return Batch(x.contiguous(memory_format=torch.channels_last), z, noise)

    def crosses(interval: int) -> bool:  # a multiple of `interval` images lies within the last step
        return step * size // interval > (step - 1) * size // interval or step == total

    bar = tqdm(total=total * size, initial=step * size, unit="img", disable=None, desc=config.name)
    with _signals() as received, bar, open(run / "metrics.jsonl", "a", encoding="utf-8") as log:
        tick, tick_step = time.monotonic(), step
        while step < total:
            # Update D, then G and E.
            metrics = train_step(state, functools.partial(make_batch, step), (step + 1) * size)
            step += 1
            bar.update(size)

            # Log.
            if crosses(config.log_images):
                now = time.monotonic()
                seconds, rate = seconds + now - tick, (step - tick_step) * size / (now - tick)
                record = {"num_images": step * size, "seconds": round(seconds, 1), "images_per_second": round(rate, 1)}
                record |= {name: round(value.item(), 5) for name, value in metrics.items()}
                tick, tick_step = now, step
                _write(log, record)
                if bar.disable:
                    logger.info("%s, %.0f minutes left", json.dumps(record), (total - step) * size / rate / 60)

            # Export a snapshot, look at it, and keep it if it is the best.
            stopping = bool(received) or time.monotonic() > deadline
            if crosses(config.snapshot_images):
                hours = (seconds + time.monotonic() - tick) / 3600
                facts = {"num_images": step * size, "hours": round(hours, 2)}
                info = ModelInfo(config.name, source="trained with the bigbigan package", provenance=facts)
                model = inference_model(state, images, info)
                scores = monitor(model, step * size, run / "samples")
                _write(log, {"num_images": step * size, **scores})
                logger.info("snapshot at %d images: %s", step * size, json.dumps(scores))
                best = _keep_snapshot(model, run / "snapshots", step * size, scores, best)
            if crosses(config.checkpoint_images) or stopping:
                seconds, tick, tick_step = seconds + time.monotonic() - tick, time.monotonic(), step
                _checkpoint(state, run, step, seconds, best, keep)
            if received:
                raise TrainingStopped(received[0])
            if stopping:
                break
    return run


def _prepare(run: Path, config: TrainConfig, dataset: ImageDataset) -> None:
    """Writes the run's configuration, or compares with what is there."""
    wanted = {"train": to_dict(config), "data": {"digest": dataset.digest, "images": len(dataset)}}
    path = run / "config.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changes = list(_differences(found, wanted, ""))
        if changes:
            raise ConfigError(
                f"{path} belongs to another run: {'; '.join(changes[:10])}. Choose another folder, or its settings"
            )
        return
    for name in ("checkpoints", "samples", "snapshots"):
        (run / name).mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def read_run_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration that a run folder was started with."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder: it holds no config.json")
    return from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8"))["train"], "train")


def _differences(found: Any, wanted: Any, where: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{where} was {found!r}, now {wanted!r}"


def _networks(state: TrainingState) -> dict[str, nn.Module]:
    return state.networks() | {f"ema_{name}": average.module for name, average in state.ema.items()}


def _checkpoint(
    state: TrainingState, run: Path, step: int, seconds: float, best: dict[str, Any] | None, keep: int
) -> None:
    tensors = {name: dict(network.state_dict()) for name, network in _networks(state).items()}
    optimizers = {"optimizer_d": state.optimizer_d, "optimizer_ge": state.optimizer_ge}
    extra: dict[str, Any] = {"seconds": seconds, "best": best}
    for name, optimizer in optimizers.items():
        tensors[name], extra[name] = optimizer_tensors(optimizer)
    save_checkpoint(run / "checkpoints", step, tensors, extra, keep=keep)


def _resume(state: TrainingState, run: Path) -> tuple[int, float, dict[str, Any] | None]:
    checkpoint = load_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return 0, 0.0, None
    for name, network in _networks(state).items():
        network.load_state_dict(checkpoint.tensors[name], strict=True)
    for name, optimizer in (("optimizer_d", state.optimizer_d), ("optimizer_ge", state.optimizer_ge)):
        load_optimizer(optimizer, checkpoint.tensors[name], checkpoint.state[name])
    logger.info("going on from %s", checkpoint.path)
    return checkpoint.step, checkpoint.state["seconds"], checkpoint.state["best"]


def _keep_snapshot(
    model: Any, folder: Path, num_images: int, scores: dict[str, float], best: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Saves the snapshot; of the others only the best stays. Best is the highest held-out linear accuracy."""
    name = f"images-{num_images:010d}"
    model.info.provenance["held_out"] = scores
    model.save(folder / name)
    score = scores.get("linear_avepool_feat")
    if best is None or (score is not None and (best["score"] is None or score > best["score"])):
        best = {"snapshot": name, "score": score, "num_images": num_images}
    for other in folder.iterdir():
        if other.name not in (name, best["snapshot"]):
            shutil.rmtree(other)
    return best


def _write(log: Any, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT so that the step can be finished; a second signal acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in map(int, (signal.SIGTERM, signal.SIGINT)):
        previous[signum] = signal.getsignal(signum)
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
