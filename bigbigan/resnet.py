"""ResNet-v2 trunk of the encoder (google/revisiting-self-supervised, `resnet` in mode v2), and its small relatives.

TensorFlow pads strided windows in ways of its own; `pad_window` expresses both that occur.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.config import EncoderConfig
from bigbigan.layers import BatchNorm, Layers, NormReLU


def pad_window(x: Tensor, kernel: int, stride: int, padding: str, value: float = 0.0) -> Tensor:
    """Pads [N, C, H, W] for a VALID window: by (kernel - 1) // 2 each side ("explicit"), or as TensorFlow's SAME."""
    if padding == "explicit":
        return F.pad(x, [(kernel - 1) // 2] * 4, value=value)
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class StridedConv2d(nn.Module):
    """Convolution without bias whose padding follows TensorFlow where the stride is above one; as one leaf."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, kernel: int, stride: int, padding: str):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        # Symmetric padding, which "explicit" is, and stride 1, where SAME is symmetric, need no separate pass.
        self.inside = stride == 1 or padding == "explicit"
        pad = kernel // 2 if self.inside else 0
        self.conv = layers.conv2d(inputs, outputs, kernel, bias=False, stride=stride, padding=pad)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H / stride), ceil(W / stride)], plus the residual if there is one."""
        out = self.conv(x if self.inside else pad_window(x, self.kernel, self.stride, self.padding))
        return out if residual is None else out + residual


class Stem(nn.Sequential):
    """First convolution, without norm or ReLU; ImageNet's is followed by a 3x3 max-pool of stride 2."""

    def __init__(self, layers: Layers, config: EncoderConfig, outputs: int):
        if config.stem == "small":
            super().__init__(StridedConv2d(layers, config.image_channels, outputs, 3, 1, "explicit"))
            return
        conv = StridedConv2d(layers, config.image_channels, outputs, 7, 2, config.stem_padding)
        super().__init__(conv, StemPool(config.pool_padding))


class StemPool(nn.Module):
    def __init__(self, padding: str):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]
        if self.padding == "ignore":
            return F.max_pool2d(x, 3, 2, padding=1)
        if self.padding == "zero":  # zeros count: the stem's output has no ReLU, so they can win
            return F.max_pool2d(pad_window(x, 3, 2, "explicit"), 3, 2)
        return F.max_pool2d(pad_window(x, 3, 2, "same", value=-float("inf")), 3, 2)


class ResNetUnit(nn.Module):
    """Pre-activation unit, bottleneck or basic; the stride sits on the (first) 3x3 convolution."""

    def __init__(self, layers: Layers, config: EncoderConfig, inputs: int, outputs: int, stride: int):
        super().__init__()
        inner = outputs // 4 if config.block == "bottleneck" else outputs
        kernels = (1, 3, 1) if config.block == "bottleneck" else (3, 3)
        widths = [inputs, *[inner] * (len(kernels) - 1), outputs]
        strided = kernels.index(3)
        self.norms = nn.ModuleList(NormReLU(n, config.bn_eps, config.bn_affine) for n in widths[:-1])
        self.convs = nn.ModuleList(
            StridedConv2d(layers, a, b, k, stride if i == strided else 1, config.strided_padding)
            for i, (a, b, k) in enumerate(zip(widths[:-1], widths[1:], kernels, strict=True))
        )
        project = stride > 1 or inputs != outputs
        self.shortcut = StridedConv2d(layers, inputs, outputs, 1, stride, "explicit") if project else None
        self.raw = config.shortcut == "raw"

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.norms[0](x)  # [N, inputs, H, W]
        for conv, norm in zip(self.convs[:-1], self.norms[1:], strict=True):
            h = norm(conv(h))  # [N, inner, H', W']
        skip = x if self.shortcut is None else self.shortcut(x if self.raw else first)
        return self.convs[-1](h, skip)  # [N, outputs, H / stride, W / stride]


class ResNet(nn.Module):
    """Stem, stages and final norm: [N, C, S, S] -> [N, num_features, S / 32, S / 32] (S / 8 with the small stem)."""

    def __init__(self, config: EncoderConfig, layers: Layers):
        super().__init__()
        width = config.base_channels
        self.stem = Stem(layers, config, width)
        expansion = 4 if config.block == "bottleneck" else 1
        units: list[nn.Module] = []
        for stage, depth in enumerate(config.depths):
            outputs = config.base_channels * expansion * 2**stage
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                units.append(ResNetUnit(layers, config, width, outputs, stride))
                width = outputs
        self.units = nn.Sequential(*units)
        self.norm = final_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.units(self.stem(x)))


def final_norm(config: EncoderConfig) -> nn.Module:
    """Batch norm before the average pool, with or without ReLU."""
    make = NormReLU if config.last_relu else BatchNorm
    return make(config.num_features, config.bn_eps, config.bn_affine)
