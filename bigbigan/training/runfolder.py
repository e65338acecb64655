"""A run folder: `config.json`, `metrics.jsonl`, `checkpoints/` (everything needed to go on), `samples/` (pictures) and
`snapshots/` (model folders as `load` reads them: the newest and the best).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigbigan.config import ConfigError, from_dict, to_dict
from bigbigan.files import atomic_write
from bigbigan.model import BigBiGAN
from bigbigan.training.config import TrainConfig
from bigbigan.training.sources import ImageDataset
from bigbigan.training.streaming import ImageStream


def prepare(run: Path, config: TrainConfig, data: ImageDataset | ImageStream) -> None:
    """Writes the run's configuration, or compares with what is there."""
    wanted = {
        "train": to_dict(config),
        "data": {"digest": data.digest, "images": len(data) if isinstance(data, ImageDataset) else None},
    }
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
    name, score = f"images-{num_images:010d}", scores.get("linear_avepool_feat")
    model.info.provenance["held_out"] = scores
    model.save(folder / name)
    if best is None or score is None or best["score"] is None or score > best["score"]:
        best = {"snapshot": name, "score": score, "num_images": num_images, "step": step}
    for other in folder.iterdir():
        if not keep_all and other.name not in (name, best["snapshot"]):
            shutil.rmtree(other)
    return best
