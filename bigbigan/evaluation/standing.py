"""Standing statistics of a whole model, from images of a data set and latents of its prior."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbigan.data.batches import Batches, Images
from bigbigan.data.latents import draw_latents
from bigbigan.layers import BatchNorm, StandingStatistics
from bigbigan.model import BigBiGAN

_STANDING_SEED = 0x57A7  # statistics of one run's snapshots come from the same images and latents


@torch.no_grad()
def standing_statistics(
    model: BigBiGAN, images: Tensor | Images, passes: int, batch_size: int, device: str | torch.device = "cpu"
) -> None:
    """Re-estimates the batch-norm statistics of all parts in place, over `passes` batches each, computed on `device`.

    D, where it has batch norm at all (BiGAN's on MNIST), sees real and generated pairs in turn.
    """
    size = min(batch_size, len(images))
    draws = Batches(images, size, _STANDING_SEED)

    def z(i: int) -> Tensor:
        assert model.generator is not None
        prior = model.generator.config.prior
        return draw_latents(_STANDING_SEED, i, 0, (batch_size, model.config.z_dim), prior).to(device)

    def x(i: int) -> Tensor:
        return draws.at(i * size, device)

    model.to(device)
    if model.generator is not None:
        with StandingStatistics(model.generator) as statistics:
            for i in range(passes):
                statistics(z(i))
    if model.encoder is not None:
        with StandingStatistics(model.encoder) as statistics:
            for i in range(passes):
                statistics(x(i))
    judge = model.discriminator
    if judge is not None and any(isinstance(layer, BatchNorm) for layer in judge.modules()):
        generator, encoder = model.part("generator").eval(), model.part("encoder").eval()
        with StandingStatistics(judge) as statistics:
            for i in range(passes):
                real, latents = x(i), z(i)
                statistics(real, encoder(real).z_sample)
                statistics(generator(latents), latents)
    model.to("cpu")
    draws.close()
