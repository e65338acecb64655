"""A run folder: `config.json`, `metrics.jsonl`, `checkpoints/` (everything needed to go on), `samples/` (pictures) and
`snapshots/` (model folders as `load` reads them: the newest and the best). One process at a time holds `.lock`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bigbigan.evaluation.features import digest
from bigbigan.files import atomic_write, sync
from bigbigan.model import BigBiGAN
from bigbigan.schema import ConfigError, from_dict, to_dict
from bigbigan.training.augment import AugmentationConfig
from bigbigan.training.checkpoint import remove_leftovers
from bigbigan.training.config import TrainConfig
from bigbigan.training.monitor import PIXEL_L1
from bigbigan.training.sources import ImageDataset
from bigbigan.training.streaming import ImageStream

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder `run`; however this one ends, the system lets go of it.

    Where the system or its file system has no locks, a warning says so. Children do not inherit the lock.

    Raises:
        ConfigError: another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, as the system likes
            raise ConfigError(f"another process trains in {run}; stop it, or choose another folder") from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing keeps another process from training there", run, error)
        yield


def _lock(file: TextIO) -> None:
    if sys.platform == "win32":
        raise OSError("Windows has no fcntl")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def describe(config: TrainConfig, data: ImageDataset | ImageStream, init: BigBiGAN | None = None) -> dict[str, Any]:
    """What makes a run this one and no other, JSON-able."""
    images = len(data) if isinstance(data, ImageDataset) else None
    found = {"train": to_dict(config), "data": {"digest": data.digest, "images": images}}
    if init is not None:
        found["init"] = {"name": init.info.name, **{part: digest(getattr(init, part)) for part in init.parts}}
    return found


# Fields that may differ when a run is resumed: no weight computed so far depends on them.
CHANGEABLE = (
    "total_images",
    "standing_passes",
    "log_images",
    "checkpoint_images",
    "snapshot_images",
    "probe_images",
    "probe_l2",
)


def check_same_run(path: Path, found: Any, wanted: dict[str, Any], *, num_images: int = 0) -> None:
    """Compares the description at `path`, which `num_images` have been seen by, with this run's.

    Raises:
        ConfigError: lists the differences that matter.
    """
    if isinstance(found, dict) and isinstance(found.get("train"), dict):
        found = {**found, "train": _completed(found["train"])}
        _check_length(path, found["train"], wanted["train"], num_images)
        # As they are now; what else differs is another run.
        found["train"] |= {field: wanted["train"][field] for field in CHANGEABLE}
    if changes := list(_differences(found, wanted, "")):
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(changes[:10])}. Choose another folder, or its settings; only "
            f"{', '.join(CHANGEABLE)} may change"
        )


def _check_length(path: Path, found: dict[str, Any], wanted: dict[str, Any], num_images: int) -> None:
    before, total, decay = found["total_images"], wanted["total_images"], wanted["lr_decay_images"]
    if total + wanted["batch_size"] <= num_images:
        raise ConfigError(f"{path} has seen {num_images:,} images already; total_images {total:,} is less")
    if total != before and decay and num_images > min(total, before) - decay:
        raise ConfigError(
            f"{path}: total_images was {before:,}, now {total:,}, but the learning rates have begun to fall "
            f"{decay:,} images before the end. Choose another folder, or total_images {before}"
        )


def prepare(run: Path, wanted: dict[str, Any]) -> None:
    """Makes the folders, or compares the description there and clears away what a killed process left."""
    path = run / "config.json"
    if path.exists() and has_checkpoint(run):  # until there is one, settings can be corrected
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON ({error}); the manifest of a checkpoint has it too") from error
        check_same_run(path, found, wanted)
    for name in ("checkpoints", "samples", "snapshots"):
        (run / name).mkdir(parents=True, exist_ok=True)
    sync(run.parent)
    remove_leftovers(run / "checkpoints")
    for leftover in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_config(run: Path, description: dict[str, Any]) -> None:
    """Writes `config.json`, once a checkpoint, if there is any, has proved to be of this run."""
    path, text = run / "config.json", json.dumps(description, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def has_checkpoint(run: Path) -> bool:
    return any(run.glob("checkpoints/step-*"))


def read_run_config(run: str | os.PathLike[str]) -> TrainConfig:
    """The configuration that a run folder was started with."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder: it holds no config.json")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("train"), dict) or "data" not in document:
        raise ConfigError(f"{path} is not of a run: it lacks 'train' or 'data'")
    return from_dict(TrainConfig, _completed(document["train"]), "train")


def _completed(train: dict[str, Any]) -> dict[str, Any]:
    """With the fields that newer versions of the package have: their defaults are what was done before."""
    fields, crops = dataclasses.fields(TrainConfig), train.get("augmentation", {})
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return (
        defaults | train | {"augmentation": to_dict(AugmentationConfig()) | crops if isinstance(crops, dict) else crops}
    )


def _differences(found: Any, wanted: Any, where: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{where} was {found!r}, now {wanted!r}"


def snapshot_name(num_images: int) -> str:
    return f"images-{num_images:010d}"


def keep_snapshot(
    model: BigBiGAN,
    folder: Path,
    scores: dict[str, float],
    best: dict[str, Any] | None,
    step: int,
    *,
    keep_all: bool,
) -> dict[str, Any]:
    """Saves the snapshot; of the others only the best stays, unless all do. Returns what is known of the best.

    Best is the highest held-out linear accuracy, or the newest where there is none.
    """
    num_images = model.info.provenance["num_images"]
    name, score = snapshot_name(num_images), scores.get("linear_avepool_feat")
    pixels = {key: value for key, value in scores.items() if key in PIXEL_L1}
    model.info.provenance["held_out"] = {key: value for key, value in scores.items() if key not in pixels}
    if pixels:
        model.info.provenance["training_images"] = pixels
    model.save(folder / name)
    if best is None or score is None or best["score"] is None or score > best["score"]:
        best = {"snapshot": name, "score": score, "num_images": num_images, "step": step}
    for other in list(folder.iterdir()):
        if not keep_all and other.name not in (name, best["snapshot"]):
            hidden = other.with_name(f".{other.name}.tmp")
            os.replace(other, hidden)  # a kill halfway leaves nothing that looks like a model
            shutil.rmtree(hidden)
    return best
