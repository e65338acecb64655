"""Opens a data set by its path: folders, Parquet files, Hugging Face datasets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbigan.data.dataset import MAX_BYTES, ImageDataset
from bigbigan.data.folders import open_folder
from bigbigan.data.huggingface import open_hugging_face
from bigbigan.data.parquet import open_parquet
from bigbigan.data.paths import split_options
from bigbigan.data.splits import (
    check_no_splits,
    classes_beside,
    family,
    find_folder,
    find_parquet,
    nested_parquet,
    parquet_files,
    split_names,
    subfolders,
)
from bigbigan.data.streaming import ImageStream
from bigbigan.images import list_images

logger = logging.getLogger(__name__)


def open_dataset(path: str | Path, **options: Any) -> ImageDataset:
    """As `open_training_data`, for users that need every image's index: a stream raises ValueError."""
    data = open_training_data(path, **options)
    if not isinstance(data, ImageDataset):
        raise ValueError(f"{path} is read as a stream, which has no index; leave streaming out")
    return data


def open_training_data(
    path: str | Path,
    *,
    split: str = "train",
    column: str = "image",
    label_column: str | None = "label",
    max_bad_fraction: float = 0.001,
    max_bytes: int = MAX_BYTES,
) -> ImageDataset | ImageStream:
    """Opens a folder of images, a `.parquet` file, a folder of `{split}.parquet` or `{split}-*.parquet`, or "hf:…".

    `path?option=value&…` comes before the arguments: `column`, `label` (empty: no labels) and `max_bad_fraction`.

    Image files lie in `path/{split}`, or for "train" in `path` itself; the first subfolder is the class and labels
    count the classes by sorted name. Splits are found in any case and usual spelling (train, training; val, valid,
    validation, dev; test, testing, eval, evaluation), and never taken for classes. Parquet is the Hugging Face layout,
    in `path` or in one subfolder of it: `column` holds struct{bytes, path} or bytes, `label_column` one number, truth
    value or text per image (None: no labels; see `class_labels`). Parquet files of more than `max_bytes` together are
    copied once by the `datasets` package into its cache on the disk, as memory-mapped Arrow: a Parquet file cannot be
    read by the row, and the copy keeps one order of samples for sets of every size. `open_hugging_face` says what
    "hf:…" takes; only such a set with `streaming` is an `ImageStream`.

    The digest of Parquet is that of the files' bytes end to end, or above `max_bytes` of their footers, which hold the
    size of each chunk, and of columns that are not "image" and "label"; that of image files covers their relative
    names, sizes and modification times, and so changes where a copy does not keep the times.

    A split may have a range, as in the `datasets` package: "train[:50000]" is the first 50,000 images. What was found
    is logged.

    Raises:
        ValueError: nothing of the kind at `path`, or it lacks the split, a shard or a column; splits that would become
            classes; or an unknown option.
        ImportError: Parquet without pyarrow, "hf:…" or more than `max_bytes` of Parquet without datasets.
    """
    options: dict[str, Any] = {"column": column, "label_column": label_column, "max_bad_fraction": max_bad_fraction}
    data: ImageDataset | ImageStream
    where, splits = str(path), list[str]()
    if str(path).startswith("hf:"):
        data = open_hugging_face(str(path), split=split, **options)
    else:
        part = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", split)
        data, where, splits = _open_local(str(path), split if part is None else part[1], options, max_bytes)
        if part is not None:
            data = data.subset(slice(*(int(number) if number else None for number in part.groups()[1:])))
    if os.environ.get("RANK", "0") == "0":
        logger.info("%s", described(data, where, split, splits))
    return data


def _open_local(spec: str, split: str, options: dict[str, Any], max_bytes: int) -> tuple[ImageDataset, str, list[str]]:
    """The whole of a split, where it was found, and the splits there."""
    name, given = split_options(spec)
    path, options = Path(name), options | {key: given[key] for key in ("column", "max_bad_fraction") if key in given}
    if "label" in given:
        options["label_column"] = given["label"] or None
    if path.suffix == ".parquet" and path.is_file():
        return open_parquet([path], max_bytes=max_bytes, **options), name, []
    if not path.is_dir():
        raise ValueError(f"{path} is neither a .parquet file nor a folder (nor hf:NAME, a Hugging Face dataset)")
    shards, folder = find_parquet(path, split), None
    if not shards and not parquet_files(path):
        folder = find_folder(path, split)
        if folder is not None:
            shards = parquet_files(folder)
        elif (inner := nested_parquet(path, split)) is not None:
            path, shards = inner, find_parquet(inner, split)
    if shards:
        where = str(path if len(shards) > 1 else shards[0])
        return open_parquet(shards, max_bytes=max_bytes, **options), where, split_names(path)
    if folder is None and (family(split) != "train" or parquet_files(path)):
        raise ValueError(_no_split(path, split))
    try:
        files = list_images(folder or path)
    except ValueError as error:
        within = [str(within) for within in subfolders(path) if parquet_files(within)]
        hint = f"; there is Parquet in {', '.join(within[:3])}: name that folder" if within else ""
        raise ValueError(f"no {split}.parquet, no {split}-*.parquet, and no images: {error}{hint}") from error
    if "column" in given or given.get("label"):
        raise ValueError(f"{path} holds image files, which have no columns: of column and label, only label= fits")
    dataset = open_folder(folder or path, files, options["max_bad_fraction"])
    if folder is None:
        check_no_splits(path, (file.relative_to(path).as_posix() for file in files))
    elif not dataset.class_names and (beside := classes_beside(folder)):
        logger.warning(
            "%s is taken as the split %s, and %s beside it left out; name a folder above, if it is a class",
            *(folder, split, ", ".join(f"{name}/" for name in beside[:5])),
        )
    if "label" in given:
        dataset.labels.fill_(-1)
    return dataset, str(folder or path), split_names(path)


def _no_split(path: Path, split: str) -> str:
    parquet, there = bool(parquet_files(path)), split_names(path)
    if not there:
        within = [inner for inner in subfolders(path) if parquet_files(inner)]
        there = [f"{name} in {inner}" for inner in within for name in split_names(inner)]
    wanted = f"neither {split}.parquet nor {split}-*.parquet"
    text = (
        f"{path} holds parquet files, but {wanted}"
        if parquet
        else f"{path} holds no {split!r} split: neither {split}.parquet, {split}-*.parquet nor {split}/"
    )
    return f"{text}; there is {', '.join(there[:8])}: name one of these as the split" if there else text


def described(data: ImageDataset | ImageStream, where: str, split: str, splits: Sequence[str] = ()) -> str:
    """What a set holds, in one line: images, classes with the first names, splits."""
    if isinstance(data, ImageDataset):
        count, unlabelled = _counted(len(data), "image"), int((data.labels < 0).sum())
        classes = len(data.labels[data.labels >= 0].unique())
        text = _counted(classes, "class") if classes else "no labels"
        if classes and unlabelled:
            text += f", {_counted(unlabelled, 'image')} without a label"
    else:
        count = f"a stream of {data.num_shards:,} shards"
        count += f" with {data.num_images:,} images" if data.num_images else ""
        text = f"{len(data.class_names):,} named classes" if data.class_names else "classes not named"
    if data.class_names and text != "no labels":
        more = ", …" if len(data.class_names) > 5 else ""
        text += f" ({', '.join(data.class_names[:5])}{more})"
    there = f"; splits there: {', '.join(splits[:8])}" if splits else ""
    return f"{where}: {count} in {split}, {text}{there}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"
