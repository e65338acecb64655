"""Images and labels of Parquet files in the Hugging Face layout."""

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

from bigbigan.training.decoding import Source
from bigbigan.training.sources import ImageDataset

MAX_CLASSES = 100_000  # a classifier has a row of weights for each number up to the largest


def open_parquet(
    files: list[Path], *, column: str, label_column: str | None, max_bad_fraction: float, max_bytes: int
) -> ImageDataset:
    """The files' rows one after the other, as `open_training_data` says.

    Raises:
        ValueError: a file that cannot be read, a missing column, or one of another type.
        ImportError: without pyarrow, or above `max_bytes` without datasets.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {files[0]} needs pyarrow: pip install 'bigbigan[train]'") from error
    in_memory = sum(file.stat().st_size for file in files) <= max_bytes
    digest, sources, labels, counts = hashlib.sha256(), list[Source](), list[int](), list[int]()
    for usual, name in (("image", column), ("label", label_column or "")):
        if name != usual:
            digest.update(f"{usual}={name}&".encode())
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = _checked_schema(file, path, column, label_column)
                digest.update(path.read_bytes() if in_memory else _footer(path, file.metadata.serialized_size))
                if in_memory:
                    sources += _encoded(file.read(columns=[column]).column(column))
                counts.append(file.metadata.num_rows)
                values = [None] * counts[-1]  # null: unlabelled
                if label_column is not None:
                    values = file.read(columns=[label_column]).column(label_column).to_pylist()
                labels += [-1 if value is None else value for value in values]
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from error
    if not labels:
        raise ValueError(f"{files[0]} holds no rows")
    if max(labels) >= MAX_CLASSES:
        raise ValueError(f"{files[0]} has a label {max(labels)}; number classes from 0, below {MAX_CLASSES:,}")
    rows: Sequence[Source] = sources
    if not in_memory:
        from bigbigan.training.huggingface import map_parquet

        rows = map_parquet(files, column)
    return ImageDataset(
        rows,
        torch.tensor(labels),
        _class_names(schema.metadata, label_column) or tuple(map(str, range(max(labels) + 1))),
        digest.hexdigest(),
        name=functools.partial(_row_name, files, np.cumsum(counts)),
        max_bad_fraction=max_bad_fraction,
    )


def _checked_schema(file: Any, path: Path, column: str, label_column: str | None) -> Any:
    from pyarrow import types

    schema = file.schema_arrow
    missing = sorted({column, *([] if label_column is None else [label_column])} - set(schema.names))
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; its columns are {', '.join(schema.names)}: name those of "
            f"images and labels, if any, as in {path}?column=img&label="
        )
    if label_column is not None and not types.is_integer(schema.field(label_column).type):
        raise ValueError(f"{path} has labels as {schema.field(label_column).type}; expected integers")
    if not holds_images(schema.field(column).type):
        raise ValueError(f"{path} has images as {schema.field(column).type}; expected struct{{bytes, path}} or bytes")
    return schema


def holds_images(kind: Any) -> bool:
    """Whether an Arrow type is bytes, or a struct with a field "bytes"."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _encoded(column: Any) -> list[bytes | None]:
    """The image files in an Arrow column; None where a row has no bytes (its path, if any, is not followed)."""
    from pyarrow import compute, types

    return (compute.struct_field(column, "bytes") if types.is_struct(column.type) else column).to_pylist()


def _footer(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(-8 - size, os.SEEK_END)
        return file.read()


def _row_name(files: list[Path], ends: np.ndarray, index: int) -> str:
    file = int(np.searchsorted(ends, index, side="right"))
    return f"{files[file]} row {index - (int(ends[file - 1]) if file else 0)}"


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel in the schema metadata that `datasets` writes; empty without."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get(label_column, {}).get("names", ()))
