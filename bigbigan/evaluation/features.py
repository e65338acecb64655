"""Encoder outputs of batches, and the digest of what makes them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from bigbigan.arrays import as_seed
from bigbigan.config import EncoderConfig, GraphEncoderConfig, MLPEncoderConfig
from bigbigan.encoder import EncoderOutput
from bigbigan.model import BigBiGAN
from bigbigan.schema import to_dict

OUTPUTS = tuple(field.name for field in fields(EncoderOutput))

logger = logging.getLogger(__name__)


def digest(network: nn.Module) -> str:
    """sha256 over names, types, shapes and values of the weights, and over the configuration that shapes them."""
    return weights_digest(network, json.dumps(to_dict(network.config)))


def weights_digest(module: nn.Module, description: str) -> str:
    """sha256 over names, types, shapes and values of the weights, and over what else shapes the module."""
    sha256 = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


class BatchEncoder:
    """Encodes batches; where memory runs out, in halves from then on."""

    def __init__(self, model: BigBiGAN, outputs: Sequence[str], batch_size: int, seed: int) -> None:
        if model.encoder is None:
            raise ValueError(f"this model was loaded without its encoder; it has {', '.join(model.parts)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        widths = _widths(model.encoder.config)
        if unknown := [name for name in outputs if name not in widths]:
            raise ValueError(f"no output {unknown[0]!r}; an encoder gives {', '.join(widths)}")
        if not outputs:
            raise ValueError(f"no outputs named; an encoder gives {', '.join(widths)}")
        self.network, self.widths = model.encoder, {name: widths[name] for name in outputs}
        self.batch_size, self.device = batch_size, model.device
        self._model, self._seed = model, as_seed(seed)

    def __call__(self, x: Tensor, start: int) -> dict[str, Tensor]:
        """Outputs of x [N, C, S, S] in [-1, 1], whose first row counts as `start` for the noise."""
        while True:
            try:
                out = self._model.encode(x, seed=self._seed, start=start, batch_size=self.batch_size)
                return {name: out[name].float().cpu() for name in self.widths}
            except RuntimeError as error:
                size = min(self.batch_size, len(x))
                # torch has no class of its own for the main memory
                exhausted = isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
                if not exhausted or size == 1:
                    raise
                self.batch_size = size // 2
                logger.warning("out of memory with %d images at once: going on with %d", size, size // 2)


def _widths(config: EncoderConfig | MLPEncoderConfig | GraphEncoderConfig) -> dict[str, int]:
    latents = dict.fromkeys(("z_sample", "z_mean", "z_stdev"), config.z_dim)
    return {**latents, "avepool_feat": config.num_features, "bn_crelu_feat": 2 * config.num_features}
