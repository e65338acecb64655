"""One training step: D's updates, then one of G and E together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigbigan.arrays import seeded
from bigbigan.config import PARTS
from bigbigan.discriminator import DiscriminatorOutput
from bigbigan.layers import advance_spectral_norm, initialize
from bigbigan.model import PART_CLASSES
from bigbigan.training.config import TrainConfig
from bigbigan.training.diffaugment import Transformation, diff_augment
from bigbigan.training.ema import EMA
from bigbigan.training.losses import discriminator_loss, generator_encoder_loss, rotation_loss, turn

Metrics = dict[str, list[Tensor]]  # values by name, one a D step and micro-batch


@dataclass
class Batch:
    """What one pass over both kinds of pairs takes, in this process; without an encoder there is no noise."""

    x: Tensor  # [N, C, S, S] real images at E's resolution
    z: Tensor  # [N, z_dim] from the prior
    noise: Tensor  # [N, z_dim] from N(0, 1), for E's sample
    draws: Tensor | None = None  # [N, 2, 7] in [-1, 1], for `diff_augment` of the real and the generated image

    def split(self, pieces: int) -> Iterator[Batch]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chunks = {name: value.chunk(pieces) for name, value in values.items() if value is not None}
        for part in zip(*chunks.values(), strict=True):
            yield Batch(**dict(zip(chunks, part, strict=True)))


@dataclass
class Pairs:
    """Images and latents of real pairs (x, E(x)) and generated pairs (G(z), z), at D's resolution."""

    real_x: Tensor
    real_z: Tensor | None  # None without an encoder
    fake_x: Tensor
    fake_z: Tensor
    draws: Tensor | None = None  # as in the batch

    def detach(self) -> Pairs:
        real_z = None if self.real_z is None else self.real_z.detach()
        return Pairs(self.real_x.detach(), real_z, self.fake_x.detach(), self.fake_z.detach(), self.draws)


