"""Sets of images as uint8 batches: data sets, samples of any model in files, and samples of ours."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bigbigan.arrays import seeded
from bigbigan.config import PreprocessConfig
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.decoding import GREY
from bigbigan.data.folders import open_folder
from bigbigan.data.opening import described, open_dataset
from bigbigan.data.paths import holds_rows
from bigbigan.images import FORMATS, list_images, read_image, to_uint8
from bigbigan.model import BigBiGAN

logger = logging.getLogger(__name__)

BATCH = 64
ARRAYS = (".npz", ".npy")
MIXED = "{} is in colour, and the first image, {}, in grey; store all in colour, or all in grey"


@dataclass(frozen=True)
class ImageSet:
    """`batches` yields uint8 [B, channels, side, side] of `count` images in all; `facts` are for the record."""

    count: int
    channels: int
    side: int
    batches: Callable[[], Iterator[Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)


def dataset_images(
    dataset: ImageDataset, preprocess: PreprocessConfig, channels: int, side: int, *, workers: int = 0
) -> ImageSet:
    """A data set under evaluation preprocessing, mean-pooled to `side`.

    Raises:
        ValueError: `side` does not divide the resolution of the preprocessing.
    """
    if preprocess.resolution % side:
        raise ValueError(
            f"reference images of {preprocess.resolution} pixels cannot be pooled to samples of {side}; "
            "choose a --model that reads images at a multiple of it"
        )

    def batches() -> Iterator[Tensor]:
        for images in dataset.batches(preprocess, channels, size=BATCH, workers=workers):
            yield pooled(images, side)

    return ImageSet(len(dataset), channels, side, batches)


def pooled(images: Tensor, side: int) -> Tensor:
    """uint8 [N, C, S, S] mean-pooled to `side`, as the discriminator and reports of reconstructions pool originals."""
    if images.shape[-1] == side:
        return images
    return torch.cat([adaptive_avg_pool2d(chunk.float(), side).round().byte() for chunk in images.split(256)])


def generated_images(
    model: BigBiGAN,
    count: int,
    *,
    seed: int = 0,
    truncation: float | None = None,
    truncation_mode: str = "resample",
    batch_size: int = BATCH,
) -> ImageSet:
    """Samples of our model, rounded to uint8 as in a picture; the i-th depends on the seed and i alone."""
    config = model.part("generator").config

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, batch_size):
            number = min(batch_size, count - start)
            options: dict[str, Any] = {"truncation": truncation, "truncation_mode": truncation_mode}
            z = model.sample_latents(number, seed=seed, start=start, **options)
            yield torch.from_numpy(to_uint8(model.generate(z, batch_size=batch_size))).permute(0, 3, 1, 2)

    return ImageSet(count, config.image_channels, config.resolution, batches)


def given_images(path: str, number: int | None = None, seed: int = 0) -> ImageSet:
    """Square images of one size in a folder, Parquet, `.npz` or `.npy`: all, or `number` at random.

    Arrays are uint8 [N, S, S, C] or [N, S, S]; a `.npz` holds one, or it is called arr_0, images or samples.

    Raises:
        ValueError: another kind of file or array, fewer than `number` images, or an image of another size.
    """
    read = _array(Path(path)) if Path(path).suffix.lower() in ARRAYS else _files(path)
    if number is not None and number > read.count:
        raise ValueError(f"{path} holds {read.count} images, and {number} are asked for; lower --number")
    count = read.count if number is None else number
    order = torch.randperm(read.count, generator=seeded(seed))[:count].sort().values.tolist()

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, BATCH):
            yield torch.from_numpy(read.at(order[start : start + BATCH])).permute(0, 3, 1, 2)

    return ImageSet(count, read.channels, read.side, batches, {"digest": read.digest, "images": read.count})


@dataclass(frozen=True)
class _Stored:
    count: int
    channels: int
    side: int
    digest: str
    at: Callable[[list[int]], np.ndarray]  # indices to [B, side, side, channels]


def _array(path: Path) -> _Stored:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix.lower() == ".npz":
            files = [name for name in content.files if name != "paths"]  # the names of the rows
            names = [name for name in ("arr_0", "images", "samples") if name in files]
            if len(files) != 1 and not names:
                raise ValueError(f"it holds {', '.join(content.files)}; call the images arr_0")
            content = content[(names or files)[0]]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no readable array of images: {error}") from error
    shape = content.shape if content.ndim == 4 else (*content.shape, 1)
    if content.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3) or not shape[0]:
        raise ValueError(
            f"{path} holds {content.dtype} {list(content.shape)}; give uint8 [N, S, S, 1 or 3] or [N, S, S]"
        )

    def at(rows: list[int]) -> np.ndarray:
        return np.array(content[rows]).reshape(-1, *shape[1:])

    return _Stored(shape[0], shape[3], shape[1], digest.hexdigest(), at)


def _files(path: str) -> _Stored:
    folder = Path(path)
    if folder.is_dir() and not holds_rows(folder):  # whole: "train" is a class like any other here
        dataset = open_folder(folder, list_images(folder), 0)
        logger.info("%s", described(dataset, path, "samples"))
    else:
        dataset = open_dataset(path, label_column=None, max_bad_fraction=0)

    def picture(index: int) -> Image.Image:
        source = dataset.sources[index]
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)  # type: ignore[arg-type]

    dataset.decode([0], PreprocessConfig(2, crop="none"), 3)  # whether it can be read
    first = read_image(picture(0))
    side, channels = first.width, 1 if first.mode == "L" else 3
    config = PreprocessConfig(side, crop="none")

    def at(rows: list[int]) -> np.ndarray:
        images = dataset.decode(rows, config, channels)
        for index in rows:  # scaled in silence otherwise
            with picture(index) as header:
                if header.size != (side, side):
                    raise ValueError(
                        f"{dataset.name(index)}: {header.width} x {header.height} pixels, and the first has "
                        f"{first.width} x {first.height}; samples are squares of one size"
                    )
                if channels == 1 and header.mode not in GREY:
                    raise ValueError(MIXED.format(dataset.name(index), dataset.name(0)))
        return images.permute(0, 2, 3, 1).numpy()

    return _Stored(len(dataset), channels, side, dataset.digest, at)


def picture_files(path: str | None) -> list[Path]:
    """The files that a path of images stands for: itself, or the pictures in a folder."""
    if path is None or not Path(path).exists():
        return []
    if not Path(path).is_dir():
        return [Path(path)]
    try:
        return list_images(path)
    except ValueError:  # none: a folder of Parquet
        return []


def named_images(folder: Path, names: list[str]) -> Tensor:
    """uint8 [N, C, S, S] of the pictures in a folder that have these names, apart from their suffix.

    Raises:
        ValueError: one is missing or there twice, or not a square of the first one's size.
    """
    found: dict[str, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same name; leave one of them")
        found[name] = path
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} pictures, such as {missing[0]}.png; "
            f"it holds {len(found)}, such as {next(iter(found.values()))}"
        )
    first = read_image(found[names[0]])
    images = np.empty((len(names), *first.size, len(first.getbands())), np.uint8)
    for row, name in zip(images, names, strict=True):
        picture = read_image(found[name])
        if picture.size != (first.width, first.width):
            size = f"{picture.width} x {picture.height}"
            raise ValueError(f"{found[name]}: {size} pixels; squares of one size, here {first.width}, are needed")
        if first.mode == "L" != picture.mode:
            raise ValueError(MIXED.format(found[name], found[names[0]]))
        row[:] = np.asarray(picture.convert(first.mode)).reshape(row.shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
