"""RevNet trunk of the encoder (google/revisiting-self-supervised, `revnet`): two streams kept apart.

One residual function a unit: y1 = x1 + f(x2), y2 = x2, and the streams swap. Between stages both are mean-pooled and
their concatenation is zero-padded by half its channels on each side.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.config import EncoderConfig
from bigbigan.layers import Layers, NormReLU
from bigbigan.resnet import Stem, StridedConv2d, final_norm
from bigbigan.reversible import couple, reversible


class RevNetStem(Stem):
    """The stem whose output's halves are the two streams, as one leaf."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, S, S] -> twice [N, 2 * base_channels, S / 4, S / 4] (S with the small stem)."""
        x1, x2 = super().forward(x).chunk(2, dim=1)
        return x1, x2


class RevNetUnit(nn.Module):
    """f of (x1, x2) -> (x2, x1 + f(x2)): a pre-activation bottleneck on one stream, half the channels.

    With the other stream as `residual`, x1 + f(x2).
    """

    def __init__(self, layers: Layers, config: EncoderConfig, channels: int):
        super().__init__()
        outer, inner = channels // 2, channels // 8
        widths = (outer, inner, inner, outer)
        self.norms = nn.ModuleList(NormReLU(n, config.bn_eps, config.bn_affine) for n in widths[:-1])
        self.convs = nn.ModuleList(
            StridedConv2d(layers, a, b, k, 1, "explicit")
            for a, b, k in zip(widths[:-1], widths[1:], (1, 3, 1), strict=True)
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [N, channels / 2, H, W]
        for norm, conv in zip(self.norms[:-1], self.convs[:-1], strict=True):
            x = conv(norm(x))  # [N, channels / 8, H, W]
        return self.convs[-1](self.norms[-1](x), residual)


class RevNet(nn.Module):
    """Stem, reversible stages and final norm: [N, C, S, S] -> [N, num_features, S / 32, S / 32].

    Where the attribute `reversible` is set, training passes recompute the activations of a stage in the backward pass
    from its output (`bigbigan.reversible`): less memory for more time, gradients equal up to rounding.
    """

    def __init__(self, config: EncoderConfig, layers: Layers):
        super().__init__()
        widths = [config.base_channels * 4 * 2**stage for stage in range(len(config.depths))]
        self.stem = RevNetStem(layers, config, widths[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(RevNetUnit(layers, config, width) for _ in range(depth))
            for width, depth in zip(widths, config.depths, strict=True)
        )
        self.norm = final_norm(config)
        self.reversible = False

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.stem(x)  # [N, 2 * base_channels, S / 4, S / 4] each
        for i, stage in enumerate(self.stages):
            if i > 0:  # zeros outside: (0, x1) and (x2, 0), twice the channels at half the resolution
                half = x1.shape[1]
                x1 = F.pad(F.avg_pool2d(x1, 2, ceil_mode=True), (0, 0, 0, 0, half, 0))
                x2 = F.pad(F.avg_pool2d(x2, 2, ceil_mode=True), (0, 0, 0, 0, 0, half))
            run = reversible if self.reversible and self.training and torch.is_grad_enabled() else couple
            x1, x2 = run(cast(nn.ModuleList, stage), x1, x2)  # [N, 2^(i + 1) * base_channels, S / 2^(i + 2), …] each
        return self.norm(torch.cat([x1, x2], dim=1))
