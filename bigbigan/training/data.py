"""Training images: where they come from, and which of them make up the batch that starts at a given sample number.

Everything random is a hash of (seed, sample number), so a batch depends on no state, batch size or number of
processes: resuming a run needs one integer.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bigbigan.config import ConfigError, PreprocessConfig
from bigbigan.images import FORMATS, BadImageError, list_images, preprocess

MAX_BYTES = 8 << 30  # of encoded files, and of decoded images, held in memory

logger = logging.getLogger(__name__)


class ImageDataset:
    """Labelled images of one split, encoded as they came.

    Attributes:
        labels: [N] int64; -1 where there is no label.
        class_names: name of each label.
        digest: sha256 of what the dataset holds (see `open_dataset`), for telling at resume that data changed.
        bad: index and reason of every unreadable image met so far. Each is replaced, with its label, by the next
            readable one, so the same files always give the same samples.
    """

    def __init__(
        self,
        sources: Sequence[Path | bytes | None],
        labels: Tensor,
        class_names: tuple[str, ...],
        digest: str,
        *,
        name: Callable[[int], str],
        max_bad_fraction: float = 0.001,
    ) -> None:
        self.labels, self.class_names, self.digest = labels, class_names, digest
        self.bad: dict[int, str] = {}
        self._sources, self._name, self._max_bad_fraction = sources, name, max_bad_fraction

    def __len__(self) -> int:
        return len(self._sources)

    def uint8(self, index: int, config: PreprocessConfig, channels: int) -> np.ndarray:
        """One image [C, S, S] under evaluation preprocessing; an unreadable one is replaced with a warning.

        Raises:
            ValueError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        for candidate in (np.arange(len(self)) + index) % len(self):
            known = candidate in self.bad
            image = None if known else self._decode(int(candidate), config, channels)
            if image is not None:
                self.labels[index] = self.labels[candidate]
                return image
            if not known:
                self._report([int(candidate)])
        raise ValueError(f"none of the {len(self)} images can be read, such as {self.bad[index]}")

    def decode_all(self, config: PreprocessConfig, channels: int, *, max_bytes: int = MAX_BYTES) -> Tensor:
        """All images, [N, C, S, S] uint8, as `uint8` gives them one by one.

        Raises:
            ValueError: they take more than `max_bytes`, or more than `max_bad_fraction` of them are unreadable.
        """
        shape = (len(self), channels, config.resolution, config.resolution)
        if math.prod(shape) > max_bytes:
            raise ValueError(
                f"{len(self)} images of {config.resolution} pixels take {math.prod(shape) / 2**30:.1f} GiB decoded, "
                f"more than {max_bytes / 2**30:.1f}; train at a lower resolution or on fewer images"
            )
        images = np.empty(shape, np.uint8)
        known = set(self.bad)
        # `disable=None`: only on a terminal
        for index in tqdm(range(len(self)), "decoding", disable=None if len(self) >= 10_000 else True):
            image = self._decode(index, config, channels)
            if image is not None:
                images[index] = image
        self._report(sorted(set(self.bad) - known))
        for index in sorted(self.bad):
            images[index] = self.uint8(index, config, channels)
        return torch.from_numpy(images)

    def _decode(self, index: int, config: PreprocessConfig, channels: int) -> np.ndarray | None:
        source = self._sources[index]
        try:
            if source is None:
                raise BadImageError(None, "the row has no image bytes")
            picture = _opened(source) if isinstance(source, bytes) else source
            # rounding undoes the map to [-1, 1] exactly
            return preprocess(picture, config, channels)[0].add(1).mul(127.5).round().byte().numpy()
        except BadImageError as error:
            self.bad[index] = f"{self._name(index)}: {error.reason}"
            return None

    def _report(self, new: list[int]) -> None:
        if len(self.bad) > self._max_bad_fraction * len(self):
            first = "; ".join(self.bad[index] for index in sorted(self.bad)[:5])
            raise ValueError(
                f"{len(self.bad)} of {len(self)} images cannot be read, more than {self._max_bad_fraction:.2%}: "
                f"{first}. Repair or remove them, or raise max_bad_fraction"
            )
        if new:
            names = "; ".join(self.bad[index] for index in new)
            logger.warning("%d unreadable images replaced by the next readable ones: %s", len(new), names)


