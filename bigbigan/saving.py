"""Pictures out: images as pixels, and pixels as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bigbigan.files import atomic_write

_SAVE_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}


def from_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """Images [N, C, H, W] in [-1, 1] as [N, H, W, C] in 0 to 255: clamped, rounded to nearest, halves to even.

    Raises:
        ValueError: another number of dimensions, not floats, or NaN or infinity among the values.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"{images.dtype} of shape {tuple(images.shape)}; give floats [N, C, H, W] in [-1, 1]")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity")
    values = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return values.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1] as pictures, "L" or "RGB" (C of 1 or 3); rounding and errors as `to_uint8`."""
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        raise ValueError(f"shape {tuple(images.shape)}; a picture has 1 or 3 channels")
    return [from_pixels(pixels) for pixels in to_uint8(images)]


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a picture of mode "RGB" or "L" whole or not at all, its pixels only: no EXIF, ICC profile or text.

    The suffix decides: .png; .jpg and .jpeg at quality 95; .webp without loss.

    Raises:
        ValueError: another suffix or mode; nothing is written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SAVE_OPTIONS:
        raise ValueError(f"{os.fspath(path)}: cannot write {suffix or 'no suffix'!r}; use {', '.join(_SAVE_OPTIONS)}")
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"{os.fspath(path)}: cannot write mode {image.mode}; read_image gives RGB or L")
    name, options = _SAVE_OPTIONS[suffix]
    with atomic_write(path) as temporary:
        Image.fromarray(np.asarray(image)).save(temporary, format=name, **options)
