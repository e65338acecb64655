"""Features of a set of images, in one pass: in memory, or in a cache on the disk that a kill leaves usable."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bigbigan.arrays import as_tensor
from bigbigan.evaluation.representations import Representation
from bigbigan.evaluation.rows import Rows, StoredRows
from bigbigan.files import OutputError, atomic_write, disk_errors, hold, sync
from bigbigan.schema import to_dict

MAX_BYTES = 8 << 30  # of features in memory
PIECE_ROWS = 1024  # what a kill may cost


class ImageSource(Protocol):
    """Images under one preprocessing, read in order, never all of them at once.

    Attributes:
        digest: of the images.
        bad: by number, why an image could not be read and was replaced, as far as they were met.
    """

    digest: str

    @property
    def bad(self) -> Mapping[int, str]: ...

    def __len__(self) -> int: ...

    def batches(self, start: int) -> Iterator[Tensor]:
        """Images [B, C, S, S] uint8 from number `start` on, to the last."""

    def read_again(self, numbers: Iterable[int]) -> None:
        """Meets these unreadable images, where features that are kept spared reading them."""


@dataclass
class TensorImages:
    """Images [N, C, S, S] uint8 in memory as an `ImageSource`."""

    images: Tensor
    digest: str = ""
    batch_size: int = 256

    def __post_init__(self) -> None:
        self.images = as_tensor(self.images, "images")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(f"images are {self.images.dtype} {list(self.images.shape)}; expected uint8 [N, C, S, S]")
        if not self.digest:
            shape = json.dumps(list(self.images.shape)).encode()
            sha256 = hashlib.sha256(shape)
            sha256.update(self.images.cpu().contiguous().numpy().data)
            self.digest = sha256.hexdigest()

    @property
    def bad(self) -> Mapping[int, str]:
        return {}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, start: int) -> Iterator[Tensor]:
        return iter(self.images[start:].split(self.batch_size))

    def read_again(self, numbers: Iterable[int]) -> None:
        assert not list(numbers)


def compute_features(
    representation: Representation,
    images: ImageSource,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, Rows]:
    """Features [N, D] float32 of all images, by output.

    With `cache`, a folder, they are written to the disk as they are computed and read from there when indexed; the
    next call for the same weights, images, preprocessing and output computes nothing, one after a kill only the rest.

    Raises:
        ValueError: features that are not finite rows, or too large for the memory.
    """
    if cache is None:
        return dict(_in_memory(representation, images, progress))
    entry = {
        "format": 1,
        "representation": representation.digest,
        "images": images.digest,
        "number": len(images),
        "preprocessing": to_dict(representation.preprocess),
        "channels": representation.channels,
    }
    folder = Path(cache) / hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:32]
    if all(_path(folder, output).exists() for output in representation.outputs):
        stores = {output: _Store(folder, output, len(images)) for output in representation.outputs}
    else:  # what is not complete is looked at under the lock alone: another process may be renaming it
        with _locked(folder):
            stores = {output: _Store(folder, output, len(images)) for output in representation.outputs}
            if not (folder / "entry.json").exists():
                text = json.dumps({"name": representation.name, **entry}, indent=2)
                with atomic_write(folder / "entry.json") as temporary:
                    temporary.write_text(text, encoding="utf-8")
            missing = [store for store in stores.values() if not store.path.exists()]
            start = min((store.done for store in missing), default=len(images))
            for rows in _computed(representation, images, start, progress):
                for store in missing:
                    store.add(start, rows[store.output], images.bad)
                start += len(rows[representation.outputs[0]])
            for store in missing:
                store.finish(images.bad)
    images.read_again({number for store in stores.values() for number in store.replaced} - set(images.bad))
    return {output: StoredRows.open(store.path) for output, store in stores.items()}


def _computed(
    representation: Representation, images: ImageSource, start: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    bar = tqdm(total=len(images), initial=start, unit="img", desc="encoding", disable=None if progress else True)
    with bar:
        for batch in images.batches(start) if start < len(images) else ():
            yield representation.features(batch.float() / 127.5 - 1, start)
            start += len(batch)
            bar.update(len(batch))
    if start != len(images):
        raise ValueError(f"{start} of {len(images)} images came; `batches` must give all of them")


def _in_memory(representation: Representation, images: ImageSource, progress: bool) -> dict[str, Tensor]:
    features: dict[str, Tensor] = {}
    start = 0
    for rows in _computed(representation, images, 0, progress):
        if not features:
            size = 4 * len(images) * sum(x.shape[1] for x in rows.values())
            if size > MAX_BYTES:
                raise ValueError(
                    f"{representation.name}: features of {len(images)} images take {size / 2**30:.1f} GiB in memory, "
                    f"more than {MAX_BYTES / 2**30:.0f}: keep them in a folder (--feature-cache), or name fewer outputs"
                )
            features = {output: torch.empty(len(images), x.shape[1]) for output, x in rows.items()}
        for output, x in rows.items():
            features[output][start : start + len(x)] = x
        start += len(x)
    return features


class _Store:
    """One output in a cache: `NAME.npy`, or until it is complete `NAME.npy.partial`, and what is known of it as JSON.

    Rows are synced to the disk before the JSON counts them.
    """

    def __init__(self, folder: Path, output: str, number: int) -> None:
        self.output, self.number = output, number
        self.path = _path(folder, output)
        self._partial, self._facts = (self.path.with_suffix(end) for end in (".npy.partial", ".json"))
        facts: dict[str, Any] = {"rows": 0, "replaced": []}
        if self._facts.exists() and (self.path.exists() or self._partial.exists()):
            try:
                known = json.loads(self._facts.read_text(encoding="utf-8"))
                known = {"rows": int(known["rows"]), "replaced": list(known["replaced"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._facts} is damaged ({error}): delete the folder {folder}") from error
            if self.path.exists() or _rows_in(self._partial) >= known["rows"]:  # fewer in a copy of a folder in use
                facts = known
        self.done, self.replaced = facts["rows"], set(facts["replaced"])
        self._waiting: list[Tensor] = []

    def add(self, start: int, rows: Tensor, bad: Mapping[int, str]) -> None:
        """Rows from number `start` on; those that are there already are left out."""
        self._waiting.append(rows[self.done + sum(map(len, self._waiting)) - start :])
        if sum(map(len, self._waiting)) >= PIECE_ROWS:
            self._write(bad)

    def finish(self, bad: Mapping[int, str]) -> None:
        self._write(bad)
        os.replace(self._partial, self.path)
        sync(self.path.parent)

    def _write(self, bad: Mapping[int, str]) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).numpy().astype("<f4", copy=False)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.number, rows.shape[1])}
        with disk_errors(self._partial), open(self._partial, "r+b" if self._partial.exists() else "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(4 * self.done * rows.shape[1], os.SEEK_CUR)
            file.write(rows.data)
        sync(self._partial)
        self._waiting.clear()
        self.done, self.replaced = self.done + len(rows), self.replaced | set(bad)
        with atomic_write(self._facts) as temporary:
            temporary.write_text(json.dumps({"rows": self.done, "replaced": sorted(self.replaced)}), encoding="utf-8")


def _path(folder: Path, output: str) -> Path:
    stem = re.sub(r"\W", "_", output)
    if stem != output:  # two names may become one
        stem += "-" + hashlib.sha256(output.encode()).hexdigest()[:8]
    return folder / f"{stem}.npy"


def _rows_in(path: Path) -> int:
    """How many rows a started .npy file holds, whatever its header says."""
    with open(path, "rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
        except ValueError:  # not even a whole header
            return 0
        return (os.fstat(file.fileno()).st_size - file.tell()) // (4 * shape[1])


def _locked(folder: Path) -> AbstractContextManager[None]:
    """Held by one process at a time: another one waits, and then finds the features there."""
    busy = OutputError(f"waiting for another process that computes the features in {folder}")
    return hold(folder / "lock", busy, wait=True)
