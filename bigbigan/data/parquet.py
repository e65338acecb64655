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

from bigbigan.data.dataset import ImageDataset
from bigbigan.data.decoding import Source
from bigbigan.data.labels import check_label_type, class_labels, is_text


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
    digest, sources, values, counts = hashlib.sha256(), list[Source](), list[Any](), list[int]()
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
                values += [None] * counts[-1] if label_column is None else _values(file, label_column)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from error
    if not values:
        raise ValueError(f"{files[0]} holds no rows")
    labels = class_labels(values, _class_names(schema.metadata, label_column), str(files[0]))
    rows: Sequence[Source] = sources
    if not in_memory:
        from bigbigan.data.huggingface import map_parquet

        rows = map_parquet(files, column)
    return ImageDataset(
        rows,
        labels.numbers,
        labels.names,
        digest.hexdigest(),
        name=functools.partial(_row_name, files, np.cumsum(counts)),
        naming=labels.naming,
        stored_paths=functools.partial(_stored_paths, files, column),
        max_bad_fraction=max_bad_fraction,
    )


def _checked_schema(file: Any, path: Path, column: str, label_column: str | None) -> Any:
    schema = file.schema_arrow
    missing = sorted({column, *([] if label_column is None else [label_column])} - set(schema.names))
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; its columns are {', '.join(schema.names)}: name those of "
            f"images and labels, if any, as in {path}?{suggested_options(schema, column, label_column)}"
        )
    if label_column is not None:
        check_label_type(schema.field(label_column).type, str(path), f"{path}?{_without_labels(column)}")
    if not holds_images(schema.field(column).type):
        raise ValueError(f"{path} has images as {schema.field(column).type}; expected struct{{bytes, path}} or bytes")
    return schema


def _without_labels(column: str) -> str:
    return "label=" if column == "image" else f"column={column}&label="


def suggested_options(schema: Any, column: str, label_column: str | None) -> str:
    """Options that name the likely columns of images and of labels; `label=` only where none can be labels."""
    from pyarrow import types

    images = [field.name for field in schema if holds_images(field.type)]
    structs = [field for field in schema if types.is_struct(field.type)]
    images = images or [
        f"{outer.name}.{field.name}" for outer in structs for field in outer.type if holds_images(field.type)
    ]
    image = next((name for name in (column, "image", "img", *images) if name in images), "img")
    options = [] if image == "image" else [f"column={image}"]
    if label_column is None:
        return "&".join([*options, "label="])
    simple = [types.is_integer, types.is_boolean, types.is_dictionary, is_text, types.is_floating]
    found = [field.name for test in simple for field in schema if test(field.type) and field.name != image]
    named = [name for name in found if name.lower().startswith(("label", "class", "target", "category", "fine"))]
    label = next((name for name in (label_column, *named, *found) if name in found), "")
    return "&".join([*options, *([] if label == "label" else [f"label={label}"])]) or "label="


def holds_images(kind: Any) -> bool:
    """Whether an Arrow type is bytes, or a struct with a field "bytes"."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _values(file: Any, column: str) -> list[Any]:
    """A column as Python objects, dictionaries resolved."""
    from pyarrow import types

    values = file.read(columns=[column]).column(column)
    return (values.cast(values.type.value_type) if types.is_dictionary(values.type) else values).to_pylist()


def _encoded(column: Any) -> list[bytes | None]:
    """The image files in an Arrow column; None where a row has no bytes (its path, if any, is not followed)."""
    from pyarrow import compute, types

    return (compute.struct_field(column, "bytes") if types.is_struct(column.type) else column).to_pylist()


def _stored_paths(files: list[Path], column: str) -> list[str] | None:
    from pyarrow import compute, parquet, types

    found: list[str | None] = []
    for path in files:
        with parquet.ParquetFile(path) as file:
            kind = file.schema_arrow.field(column).type
            if not types.is_struct(kind) or kind.get_field_index("path") < 0:
                return None
            found += compute.struct_field(file.read(columns=[f"{column}.path"]).column(column), "path").to_pylist()
    paths = [path for path in found if isinstance(path, str)]
    return paths if len(set(paths)) == len(found) else None


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