def open_dataset(
    path: str | Path,
    *,
    split: str = "train",
    column: str = "image",
    label_column: str | None = "label",
    max_bad_fraction: float = 0.001,
) -> ImageDataset:
    """Opens a `.parquet` file, a folder of `{split}.parquet` or `{split}-*.parquet`, or a folder of image files.

    Parquet is the Hugging Face layout: `column` holds struct{bytes, path} or bytes, `label_column` integers (None:
    no labels). Image files lie in `path/{split}`, or for "train" in `path` itself; the first subfolder is the class
    and labels count the classes by sorted name.

    The digest of parquet is that of the files' bytes end to end; that of image files covers their relative names,
    sizes and modification times, and so changes where a copy does not keep the times.

    Raises:
        ValueError: nothing of the kind at `path`, or it lacks the split, a shard or a column.
        ImportError: parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        return _open_parquet([path], column, label_column, max_bad_fraction)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a .parquet file nor a folder")
    shards = [path / f"{split}.parquet"]
    if not shards[0].is_file():
        shards = sorted(path.glob(f"{glob.escape(split)}-*.parquet"))
    if shards:
        counts = {int(match[1]) for shard in shards if (match := re.search(r"-of-(\d+)$", shard.stem))}
        if counts and counts != {len(shards)}:
            raise ValueError(f"{path} holds {len(shards)} of {max(counts)} {split}-*.parquet shards; fetch the others")
        return _open_parquet(shards, column, label_column, max_bad_fraction)
    if any(path.glob("*.parquet")):
        raise ValueError(f"{path} holds parquet files, but neither {split}.parquet nor {split}-*.parquet")
    if (path / split).is_dir():
        path = path / split
    elif split != "train":
        raise ValueError(f"{path} holds no {split!r} split: neither {split}.parquet, {split}-*.parquet nor {split}/")
    try:
        files = list_images(path)
    except ValueError as error:
        raise ValueError(f"no {split}.parquet, no {split}-*.parquet, and no images: {error}") from error
    return _open_folder(path, files, max_bad_fraction)


def _open_parquet(files: list[Path], column: str, label_column: str | None, max_bad_fraction: float) -> ImageDataset:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {files[0]} needs pyarrow: pip install 'bigbigan[train]'") from error
    size = sum(file.stat().st_size for file in files)
    if size > MAX_BYTES:
        raise ValueError(
            f"{files[0]} and its shards hold {size / 2**30:.1f} GiB, more than {MAX_BYTES >> 30} in memory"
        )
    wanted = [column] if label_column is None else [column, label_column]
    digest = hashlib.sha256()
    sources: list[bytes | None] = []
    labels: list[int] = []
    rows: list[tuple[Path, int]] = []
    for path in files:
        digest.update(path.read_bytes())
        try:
            file = pyarrow.parquet.ParquetFile(path)
            schema = file.schema_arrow
            missing = sorted(set(wanted) - set(schema.names))
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; its columns are {', '.join(schema.names)}"
                )
            if label_column is not None and not pyarrow.types.is_integer(schema.field(label_column).type):
                raise ValueError(f"{path} has labels as {schema.field(label_column).type}; expected integers")
            table = file.read(columns=wanted)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from error
        sources += _encoded(table.column(column), path)
        rows += [(path, row) for row in range(len(table))]
        # null: unlabelled
        values = [None] * len(table) if label_column is None else table.column(label_column).to_pylist()
        labels += [-1 if value is None else value for value in values]
    if not sources:
        raise ValueError(f"{files[0]} holds no rows")
    names = _class_names(schema.metadata, label_column) or tuple(map(str, range(max(labels) + 1)))
    return ImageDataset(
        sources,
        torch.tensor(labels),
        names,
        digest.hexdigest(),
        name=lambda index: f"{rows[index][0]} row {rows[index][1]}",
        max_bad_fraction=max_bad_fraction,
    )


def _encoded(column: Any, path: Path) -> list[bytes | None]:
    """The image files in an Arrow column; None where a row has no bytes (its path, if any, is not followed)."""
    from pyarrow import compute, types

    encoded = column
    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        encoded = compute.struct_field(column, "bytes")
    if not (types.is_binary(encoded.type) or types.is_large_binary(encoded.type)):
        raise ValueError(f"{path} has images as {column.type}; expected struct{{bytes, path}} or bytes")
    return encoded.to_pylist()


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # what damaged files raise in Pillow is an open set
        raise BadImageError(None, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel in the schema metadata that `datasets` writes; empty without."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get(label_column, {}).get("names", ()))


def _open_folder(folder: Path, files: list[Path], max_bad_fraction: float) -> ImageDataset:
    relative = [file.relative_to(folder) for file in files]
    classes = [file.parts[0] if len(file.parts) > 1 else None for file in relative]
    names = sorted({name for name in classes if name is not None})
    ids: dict[str | None, int] = {None: -1, **{name: number for number, name in enumerate(names)}}
    listing = [
        (name.as_posix(), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for name, file in zip(relative, files, strict=True)
    ]
    return ImageDataset(
        files,
        torch.tensor([ids[name] for name in classes]),
        tuple(names),
        hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        name=lambda index: str(files[index]),
        max_bad_fraction=max_bad_fraction,
    )


@dataclass(frozen=True)
class AugmentationConfig:
    """Random crop, flip and translation of training images; the default does nothing."""

    crop_scale: tuple[float, float] = (1.0, 1.0)  # share of the image's area; 0.08 to 1 in ResNet training
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop, where crop_scale is below 1
    flip: bool = False
    shift: int = 0  # up to so many pixels each way, black behind

    def __post_init__(self) -> None:
        for name, low, high in (("crop_scale", 1e-3, 1.0), ("aspect", 0.1, 10.0)):
            value = getattr(self, name)
            if len(value) != 2 or not low <= value[0] <= value[1] <= high:
                raise ConfigError(f"AugmentationConfig.{name} is {value}; give a range within {low} to {high}")
        if not 0 <= self.shift <= 256:
            raise ConfigError(f"AugmentationConfig.shift is {self.shift}, outside 0 to 256")

    @property
    def crops(self) -> bool:
        return self.crop_scale[0] < 1


class Batches:
    """The endless stream of training samples, addressed by sample number.

    Sample k is image k % N of the permutation of epoch k // N, so batches may straddle epochs and every epoch holds
    each image once. Its augmentation is drawn from (seed, k).

    Args:
        images: [N, C, S, S] uint8.
        batch_size: of all processes together.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int,
        *,
        augmentation: AugmentationConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 [N, C, S, S]")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not split evenly over {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0 to {world_size - 1}")
        self.batch_size = batch_size
        self._images, self._seed = images, seed
        self._augmentation = augmentation or AugmentationConfig()
        self._rank, self._local_size = rank, batch_size // world_size
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, len(images), seed))

    def at(self, k: int) -> Tensor:
        """This process's slice [batch_size / world_size, C, S, S], in [-1, 1], of the batch starting at sample k."""
        images = self._images[self.indices(k)].float() / 127.5 - 1
        return augment(images, uniform(self._seed, self._samples(k), NUM_DRAWS), self._augmentation)

    def indices(self, k: int) -> Tensor:
        """The images behind `at(k)` as [batch_size / world_size] int64 indices, for labels."""
        epochs, positions = np.divmod(self._samples(k), len(self._images))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self._permutation(int(epoch))[positions[epochs == epoch]]
        return torch.from_numpy(indices)

    def _samples(self, k: int) -> np.ndarray:
        if k < 0:
            raise ValueError(f"sample number {k} is negative")
        return k + self._rank * self._local_size + np.arange(self._local_size)


