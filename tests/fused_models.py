"""Models of every architecture with few channels, and their outputs, for the tests of fused inference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from reference import random_images, random_normal, randomize
from torch import Tensor

from bigbigan import BigBiGAN
from bigbigan.config import BigBiGANConfig, DiscriminatorConfig, EncoderConfig, GeneratorConfig, MLPConfig

TOLERANCE = 2e-5  # of the largest value of an output
HEAD = MLPConfig(16, 4)


def narrow(config: BigBiGANConfig) -> BigBiGANConfig:
    """The same layers at the same resolutions, with few channels."""
    changes: dict[str, Any] = {}
    if isinstance(config.generator, GeneratorConfig):
        changes["generator"] = dataclasses.replace(config.generator, base_channels=4)
    if isinstance(config.encoder, EncoderConfig):
        changes["encoder"] = dataclasses.replace(config.encoder, base_channels=8, head=HEAD)
    if isinstance(config.discriminator, DiscriminatorConfig):
        changes["discriminator"] = dataclasses.replace(
            config.discriminator, base_channels=4, z_mlp=HEAD, joint_mlp=HEAD
        )
    return dataclasses.replace(config, **changes)


@torch.no_grad()
def make(config: BigBiGANConfig, dtype: torch.dtype = torch.float32, parts: Any = None) -> BigBiGAN:
    """Random weights and statistics, of sizes at which neither form rounds its last digits away.

    Attention and images near saturation, and gains far from one, amplify the rounding of both.
    """
    model = BigBiGAN(config, parts)
    randomize(model)
    for name, parameter in model.named_parameters():
        if "theta" in name or "gain.linear.weight" in name or name == "generator.conv.weight":
            parameter.mul_(0.2)
    return model.to(dtype).eval()


def inputs(config: Any, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = random_images(batch, config.image_channels, config.resolution, config.resolution)
    return images.to(dtype), random_normal(batch, config.z_dim).to(dtype)


@torch.no_grad()
def outputs(model: BigBiGAN, batch: int = 3) -> dict[str, Tensor]:
    """Every output of every part."""
    found: dict[str, Tensor] = {}
    for part in model.parts:
        network = getattr(model, part)
        x, z = inputs(network.config, batch, model.dtype)
        out = network(z) if part == "generator" else network(x, z)
        named = {"images": out} if isinstance(out, Tensor) else dataclasses.asdict(out)
        found |= {f"{part} {name}": tensor for name, tensor in named.items() if tensor is not None}
    return found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        assert torch.isfinite(tensor).all(), name
        difference = (actual[name] - tensor).abs().max().item()
        assert difference <= tolerance * tensor.abs().max().item(), f"{name}: {difference}"
