"""The joint discriminator (BigBiGAN, section 2): F on images, H on latents, J on both, one score each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.arrays import check_shape
from bigbigan.config import DISCRIMINATOR_CHANNELS, DiscriminatorConfig
from bigbigan.layers import DownsampleConv2d, Layers, ResidualMLP, SelfAttention


@dataclass(frozen=True)
class DiscriminatorOutput:
    """Scores of pairs, [N] each, and of images in four rotations, [N, 4] logits; what the model lacks is None."""

    score_x: Tensor | None
    score_z: Tensor | None
    score_xz: Tensor | None
    rotation: Tensor | None = None

    def present(self) -> list[Tensor]:
        """The scores of pairs that there are."""
        return [score for score in (self.score_x, self.score_z, self.score_xz) if score is not None]


class DiscriminatorBlock(nn.Module):
    """Residual block without norms; `downsample` halves the resolution by mean pooling."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, downsample: bool, relu: bool, identity: bool):
        super().__init__()
        self.relu, self.downsample = relu, downsample
        self.conv1 = layers.conv2d(inputs, outputs, 3)
        self.conv2 = DownsampleConv2d(layers, outputs, outputs) if downsample else layers.conv2d(outputs, outputs, 3)
        self.shortcut = layers.conv2d(inputs, outputs, 1) if downsample or inputs != outputs else None
        self.has_skip = self.shortcut is not None or identity

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(x) if self.relu else x)  # [N, outputs, H, W]
        h = self.conv2(F.relu(h, inplace=not self.training))  # [N, outputs, H, W], or [N, outputs, H / 2, W / 2]
        if not self.has_skip:
            return h
        if self.downsample:  # commutes with the 1x1 shortcut, at a quarter of the cost
            x = F.avg_pool2d(x, 2)  # [N, inputs, H / 2, W / 2]
        return h + (self.shortcut(x) if self.shortcut is not None else x)


class ImageDiscriminator(nn.Module):
    """F: BigGAN's discriminator up to its sum-pooled features."""

    def __init__(self, config: DiscriminatorConfig, layers: Layers):
        super().__init__()
        table = DISCRIMINATOR_CHANNELS[config.resolution]
        widths = [config.image_channels, *(config.base_channels * n for n in table)]
        halvings = 2 if config.resolution == 32 else len(table) - 1
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(layers, a, b, i < halvings, relu=i > 0 or config.first_relu, identity=config.last_skip)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        sides = [config.resolution >> min(i + 1, halvings) for i in range(len(table))]
        self.attention_index = sides.index(config.attention_resolution) if config.attention_resolution in sides else -1
        self.attention = SelfAttention(layers, widths[self.attention_index + 1]) if self.attention_index >= 0 else None

    def forward(self, x: Tensor) -> Tensor:  # [N, C, S, S] -> [N, num_features]
        for i, block in enumerate(self.blocks):
            x = block(x)  # [N, widths[i + 1], S / 2^(i + 1), …]
            if i == self.attention_index and self.attention is not None:
                x = self.attention(x)
        return F.relu(x).sum(dim=(2, 3))


class Discriminator(nn.Module):
    """Scores pairs of image and latent; higher means "from the encoder" (real image, encoded latent)."""

    def __init__(self, config: DiscriminatorConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        layers = Layers(spectral_norm)
        scores, features, joint = config.scores, config.num_features, config.joint_mlp
        self.f = ImageDiscriminator(config, layers)
        self.score_x = layers.linear(features, 1) if "x" in scores else None
        self.h = ResidualMLP(layers, config.z_mlp, config.z_dim) if {"z", "xz"} & set(scores) else None
        self.score_z = layers.linear(config.z_mlp.width, 1) if "z" in scores else None
        inputs = features + config.z_mlp.width if config.combine == "concat" else features
        self.j = ResidualMLP(layers, joint, inputs) if "xz" in scores else None
        self.score_xz = layers.linear(joint.width, 1) if "xz" in scores else None
        self.rotation = layers.linear(features, 4) if config.rotation_head else None

    def forward(self, x: Tensor, z: Tensor | None = None) -> DiscriminatorOutput:
        """x: [N, C, resolution, resolution] in [-1, 1]; z: [N, z_dim], not needed where ("x",) are all scores."""
        if z is None and self.h is not None:
            raise ValueError(f"the scores {', '.join(self.config.scores)} need latents; z is None")
        check_shape(x, "images", None, self.config.image_channels, None, None)
        if z is not None and self.h is not None:
            check_shape(z, "latents", None, self.config.z_dim)
        score_x = score_z = score_xz = None
        f = self.f(x)  # [N, num_features]
        if self.score_x is not None:
            score_x = self.score_x(f).squeeze(1)  # [N]
        rotation = self.rotation(f) if self.rotation is not None else None  # [N, 4]
        if self.h is not None:
            h = self.h(z)  # [N, z_mlp.width]
            if self.score_z is not None:
                score_z = self.score_z(h).squeeze(1)  # [N]
            if self.j is not None and self.score_xz is not None:
                score_xz = self.score_xz(self.j(self._combine(f, h))).squeeze(1)  # [N]
        return DiscriminatorOutput(score_x, score_z, score_xz, rotation)

    def _combine(self, f: Tensor, h: Tensor) -> Tensor:
        if self.config.combine == "concat":
            return torch.cat([f, h], dim=1)  # [N, num_features + z_mlp.width]
        return f + h if self.config.combine == "sum" else f * h  # [N, num_features]
