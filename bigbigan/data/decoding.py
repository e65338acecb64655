"""From encoded images to uint8 batches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import NUM_CROP_DRAWS, AugmentationConfig, crop_box, uniform
from bigbigan.images import FORMATS, WHITE, BadImageError, opened, preprocess, read_image

GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes
Source = Path | bytes | None  # a file, an encoded image, or a row without one


@dataclass(frozen=True)
class Job:
    """One batch to decode."""

    indices: np.ndarray  # [B], into `sources`
    samples: np.ndarray | None = None  # [B] numbers that the random crops are drawn by
    sources: Sequence[Source] | None = None  # None: those of the decoder
    names: Sequence[str] = ()
    position: Any = None  # handed through


@dataclass(frozen=True)
class Decoded:
    images: Tensor  # [B, C, S, S] uint8
    used: np.ndarray  # [B] the images that were taken: another than asked for where that one is unreadable, -1 if none
    bad: dict[int, str]  # reasons of those that this job found unreadable
    job: Job


@dataclass
class Decoder:
    """Decodes jobs; an unreadable image is replaced by the next readable one of the same sources.

    Images come under evaluation preprocessing, or, where `augmentation` takes them from the original picture and the
    job has sample numbers, cropped and flipped at random.

    Args:
        max_bad: with more unreadable images than that, no replacement is looked for: the caller will stop.
    """

    sources: Sequence[Source]
    config: PreprocessConfig
    channels: int
    max_bad: float
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    seed: int = 0
    bad: dict[int, str] = field(default_factory=dict)  # of `sources`, so that none is tried twice

    def __call__(self, job: Job) -> Decoded:
        sources, bad = (self.sources, self.bad) if job.sources is None else (job.sources, {})
        known, used = set(bad), job.indices.copy()
        images = np.zeros((len(used), self.channels, self.config.resolution, self.config.resolution), np.uint8)
        draws: Sequence[np.ndarray | None] = [None] * len(used)
        if job.samples is not None and self.augmentation.original:
            draws = list(uniform(self.seed, job.samples, NUM_CROP_DRAWS))

        def read(place: int, index: int) -> bool:
            if index in bad:
                return False
            try:
                images[place] = self.decode(sources[index], draws[place])
            except BadImageError as error:
                bad[index] = error.reason
                return False
            used[place] = index
            return True

        failed = [place for place, index in enumerate(job.indices.tolist()) if not read(place, index)]
        for place in failed:
            first, used[place] = int(used[place]), -1
            for step in range(1, len(sources)):
                if len(bad) > self.max_bad or read(place, (first + step) % len(sources)):
                    break
        return Decoded(torch.from_numpy(images), used, {i: reason for i, reason in bad.items() if i not in known}, job)

    def decode(self, source: Source, draws: np.ndarray | None = None) -> np.ndarray:
        """[C, S, S] uint8.

        JPEGs are decoded at full size, never by Pillow's draft mode: pixels would differ, and of ImageNet's crops at
        256 pixels next to none is large enough for it.

        Raises:
            BadImageError: it cannot be read.
        """
        if source is None:
            raise BadImageError(None, "the row has no image bytes")
        picture: Any = opened(source) if isinstance(source, bytes) else source
        if draws is None:
            return _to_uint8(preprocess(picture, self.config, self.channels, tell_colour=False))
        background = (0, 0, 0) if self.config.polarity == "light-on-dark" else WHITE
        picture = read_image(picture, background=background)
        box = crop_box(picture.size, draws, self.augmentation)
        if box is None:
            pixels = _to_uint8(preprocess(picture, self.config, self.channels, crop="resnet", tell_colour=False))
        else:
            size, pad, scale = self.config.size, self.config.pad, Image.Resampling[self.augmentation.filter.upper()]
            picture = picture.crop(box).resize((size, size), scale)  # cut first: the filter sees nothing outside
            pixels = np.asarray(picture.convert("L" if self.channels == 1 else "RGB")).reshape(size, size, -1)
            pixels = np.pad(pixels.transpose(2, 0, 1), ((0, 0), (pad, pad), (pad, pad)))  # as `preprocess` does
        return pixels[:, :, ::-1] if self.augmentation.flip and draws[0] < 0.5 else pixels


def _to_uint8(images: Tensor) -> np.ndarray:
    return images[0].add(1).mul(127.5).round().byte().numpy()  # rounding undoes the map to [-1, 1] exactly


def in_colour(sources: Sequence[Source], numbers: Sequence[int]) -> list[bool]:
    """Of those of the numbered pictures whose header can be read, whether they are in colour."""
    found = []
    for number in numbers:
        source = sources[number]
        if source is None or (isinstance(source, Path) and not source.is_file()):
            continue
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
                found.append(picture.mode not in GREY)
        except Exception:  # as open a set as in `opened`; decoding it will tell why
            continue
    return found
