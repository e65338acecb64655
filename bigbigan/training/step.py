"""One training step: D's updates, then one of G and E together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.discriminator import Discriminator, DiscriminatorOutput
from bigbigan.encoder import Encoder
from bigbigan.generator import Generator
from bigbigan.layers import advance_spectral_norm, initialize
from bigbigan.training.config import TrainConfig
from bigbigan.training.ema import EMA
from bigbigan.training.losses import discriminator_loss, generator_encoder_loss


@dataclass
class Batch:
    """What one pass over both kinds of pairs takes."""

    x: Tensor  # [N, C, S, S] real images at E's resolution
    z: Tensor  # [N, z_dim] from the prior
    noise: Tensor  # [N, z_dim] from N(0, 1), for E's sample


@dataclass
class Pairs:
    """Images and latents of real pairs (x, E(x)) and generated pairs (G(z), z), at D's resolution."""

    real_x: Tensor
    real_z: Tensor
    fake_x: Tensor
    fake_z: Tensor

    def detach(self) -> Pairs:
        return Pairs(self.real_x.detach(), self.real_z.detach(), self.fake_x.detach(), self.fake_z.detach())


class TrainingState:
    """Networks in training form, their averages, and the two optimisers."""

    def __init__(self, config: TrainConfig, device: str | torch.device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        model = config.model
        draws = torch.Generator().manual_seed(config.seed)
        assert model.generator and model.encoder and model.discriminator
        with torch.device("meta"):
            generator = Generator(model.generator, spectral_norm=True)
            encoder = Encoder(model.encoder, spectral_norm=model.encoder.spectral_norm)
            discriminator = Discriminator(model.discriminator, spectral_norm=True)
        self.generator, self.encoder, self.discriminator = generator, encoder, discriminator
        for network in self.networks().values():
            network.to_empty(device="cpu")
            initialize(network, draws).to(self.device)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.train()
        self.ema = {name: EMA(getattr(self, name), config.ema_halflife_images) for name in ("generator", "encoder")}
        betas = (config.adam_beta1, config.adam_beta2)
        groups = [
            {"params": list(generator.parameters()), "lr": config.lr_g},
            {"params": list(encoder.parameters()), "lr": config.lr_g * config.encoder_lr_multiplier},
        ]
        self.optimizer_ge = torch.optim.Adam(groups, betas=betas, eps=config.adam_eps, fused=True)
        self.optimizer_d = torch.optim.Adam(
            discriminator.parameters(), lr=config.lr_d, betas=betas, eps=config.adam_eps, fused=True
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder, "discriminator": self.discriminator}

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def pool_to(x: Tensor, resolution: int) -> Tensor:
    """Images at E's resolution, mean-pooled to D's (paper, section 3)."""
    return F.avg_pool2d(x, x.shape[-1] // resolution) if x.shape[-1] != resolution else x


def make_pairs(state: TrainingState, batch: Batch) -> Pairs:
    fake_x = state.generator(batch.z)  # [N, C, s, s]
    real_z = state.encoder(batch.x, batch.noise).z_sample  # [N, z_dim]
    return Pairs(pool_to(batch.x, fake_x.shape[-1]), real_z, fake_x, batch.z)


def score(discriminator: nn.Module, pairs: Pairs) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
    """Scores of real and generated pairs, from one pass over both, so that they share one spectral norm."""
    x = torch.cat([pairs.real_x, pairs.fake_x.to(pairs.real_x.dtype)])  # [2 N, C, s, s]
    z = torch.cat([pairs.real_z.to(pairs.fake_z.dtype), pairs.fake_z])  # [2 N, z_dim]
    out = discriminator(x, z)
    halves = [(None, None) if s is None else s.chunk(2) for s in (out.score_x, out.score_z, out.score_xz)]
    real, fake = zip(*halves, strict=True)
    return DiscriminatorOutput(*real), DiscriminatorOutput(*fake)


def train_step(state: TrainingState, batches: Callable[[int], Batch], num_images: int) -> dict[str, Tensor]:
    """One step; `batches(i)` gives its i-th batch. Returns detached losses and mean scores.

    Raises:
        FloatingPointError: a loss is not finite; the weights that gave it are untouched by that loss.
    """
    config, discriminator = state.config, state.discriminator
    metrics: dict[str, Tensor] = {}
    pairs = None
    for i in range(config.d_steps):
        last = config.reuse_batch and i == config.d_steps - 1
        with state.autocast():
            with contextlib.nullcontext() if last else torch.no_grad():
                pairs = make_pairs(state, batches(i))
            real, fake = score(discriminator, pairs.detach())
            loss = discriminator_loss(real, fake)
        _update(loss, "discriminator", [discriminator], state.optimizer_d)
        metrics["loss_d"] = loss.detach()
    for name in ("score_x", "score_z", "score_xz"):
        if getattr(real, name) is not None:
            metrics[f"{name}_real"] = getattr(real, name).detach().float().mean()
            metrics[f"{name}_fake"] = getattr(fake, name).detach().float().mean()

    discriminator.requires_grad_(False)
    with state.autocast():
        if pairs is None or not config.reuse_batch:
            pairs = make_pairs(state, batches(config.d_steps))
        loss = generator_encoder_loss(*score(discriminator, pairs))
    _update(loss, "generator and encoder", [state.generator, state.encoder], state.optimizer_ge)
    discriminator.requires_grad_(True)
    metrics["loss_ge"] = loss.detach()

    for name, average in state.ema.items():
        average.update(getattr(state, name), num_images, config.batch_size)
    return metrics


def _update(loss: Tensor, what: str, modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the {what} loss is {loss.item()}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for module in modules:
        advance_spectral_norm(module)
    optimizer.step()
