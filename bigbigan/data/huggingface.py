"""Datasets of the Hugging Face `datasets` package, by a name such as `hf:org/name?streaming=1`."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bigbigan.data.dataset import ImageDataset
from bigbigan.data.decoding import Source
from bigbigan.data.labels import check_label_type, class_labels, is_text, streamed_label
from bigbigan.data.parquet import holds_images, suggested_options
from bigbigan.data.paths import OPTIONS, split_options
from bigbigan.data.streaming import BLOCK, ImageStream, Row

_OPTIONS = (*OPTIONS, "block", "config", "data_dir", "data_files", "revision", "split", "streaming")
_ROWS = 64  # read at a time from a stream

logger = logging.getLogger(__name__)


def open_hugging_face(
    spec: str, *, split: str, column: str, label_column: str | None, max_bad_fraction: float
) -> ImageDataset | ImageStream:
    """Opens `hf:NAME`, or `hf:NAME?option=value&…`.

    NAME is a dataset on the Hub, a folder that `save_to_disk` wrote, or a format such as `parquet` or `imagefolder`
    with `data_files` or `data_dir`. Further options: `config`, `revision`, `split`, `column`, `label` (empty: none) and
    `max_bad_fraction`, which come before the arguments, `streaming=1`, and `block`, images that a stream shuffles
    among each other.
    A column in a struct is named with a dot: `column=views.front`.

    Without `streaming` the set is downloaded once and memory-mapped. Its digest covers the labels and the bytes of 64
    images spread over it. Gated datasets take the token of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: an unknown option or column, or the dataset cannot be opened.
        ImportError: without datasets.
    """
    name, options = split_options(spec, _OPTIONS)
    name = name.removeprefix("hf:")
    if not name:
        raise ValueError(f"{spec} names no dataset; give hf:NAME?option=value&…")
    column, label_column = options.get("column", column), options.get("label", label_column) or None
    split, streaming = options.get("split", split), options.get("streaming", "") not in ("", "0", "false")
    max_bad_fraction, block = options.get("max_bad_fraction", max_bad_fraction), options.get("block", str(BLOCK))
    if not block.isdecimal() or not int(block):
        raise ValueError(f"{spec}: block is {block!r}; give a number of images")
    loaded = _load(_import(spec), spec, name, options, split, streaming)
    schema = loaded.features.arrow_schema if loaded.features else next(loaded.with_format("arrow").iter(1)).schema
    image, label = (
        _resolve(spec, schema, column),
        None if label_column is None else _resolve(spec, schema, label_column),
    )
    _check_types(spec, schema, image, label)
    classes = _class_names(loaded.features, label)
    roots = sorted({path[0] for path in (image, label) if path})
    loaded = loaded.select_columns(roots).with_format("arrow")
    if streaming:
        if label is not None and not classes:
            _check_streamed(spec, _arrow_type(schema, label))
        known = (loaded.info.splits or {}).get(split)
        return ImageStream(
            functools.partial(_shard, loaded, image, label),
            loaded.num_shards,
            name=spec,
            class_names=classes,
            num_images=known.num_examples or None if known else None,
            max_bad_fraction=max_bad_fraction,
            block=int(block),
        )
    if not len(loaded):
        raise ValueError(f"{spec} holds no rows")
    sources = ArrowRows(loaded, image)
    values = [None] * len(loaded) if label is None else _values(loaded.select_columns(label[0])[:], label)
    labels = class_labels(values, classes, spec)
    digest = hashlib.sha256(labels.numbers.numpy().tobytes())
    for index in np.linspace(0, len(values) - 1, min(64, len(values))).astype(int):
        source = sources[index]
        digest.update(source if isinstance(source, bytes) else str(source).encode())
    return ImageDataset(
        sources,
        labels.numbers,
        labels.names,
        digest.hexdigest(),
        name=functools.partial("{} row {}".format, spec),
        naming=labels.naming,
        max_bad_fraction=max_bad_fraction,
    )


def map_parquet(files: list[Path], column: str) -> ArrowRows:
    """The images of Parquet files too large for the memory, from a memory-mapped copy that is made once."""
    datasets = _import(str(files[0]))
    logger.info("%s and its shards: copied once into %s", files[0], datasets.config.HF_DATASETS_CACHE)
    names = [str(file) for file in files]
    rows = datasets.load_dataset("parquet", data_files=names, split="train", columns=[column])
    return ArrowRows(rows.with_format("arrow"), (column,))


class ArrowRows(Sequence[Source]):
    """The images of a memory-mapped dataset in Arrow format; never decoded by `datasets`."""

    def __init__(self, rows: Any, path: tuple[str, ...]) -> None:
        self._rows, self._path = rows, path

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return _source(_values(self._rows[int(index)], self._path)[0])


def _import(spec: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{spec} needs the datasets package: pip install 'bigbigan[train]'") from error
    return datasets


def _load(datasets: ModuleType, spec: str, name: str, options: dict[str, str], split: str, streaming: bool) -> Any:
    """A `Dataset`, or with `streaming` an `IterableDataset`."""
    saved = Path(name)
    try:
        if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if isinstance(loaded, dict) else loaded
            return loaded.to_iterable_dataset(max(1, len(loaded.cache_files))) if streaming else loaded
        sources = {key: options[key] for key in ("data_dir", "data_files", "revision") if key in options}
        return datasets.load_dataset(name, options.get("config"), split=split, streaming=streaming, **sources)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        hint = ""
        if any(word in str(error).lower() for word in ("gated", "401", "403", "authenticated")):
            hint = f". Accept its terms on https://huggingface.co/datasets/{name}, then `hf auth login` or set HF_TOKEN"
        raise ValueError(f"{spec} cannot be opened: {error}{hint}") from error


def _resolve(spec: str, schema: Any, column: str) -> tuple[str, ...]:
    """A column's name, and those of the fields in it."""
    if column in schema.names:
        return (column,)
    path = tuple(column.split("."))
    kind: Any = schema
    for name in path:
        if not hasattr(kind, "get_field_index") or kind.get_field_index(name) < 0:
            raise ValueError(
                f"{spec} has no column {column}; its columns are {', '.join(schema.names)}: name those of images and "
                f"labels, as in {spec}{'&' if '?' in spec else '?'}{suggested_options(schema, column, 'label')}"
            )
        kind = kind.field(name).type
    return path


