"""From training weights to a model folder's: average, spectral norm divided out, standing statistics."""

from __future__ import annotations

from torch import Tensor

from bigbigan.config import ModelInfo
from bigbigan.data.batches import Images
from bigbigan.evaluation.standing import standing_statistics
from bigbigan.layers import effective_state
from bigbigan.model import BigBiGAN
from bigbigan.training.step import TrainingState

MAX_STANDING_BATCH = 128  # G and E of the paper do not take a batch of 2048 on one device, as a snapshot has to


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
