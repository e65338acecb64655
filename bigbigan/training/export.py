"""From training weights to a model folder's: average, spectral norm divided out, standing statistics."""

from __future__ import annotations

from torch import Tensor

from bigbigan.config import ModelInfo
from bigbigan.layers import StandingStatistics, effective_state
from bigbigan.model import BigBiGAN
from bigbigan.training.data import Batches
from bigbigan.training.latents import draw_latents
from bigbigan.training.step import TrainingState

_STANDING_SEED = 0x57A7  # statistics of one run's snapshots come from the same images and latents


def inference_model(state: TrainingState, images: Tensor, info: ModelInfo | None = None) -> BigBiGAN:
    """The model as users get it, on the CPU: G and E from their averages, D as it stands.

    Args:
        images: [N, C, S, S] uint8 training images under evaluation preprocessing, for E's standing statistics; G's
            come from latents of the prior. Both are taken once weights are final.
    """
    config = state.config
    model = BigBiGAN(config.model, info=info)
    for name, network in state.networks().items():
        source = state.ema[name].module if name in state.ema else network
        getattr(model, name).load_state_dict(dict(effective_state(source)), strict=True)
    standing_statistics(model, images, config.standing_passes, config.batch_size)
    return model.eval().requires_grad_(True)


def standing_statistics(model: BigBiGAN, images: Tensor, passes: int, batch_size: int) -> None:
    """Re-estimates the batch-norm statistics of G and E in place, over `passes` batches each."""
    if model.generator is not None:
        with StandingStatistics(model.generator) as statistics:
            for i in range(passes):
                z = draw_latents(_STANDING_SEED, i, 0, (batch_size, model.config.z_dim), model.generator.config.prior)
                statistics(z)
    if model.encoder is not None:
        batches = Batches(images, min(batch_size, len(images)), _STANDING_SEED)
        with StandingStatistics(model.encoder) as statistics:
            for i in range(passes):
                statistics(batches.at(i * batches.batch_size))
