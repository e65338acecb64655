"""Random numbers by sample number, and what they do to a training image.

Everything random is a hash of (seed, sample number): it depends on no state, batch size or number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbigan.schema import ConfigError


@dataclass(frozen=True)
class AugmentationConfig:
    """Random crop, flip and translation of training images; the default does nothing.

    Two kinds of crop. By default it is cut from the image as preprocessed for evaluation, and enlarged again: for
    small images in memory (`augment`). With `original` it is cut from the decoded picture as the crops of ResNet
    training are, and is the only cropping and scaling (`crop_box`). BigBiGAN's are crop_scale (0.08, 1) and aspect
    (3/4, 4/3) with flips; those of its generation runs, after Lucic et al. 2019, (0.5, 1) and (1, 1), bilinear.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)  # share of the image's area; 0.08 to 1 in ResNet training
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop, where crop_scale is below 1
    flip: bool = False
    shift: int = 0  # up to so many pixels each way, black behind
    original: bool = False  # crop the picture as it was decoded
    filter: Literal["bicubic", "bilinear"] = "bicubic"  # scales such a crop; antialiased, unlike TensorFlow's

    def __post_init__(self) -> None:
        for name, low, high in (("crop_scale", 1e-3, 1.0), ("aspect", 0.1, 10.0)):
            value = getattr(self, name)
            if len(value) != 2 or not low <= value[0] <= value[1] <= high:
                raise ConfigError(f"AugmentationConfig.{name} is {value}; give a range within {low} to {high}")
        if not 0 <= self.shift <= 256:
            raise ConfigError(f"AugmentationConfig.shift is {self.shift}, outside 0 to 256")
        if self.original and (self.shift or not self.crops):
            raise ConfigError("AugmentationConfig.original needs crop_scale below 1, and shift 0")
        if self.filter not in ("bicubic", "bilinear"):
            raise ConfigError(f"AugmentationConfig.filter is {self.filter!r}; give 'bicubic' or 'bilinear'")

    @property
    def crops(self) -> bool:
        return self.crop_scale[0] < 1


CROP_ATTEMPTS = 10
NUM_CROP_DRAWS = 1 + 4 * CROP_ATTEMPTS  # flip; aspect, height, top, left of each attempt
_MIN_COVERED = 0.1  # of the picture


def crop_box(size: tuple[int, int], draws: np.ndarray, config: AugmentationConfig) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of a random crop of a picture (width, height), by `draws` [41] in [0, 1).

    None: the centre crop, min_edge * size / (size + 32), is to be taken instead.

    The rule of TensorFlow's `sample_distorted_bounding_box` as `resnet_preprocessing.py` calls it: ten attempts, each
    with a uniform aspect and then a uniform height between those that give the smallest and the largest area; crops
    under a tenth of the picture are drawn again. A crop of the whole picture counts as none.
    """
    width, height = size
    low, high = (share * width * height for share in config.crop_scale)
    for draw in draws[1:].reshape(CROP_ATTEMPTS, 4).tolist():
        aspect = config.aspect[0] + draw[0] * (config.aspect[1] - config.aspect[0])
        # the crop is `rows` high and round(rows * aspect) wide
        max_rows = round((high / aspect) ** 0.5)
        if round(max_rows * aspect) > width:
            max_rows = int((width + 0.5 - 1e-7) / aspect)
        max_rows = min(max_rows, height)
        min_rows = min(round((low / aspect) ** 0.5), max_rows)
        rows = min_rows + int(draw[1] * (max_rows - min_rows + 1))
        if rows * round(rows * aspect) < low:  # by rounding
            rows += 1
        if rows * round(rows * aspect) > high:
            rows -= 1
        columns = round(rows * aspect)
        fits = 0 < columns <= width and 0 < rows <= height and low <= rows * columns <= high
        if not fits or rows * columns < max(1, _MIN_COVERED * width * height):
            continue
        if (columns, rows) == (width, height):
            return None
        # TensorFlow's offsets are below, never at, the largest possible
        top, left = int(draw[2] * (height - rows)), int(draw[3] * (width - columns))
        return left, top, left + columns, top + rows
    return None


NUM_DRAWS = 7  # area, aspect, left, top, flip, shift right, shift down


def augment(images: Tensor, draws: np.ndarray, config: AugmentationConfig) -> Tensor:
    """Crops and scales back, then flips, then shifts each image [B, C, S, S] by its row of `draws` [B, 7] in [0, 1).

    The crop's area is uniform and its aspect log-uniform; where it exceeds the image it is cut to it, not redrawn.
    Scaling is bilinear and only ever enlarges, so it needs no low-pass filter.
    """
    flips = draws[:, 4] < 0.5 if config.flip else np.zeros(len(images), bool)
    if not config.crops and not config.shift:
        where = torch.from_numpy(flips).to(images.device)[:, None, None, None]
        return torch.where(where, images.flip(3), images) if config.flip else images
    size = images.shape[-1]
    area = _between(draws[:, 0], *config.crop_scale)
    # an uncropped image keeps its aspect, whatever range is set
    ratio = np.exp(_between(draws[:, 1], *np.log(config.aspect))) if config.crops else np.ones(len(draws))
    extent = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], 1)), 1)  # [B, (x, y)], share of the side
    center = (1 - extent) * (2 * draws[:, 2:4] - 1)  # in the grid's units: -1 and 1 are the image's edges
    shift = np.floor(draws[:, 5:7] * (2 * config.shift + 1)) - config.shift
    pixels = (2 * np.arange(size) + 1) / size - 1
    frame = pixels - 2 * shift[:, :, None] / size  # [B, 2, S]: where the shifted image has each output pixel
    mirror = np.stack([1 - 2.0 * flips, np.ones(len(draws))], 1)
    x, y = (
        torch.from_numpy(center[:, :, None] + (extent * mirror)[:, :, None] * frame).float().to(images.device).unbind(1)
    )
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    # "border" and a mask, not "zeros": the filter must not darken a crop's rim with what lies behind the edge
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside_x, inside_y = torch.from_numpy(np.abs(frame) < 1).to(images.device).unbind(1)
    return moved.masked_fill(~(inside_x[:, None, None, :] & inside_y[:, None, :, None]), -1.0)


def _between(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + draws * (high - low)


def uniform(seed: int, samples: np.ndarray, num_draws: int) -> np.ndarray:
    """[B, num_draws] float64 in [0, 1), each a function of seed, sample number and column alone."""
    bits = _hash(seed, 1, samples[:, None], np.arange(num_draws))
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, *words: int) -> np.ndarray:
    """[n] int64: the order of n things that belongs to the seed and the words (the epoch, say)."""
    # Not numpy's `permutation`: its stream may change between versions, and a run resumes on another one.
    return np.argsort(_hash(seed, 0, *words, np.arange(n)), kind="stable")


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
