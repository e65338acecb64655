"""BigGAN's generator without labels (BigBiGAN, section 3): [N, z_dim] -> [N, C, S, S] in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.arrays import as_tensor, check_shape
from bigbigan.config import GENERATOR_CHANNELS, GeneratorConfig
from bigbigan.layers import ConditionalNormReLU, Layers, NormReLU, SelfAttention, UpsampleConv2d, upsample_nearest
from bigbigan.pretrained import Pretrained


class GeneratorBlock(nn.Module):
    """Residual block that doubles the resolution."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, z_dim: int, shared_dim: int, eps: float):
        super().__init__()
        self.norm1 = ConditionalNormReLU(layers, inputs, z_dim, shared_dim, eps)
        self.conv1 = UpsampleConv2d(layers, inputs, outputs)
        self.norm2 = ConditionalNormReLU(layers, outputs, z_dim, shared_dim, eps)
        self.conv2 = layers.conv2d(outputs, outputs, 3)
        self.shortcut = layers.conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, z: Tensor, shared: Tensor | None) -> Tensor:
        h = self.conv1(self.norm1(x, z, shared))  # [N, outputs, 2H, 2W]
        h = self.conv2(self.norm2(h, z, shared))  # [N, outputs, 2H, 2W]
        # A 1x1 convolution commutes with nearest upsampling, at a quarter of the cost.
        return h + upsample_nearest(self.shortcut(x))


class Generator(nn.Module, Pretrained):
    """Draws images from latents.

    `spectral_norm=True` builds the training form, with `config.shared_dim` values learned in place of a class
    embedding; otherwise weights are plain and that vector's products are biases.
    """

    part, config_class = "generator", GeneratorConfig

    def __init__(self, config: GeneratorConfig, *, spectral_norm: bool = False):
        super().__init__()
        self.config = config
        layers = Layers(spectral_norm)
        widths = [config.base_channels * n for n in GENERATOR_CHANNELS[config.resolution]]
        shared_dim = config.shared_dim if spectral_norm else 0
        self.shared = nn.Parameter(torch.empty(shared_dim)) if shared_dim else None
        self.seed = layers.linear(config.z_chunks[0], 16 * widths[0])
        self.blocks = nn.ModuleList(
            GeneratorBlock(layers, widths[i], widths[i + 1], z_dim, shared_dim, config.bn_eps)
            for i, z_dim in enumerate(config.z_chunks[1:])
        )
        sides = [8 << i for i in range(len(self.blocks))]
        self.attention_index = sides.index(config.attention_resolution) if config.attention_resolution in sides else -1
        self.attention = SelfAttention(layers, widths[self.attention_index + 1]) if self.attention_index >= 0 else None
        self.norm = NormReLU(widths[-1], config.bn_eps)
        self.conv = layers.conv2d(widths[-1], config.image_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_dim] -> images [N, image_channels, resolution, resolution] in [-1, 1]."""
        check_shape(z, "latents", None, self.config.z_dim)
        seed, *chunks = z.split(self.config.z_chunks, dim=1)  # [N, 20] each
        x = self.seed(seed).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # [N, 16 ch, 4, 4], from NHWC order
        for i, (block, chunk) in enumerate(zip(self.blocks, chunks, strict=True)):
            x = block(x, chunk, self.shared)  # [N, widths[i + 1], 8 << i, 8 << i]
            if i == self.attention_index and self.attention is not None:
                x = self.attention(x)
        return torch.tanh(self.conv(self.norm(x)))

    def upsample(self, images: Tensor) -> Tensor:
        """images: [N, C, S, S] -> [N, C, upsample_size, upsample_size], as the module's `upsampled` output."""
        images = as_tensor(images, "images")
        check_shape(images, "images", None, None, None, None)
        size, mode = self.config.upsample_size, self.config.upsample_mode
        if mode == "nearest":
            return F.interpolate(images, size=(size, size), mode="nearest")
        if mode == "bilinear-asymmetric" or mode.startswith("bicubic"):
            matrix = resize_matrix(images.shape[-1], size, mode).to(images)  # [size, S]
            return matrix @ images @ matrix.t()
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=mode == "bilinear-aligned")


def resize_matrix(inputs: int, outputs: int, mode: str) -> Tensor:
    """[outputs, inputs] weights of TensorFlow's interpolation along one axis.

    "asymmetric" has the corners at the origin, as TensorFlow 1 has by default; "aligned" has corner on corner; neither
    word means half-pixel centres, for which TensorFlow takes another cubic and leaves out what lies outside.
    """
    kind, _, corners = mode.partition("-")
    target = torch.arange(outputs, dtype=torch.float32)  # TensorFlow's precision, which decides ties in its table
    ratio = torch.tensor(inputs - 1.0) / max(outputs - 1, 1) if corners == "aligned" else torch.tensor(inputs) / outputs
    position = target * ratio if corners else (target + 0.5) * ratio - 0.5
    low = position.floor()
    fraction = (position - low).double()
    if kind == "bilinear":
        taps, weights = [0, 1], [1 - fraction, fraction]
    else:
        fraction = (fraction * 1024).round() / 1024  # TensorFlow looks its weights up in a table
        taps, a = [-1, 0, 1, 2], -0.75 if corners else -0.5
        weights = [_cubic((fraction - tap).abs(), a) for tap in taps]
    index = low.long()[:, None] + torch.tensor(taps)  # [outputs, taps]
    weight = torch.stack(weights, dim=1)
    if kind == "bicubic" and not corners:
        weight = weight * ((index >= 0) & (index < inputs))
        weight = weight / weight.sum(dim=1, keepdim=True)
    eye = torch.eye(inputs, dtype=torch.float64)
    return (eye[index.clamp(0, inputs - 1)] * weight[..., None]).sum(dim=1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel at distances of 0 to 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, far)
