"""What each evaluate function takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bigbigan import factory
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.opening import open_dataset
from bigbigan.evaluation.report import make_record
from bigbigan.evaluation.tables import printed
from bigbigan.model import BigBiGAN

ModelLike = BigBiGAN | str | Path | None
Data = str | Path | ImageDataset


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        record: JSON-able figures, protocol, digests of model and data, versions; what `--json` writes, without the
            command.
        header, rows: the table that the command prints, as texts.
        draw: retrieval and reconstruction only: draws the first N queries with their neighbours, or the first N pairs
            of an original and its reconstruction. Call it before the data or the model are gone.
    """

    record: dict[str, Any]
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    draw: Callable[[int], Image.Image] | None = field(default=None, repr=False)


def tabulated(
    model: BigBiGAN | None,
    protocol: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any] | ImageDataset],
    draw: Callable[[int], Image.Image] | None = None,
) -> Evaluation:
    """An `Evaluation` whose table has a line per result, in the columns of the record."""
    record = make_record(model, protocol, results=results, data=data)
    return Evaluation(record, *printed(record["table"], record["results"]), draw)


def opened_model(
    model: ModelLike, parts: Sequence[str], *, device: str | torch.device, revision: str | None
) -> BigBiGAN:
    """A model by what `load` takes; an object as it is, on its own device.

    Raises:
        ValueError, FileNotFoundError, DownloadError: as `load`, or a part that the object lacks.
    """
    if not isinstance(model, BigBiGAN):
        return factory.load(model, parts=parts, device=device, revision=revision)
    for part in parts:
        model.part(part)
    return model


def opened_data(data: Data, split: str) -> ImageDataset:
    """A data set by its path; an opened one as it is."""
    return data if isinstance(data, ImageDataset) else open_dataset(data, split=split)
