"""Pictures of many images: grids, and originals above what became of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bigbigan.images import to_pil

MAX_GRID_PIXELS = 250_000_000  # a gigabyte of memory
CELL = 64  # pixels of a small image's side in a picture that people look at


def enlargement(images: Tensor) -> int:
    """The whole number by which images [N, C, H, W] are enlarged to fill about a CELL."""
    return max(1, CELL // images.shape[-1])


def make_grid(images: Tensor, columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """One picture of the images [N, C, H, W] in [-1, 1], row by row, on white.

    Args:
        columns: at most N; default the square root of N, rounded up.
        gap: pixels between neighbours, after enlarging; none around the whole.
        scale: each pixel becomes a square of this side.

    Raises:
        ValueError: no images, a number out of range, or as `to_pil`.
    """
    columns, size = grid_layout(len(images), (images.shape[-2], images.shape[-1]), columns, gap, scale)
    pictures = to_pil(images)
    height, width = (scale * side for side in images.shape[2:])
    canvas = Image.new(pictures[0].mode, size, "white")
    for index, picture in enumerate(pictures):
        corner = (index % columns * (width + gap), index // columns * (height + gap))
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), corner)
    return canvas


def grid_layout(
    number: int, shape: tuple[int, int], columns: int | None = None, gap: int = 2, scale: int = 1
) -> tuple[int, tuple[int, int]]:
    """The columns, and the (width, height) in pixels, that `make_grid` gives `number` images of `shape` (H, W).

    Raises:
        ValueError: no images, a number out of range, or a picture of more than MAX_GRID_PIXELS.
    """
    columns = math.isqrt(max(number - 1, 0)) + 1 if columns is None else min(columns, number)
    if number < 1 or columns < 1 or gap < 0 or scale < 1:
        raise ValueError(f"cannot lay out {number} images in {columns} columns with gap {gap} and scale {scale}")
    rows, (height, width) = math.ceil(number / columns), shape
    size = (columns * (scale * width + gap) - gap, rows * (scale * height + gap) - gap)
    if size[0] * size[1] > MAX_GRID_PIXELS:
        raise ValueError(
            f"{number} images of {width} x {height} pixels, enlarged {scale} times, make a picture of {size[0]} x "
            f"{size[1]}; it may have {MAX_GRID_PIXELS:,} pixels at most: take fewer images or a smaller scale"
        )
    return columns, size


def match_size(images: Tensor, like: Tensor) -> Tensor:
    """Images [N, C, S, S] at the size and on the device of `like`: mean-pooled to a smaller, repeated to a larger."""
    return F.adaptive_avg_pool2d(images, like.shape[-1]).to(like.device)


def make_pairs(above: Tensor, below: Tensor, columns: int = 8, *, scale: int | None = None) -> Image.Image:
    """One picture in which each row of `above` [N, C, S, S] stands over the row of `below` [N, C, s, s].

    `above` takes the size of `below` (`match_size`); white fills the last pair of rows; `scale` is `enlargement(below)`
    unless given.
    """
    columns = min(columns, len(below))

    def rows(images: Tensor) -> Tensor:  # [R, columns, C, s, s]
        white = images.new_ones(-len(images) % columns, *images.shape[1:])
        return torch.cat([images, white]).unflatten(0, (-1, columns))

    paired = torch.stack([rows(match_size(above, below)), rows(below)], dim=1).flatten(0, 2)  # [2 R columns, C, s, s]
    return make_grid(paired, columns, scale=scale or enlargement(below))
