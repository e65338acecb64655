"""Random changes of the images that D sees, real and generated alike, so that D cannot learn a small data set by heart.

DiffAugment (Zhao et al. 2020, arXiv 2006.10738, section 3): gradients flow through the changes to G. The three
transformations and their strengths are those of the paper's code, mit-han-lab/data-efficient-gans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Transformation = Literal["color", "translation", "cutout"]
NUM_DIFF_DRAWS = 7  # brightness, saturation, contrast; shift right, shift down; hole's centre right, down


def diff_augment(images: Tensor, draws: Tensor, transformations: Sequence[Transformation]) -> Tensor:
    """Changes each image [N, C, S, S] by its row of `draws` [N, 7] in [-1, 1]; differentiable in the images.

    "color": brightness plus up to 0.5 each way, saturation times 0 to 2, contrast times 0.5 to 1.5.
    "translation": by up to an eighth of the side each way, zeros behind. "cutout": zeros in a square of half the side.
    """
    brightness, saturation, contrast, *_ = draws[:, :, None, None, None].unbind(1)  # [N, 1, 1, 1] each
    if "color" in transformations:
        images = images + brightness / 2
        grey = images.mean(dim=1, keepdim=True)  # [N, 1, S, S]
        images = (images - grey) * (1 + saturation) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)  # [N, 1, 1, 1]
        images = (images - mean) * (1 + contrast / 2) + mean
    if "translation" in transformations:
        images = _translate(images, draws[:, 3:5])
    if "cutout" in transformations:
        images = images * _outside_hole(images.shape[-1], draws[:, 5:7])[:, None]
    return images


def _translate(images: Tensor, draws: Tensor) -> Tensor:
    """By whole pixels: the nearest pixel of a shifted grid [N, S, S, (x, y)], whose edges are at -1 and 1."""
    side = images.shape[-1]
    most = int(side / 8 + 0.5)
    shift = (draws * (most + 0.5)).round().clamp(-most, most)  # [N, 2], each step as likely
    pixels = (2 * torch.arange(side, device=images.device) + 1) / side - 1  # [S]
    x, y = (pixels - 2 * shift[:, :, None] / side).unbind(1)  # [N, S] each
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return F.grid_sample(images, grid.to(images.dtype), mode="nearest", padding_mode="zeros", align_corners=False)


def _outside_hole(side: int, draws: Tensor) -> Tensor:
    """[N, S, S]: 0 in a square of half the side whose centre lies anywhere in the image, 1 elsewhere."""
    hole = side // 2
    first = ((draws + 1) / 2 * (side + 1 - hole % 2)).floor().clamp(max=side - hole % 2) - hole // 2  # [N, (x, y)]
    pixels = torch.arange(side, device=draws.device)
    x, y = ((pixels >= first[:, :, None]) & (pixels < first[:, :, None] + hole)).unbind(1)  # [N, S] each
    return (~(x[:, None, :] & y[:, :, None])).to(draws.dtype)
