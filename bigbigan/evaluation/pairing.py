"""Which row of a file belongs to which image of a data set: by name, wherever both have names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from bigbigan.data.dataset import ImageDataset
from bigbigan.files import file_name

logger = logging.getLogger(__name__)


def row_names(dataset: ImageDataset) -> list[str]:
    """What each image is called: its path in the folder of its split, or for rows without names 000000, 000001, …"""
    if dataset.root is None:
        return [f"{index:06d}" for index in range(len(dataset))]
    paths = (Path(dataset.name(index)) for index in range(len(dataset)))
    return [file_name(path.relative_to(dataset.root)) for path in paths]


def row_order(dataset: ImageDataset, names: Sequence[str] | None, where: str) -> Tensor | None:
    """For each image the number of its row in a file, whose rows have these names; None: the order is the images'.

    Names of files may begin with any of the folders that the images lie in, and may have another suffix. Images in
    Parquet are known by the paths stored with them, or by the number of their row. Where one side has no names, rows
    are taken in the order of the images.

    Args:
        where: the file, for messages.

    Raises:
        ValueError: names that repeat, or that are others than those of the images.
    """
    if names is None:
        return None
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for number, name in enumerate(names) if place[name] != number)
        raise ValueError(f"{where} names {twice!r} more than once; give each image one row")
    bare = {_bare(name): number for name, number in place.items()}
    own = row_names(dataset)
    for wanted in _spellings(dataset, own, names):
        if len(wanted) == len(place) and all(name in place for name in wanted):
            return torch.tensor([place[name] for name in wanted])
        stems = [_bare(name) for name in wanted]
        if len(bare) == len(place) == len(set(stems)) == len(wanted) and all(stem in bare for stem in stems):
            return torch.tensor([bare[stem] for stem in stems])
    if dataset.root is None and dataset.stored_paths() is None:
        logger.warning("%s names its rows, and the images have no names: rows are taken in their order", where)
        return None
    wanted = dataset.stored_paths() or own
    lacking, others = [name for name in wanted if name not in place], sorted(set(names) - set(wanted))
    raise ValueError(
        f"{where} names other images than the data: {len(lacking)} of {len(wanted)} have no row, such as "
        f"{next(iter(lacking), '-')}, and {len(others)} rows are of no image, such as {next(iter(others), '-')}. "
        "Encode this very split (unreadable pictures get no row), or give features without names, in the images' order"
    )


def _spellings(dataset: ImageDataset, own: list[str], names: Sequence[str]) -> Iterator[list[str]]:
    """What the images may be called in a file, as a list of all."""
    yield own
    if dataset.root is not None:
        parts = Path(file_name(dataset.root.absolute())).parts
        for start in range(len(parts) - 1, -1, -1):
            prefix = PurePosixPath(*parts[start:]).as_posix()
            if names and names[0].startswith(prefix):  # all of them are written out only if this may be it
                yield [f"{prefix.rstrip('/')}/{name}" for name in own]
        given = file_name(dataset.root)
        if names and names[0].startswith(given):
            yield [f"{given}/{name}" for name in own]
        return
    if (paths := dataset.stored_paths()) is not None:
        yield paths
    numbers = {_bare(name): name for name in names}
    if all(stem.isdecimal() for stem in numbers):
        by_number = {int(stem): name for stem, name in numbers.items()}
        yield [by_number.get(index, "") for index in range(len(dataset))]


def _bare(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix() if PurePosixPath(name).name else name
