"""What the tests of images share: random pictures, their values, and arithmetic by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bigbigan.config import PreprocessConfig

ORIENTATION = 0x0112  # the EXIF tag
Array = NDArray[Any]


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> Array:
    """Asymmetric by being random."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def values(image: Image.Image) -> Array:
    return np.asarray(image, int)


def pixels(tensor: torch.Tensor) -> Array:
    """[N, C, H, W] in [-1, 1] as [N, H, W, C]; fails where a value stands for no integer."""
    exact: Array = tensor.double().numpy() * 127.5 + 127.5
    assert np.abs(exact - np.rint(exact)).max() < 1e-4
    return np.rint(exact).astype(int).transpose(0, 2, 3, 1)


def over(colour: Array, alpha: Array, background: int | tuple[int, ...] = 255) -> Array:
    """Composition rounded to nearest, in integers."""
    result: Array = (2 * (colour * alpha + np.array(background) * (255 - alpha)) + 255) // 510
    return result


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


PHOTO = Image.fromarray(noise(24, 32, 3, seed=9))


def config(size: int, pad: int = 0, **fields: Any) -> PreprocessConfig:
    return PreprocessConfig(size=size, pad=pad, **fields)
