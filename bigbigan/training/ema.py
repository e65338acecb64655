"""Exponential moving average of the weights of G and E (BigGAN, appendix C; BigBiGAN, appendix A).

The average runs over **raw** weights, before spectral norm divides them. Averaging or copying the spectral norm's
vectors and dividing by what they give would be wrong for the averaged weight, so nothing here divides:
`bigbigan.layers.effective_state` finds the averaged weight's own singular value when the model is exported.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """A copy of `module` whose parameters follow it with a half-life in images; its buffers are copied.

    Args:
        halflife_images: images after which the average has forgotten half.
        rampup: the half-life is at most this share of the images seen so far; 0: no such limit.
        start_images: until then the average is a copy of the weights (google/compare_gan's rule).
    """

    def __init__(self, module: nn.Module, halflife_images: float, *, rampup: float = 0.0, start_images: int = 0):
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.halflife_images, self.rampup, self.start_images = halflife_images, rampup, start_images

    def decay(self, num_images: int, batch_size: int) -> float:
        """Weight of the old average in the step that ends at `num_images`."""
        if num_images <= self.start_images:
            return 0.0
        halflife = min(self.halflife_images, self.rampup * num_images) if self.rampup else self.halflife_images
        return 0.5 ** (batch_size / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, module: nn.Module, num_images: int, batch_size: int) -> None:
        weight = 1 - self.decay(num_images, batch_size)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
        for average, current in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(current)
