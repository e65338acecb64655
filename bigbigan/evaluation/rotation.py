"""How well a discriminator with a rotation head tells by how many quarter turns images are rotated (SS-GAN)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotationResult:
    """Fractions of 1; `per_turn` by 0, 90, 180 and 270 degrees counterclockwise. Chance is 0.25."""

    accuracy: float
    per_turn: tuple[float, ...]
    num_images: int


@torch.no_grad()
def rotation_accuracy(classify: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = 256) -> RotationResult:
    """Accuracy over all four orientations of each image.

    Args:
        classify: [N, C, S, S] in [-1, 1] -> [N, 4] logits of the number of quarter turns.
        images: [N, C, S, S] uint8.

    Raises:
        ValueError: images or logits of another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3] or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, C, S, S]")
    right = torch.zeros(4)
    for batch in images.split(batch_size):
        x = batch.float() / 127.5 - 1
        for k in range(4):
            logits = classify(x.rot90(k, (2, 3)))
            if logits.shape != (len(x), 4):
                raise ValueError(f"classify gave {list(logits.shape)} for {len(x)} images; expected [{len(x)}, 4]")
            right[k] += (logits.argmax(1).cpu() == k).sum()
    shares = (right / len(images)).tolist()
    return RotationResult(sum(shares) / 4, tuple(shares), len(images))
