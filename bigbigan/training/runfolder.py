"""A run folder: `config.json`, `metrics.jsonl`, `checkpoints/` (everything needed to go on), `samples/` (pictures) and
`snapshots/` (model folders as `load` reads them: the newest and the best). `config.json` marks it by its "format".
One process at a time holds `.lock`. What has other names than these is left alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigbigan.data.augment import AugmentationConfig
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.streaming import ImageStream
from bigbigan.evaluation.features import digest
from bigbigan.files import LOCK, TEMPORARY, atomic_write, foreign, hold, remove_own, sync
from bigbigan.model import BigBiGAN
from bigbigan.modelfolder import FOLDER_FILES
from bigbigan.schema import ConfigError, from_dict, to_dict
from bigbigan.training.checkpoint import CHECKPOINT_NAME, is_checkpoint, remove_leftovers
from bigbigan.training.config import TrainConfig
from bigbigan.training.monitor import PIXEL_L1

logger = logging.getLogger(__name__)

FORMAT = "bigbigan-run/1"
SNAPSHOT_NAME = r"images-[0-9]{10,}"
_PICTURE_NAME = r"(samples|reconstructions)-[0-9]{10,}\.png"
# What lies in a run's folders, and the hidden names of what a killed process left half done there.
_NAMES = {"checkpoints": CHECKPOINT_NAME, "samples": _PICTURE_NAME, "snapshots": SNAPSHOT_NAME}
_LEFTOVERS = {
    "": rf"\.config\.json{TEMPORARY}",
    "samples": rf"\.{_PICTURE_NAME}{TEMPORARY}",
    "snapshots": rf"\.{SNAPSHOT_NAME}(\.[a-z0-9_]+)?\.tmp|\.{SNAPSHOT_NAME}\.{LOCK}",
}
_BEFORE_CONFIG = rf"\.lock|{_LEFTOVERS['']}|checkpoints|samples|snapshots"  # of a run killed as it started


@contextmanager
def claim_run(run: Path) -> Iterator[None]:
    """Keeps the folder `run` for this process to train in.

    Raises:
        ConfigError: another process trains there, or the folder is neither new, nor empty, nor a run's.
    """
    check_run_folder(run)
    with hold(run / ".lock", ConfigError(f"another process trains in {run}; stop it, or choose another folder")):
        yield


def check_run_folder(run: Path) -> None:
    """
    Raises:
        ConfigError: the folder is neither new, nor empty, nor a run's.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise ConfigError(f"{run} is a file; name a folder")
    empty = all(
        re.fullmatch(_BEFORE_CONFIG, entry.name) and not (entry.is_dir() and any(entry.iterdir()))
        for entry in run.iterdir()
    )
    if not empty and not _is_run(run):
        strangers = ", ".join(sorted(entry.name for entry in run.iterdir())[:5])
        raise ConfigError(f"{run} is not a training run and holds {strangers}; name a new or an empty folder")


def _is_run(run: Path) -> bool:
    """By the mark in its `config.json`, by what older versions wrote there, or by a checkpoint where it is damaged."""
    try:
        found = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return any(map(is_checkpoint, run.glob("checkpoints/*")))
    if not isinstance(found, dict):
        return False
    if isinstance(mark := found.get("format"), str):
        return mark == FORMAT
    train, data = found.get("train"), found.get("data")
    if not isinstance(train, dict) or not isinstance(data, dict):
        return False
    return {"name", "model", "batch_size", "total_images"} <= set(train) and set(data) == {"digest", "images"}


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
        found = {key: value for key, value in found.items() if key != "format"}
        found["train"] = _completed(found["train"])
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
    """Makes the folders, or compares the description there and clears away what a killed process left.

    What is foreign in them is left alone, with one warning.
    """
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
    for place, leftovers in _LEFTOVERS.items():
        for path in list((run / place).iterdir()):
            if re.fullmatch(leftovers, path.name) and not path.is_symlink():
                remove_own(path, FOLDER_FILES) if path.is_dir() else path.unlink()
    strangers = [f"{place}/{name}" for place, own in _NAMES.items() for name in _strangers(run / place, own)]
    if strangers:
        shown = ", ".join(strangers[:5]) + ", …" * (len(strangers) > 5)
        logger.warning("%s holds what bigbigan did not write, and leaves it alone: %s", run, shown)


def _strangers(folder: Path, own: str) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not re.fullmatch(own, entry.name))


def write_config(run: Path, description: dict[str, Any]) -> None:
    """Writes `config.json`, once a checkpoint, if there is any, has proved to be of this run."""
    path, text = run / "config.json", json.dumps({"format": FORMAT, **description}, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def has_checkpoint(run: Path) -> bool:
    return any(re.fullmatch(CHECKPOINT_NAME, path.name) for path in run.glob("checkpoints/step-*"))


def find_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run folder, the newest last."""
    found = [path for path in run.glob("snapshots/images-*") if re.fullmatch(SNAPSHOT_NAME, path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.removeprefix("images-")))


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
    defaults = json.loads(json.dumps(defaults))  # as a file has them: tuples as lists
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

    Folders that hold more than a snapshot's own files stay as well.

    Best is the highest held-out linear accuracy, or the newest where there is none.
    """
    num_images = model.info.provenance["num_images"]
    name, score = snapshot_name(num_images), scores.get("linear_avepool_feat")
    pixels = {key: value for key, value in scores.items() if key in PIXEL_L1}
    model.info.provenance["held_out"] = {key: value for key, value in scores.items() if key not in pixels}
    if pixels:
        model.info.provenance["training_images"] = pixels
    if (folder / name / "config.json").exists() and foreign(folder / name, FOLDER_FILES):
        logger.warning("%s is not written again: it holds more than a snapshot", folder / name)
    else:
        model.save(folder / name)
    if best is None or score is None or best["score"] is None or score > best["score"]:
        best = {"snapshot": name, "score": score, "num_images": num_images, "step": step}
    for other in find_snapshots(folder.parent):
        kept = keep_all or other.name in (name, best["snapshot"]) or other.is_symlink()
        if not kept and not foreign(other, FOLDER_FILES):
            hidden = other.with_name(f".{other.name}.tmp")
            os.replace(other, hidden)  # a kill halfway leaves nothing that looks like a model
            shutil.rmtree(hidden)
    return best
