"""Generator and encoders as public BigGAN and BigBiGAN ports have them: what fused inference is measured against.

Spectral norm is computed in every pass, the class vector goes through every gain and offset, batch norms, ReLUs and
shortcuts are layers of their own, RevNet's streams are split and concatenated in every unit, memory order is NCHW.
Configurations are those of the paper's models; weights are drawn at random, since only time is asked of them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.config import GENERATOR_CHANNELS, EncoderConfig, GeneratorConfig


class SpectralNorm:
    """One power iteration a pass, in evaluation too."""

    weight: Tensor

    def normalized(self) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u @ matrix, eps=1e-4)
            u = F.normalize(v @ matrix.t(), eps=1e-4)
        return self.weight / (v @ matrix.t() @ u.t()).squeeze()


class SNConv2d(SpectralNorm, nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.register_buffer("u", torch.randn(1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized(), self.bias, padding=self.padding)


class SNLinear(SpectralNorm, nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.register_buffer("u", torch.randn(1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized(), self.bias)


class ConditionalNorm(nn.Module):
    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, 1e-4, affine=False)
        self.gain, self.offset = SNLinear(condition, channels, False), SNLinear(condition, channels, False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + self.gain(y))[:, :, None, None] * self.norm(x) + self.offset(y)[:, :, None, None]


class GeneratorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int):
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(inputs, condition), ConditionalNorm(outputs, condition)
        self.conv1, self.conv2 = SNConv2d(inputs, outputs, 3), SNConv2d(outputs, outputs, 3)
        self.shortcut = SNConv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, y)), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, y)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        inner, half = channels // 8, channels // 2
        self.theta, self.phi = SNConv2d(channels, inner, 1, False), SNConv2d(channels, inner, 1, False)
        self.g, self.o = SNConv2d(channels, half, 1, False), SNConv2d(half, channels, 1, False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2)
        phi, g = F.max_pool2d(self.phi(x), 2).flatten(2), F.max_pool2d(self.g(x), 2).flatten(2)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        return self.gamma * self.o(torch.bmm(g, beta.transpose(1, 2)).unflatten(2, x.shape[2:])) + x


class Generator(nn.Module):
    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        widths = [config.base_channels * n for n in GENERATOR_CHANNELS[config.resolution]]
        self.shared = nn.Parameter(torch.randn(1, config.shared_dim))
        self.seed = SNLinear(config.z_chunks[0], 16 * widths[0])
        pairs = zip(itertools.pairwise(widths), config.z_chunks[1:], strict=True)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, n + config.shared_dim) for (a, b), n in pairs)
        self.attention = Attention(config.base_channels * config.resolution // 64)
        self.norm, self.conv = nn.BatchNorm2d(widths[-1], 1e-4), SNConv2d(widths[-1], config.image_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        seed, *chunks = z.split(self.config.z_chunks, dim=1)
        x = self.seed(seed).view(len(z), -1, 4, 4)
        for block, chunk in zip(self.blocks, chunks, strict=True):
            x = block(x, torch.cat([self.shared.expand(len(z), -1), chunk], 1))
            if x.shape[-1] == self.config.attention_resolution:
                x = self.attention(x)
        return torch.tanh(self.conv(F.relu(self.norm(x))))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, skip: bool = True):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(n, 1e-3) for n in (inputs, inner, inner))
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        project = skip and (stride > 1 or inputs != outputs)
        self.skip, self.shortcut = skip, nn.Conv2d(inputs, outputs, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm1(x))
        h = self.conv3(F.relu(self.norm3(self.conv2(F.relu(self.norm2(self.conv1(first)))))))
        if not self.skip:
            return h
        return h + (x if self.shortcut is None else self.shortcut(first))


class RevNetUnit(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.f = Bottleneck(channels // 2, channels // 8, channels // 2, skip=False)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return torch.cat([x2, x1 + self.f(x2)], dim=1)


class RevNetPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return F.pad(F.avg_pool2d(x, 2, ceil_mode=True), (0, 0, 0, 0, half, half))


class Encoder(nn.Module):
    """[N, 3, S, S] -> z_mean, pooled features and their batch-normalised halves."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        reversible, width = config.architecture == "revnet", config.base_channels * 4
        stem = width if reversible else config.base_channels
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)]
        inputs = stem
        for stage, depth in enumerate(config.depths):
            outputs = width << stage
            if reversible:
                layers += [RevNetPool()] if stage else []
                layers += [RevNetUnit(outputs) for _ in range(depth)]
            for i in range(0 if reversible else depth):
                layers.append(Bottleneck(inputs, outputs // 4, outputs, 2 if stage and not i else 1))
                inputs = outputs
        features, head = config.num_features, config.head.width
        self.trunk = nn.Sequential(*layers, nn.BatchNorm2d(features, 1e-3), nn.ReLU())
        self.norm = nn.BatchNorm1d(features, 1e-3, affine=False)
        self.linear1, self.linear2 = nn.Linear(features, head), nn.Linear(head, head)
        self.linear3, self.linear4 = nn.Linear(head, head), nn.Linear(head, head)
        self.skip = nn.Linear(features, head) if features != head else nn.Identity()
        self.latent = nn.Linear(head, 2 * config.z_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.trunk(x).mean((2, 3))
        h = self.linear2(F.relu(self.linear1(pooled))) + self.skip(pooled)
        h = h + self.linear4(F.relu(self.linear3(F.relu(h))))
        normed = self.norm(pooled)
        mean, _ = self.latent(F.relu(h)).chunk(2, dim=1)
        return mean, pooled, torch.cat([F.relu(normed), F.relu(-normed)], 1)
