"""Random draws of latents, addressed by step so that a resumed run repeats them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_latents(seed: int, step: int, index: int, shape: tuple[int, int], prior: str = "normal") -> Tensor:
    """[N, dim] float32 from N(0, 1), or from U(-1, 1) for the prior "uniform"; `index` tells a step's draws apart."""
    words = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0]))
    if prior == "uniform":
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randn(shape, generator=generator)
