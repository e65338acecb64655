"""Layers that the networks share: spectral norm, batch norms, attention, residual MLP.

Networks are written over small leaves (`NormReLU`, `ConditionalNormReLU`, `UpsampleConv2d`, …), and every layer comes
from a `Layers` factory, so that one definition serves training (spectral norm on) and inference (plain weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.config import MLPConfig
from bigbigan.crossreplica import Moments, batch_norm, batch_norm_and_moments

SPECTRAL_NORM_EPS = 1e-4  # as in DeepMind's released BigGAN


class SpectralNorm:
    """Mixin that divides the weight by an estimate of its largest singular value (BigGAN's rule).

    One vector `u` persists. Each forward pass runs one power iteration from it without storing the result, in
    training and in evaluation alike, so that a forward pass changes nothing; `advance_spectral_norm` stores it.
    """

    weight: Tensor
    u: Tensor

    def power_iteration(self) -> tuple[Tensor, Tensor]:
        """sigma (differentiable in the weight) and the next u, from the stored one."""
        matrix = self.weight.flatten(1)  # [out, in * kh * kw]
        # Meta tensors, on which the cost of a step is counted, know no autocast.
        device = "cpu" if matrix.is_meta else matrix.device.type
        with torch.autocast(device, enabled=False):
            with torch.no_grad():
                v = F.normalize(self.u @ matrix, dim=1, eps=SPECTRAL_NORM_EPS)  # [1, in * kh * kw]
            product = v @ matrix.t()  # [1, out]
            u = F.normalize(product.detach(), dim=1, eps=SPECTRAL_NORM_EPS)  # [1, out]
            return (product * u).sum(), u

    def normalized_weight(self) -> Tensor:
        """The weight over the estimate: what a forward pass uses."""
        return self.weight / self.power_iteration()[0]

    def effective_weight(self) -> Tensor:
        """The weight over its exact largest singular value, for inference."""
        matrix = self.weight.detach().flatten(1).double()
        return (self.weight.detach().double() / torch.linalg.matrix_norm(matrix, 2)).to(self.weight.dtype)


class SpectralNormConv2d(SpectralNorm, nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.empty(1, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized_weight(), self.bias, self.stride, self.padding)


class SpectralNormLinear(SpectralNorm, nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.empty(1, self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)


@torch.no_grad()
def advance_spectral_norm(module: nn.Module) -> None:
    """Stores one power iteration in every layer: once per optimiser step, just before the weights change."""
    for layer in module.modules():
        if isinstance(layer, SpectralNorm):
            layer.u.copy_(layer.power_iteration()[1])


class Layers:
    """Makes convolutions and linear layers in one of the two forms."""

    def __init__(self, spectral_norm: bool = False):
        self.spectral_norm = spectral_norm

    def conv2d(
        self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, stride: int = 1, padding: int | None = None
    ) -> nn.Conv2d:
        """Zero padding by half the kernel unless `padding` says otherwise."""
        make = SpectralNormConv2d if self.spectral_norm else nn.Conv2d
        return make(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding, bias=bias)

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
        return (SpectralNormLinear if self.spectral_norm else nn.Linear)(inputs, outputs, bias=bias)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the second, without moving averages (BigGAN).

    Training normalises by the batch. Evaluation uses `running_mean` and `running_var`, which hold **standing
    statistics**: the mean over many training-mode passes, written by `StandingStatistics`.

    With a `group` (`synchronize_batch_norm`) the batch is that of all processes.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, affine: bool = True):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.accumulator: tuple[Tensor, Tensor] | None = None
        self.group: torch.distributed.ProcessGroup | None = None
        self.tape: dict[nn.Module, Moments] | None = None  # moments of a pass that reversible back-propagation repeats

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.bias)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.tape and self in self.tape:
            return batch_norm(x, self.tape[self], weight, bias, self.eps, self.group)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        out, moments = batch_norm_and_moments(x, weight, bias, self.eps, self.group)
        if self.accumulator is not None:
            self.accumulator[0].add_(moments.mean)
            self.accumulator[1].add_(moments.var)
        if self.tape is not None:
            self.tape[self] = moments
        return out

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps:g}, affine={self.weight is not None}"


def synchronize_batch_norm(module: nn.Module, group: torch.distributed.ProcessGroup | None) -> None:
    """Lets every `BatchNorm` train on the batches of all processes of `group` together; None restores it.

    Evaluation and the state dict stay as they are. Every process has to run the same passes, forward and backward.
    A group of the norms' own (`torch.distributed.new_group()`) keeps their collectives apart from others. A module
    with a group cannot be copied by `copy.deepcopy`.
    """
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.group = group


class StandingStatistics:
    """Context in which training-mode passes are averaged into the evaluation statistics of every `BatchNorm`.

    Means and variances are averaged with equal weight a pass, in float64 (BigGAN, appendix: "standing statistics").
    The module is put in training mode inside and returned to its modes after; on an error nothing is written. In a
    synchronised module the passes are over all processes' batches, and every process writes the same numbers.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
        self.passes = 0

    def __enter__(self) -> StandingStatistics:
        self.modes = {m: m.training for m in self.module.modules()}
        self.module.train()
        for norm in self.norms:
            zeros = torch.zeros_like(norm.running_mean, dtype=torch.float64)
            norm.accumulator = (zeros, zeros.clone())
        return self

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> None:
        """One pass over a batch."""
        self.module(*inputs)
        self.passes += 1

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for norm in self.norms:
            assert norm.accumulator is not None
            if error is None and self.passes:
                norm.running_mean.copy_(norm.accumulator[0] / self.passes)
                norm.running_var.copy_(norm.accumulator[1] / self.passes)
            norm.accumulator = None
        for module, mode in self.modes.items():
            module.training = mode


class NormReLU(BatchNorm):
    """Batch norm and ReLU as one leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=not self.training)


class ConditionLinear(nn.Module):
    """linear(z chunk) + constant, as every gain and offset of the generator has it.

    With `shared_dim` the constant comes from a learned vector shared by all layers, in training; `effective_state`
    turns that form into a plain linear layer with a bias.
    """

    def __init__(self, layers: Layers, z_dim: int, shared_dim: int, channels: int):
        super().__init__()
        self.z_dim = z_dim
        self.linear = layers.linear(z_dim + shared_dim, channels, bias=shared_dim == 0)

    def forward(self, z: Tensor, shared: Tensor | None) -> Tensor:
        if shared is not None:  # concat order [z, shared], as in DeepMind's module
            z = torch.cat([z, shared.to(z.dtype).expand(len(z), -1)], dim=1)  # [N, z_dim + shared_dim]
        return self.linear(z)  # [N, channels]


class ConditionalNormReLU(nn.Module):
    """Batch norm whose gain (1 + linear) and offset come from a chunk of z, then ReLU, as one leaf."""

    def __init__(self, layers: Layers, channels: int, z_dim: int, shared_dim: int, eps: float):
        super().__init__()
        self.norm = BatchNorm(channels, eps, affine=False)
        self.gain = ConditionLinear(layers, z_dim, shared_dim, channels)
        self.offset = ConditionLinear(layers, z_dim, shared_dim, channels)

    def forward(self, x: Tensor, z: Tensor, shared: Tensor | None) -> Tensor:
        gain = 1 + self.gain(z, shared)[:, :, None, None]  # [N, C, 1, 1]
        offset = self.offset(z, shared)[:, :, None, None]  # [N, C, 1, 1]
        return F.relu(torch.addcmul(offset, self.norm(x), gain), inplace=not self.training)  # [N, C, H, W]


class UpsampleConv2d(nn.Module):
    """Nearest upsampling by two, then a 3x3 convolution, as one leaf."""

    def __init__(self, layers: Layers, inputs: int, outputs: int):
        super().__init__()
        self.conv = layers.conv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.conv(upsample_nearest(x))  # [N, outputs, 2H, 2W]
        kernel = box_kernel(conv_weight(self.conv)).flip(2, 3).transpose(0, 1)  # [inputs, outputs, 4, 4]
        h = F.conv_transpose2d(x, kernel, stride=2, padding=1)  # [N, outputs, 2H, 2W]
        assert self.conv.bias is not None  # added here: oneDNN's backward pass takes two to four times as long with it
        return h.add_(self.conv.bias.to(h.dtype)[:, None, None])


class DownsampleConv2d(nn.Module):
    """A 3x3 convolution, then 2x2 mean pooling, as one leaf."""

    def __init__(self, layers: Layers, inputs: int, outputs: int):
        super().__init__()
        self.conv = layers.conv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.avg_pool2d(self.conv(x), 2)  # [N, outputs, H / 2, W / 2]
        kernel = box_kernel(conv_weight(self.conv)) / 4  # [outputs, inputs, 4, 4]
        return F.conv2d(x, kernel, self.conv.bias, stride=2, padding=1)  # [N, outputs, H / 2, W / 2]


def conv_weight(conv: nn.Conv2d) -> Tensor:
    return conv.normalized_weight() if isinstance(conv, SpectralNorm) else conv.weight


def box_kernel(weight: Tensor) -> Tensor:
    """[O, I, 3, 3] convolved with a 2x2 box of ones: [O, I, 4, 4].

    With stride 2 it does a 3x3 convolution and the resampling beside it at once, with 4/9 of the multiplications.
    Training takes this form; the kernel is cheap there beside a batch, which it is not in inference.
    """
    return sum((F.pad(weight, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1)), start=weight.new_zeros(()))


def upsample_nearest(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class SelfAttention(nn.Module):
    """SAGAN's block as BigGAN has it: keys and values max-pooled, no scaling by 1/sqrt(d), gamma from 0."""

    def __init__(self, layers: Layers, channels: int):
        super().__init__()
        inner = max(channels // 8, 1)
        self.theta = layers.conv2d(channels, inner, 1, bias=False)
        self.phi = layers.conv2d(channels, inner, 1, bias=False)
        self.g = layers.conv2d(channels, max(channels // 2, 1), 1, bias=False)
        self.o = layers.conv2d(max(channels // 2, 1), channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.theta(x).flatten(2).transpose(1, 2)  # [N, H * W, C / 8]
        key = F.max_pool2d(self.phi(x), 2).flatten(2).transpose(1, 2)  # [N, H * W / 4, C / 8]
        value = F.max_pool2d(self.g(x), 2).flatten(2).transpose(1, 2)  # [N, H * W / 4, C / 2]
        query, key, value = (h.unsqueeze(1) for h in (query, key, value))  # one head; ONNX export insists on them
        out = F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)  # [N, H * W, C / 2]
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])  # [N, C / 2, H, W]
        return x + self.gamma * self.o(out)  # [N, C, H, W]


class ResidualMLP(nn.Sequential):
    """`layers / 2` residual blocks of two linear layers: [N, inputs] -> [N, width]."""

    def __init__(self, layers: Layers, config: MLPConfig, inputs: int, norm_eps: float = 1e-3):
        blocks = [
            ResidualMLPBlock(layers, config, inputs if i == 0 else config.width, norm_eps, first=i == 0)
            for i in range(config.layers // 2)
        ]
        last: list[nn.Module] = []
        if config.order == "pre" and config.last_activation:
            last = [_norm(config, config.width, norm_eps), _activation(config)]
        super().__init__(*blocks, *last)


class ResidualMLPBlock(nn.Module):
    def __init__(self, layers: Layers, config: MLPConfig, inputs: int, norm_eps: float, first: bool):
        super().__init__()
        width, self.order = config.width, config.order
        pre = config.order == "pre"
        active = not (pre and first and not config.first_activation)
        self.norm1 = _norm(config, inputs if pre else width, norm_eps) if active else nn.Identity()
        self.activation1 = _activation(config) if active else nn.Identity()
        self.linear1 = layers.linear(inputs, width, bias=config.bias)
        self.norm2 = _norm(config, width, norm_eps)
        self.activation2 = _activation(config)
        self.linear2 = layers.linear(width, width, bias=config.bias)
        project = config.projection == "always" or (config.projection == "auto" and inputs != width)
        self.skip = layers.linear(inputs, width, bias=config.bias) if project else nn.Identity()
        self.has_skip = project or inputs == width

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs] -> [N, width]
        if self.order == "pre":
            h = self.linear1(self.activation1(self.norm1(x)))  # [N, width]
            h = self.linear2(self.activation2(self.norm2(h)))  # [N, width]
            return h + self.skip(x) if self.has_skip else h
        h = self.activation1(self.norm1(self.linear1(x)))  # [N, width]
        h = self.norm2(self.linear2(h))  # [N, width]
        return self.activation2(h + self.skip(x) if self.has_skip else h)


def _activation(config: MLPConfig) -> nn.Module:
    return nn.ReLU() if config.activation == "relu" else nn.LeakyReLU(0.2)


def _norm(config: MLPConfig, width: int, eps: float) -> nn.Module:
    return BatchNorm(width, eps) if config.norm == "batch" else nn.Identity()


Initializer = Literal["orthogonal", "normal"]


def initialize(module: nn.Module, generator: torch.Generator, initializer: Initializer = "orthogonal") -> nn.Module:
    """Orthogonal weights, zero biases, unit norms, zero attention gamma (BigGAN); `u` from N(0, 1).

    Or "normal" weights as jeffdonahue/bigan has them: from N(0, 0.02), those of D's scores zero (`stddev=0` in gan.py)
    unless a spectral norm divides them. Draws from `generator` alone, layer by layer in definition order.

    Raises:
        ValueError: another `initializer`.
    """
    if initializer not in get_args(Initializer):
        raise ValueError(f"no initializer {initializer!r}; there is {', '.join(get_args(Initializer))}")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if initializer == "orthogonal":
                nn.init.orthogonal_(layer.weight, generator=generator)
            else:
                stdev = 0.0 if name.startswith("score_") and not isinstance(layer, SpectralNorm) else 0.02
                nn.init.normal_(layer.weight, std=stdev, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if isinstance(layer, SpectralNorm):
                nn.init.normal_(layer.u, generator=generator)
        elif isinstance(layer, BatchNorm):
            for tensor, value in ((layer.running_mean, 0), (layer.running_var, 1), (layer.weight, 1), (layer.bias, 0)):
                if tensor is not None:
                    nn.init.constant_(tensor, value)
        elif isinstance(layer, SelfAttention):
            nn.init.zeros_(layer.gamma)
        if (shared := getattr(layer, "shared", None)) is not None:
            nn.init.orthogonal_(shared[None], generator=generator)  # the one row of BigGAN's embedding: of length 1
    return module


def effective_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """State of the inference form of a training-form module: spectral norm divided out, the shared vector folded in.

    Yields (name, tensor) pairs for `load_state_dict` of the same network built with `spectral_norm=False`.
    """
    shared = getattr(module, "shared", None)
    conditions = {f"{name}.linear": m for name, m in module.named_modules() if isinstance(m, ConditionLinear)}
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        own = {**layer._parameters, **{k: v for k, v in layer._buffers.items() if k != "u"}}
        for key, tensor in own.items():
            if tensor is None or tensor is shared:
                continue
            value = tensor.detach()
            if key == "weight" and isinstance(layer, SpectralNorm):
                value = layer.effective_weight()
            if key == "weight" and name in conditions and shared is not None:
                z_dim = conditions[name].z_dim
                yield f"{prefix}bias", value[:, z_dim:] @ shared.detach()
                value = value[:, :z_dim].contiguous()
            yield f"{prefix}{key}", value
