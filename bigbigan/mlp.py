"""The fully connected networks of BiGAN's permutation-invariant MNIST (arXiv 1605.09782, layers as jeffdonahue/bigan).

Images are [N, C, S, S] in [-1, 1] as everywhere; the networks themselves see and draw [0, 1]. No layer has a bias, no
batch norm a gain or an offset. BiGAN has no spectral norm: `spectral_norm` is taken, so that every network is made
alike, and changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.arrays import as_tensor, check_shape
from bigbigan.config import MLPDiscriminatorConfig, MLPEncoderConfig, MLPGeneratorConfig
from bigbigan.discriminator import DiscriminatorOutput
from bigbigan.encoder import EncoderOutput, crelu
from bigbigan.layers import BatchNorm
from bigbigan.onednn import trained_linear
from bigbigan.pretrained import Pretrained

Config = MLPGeneratorConfig | MLPEncoderConfig | MLPDiscriminatorConfig


class Linear(nn.Linear):
    """Without bias, and trained by faster kernels where there are some."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        # In evaluation plain: those kernels know no torch.func transforms and no second derivatives.
        return trained_linear(x, self.weight) if self.training else F.linear(x, self.weight)


class HiddenLayers(nn.Module):
    """Two layers with leaky ReLUs: [N, inputs] -> [N, width]. Batch norm in the second, and in the first on demand.

    With `z_dim`, a linear function of z is added before the second batch norm.
    """

    def __init__(self, config: Config, inputs: int, *, first_norm: bool = False, z_dim: int = 0):
        super().__init__()
        width, self.negative_slope = config.width, config.negative_slope
        self.linear1 = Linear(inputs, width)
        self.norm1 = BatchNorm(width, config.bn_eps, affine=False) if first_norm else nn.Identity()
        self.linear2 = Linear(width, width)
        self.linear_z = Linear(z_dim, width) if z_dim else None
        self.norm2 = BatchNorm(width, config.bn_eps, affine=False)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        h = F.leaky_relu(self.norm1(self.linear1(x)), self.negative_slope)  # [N, width]
        h = self.linear2(h)  # [N, width]
        if self.linear_z is not None:
            h = h + self.linear_z(z)
        return F.leaky_relu(self.norm2(h), self.negative_slope)


def pixels(config: Config) -> int:
    return config.image_channels * config.resolution**2


def check_images(x: Tensor, config: Config) -> None:
    """
    Raises:
        ValueError: the shape is not [N, C, S, S].
    """
    check_shape(x, "images", None, config.image_channels, config.resolution, config.resolution)


def flat(x: Tensor) -> Tensor:
    """[N, C, S, S] in [-1, 1] -> [N, C * S * S] in [0, 1]."""
    return (x.flatten(1) + 1) / 2


class MLPGenerator(nn.Module, Pretrained):
    """Draws images from latents, which enter both hidden layers."""

    part, config_class = "generator", MLPGeneratorConfig

    def __init__(self, config: MLPGeneratorConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        self.hidden = HiddenLayers(config, config.z_dim, first_norm=True, z_dim=config.z_dim)
        self.image = Linear(config.width, pixels(config))

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_dim] -> images [N, image_channels, resolution, resolution] in [-1, 1]."""
        check_shape(z, "latents", None, self.config.z_dim)
        x = torch.tanh(self.image(self.hidden(z, z)) / 2)  # 2 sigmoid(logits) - 1, [N, C * S * S]
        side = self.config.resolution
        return x.unflatten(1, (self.config.image_channels, side, side))

    def upsample(self, images: Tensor) -> Tensor:
        """The images themselves: BiGAN has no enlarged output."""
        return as_tensor(images, "images")


class MLPEncoder(nn.Module, Pretrained):
    """Features and latents of images; avepool_feat is the last hidden layer, BiGAN's features on MNIST."""

    part, config_class = "encoder", MLPEncoderConfig

    def __init__(self, config: MLPEncoderConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        self.hidden = HiddenLayers(config, pixels(config))
        self.feature_norm = BatchNorm(config.width, config.feature_norm_eps, affine=False)
        self.latent = Linear(config.width, config.z_dim)

    @property
    def num_features(self) -> int:
        """Width of avepool_feat."""
        return self.config.num_features

    def forward(self, x: Tensor, noise: Tensor | None = None) -> EncoderOutput:
        """x: [N, C, S, S] in [-1, 1]; noise is not used, as in every deterministic encoder."""
        check_images(x, self.config)
        features = self.hidden(flat(x)).to(x.dtype)  # [N, width]
        mean = torch.tanh(self.latent(features) / 2).to(x.dtype)  # 2 sigmoid(logits) - 1, [N, z_dim]
        return EncoderOutput(mean, mean, torch.zeros_like(mean), features, crelu(self.feature_norm(features)))


class MLPDiscriminator(nn.Module):
    """Scores pairs of image and latent; its batch norm should see real and generated pairs apart, as BiGAN's does."""

    def __init__(self, config: MLPDiscriminatorConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        self.hidden = HiddenLayers(config, pixels(config), z_dim=config.z_dim)
        self.score_xz = Linear(config.width, 1)

    def forward(self, x: Tensor, z: Tensor | None) -> DiscriminatorOutput:
        """x: [N, C, resolution, resolution] in [-1, 1]; z: [N, z_dim]."""
        check_images(x, self.config)
        if z is None:
            raise ValueError("the score xz needs latents; z is None")
        check_shape(z, "latents", None, self.config.z_dim)
        return DiscriminatorOutput(None, None, self.score_xz(self.hidden(flat(x), z)).squeeze(1))
