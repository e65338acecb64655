"""The training step of a small BigBiGAN, written with PyTorch's own parts: what `train_step` is measured against.

Layers are defined in the order of the package's, so that weights can be copied; only the seed's outputs are ordered as
[C, 4, 4]. It takes configurations as `bigbigan.presets.small` makes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bigbigan.config import (
    DISCRIMINATOR_CHANNELS,
    GENERATOR_CHANNELS,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
)
from bigbigan.layers import SPECTRAL_NORM_EPS, BatchNorm, SpectralNorm
from bigbigan.training.config import TrainConfig
from bigbigan.training.step import Batch


def sn(layer: nn.Module) -> nn.Module:
    return spectral_norm(layer, eps=SPECTRAL_NORM_EPS)


class ConditionalNorm(nn.Module):
    def __init__(self, channels: int, z_dim: int, eps: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps, affine=False)
        self.gain, self.offset = sn(nn.Linear(z_dim, channels)), sn(nn.Linear(z_dim, channels))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (1 + self.gain(z))[:, :, None, None] * self.norm(x) + self.offset(z)[:, :, None, None]


class GeneratorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, z_dim: int, eps: float):
        super().__init__()
        self.norm1 = ConditionalNorm(inputs, z_dim, eps)
        self.conv1 = sn(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.norm2 = ConditionalNorm(outputs, z_dim, eps)
        self.conv2 = sn(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = sn(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, z)), scale_factor=2, mode="nearest"))
        h = self.conv2(F.relu(self.norm2(h, z)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2, mode="nearest"))


class Generator(nn.Module):
    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.chunks = config.z_chunks
        widths = [config.base_channels * n for n in GENERATOR_CHANNELS[config.resolution]]
        self.seed = sn(nn.Linear(self.chunks[0], 16 * widths[0]))
        sizes = zip(itertools.pairwise(widths), self.chunks[1:], strict=True)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, z_dim, config.bn_eps) for (a, b), z_dim in sizes)
        self.norm = nn.BatchNorm2d(widths[-1], config.bn_eps)
        self.conv = sn(nn.Conv2d(widths[-1], config.image_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        seed, *chunks = z.split(self.chunks, dim=1)
        x = self.seed(seed).unflatten(1, (-1, 4, 4))
        for block, chunk in zip(self.blocks, chunks, strict=True):
            x = block(x, chunk)
        return torch.tanh(self.conv(F.relu(self.norm(x))))


class ResNetUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs, eps), nn.BatchNorm2d(outputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        project = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm1(x))
        h = self.conv2(F.relu(self.norm2(self.conv1(first))))
        return h + (x if self.shortcut is None else self.shortcut(first))


class MLPBlock(nn.Module):
    def __init__(self, inputs: int, width: int, first: bool, wrap: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.first = first
        self.linear1, self.linear2 = wrap(nn.Linear(inputs, width)), wrap(nn.Linear(width, width))
        self.skip = wrap(nn.Linear(inputs, width)) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear1(x if self.first else F.relu(x))
        return self.linear2(F.relu(h)) + self.skip(x)


def mlp(config: MLPConfig, inputs: int, wrap: Callable[[nn.Module], nn.Module] = sn) -> nn.Sequential:
    widths = [inputs, *[config.width] * (config.layers // 2)]
    blocks = [MLPBlock(a, b, i == 0, wrap) for i, (a, b) in enumerate(itertools.pairwise(widths))]
    return nn.Sequential(*blocks, nn.ReLU())


class Encoder(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, units = config.base_channels, []
        self.stem = nn.Conv2d(config.image_channels, width, 3, padding=1, bias=False)
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                outputs, stride = config.base_channels * 2**stage, 2 if stage > 0 and i == 0 else 1
                units.append(ResNetUnit(width, outputs, stride, config.bn_eps))
                width = outputs
        self.units = nn.Sequential(*units)
        self.norm = nn.BatchNorm2d(width, config.bn_eps)
        self.head = mlp(config.head, width, wrap=lambda layer: layer)
        self.latent = nn.Linear(config.head.width, 2 * config.z_dim)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        features = F.relu(self.norm(self.units(self.stem(x)))).mean(dim=(2, 3))
        mean, raw = self.latent(self.head(features)).to(x.dtype).chunk(2, dim=1)
        return mean + noise * F.softplus(raw)


class DiscriminatorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool, downsample: bool):
        super().__init__()
        self.first, self.downsample = first, downsample
        self.conv1 = sn(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = sn(nn.Conv2d(outputs, outputs, 3, padding=1))
        project = downsample or inputs != outputs
        self.shortcut = sn(nn.Conv2d(inputs, outputs, 1)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        x = self.shortcut(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if self.downsample else h + x


class Discriminator(nn.Module):
    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        table = DISCRIMINATOR_CHANNELS[config.resolution]
        widths = [config.image_channels, *(config.base_channels * n for n in table)]
        blocks = (DiscriminatorBlock(a, b, i == 0, i < 2) for i, (a, b) in enumerate(itertools.pairwise(widths)))
        self.f = nn.Sequential(*blocks)
        self.score_x = sn(nn.Linear(widths[-1], 1))
        self.h = mlp(config.z_mlp, config.z_dim)
        self.score_z = sn(nn.Linear(config.z_mlp.width, 1))
        self.j = mlp(config.joint_mlp, widths[-1] + config.z_mlp.width)
        self.score_xz = sn(nn.Linear(config.joint_mlp.width, 1))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, h = F.relu(self.f(x)).sum(dim=(2, 3)), self.h(z)
        return self.score_x(f), self.score_z(h), self.score_xz(self.j(torch.cat([f, h], dim=1)))


class StandardTraining:
    """Networks, `foreach` Adam, averages, and the step: pairs made anew for each update, D in one pass a kind."""

    def __init__(self, config: TrainConfig, ema_decay: float):
        model = config.model
        assert isinstance(model.generator, GeneratorConfig) and isinstance(model.encoder, EncoderConfig)
        assert isinstance(model.discriminator, DiscriminatorConfig) and model.discriminator.resolution == 32
        self.config, self.dtype = config, torch.float64 if config.precision == "fp64" else torch.float32
        self.generator = Generator(model.generator).to(self.dtype)
        self.encoder = Encoder(model.encoder).to(self.dtype)
        self.discriminator = Discriminator(model.discriminator).to(self.dtype)
        betas = (config.adam_beta1, config.adam_beta2)
        groups = [
            {"params": self.generator.parameters(), "lr": config.lr_g},
            {"params": self.encoder.parameters(), "lr": config.lr_g * config.encoder_lr_multiplier},
        ]
        self.optimizer_ge = torch.optim.Adam(groups, betas=betas, eps=config.adam_eps, foreach=True)
        own = self.discriminator.parameters()
        self.optimizer_d = torch.optim.Adam(own, config.lr_d, betas=betas, eps=config.adam_eps, foreach=True)
        average = get_ema_multi_avg_fn(ema_decay)
        self.ema = [AveragedModel(net, multi_avg_fn=average) for net in (self.generator, self.encoder)]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder, "discriminator": self.discriminator}

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16")

    def step(self, batches: Callable[[int], Batch]) -> dict[str, Tensor]:
        """Losses, as `train_step` returns them."""
        losses = []
        for i in range(self.config.d_steps):
            batch = batches(i)
            small = F.adaptive_avg_pool2d(batch.x, self.config.model.discriminator.resolution)  # of E's larger images
            with self.autocast():
                with torch.no_grad():
                    latents, images = self.encoder(batch.x, batch.noise), self.generator(batch.z)
                real, fake = self.discriminator(small, latents), self.discriminator(images, batch.z)
                pairs = zip(real, fake, strict=True)
                loss_d = sum(F.relu(1 - r).float().mean() + F.relu(1 + f).float().mean() for r, f in pairs)
            self.optimizer_d.zero_grad()
            loss_d.backward()
            self.optimizer_d.step()
            losses.append(loss_d.detach())
        self.discriminator.requires_grad_(False)
        with self.autocast():
            real = self.discriminator(small, self.encoder(batch.x, batch.noise))
            fake = self.discriminator(self.generator(batch.z), batch.z)
            loss_ge = sum(r.float().mean() - f.float().mean() for r, f in zip(real, fake, strict=True))
        self.optimizer_ge.zero_grad()
        loss_ge.backward()
        self.optimizer_ge.step()
        self.discriminator.requires_grad_(True)
        for average, network in zip(self.ema, (self.generator, self.encoder), strict=True):
            average.update_parameters(network)
        return {"loss_d": torch.stack(losses).mean(), "loss_ge": loss_ge.detach()}


def weighted_layers(network: nn.Module) -> list[nn.Module]:
    """Layers with parameters, in the order of their definition."""
    kinds = (nn.Conv2d, nn.Linear, BatchNorm, nn.BatchNorm2d)
    return [m for m in network.modules() if isinstance(m, kinds) and len(list(m.parameters())) > 0]


def raw_weight(layer: nn.Module) -> nn.Parameter:
    """The parameter, before spectral norm."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight


@torch.no_grad()
def copy_spectral_norm(source: SpectralNorm, target: nn.Module) -> None:
    """Sets both vectors of `torch.nn.utils.parametrizations.spectral_norm` to the layer's own."""
    matrix, parametrization = source.weight.flatten(1), target.parametrizations.weight[0]
    v = F.normalize(source.u @ matrix, dim=1)
    parametrization._v.copy_(v[0])
    parametrization._u.copy_(F.normalize(v @ matrix.t(), dim=1)[0])


@torch.no_grad()
def copy_weights(ours: dict[str, nn.Module], standard: dict[str, nn.Module]) -> None:
    for name, network in standard.items():
        for source, target in zip(weighted_layers(ours[name]), weighted_layers(network), strict=True):
            if isinstance(source, SpectralNorm):
                copy_spectral_norm(source, target)
            raw_weight(target).copy_(source.weight)
            if source.bias is not None:
                target.bias.copy_(source.bias)
    seed = standard["generator"].seed
    for rows in (raw_weight(seed), seed.bias, seed.parametrizations.weight[0]._u):
        rows.copy_(rows.unflatten(0, (4, 4, -1)).movedim(2, 0).flatten(0, 2))  # [4, 4, C] to [C, 4, 4]