def _check_types(spec: str, schema: Any, image: tuple[str, ...], label: tuple[str, ...] | None) -> None:
    kind = _arrow_type(schema, image)
    if not holds_images(kind):
        raise ValueError(f"{spec} has images as {kind}; expected struct{{bytes, path}} or bytes. Name it with column=")
    if label is not None:
        check_label_type(_arrow_type(schema, label), spec, f"{spec}{'&' if '?' in spec else '?'}label=")


def _check_streamed(spec: str, kind: Any) -> None:
    """
    Raises:
        ValueError: texts, which can be numbered only when all are known.
    """
    if is_text(getattr(kind, "value_type", kind)):
        raise ValueError(
            f"{spec} has labels as {kind}, and a stream cannot number texts that it has not seen yet: leave streaming "
            "out, cast the column to ClassLabel, or leave labels out with label="
        )


def _arrow_type(schema: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda kind, name: kind.field(name).type, path, schema)


def _class_names(features: Any, label: tuple[str, ...] | None) -> tuple[str, ...]:
    if not features or label is None:
        return ()
    return tuple(getattr(functools.reduce(lambda feature, name: feature[name], label, features), "names", None) or ())


def _values(table: Any, path: tuple[str, ...]) -> list[Any]:
    """A column of an Arrow table, or of a struct in it, as Python objects."""
    from pyarrow import compute, types

    column = table.column(path[0])
    values = compute.struct_field(column, list(path[1:])) if path[1:] else column
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.to_pylist()


def _source(value: Any) -> Source:
    if not isinstance(value, dict):
        return value
    return value["bytes"] or (Path(value["path"]) if value.get("path") else None)


def _shard(stream: Any, image: tuple[str, ...], label: tuple[str, ...] | None, index: int) -> Iterator[Row]:
    # `iter` of one shard, in this process: iterated in a worker process, `datasets` would share the shard out again
    for table in stream.shard(stream.num_shards, index).iter(_ROWS):
        labels = [None] * len(table) if label is None else _values(table, label)
        for value, number in zip(_values(table, image), labels, strict=True):
            yield functools.partial(_streamed, value), streamed_label(number, stream.info.dataset_name or "the stream")


def _streamed(value: Any) -> Source:
    source = _source(value)
    if isinstance(source, Path) and not source.is_file():
        import fsspec

        with fsspec.open(value["path"], "rb") as file:  # inside an archive, or on another machine
            return file.read()
    return source
