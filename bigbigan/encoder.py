"""The encoder (BigBiGAN, section 3): trunk, average pool, residual MLP head, latent distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.arrays import check_shape
from bigbigan.config import EncoderConfig
from bigbigan.layers import BatchNorm, Layers, ResidualMLP
from bigbigan.pretrained import Pretrained
from bigbigan.resnet import ResNet
from bigbigan.revnet import RevNet


@dataclass(frozen=True)
class EncoderOutput:
    """What the module's `encode` signature gives, under its names; also by key, `out["avepool_feat"]`.

    Shapes: z_sample, z_mean and z_stdev [N, z_dim]; avepool_feat [N, F]; bn_crelu_feat [N, 2 F], which is
    [ReLU(h), ReLU(-h)] of the batch-normalised average pool h. A deterministic encoder has z_sample = z_mean and
    z_stdev = 0. The key "default" is z_sample, as in the module.
    """

    z_sample: Tensor
    z_mean: Tensor
    z_stdev: Tensor
    avepool_feat: Tensor
    bn_crelu_feat: Tensor

    def keys(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __getitem__(self, name: str) -> Tensor:
        if name != "default" and name not in self.keys():
            raise KeyError(f"{name!r}; an encoder gives {', '.join(self.keys())}")
        return getattr(self, "z_sample" if name == "default" else name)

    def __contains__(self, name: object) -> bool:
        return name == "default" or name in tuple(self.keys())

    def __len__(self) -> int:
        return len(self.z_mean)


def crelu(h: Tensor) -> Tensor:
    """[N, F] -> [ReLU(h), ReLU(-h)], [N, 2 F]."""
    return torch.cat([F.relu(h), F.relu(-h)], dim=1)


class Encoder(nn.Module, Pretrained):
    """Features and latents of images. `spectral_norm=True` builds a training form that has it (the paper's has not)."""

    part, config_class = "encoder", EncoderConfig

    def __init__(self, config: EncoderConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        layers = Layers(spectral_norm)
        self.trunk = (ResNet if config.architecture == "resnet" else RevNet)(config, layers)
        features, eps = config.num_features, config.feature_norm_eps
        self.feature_norm = BatchNorm(features, eps, affine=config.feature_norm_affine)
        self.head = ResidualMLP(layers, config.head, features, config.bn_eps)
        # Means, then deviations before softplus.
        self.latent = layers.linear(config.head.width, config.z_dim * (2 if config.output == "stochastic" else 1))

    @property
    def num_features(self) -> int:
        """Width of avepool_feat."""
        return self.config.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [N, C, S, S] in [-1, 1] -> unpooled features [N, num_features, S / 32, S / 32]."""
        return self.trunk(x)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> EncoderOutput:
        """x: [N, C, S, S] in [-1, 1]; noise: [N, z_dim] from N(0, 1), so that z_sample = z_mean + noise * z_stdev.

        Without noise it is drawn afresh, without touching torch's global generator.
        """
        check_shape(x, "images", None, self.config.image_channels, None, None)
        wide = torch.promote_types(x.dtype, torch.float32)  # half precision would lose the mean
        pooled = self.trunk(x).mean(dim=(2, 3), dtype=wide).to(x.dtype)  # [N, num_features]
        bn_crelu = crelu(self.feature_norm(pooled))  # [N, 2 * num_features]
        latent = self.latent(self.head(pooled)).to(x.dtype)  # [N, z_dim], or twice that
        if self.config.output != "stochastic":
            mean = torch.tanh(latent) if self.config.output == "tanh" else latent
            return EncoderOutput(mean, mean, torch.zeros_like(mean), pooled, bn_crelu)
        mean, raw = latent.chunk(2, dim=1)  # [N, z_dim] each
        stdev = F.softplus(raw)  # [N, z_dim]
        if noise is None:
            generator = torch.Generator(mean.device)
            generator.seed()
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return EncoderOutput(mean + noise * stdev, mean, stdev, pooled, bn_crelu)
