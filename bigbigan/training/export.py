"""From training weights to a model folder's: average, spectral norm divided out, standing statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbigan.config import ModelInfo
from bigbigan.data.batches import Batches, Images
from bigbigan.layers import BatchNorm, StandingStatistics, effective_state
from bigbigan.model import BigBiGAN
from bigbigan.training.latents import draw_latents
from bigbigan.training.step import TrainingState

MAX_STANDING_BATCH = 128  # G and E of the paper do not take a batch of 2048 on one device, as a snapshot has to
_STANDING_SEED = 0x57A7  # statistics of one run's snapshots come from the same images and latents


def inference_model(state: TrainingState, images: Tensor | Images, info: ModelInfo | None = None) -> BigBiGAN:
    """The model as users get it, on the CPU: G and E from their averages (if there are any), D as it stands.

    Args:
        images: training images under evaluation preprocessing, [N, C, S, S] uint8 or read by index, for E's standing
            statistics; G's come from latents of the prior. Both are taken once weights are final, over as many images
            as `standing_passes` batches hold, none larger at a time than a micro-batch or MAX_STANDING_BATCH.
    """
    config = state.config
    model = BigBiGAN(config.model, info=info)
    for name, network in state.networks.items():
        source = state.ema[name].module if name in state.ema else network
        weights = {key: value.float().cpu() for key, value in effective_state(source)}
        getattr(model, name).load_state_dict(weights, strict=True)
    pieces = max(config.accumulate, -(-config.batch_size // MAX_STANDING_BATCH))
    size = config.batch_size // pieces
    device = state.device if state.device.type == "cuda" else "cpu"  # MPS lacks float64, which sums statistics
    standing_statistics(model, images, config.standing_passes * pieces, size, device)
    return model.eval().requires_grad_(True)


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
