"""Folders of image files as data sets."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbigan.data.dataset import ImageDataset
from bigbigan.data.decoding import Source


class _Files(Sequence[Source]):
    """Paths in one block of memory: a million Python objects would be copied into every worker as they are counted."""

    def __init__(self, files: list[Path]) -> None:
        self._names = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return Path(os.fsdecode(bytes(self._names[index])))


def _file_name(files: _Files, index: int) -> str:
    return str(files[index])


def open_folder(folder: Path, files: list[Path], max_bad_fraction: float) -> ImageDataset:
    """These image files in a folder, the first subfolder of each its class."""
    relative = [os.path.relpath(file, folder).replace(os.sep, "/") for file in files]
    classes = [name.split("/")[0] if "/" in name else None for name in relative]
    names = sorted({name for name in classes if name is not None})
    ids: dict[str | None, int] = {None: -1, **{name: number for number, name in enumerate(names)}}
    listing = [
        (name, (stat := file.stat()).st_size, stat.st_mtime_ns) for name, file in zip(relative, files, strict=True)
    ]
    sources = _Files(files)
    return ImageDataset(
        sources,
        torch.tensor([ids[name] for name in classes]),
        tuple(names),
        hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        name=functools.partial(_file_name, sources),
        naming="own",
        root=folder,
        max_bad_fraction=max_bad_fraction,
    )
