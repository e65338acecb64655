"""Models by name: with random weights, as a list, and the one-call reconstruction."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigbigan import hub
from bigbigan.arrays import as_dtype, seeded
from bigbigan.config import BigBiGANConfig, ModelInfo
from bigbigan.images import ImageLike
from bigbigan.layers import Initializer, initialize
from bigbigan.model import BigBiGAN
from bigbigan.presets import PRESETS, get_preset, normalize


def create_model(
    name: str | BigBiGANConfig,
    *,
    parts: Sequence[str] | None = None,
    seed: int = 0,
    initializer: Initializer = "orthogonal",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> BigBiGAN:
    """A preset's architecture (or a configuration's) with random weights, in evaluation mode.

    Weights are BigGAN's initialisation (orthogonal), or with "normal" that of BiGAN's authors (N(0, 0.02), scores 0),
    drawn from `seed`; batch-norm statistics are mean 0, variance 1.

    Raises:
        ValueError: unknown name, initializer or dtype, or a part that the architecture lacks.
    """
    if isinstance(name, BigBiGANConfig):
        config, info = name, ModelInfo(source="random weights")
    else:
        config, info = get_preset(name).config, ModelInfo(normalize(name), source="random weights")
    with torch.device("meta"):
        model = BigBiGAN(config, parts, info)
    model.to_empty(device="cpu")
    for part in model.parts:  # each part from the seed alone, so that it does not depend on which others are made
        initialize(getattr(model, part), seeded(seed), initializer)
    return model.to(device, as_dtype(dtype)).eval()


def list_models(pattern: str = "*", *, pretrained: bool | None = None) -> list[str]:
    """Names of presets that match a shell pattern; with `pretrained`, those whose weights are (not) at hand here."""
    names = fnmatch.filter(PRESETS, normalize(pattern))
    return [name for name in names if pretrained is None or hub.has_weights(name) == pretrained]


def reconstruct(
    images: ImageLike | Sequence[ImageLike], *, model: str | BigBiGAN | None = None, **options: Any
) -> Tensor:
    """G(E(x)) of images, [N, C, S, S] in [-1, 1], by a model or one that `load` finds; see `BigBiGAN.reconstruct`."""
    loaded = model if isinstance(model, BigBiGAN) else hub.load(model, parts=("generator", "encoder"))
    return loaded.reconstruct(images, **options)