class TrainingState:
    """Networks in training form, their averages, and the two optimisers.

    `parallel` has the networks as the step calls them in a forward pass: themselves, unless wrapped (compiled, or by
    DistributedDataParallel).
    """

    def __init__(self, config: TrainConfig, device: str | torch.device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        draws = seeded(config.seed)
        self.networks: dict[str, nn.Module] = {}
        for name in PARTS:
            part = getattr(config.model, name)
            if part is None:
                continue
            with torch.device("meta"):
                # In G and D, but not in E (paper, appendix A), unless its configuration says so.
                spectral_norm = name != "encoder" or getattr(part, "spectral_norm", False)
                network = PART_CLASSES[type(part)](part, spectral_norm=spectral_norm)
            if self.device.type != "meta":
                initialize(network.to_empty(device="cpu"), draws, config.initializer)
            network.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.networks[name] = network.train()
        if (encoder := self.networks.get("encoder")) is not None:
            encoder.feature_norm.requires_grad_(False)  # behind bn_crelu_feat, which no loss sees
            if config.reversible:
                encoder.trunk.reversible = True  # type: ignore[union-attr]
        self.parallel = dict(self.networks)
        averaged = [name for name in ("generator", "encoder") if name in self.networks and config.ema_halflife_images]
        self.ema = {
            name: EMA(
                self.networks[name],
                config.ema_halflife_images,
                rampup=config.ema_rampup,
                start_images=config.ema_start_images,
            )
            for name in averaged
        }
        rates = {"generator": config.lr_g, "encoder": config.lr_g * config.encoder_lr_multiplier}
        groups = [
            {"params": list(self.networks[name].parameters()), "lr": rate, "initial_lr": rate}
            for name, rate in rates.items()
            if name in self.networks
        ]
        self.optimizer_ge = self._adam(groups)
        own = {"params": list(self.discriminator.parameters()), "lr": config.lr_d, "initial_lr": config.lr_d}
        self.optimizer_d = self._adam([own])

    def _adam(self, groups: list[dict[str, object]]) -> torch.optim.Adam:
        config = self.config
        betas = (config.adam_beta1, config.adam_beta2)
        fused = self.device.type != "meta"  # older versions of torch refuse it there, where nothing is computed
        return torch.optim.Adam(groups, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=fused)

    @property
    def generator(self) -> nn.Module:
        return self.networks["generator"]

    @property
    def encoder(self) -> nn.Module:
        return self.networks["encoder"]

    @property
    def discriminator(self) -> nn.Module:
        return self.networks["discriminator"]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def all_finite(self, loss: Tensor) -> bool:
        """Whether a loss is finite in every process."""
        return bool(torch.isfinite(loss))


def pool_to(x: Tensor, resolution: int) -> Tensor:
    """Images at E's resolution, mean-pooled to D's (paper, section 3)."""
    return F.avg_pool2d(x, x.shape[-1] // resolution) if x.shape[-1] != resolution else x


def channels_last(x: Tensor) -> Tensor:
    """A copy whose strides say so even of one channel, where any do: convolutions choose their form by them."""
    return x.clone(memory_format=torch.channels_last)


def make_pairs(state: TrainingState, batch: Batch) -> Pairs:
    fake_x = state.parallel["generator"](batch.z)  # [N, C, s, s]
    encoder = state.parallel.get("encoder")
    real_z = encoder(channels_last(batch.x), batch.noise).z_sample if encoder is not None else None  # [N, z_dim]
    return Pairs(pool_to(batch.x, fake_x.shape[-1]), real_z, fake_x, batch.z, batch.draws)


def score(
    discriminator: nn.Module,
    pairs: Pairs,
    *,
    rotate_every: int = 0,
    separate: bool = False,
    augmentations: Sequence[Transformation] = (),
) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
    """Scores of real and generated pairs, from one pass over both (or `separate` ones), under one spectral norm.

    With `rotate_every` = k, each k-th image passes in its other orientations too, and the outputs' `rotation` has
    the logits [4 M, 4] of those M images, upright first.
    """
    halves = [(pairs.real_x, pairs.real_z), (pairs.fake_x.to(pairs.real_x.dtype), pairs.fake_z)]
    n = len(pairs.real_x)
    if augmentations and pairs.draws is not None:
        halves = [(diff_augment(x, pairs.draws[:, i], augmentations), z) for i, (x, z) in enumerate(halves)]
    if rotate_every:
        halves = [(torch.cat([x, turn(x[rotate_every - 1 :: rotate_every])]), None) for x, _ in halves]
    if separate:
        outputs = [discriminator(channels_last(x), z) for x, z in halves]
    else:
        x = torch.cat([x for x, _ in halves])  # [2 N, C, s, s]; with rotations [2 (N + 3 M), C, s, s]
        latents = [z.to(pairs.fake_z.dtype) for _, z in halves if z is not None]
        z = torch.cat(latents) if len(latents) == 2 else None  # [2 N, z_dim]
        outputs = list(_halve(discriminator(channels_last(x), z)))
    real, fake = (_upright(output, n, rotate_every) for output in outputs)
    return real, fake


def _halve(output: DiscriminatorOutput) -> Iterator[DiscriminatorOutput]:
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    for half in (0, 1):
        yield DiscriminatorOutput(**{k: None if v is None else v.chunk(2)[half] for k, v in values.items()})


def _upright(output: DiscriminatorOutput, n: int, rotate_every: int) -> DiscriminatorOutput:
    if not rotate_every or output.rotation is None or output.score_x is None:
        return output
    upright, turned = output.rotation[:n], output.rotation[n:]
    logits = torch.cat([upright[rotate_every - 1 :: rotate_every], turned])  # [4 M, 4]
    return DiscriminatorOutput(output.score_x[:n], None, None, logits)


def train_step(state: TrainingState, batches: Callable[[int], Batch], num_images: int) -> dict[str, Tensor]:
    """One step; `batches(i)` gives its i-th batch. Returns detached losses and mean scores, averaged over D steps.

    Raises:
        FloatingPointError: a loss is not finite; the weights that gave it are untouched by that loss.
    """
    config, discriminator = state.config, state.discriminator
    metrics: Metrics = {}
    batch, pairs = None, None
    for i in range(config.d_steps):
        batch, reuse = batches(i), config.reuse_batch and i == config.d_steps - 1
        # Micro-batches' graphs would pile up until the G and E step; it computes those pairs again.
        pairs = _discriminator_gradients(state, batch, reuse and config.accumulate == 1, metrics)
        if not config.simultaneous:
            _update(state, state.optimizer_d, ("discriminator",), num_images)
    if not config.reuse_batch:
        batch = batches(config.d_steps)
    assert batch is not None

    discriminator.requires_grad_(False)
    state.optimizer_ge.zero_grad(set_to_none=True)
    for micro, last in _micro_batches(batch, config.accumulate):
        with _synchronized(state, ("generator", "encoder"), last):
            with state.autocast():
                real, fake = _score(state, discriminator, pairs if pairs is not None else make_pairs(state, micro))
                loss = generator_encoder_loss(real, fake, config.objective)
                if fake.rotation is not None:
                    loss = loss + config.rotation_weight_g * rotation_loss(fake.rotation)
            _backward(state, loss, "generator and encoder")
        _record(metrics, {"loss_ge": loss})
    discriminator.requires_grad_(True)
    if config.simultaneous:
        _update(state, state.optimizer_d, ("discriminator",), num_images)
    _update(state, state.optimizer_ge, ("generator", "encoder"), num_images)

    for name, average in state.ema.items():
        average.update(state.networks[name], num_images, config.batch_size)
    return {name: torch.stack(values).mean() for name, values in metrics.items()}


def _discriminator_gradients(state: TrainingState, batch: Batch, keep_graph: bool, metrics: Metrics) -> Pairs | None:
    """Leaves D's gradients in place; the pairs with their graph if `keep_graph`."""
    config, pairs = state.config, None
    state.optimizer_d.zero_grad(set_to_none=True)
    for micro, last in _micro_batches(batch, config.accumulate):
        with _synchronized(state, ("discriminator",), last):
            with state.autocast():
                with contextlib.nullcontext() if keep_graph else torch.no_grad():
                    pairs = make_pairs(state, micro)
                real, fake = _score(state, state.parallel["discriminator"], pairs.detach())
                loss = discriminator_loss(real, fake, config.objective)
                if real.rotation is not None:
                    rotation = rotation_loss(real.rotation)
                    _record(metrics, {"loss_rotation": rotation})
                    loss = loss + config.rotation_weight_d * rotation
            _backward(state, loss, "discriminator")
        _record(metrics, {"loss_d": loss})
        for kind, output in (("real", real), ("fake", fake)):
            scores = {name: getattr(output, name) for name in ("score_x", "score_z", "score_xz")}
            _record(metrics, {f"{k}_{kind}": v.float().mean() for k, v in scores.items() if v is not None})
    return pairs if keep_graph else None


def _score(state: TrainingState, discriminator: nn.Module, pairs: Pairs) -> tuple[DiscriminatorOutput, ...]:
    config = state.config
    every = 4 * config.batch_size // config.rotated_batch_size if config.rotated_batch_size else 0
    separate, augmentations = config.separate_passes, config.diff_augment
    return score(discriminator, pairs, rotate_every=every, separate=separate, augmentations=augmentations)


def _micro_batches(batch: Batch, pieces: int) -> Iterator[tuple[Batch, bool]]:
    for i, micro in enumerate(batch.split(pieces)):
        yield micro, i == pieces - 1


@contextlib.contextmanager
def _synchronized(state: TrainingState, names: tuple[str, ...], last: bool) -> Iterator[None]:
    """Only the last micro-batch's backward pass averages gradients over processes."""
    with contextlib.ExitStack() as stack:
        for name in names:
            network = state.parallel.get(name)
            if not last and isinstance(network, DistributedDataParallel):
                stack.enter_context(network.no_sync())
        yield


def _backward(state: TrainingState, loss: Tensor, what: str) -> None:
    if not state.all_finite(loss):
        raise FloatingPointError(f"the {what} loss is {loss.item()}")
    (loss / state.config.accumulate).backward()


def _record(metrics: Metrics, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        metrics.setdefault(name, []).append(value.detach())


def _update(state: TrainingState, optimizer: torch.optim.Adam, names: tuple[str, ...], num_images: int) -> None:
    for name in names:
        if name in state.networks:
            advance_spectral_norm(state.networks[name])
    factor = state.config.lr_factor(num_images)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