NUM_DRAWS = 7  # area, aspect, left, top, flip, shift right, shift down


def augment(images: Tensor, draws: np.ndarray, config: AugmentationConfig) -> Tensor:
    """Crops and scales back, then flips, then shifts each image [B, C, S, S] by its row of `draws` [B, 7] in [0, 1).

    The crop's area is uniform and its aspect log-uniform; where it exceeds the image it is cut to it, not redrawn.
    Scaling is bilinear and only ever enlarges, so it needs no low-pass filter.
    """
    flips = torch.from_numpy(draws[:, 4] < 0.5) if config.flip else torch.zeros(len(images), dtype=torch.bool)
    if not config.crops and not config.shift:
        return torch.where(flips[:, None, None, None], images.flip(3), images) if config.flip else images
    size = images.shape[-1]
    area = _between(draws[:, 0], *config.crop_scale)
    # an uncropped image keeps its aspect, whatever range is set
    ratio = np.exp(_between(draws[:, 1], *np.log(config.aspect))) if config.crops else np.ones(len(draws))
    extent = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], 1)), 1)  # [B, (x, y)], share of the side
    center = (1 - extent) * (2 * draws[:, 2:4] - 1)  # in the grid's units: -1 and 1 are the image's edges
    shift = np.floor(draws[:, 5:7] * (2 * config.shift + 1)) - config.shift
    pixels = (2 * np.arange(size) + 1) / size - 1
    frame = pixels - 2 * shift[:, :, None] / size  # [B, 2, S]: where the shifted image has each output pixel
    mirror = np.stack([1 - 2.0 * flips.numpy(), np.ones(len(draws))], 1)
    x, y = torch.from_numpy(center[:, :, None] + (extent * mirror)[:, :, None] * frame).float().unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    # "border" and a mask, not "zeros": the filter must not darken a crop's rim with what lies behind the edge
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside_x, inside_y = torch.from_numpy(np.abs(frame) < 1).unbind(1)
    return moved.masked_fill(~(inside_x[:, None, None, :] & inside_y[:, None, :, None]), -1.0)


def _between(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + draws * (high - low)


def uniform(seed: int, samples: np.ndarray, num_draws: int) -> np.ndarray:
    """[B, num_draws] float64 in [0, 1), each a function of seed, sample number and column alone."""
    bits = _hash(seed, 1, samples[:, None], np.arange(num_draws))
    return (bits >> np.uint64(11)) * 2.0**-53


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Not numpy's `permutation`: its stream may change between versions, and a run resumes on another one.
    return np.argsort(_hash(seed, 0, epoch, np.arange(n)), kind="stable")


def _hash(*words: int | np.ndarray) -> np.ndarray:
    """64 bits that depend on every word: SplitMix64 (Steele et al. 2014, constants by Vigna) chained over them."""
    state = np.zeros(1, np.uint64)  # never a scalar: arrays wrap around in silence
    for word in words:
        state = state ^ (np.uint64(word % 2**64) if isinstance(word, int) else word.astype(np.uint64))
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
