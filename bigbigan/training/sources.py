"""Where training images come from: folders, Parquet files, Hugging Face datasets."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bigbigan.config import PreprocessConfig
from bigbigan.images import list_images
from bigbigan.training.decoding import Decoded, Decoder, Job, Source, in_colour
from bigbigan.training.labels import Naming
from bigbigan.training.paths import split_options
from bigbigan.training.splits import (
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
from bigbigan.workers import run_jobs

if TYPE_CHECKING:
    from bigbigan.training.streaming import ImageStream

MAX_BYTES = 8 << 30  # of encoded files, and of decoded images, held in memory
LOOKED_AT = 32  # images whose header tells whether a set is in colour
CHUNK = 64  # images that one worker decodes at a time, outside training

logger = logging.getLogger(__name__)


class UnreadableImages:
    """Counts and names the unreadable images of a run, and stops it when they are too many."""

    def __init__(self, max_fraction: float) -> None:
        self.reasons: dict[int, str] = {}
        self._max_fraction = max_fraction

    def add(self, new: dict[int, str], total: int) -> None:
        """Warns of images not met before.

        Raises:
            ValueError: more than `max_fraction` of `total` images are unreadable.
        """
        new = {index: reason for index, reason in new.items() if index not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self._max_fraction * total:
            first = "; ".join(self.reasons[index] for index in sorted(self.reasons)[:5])
            raise ValueError(
                f"{len(self.reasons)} of {total} images cannot be read, more than {self._max_fraction:.2%}: "
                f"{first}. Repair or remove them, or raise max_bad_fraction, an option of the path"
            )
        if new:
            names = "; ".join(new[index] for index in sorted(new))
            logger.warning("%d unreadable images replaced by the next readable ones: %s", len(new), names)


class ImageDataset:
    """Labelled images of one split, encoded as they came, each reachable by its index.

    Attributes:
        labels: [N] int64; -1 where there is no label.
        class_names: name of each label.
        digest: sha256 of what the dataset holds (see `open_training_data`), for telling at resume that data changed.
        naming: what the labels mean in another split (`Naming`).
        root: the folder that image files are named by; None: rows without names.
        stored_paths: reads the paths that Parquet keeps beside its images; None where it has none, or some twice.
        bad: index and reason of every unreadable image met so far. Each is replaced, with its label, by the next
            readable one, so the same files always give the same samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Tensor,
        class_names: tuple[str, ...],
        digest: str,
        *,
        name: Callable[[int], str],
        naming: Naming = "numbers",
        root: Path | None = None,
        stored_paths: Callable[[], list[str] | None] = lambda: None,
        max_bad_fraction: float = 0.001,
    ) -> None:
        self.labels, self.class_names, self.digest, self.root = labels, class_names, digest, root
        self.naming, self.stored_paths = naming, stored_paths
        self.sources, self.max_bad = sources, max_bad_fraction * len(sources)
        self._unreadable, self.name = UnreadableImages(max_bad_fraction), name
        self._told = set[int]()

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def bad(self) -> dict[int, str]:
        return self._unreadable.reasons

    def tell_channels(self, channels: int) -> None:
        """Says once if pictures in colour become grey, or all are grey where colour is taken; a few are looked at."""
        if channels in self._told or os.environ.get("RANK", "0") != "0":
            return
        self._told.add(channels)
        looked = in_colour(self.sources, np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int).tolist())
        if channels == 1 and any(looked):
            logger.warning(
                "%d of %d images looked at are in colour, and the networks take grey images: colour is converted to "
                "grey. Recipes and models for colour have image_channels 3, such as bigbigan-cifar10-32",
                *(sum(looked), len(looked)),
            )
        elif channels == 3 and looked and not any(looked):
            logger.info("the images are grey, and the networks take colour: grey is repeated in three channels")

    def decoder(self, config: PreprocessConfig, channels: int, **options: Any) -> Decoder:
        self.tell_channels(channels)
        return Decoder(self.sources, config, channels, self.max_bad, bad=dict(self.bad), **options)

    def accept(self, decoded: Decoded) -> Tensor:
        """The images of a job, once its unreadable ones are counted and the labels of replaced ones set.

        Raises:
            ValueError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        self._unreadable.add({i: f"{self.name(i)}: {reason}" for i, reason in decoded.bad.items()}, len(self))
        if (decoded.used < 0).any():
            raise ValueError(f"none of the {len(self)} images can be read, such as {next(iter(self.bad.values()))}")
        self.labels[decoded.job.indices] = self.labels[decoded.used]
        return decoded.images

    def subset(self, part: slice) -> ImageDataset:
        """The images of a slice, renumbered from 0."""
        if max(part.start or 0, part.stop or 0) > len(self):
            raise ValueError(f"{part.start or 0}:{part.stop or ''} was asked for, and there are {len(self)} images")
        numbers = range(*part.indices(len(self)))
        if not numbers or numbers.step != 1:
            asked = f"[{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}]"
            raise ValueError(f"{asked} leaves no images of {len(self)}, or is no plain range")
        return self._select(numbers, f"{numbers[0]}:{numbers[-1] + 1}")

    def select(self, indices: Tensor) -> ImageDataset:
        """These images [n] in this order, renumbered from 0."""
        numbers = indices.cpu().numpy()
        return self._select(numbers, hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest())

    def _select(self, numbers: range | np.ndarray, what: str) -> ImageDataset:
        name, stored_paths, told = self.name, self.stored_paths, self._told

        def paths() -> list[str] | None:
            found = stored_paths()
            return None if found is None else [found[int(number)] for number in numbers]

        part = ImageDataset(
            _Part(self.sources, numbers),
            self.labels[torch.as_tensor(np.asarray(numbers))],
            self.class_names,
            hashlib.sha256(f"{self.digest}[{what}]".encode()).hexdigest(),
            name=lambda index: name(int(numbers[index])),
            naming=self.naming,
            root=self.root,
            stored_paths=paths,
            max_bad_fraction=self.max_bad / len(self),
        )
        part._told = told
        return part

    def uint8(self, index: int, config: PreprocessConfig, channels: int) -> np.ndarray:
        """One image [C, S, S] under evaluation preprocessing; an unreadable one is replaced with a warning.

        Raises:
            ValueError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        return self.decode([index], config, channels)[0].numpy()

    def decode(
        self, indices: Iterable[int] | Tensor, config: PreprocessConfig, channels: int, *, workers: int = 0
    ) -> Tensor:
        """Images [B, C, S, S] uint8 under evaluation preprocessing, as `uint8` gives them one by one."""
        wanted = np.fromiter(map(int, indices), np.int64)
        images = torch.empty((len(wanted), channels, config.resolution, config.resolution), dtype=torch.uint8)
        jobs = [Job(wanted[start : start + CHUNK]) for start in range(0, len(wanted), CHUNK)]
        results = run_jobs(
            self.decoder(config, channels), jobs, min(workers, len(jobs) // 16)
        )  # starting one takes a while
        # `disable=None`: only on a terminal
        for number, decoded in enumerate(
            tqdm(results, "decoding", len(jobs), disable=None if len(jobs) > 99 else True)
        ):
            images[number * CHUNK :][: len(decoded.images)] = self.accept(decoded)
        return images

    def batches(
        self, config: PreprocessConfig, channels: int, *, size: int, start: int = 0, workers: int = 0
    ) -> Iterator[Tensor]:
        """Images [size, C, S, S] uint8, of the last batch the rest, in order from `start` on, as `uint8` gives them."""
        stops = range(start + size, len(self) + size, size)
        jobs = (Job(np.arange(stop - size, min(stop, len(self)))) for stop in stops)
        for decoded in run_jobs(self.decoder(config, channels), jobs, min(workers, len(stops) // 2)):
            yield self.accept(decoded)

    def decode_all(
        self, config: PreprocessConfig, channels: int, *, max_bytes: int = MAX_BYTES, workers: int = 0
    ) -> Tensor:
        """All images, [N, C, S, S] uint8, as `uint8` gives them one by one.

        Raises:
            ValueError: they take more than `max_bytes`, or more than `max_bad_fraction` of them are unreadable.
        """
        self.check_decoded_bytes(config, channels, max_bytes)
        return self.decode(range(len(self)), config, channels, workers=workers)

    def check_decoded_bytes(self, config: PreprocessConfig, channels: int, max_bytes: int = MAX_BYTES) -> None:
        """
        Raises:
            ValueError: all images, decoded, take more.
        """
        size = self.decoded_bytes(config, channels)
        if size > max_bytes:
            raise ValueError(
                f"{len(self)} images of {config.resolution} pixels take {size / 2**30:.1f} GiB decoded, "
                f"more than {max_bytes / 2**30:.1f}; decode them on demand, at a lower resolution, or fewer"
            )

    def decoded_bytes(self, config: PreprocessConfig, channels: int) -> int:
        return math.prod((len(self), channels, config.resolution, config.resolution))


class _Part(Sequence[Source]):
    """Some of the sources, read when asked for."""

    def __init__(self, sources: Sequence[Source], numbers: range | np.ndarray) -> None:
        self.sources, self.numbers = sources, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[int(self.numbers[index])]


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
        from bigbigan.training.huggingface import open_hugging_face

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
    from bigbigan.training.folders import open_folder
    from bigbigan.training.parquet import open_parquet

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
