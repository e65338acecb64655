"""Rows of features: in memory as tensors, or on the disk and read when indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbigan.arrays import as_tensor
from bigbigan.encoder import crelu

CHUNK = 4096  # rows in memory at a time
CHUNK_VALUES = 1 << 26  # at a time, whatever the width


class StoredRows:
    """Features [N, D] in a file, indexed like a tensor: each access reads its rows into a new float32 tensor."""

    def __init__(self, array: Any, function: Callable[[Tensor], Tensor] | None = None) -> None:
        self._array, self._function = array, function
        width = array.shape[1] if function is None else self[:1].shape[1]
        self.shape = torch.Size((len(array), width))

    @classmethod
    def open(cls, path: Path) -> StoredRows:
        """Of a .npy file [N, D].

        Raises:
            ValueError: it is damaged.
        """
        try:
            return cls(np.load(path, mmap_mode="r"))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is computed again") from error

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        place = index.cpu().numpy() if isinstance(index, Tensor) else index
        rows = torch.from_numpy(np.array(self._array[place], np.float32))
        return rows if self._function is None else self._function(rows)

    def select(self, index: Tensor) -> StoredRows:
        """These rows."""
        return StoredRows(_Selected(self._array, index.cpu().numpy()), self._function)

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredRows:
        """With `function` applied to what is read."""
        before = self._function
        return StoredRows(self._array, function if before is None else lambda rows: function(before(rows)))


class _Selected:
    """Rows of an array by number, read when indexed."""

    def __init__(self, array: Any, index: np.ndarray) -> None:
        self._array, self._index, self.shape = array, index, (len(index), *array.shape[1:])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: Any) -> Any:
        return self._array[self._index[place]]


Rows = Tensor | StoredRows


def as_rows(x: Any, name: str = "features") -> Rows:
    """Arrays, lists and frames as tensors (`as_tensor`); rows that are read when indexed stay what they are."""
    read_when_indexed = isinstance(x, StoredRows) or (hasattr(x, "shape") and not hasattr(x, "__array__"))
    return x if read_when_indexed else as_tensor(x, name)


def select(rows: Rows, index: Tensor) -> Rows:
    """The rows of these numbers; stored rows stay stored."""
    return rows.select(index) if isinstance(rows, StoredRows) else rows[index]


def chunks(rows: Rows) -> Iterator[Tensor]:
    step = max(1, min(CHUNK, CHUNK_VALUES // max(1, rows.shape[1])))
    return (rows[start : start + step] for start in range(0, len(rows) or 1, step))


def column_mean(rows: Rows, function: Callable[[Tensor], Tensor] = lambda chunk: chunk) -> Tensor:
    """[D] float64, the mean of `function` of float64 rows."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for chunk in chunks(rows):
        total += function(chunk.cpu().double()).sum(0)
    return total / len(rows)


def check_finite(rows: Rows, name: str) -> None:
    """
    Raises:
        ValueError: NaN or infinity; it names the first row.
    """
    done = 0
    for chunk in chunks(rows):
        bad = ~chunk.isfinite().all(1)
        if bad.any():
            row = done + int(bad.nonzero()[0])
            raise ValueError(f"{name}: row {row} (from 0) holds NaN or infinity; compute it again or leave it out")
        done += len(chunk)


def bn_crelu(train: Rows, *others: Rows, eps: float = 1e-5) -> tuple[Rows, ...]:
    """[ReLU(h), ReLU(-h)] of `train` and `others` [N, D], with h batch-normalised by the statistics of `train`.

    Without scale or offset, as BigBiGAN's paper does with its own features: [N, 2 D]. Stored rows stay stored.
    """
    function = fit_bn_crelu(train, eps=eps)
    return tuple(mapped(rows, function) for rows in (train, *others))


def mapped(rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
    """`function` of each row; of stored rows, when they are read."""
    return rows.map(function) if isinstance(rows, StoredRows) else torch.cat([function(x) for x in chunks(rows)])


def fit_bn_crelu(train: Rows, *, eps: float = 1e-5) -> Callable[[Tensor], Tensor]:
    """The function that `bn_crelu` applies, [N, D] to [N, 2 D]."""
    if not len(train):
        raise ValueError("no training rows to take the statistics of batch norm from")
    mean = column_mean(train)
    variance = column_mean(train, lambda chunk: (chunk - mean).square())
    factor = 1 / (variance + eps).sqrt()
    return lambda rows: crelu(((rows.double() - mean.to(rows.device)) * factor.to(rows.device)).float())
