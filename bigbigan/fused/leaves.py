"""Leaves of fused networks: each takes the place of a plain leaf, computes the same and writes that leaf's state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.fused.kernels import CHANNELS_LAST, Kernel, LinearKernel, Side, attend, scale_shift_relu, spread
from bigbigan.layers import BatchNorm, ConditionalNormReLU, NormReLU, SelfAttention, UpsampleConv2d
from bigbigan.resnet import StemPool, StridedConv2d, pad_window
from bigbigan.revnet import RevNetStem

STEM_CHANNELS = 128  # of RevNet's stem at a time
Window = tuple[int, int, str] | None  # kernel, stride, padding for `pad_window`


class Leaf(nn.Module):
    """Takes a plain leaf's place and writes that leaf's state.

    `plain` holds the tensors of that state which cannot be had back from the leaf's own.
    """

    def __init__(self, plain: nn.Module, *recovered: str):
        super().__init__()
        # Clones, since a view would keep all of the file that it was loaded from in memory.
        self.plain = {k: v.clone() for k, v in plain.state_dict().items() if k not in recovered}

    def plain_state(self) -> dict[str, Tensor]:
        return self.plain

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: tensor for name, tensor in self.plain_state().items()}


class Folded(Leaf):
    """A norm and its ReLU that another leaf does."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Convolution(Leaf):
    """Convolution with what follows it: bias, ReLU, addition of a residual, which is overwritten."""

    def __init__(self, plain: nn.Module, kernel: Kernel, window: Window = None, recovered: str = ""):
        super().__init__(plain, recovered)
        self.kernel, self.window, self.recovered = kernel, window, recovered

    def plain_state(self) -> dict[str, Tensor]:
        return {**self.plain, **({self.recovered: self.kernel.dense()} if self.recovered else {})}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.kernel(x if self.window is None else pad_window(x, *self.window), residual)


class UpsampleConvolution(Leaf):
    """Nearest upsampling and 3x3 convolution: nine products a pixel of the small image, which are then summed.

    A quarter of the multiplications of the plain form, and no more weights than it has.
    """

    def __init__(self, plain: UpsampleConv2d):
        super().__init__(plain, "conv.weight")
        conv = plain.conv
        self.channels = conv.out_channels
        assert conv.bias is not None
        bias = F.pad(conv.bias[None], (0, 0, 4, 4)).flatten()  # the tap in the middle is in every sum once
        weight = conv.weight.detach().permute(2, 3, 0, 1).flatten(0, 2)
        conv.weight = None  # type: ignore[assignment]  # it is the largest: two copies of it are enough
        self.kernel = LinearKernel(weight, bias)

    def plain_state(self) -> dict[str, Tensor]:
        weight = self.kernel.dense().view(3, 3, self.channels, -1).permute(2, 3, 0, 1)
        return {**self.plain, "conv.weight": weight.contiguous()}

    def forward(self, x: Tensor) -> Tensor:
        h = self.kernel(x.permute(0, 2, 3, 1).contiguous())  # [N, H, W, 9 O]
        h = spread(h.unflatten(3, (3, -1)), 1)  # [N, 2H, W, 3 O]
        return spread(h.unflatten(3, (3, -1)), 2).permute(0, 3, 1, 2)  # [N, O, 2H, 2W]


class ScaleShiftReLU(Leaf):
    """Batch norm and ReLU in one pass, on the first `channels` alone if they are given."""

    scale: Tensor
    shift: Tensor

    def __init__(self, plain: NormReLU, channels: int | None = None):
        super().__init__(plain)
        scale, shift = (part[:channels].to(plain.running_mean.dtype) for part in scale_shift(plain))
        self.channels = channels
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return scale_shift_relu(x[:, : self.channels], self.scale, self.shift)


class ConditionalScaleShiftReLU(Leaf):
    """Scale and shift of a conditional batch norm from one linear layer."""

    weight: Tensor
    bias: Tensor

    def __init__(self, plain: ConditionalNormReLU):
        super().__init__(plain)
        scale, shift = scale_shift(plain.norm)
        gain, offset = plain.gain.linear, plain.offset.linear
        weight = torch.cat([scale[:, None] * gain.weight, offset.weight + shift[:, None] * gain.weight])
        bias = torch.cat([scale * (1 + gain.bias.double()), offset.bias + shift * (1 + gain.bias.double())])
        self.register_buffer("weight", weight.to(gain.weight.dtype), persistent=False)
        self.register_buffer("bias", bias.to(gain.weight.dtype), persistent=False)

    def forward(self, x: Tensor, z: Tensor, shared: Tensor | None) -> Tensor:
        scale, shift = F.linear(z, self.weight, self.bias)[:, :, None, None].chunk(2, dim=1)  # [N, C, 1, 1] each
        return torch.addcmul(shift, x, scale).relu_()


class ZeroPaddedPool(Leaf):
    """3x3 max-pool of stride 2 whose zero padding counts: windows at the border win by it or not."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(x, 3, 2, padding=1)
        for axis in (2, 3):
            out.select(axis, 0).clamp_(min=0)
            if x.shape[axis] % 2:
                out.select(axis, -1).clamp_(min=0)
        return out


class StreamStem(Leaf):
    """RevNet's stem, some channels at a time: what one of 1024 channels gives is too large to stay at hand."""

    def __init__(self, plain: RevNetStem, side: Side):
        super().__init__(plain)
        first: Any = plain[0]
        self.channels = half = first.conv.out_channels // 2
        width = next(n for n in range(min(half, STEM_CHANNELS), 0, -1) if half % n == 0)
        self.window = window_of(first)
        self.kernels = [conv_kernel(first.conv, side, weight=part) for part in first.conv.weight.split(width)]
        self.pool = max_pool(plain[1]) if len(plain) > 1 else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.window is None else pad_window(x, *self.window)
        streams: list[Tensor] = []
        for i, kernel in enumerate(self.kernels):
            part = self.pool(kernel(x))
            if i % (len(self.kernels) // 2) == 0:
                shape = (len(part), self.channels, *part.shape[2:])
                streams.append(torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=CHANNELS_LAST))
                rest = iter(streams[-1].split(part.shape[1], dim=1))
            next(rest).copy_(part)
        return streams[0], streams[1]


class Attention(Leaf):
    """Self-attention whose scores are made and used up piece by piece."""

    def __init__(self, plain: SelfAttention, side: Side):
        super().__init__(plain)
        self.widths = [plain.theta.out_channels, plain.g.out_channels]
        self.inputs = Kernel(torch.cat([plain.theta.weight, plain.phi.weight, plain.g.weight]), None, side)
        self.output = Kernel(plain.gamma * plain.o.weight, None, side)

    def forward(self, x: Tensor) -> Tensor:
        inner, _ = self.widths
        h = self.inputs(x)  # [N, C / 8 + C / 8 + C / 2, H, W]
        query = h[:, :inner].flatten(2).transpose(1, 2)  # [N, H * W, C / 8]
        pooled = F.max_pool2d(h[:, inner:], 2).flatten(2).transpose(1, 2)  # [N, H * W / 4, C / 8 + C / 2]
        key, value = pooled.split(self.widths, dim=2)
        out = attend(query, key, value).transpose(1, 2).unflatten(2, x.shape[2:])  # [N, C / 2, H, W]
        return self.output(out, residual=x)


class PackedLinear(Leaf):
    """Linear layer on packed weights."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain, "weight")
        self.kernel = LinearKernel(plain.weight.detach(), plain.bias)

    def plain_state(self) -> dict[str, Tensor]:
        return {**self.plain, "weight": self.kernel.dense()}

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)


def scale_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of a norm's evaluation form, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def conv_kernel(
    conv: nn.Conv2d, side: Side, *, weight: Tensor | None = None, bias: Tensor | None = None, relu: bool = False
) -> Kernel:
    """A kernel with the stride and padding of a convolution, and its weight and bias unless others are given."""
    weight = conv.weight if weight is None else weight
    bias = conv.bias if bias is None else bias.to(weight.dtype)
    return Kernel(weight, bias, side, conv.stride[0], int(conv.padding[0]), relu=relu)


def window_of(plain: StridedConv2d) -> Window:
    """What is padded before the convolution itself."""
    return None if plain.inside else (plain.kernel, plain.stride, plain.padding)


def max_pool(plain: StemPool) -> nn.Module:
    return ZeroPaddedPool(plain) if plain.padding == "zero" else plain
