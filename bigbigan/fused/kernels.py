"""What fused networks compute with: convolutions and linear layers on packed weights, and a few other functions.

On x86 CPUs in float32 weights are packed once for oneDNN's kernels, which add a bias and a residual and take the ReLU
while a result is at hand. Elsewhere PyTorch's own functions do the same, on weights in channels_last order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbigan.onednn import proved

CHANNELS_LAST = torch.channels_last
SCORE_BYTES = 2 << 20  # of attention at a time: about a core's own cache
Side = tuple[int, ...]  # height and width


@functools.cache
def packs() -> bool:
    """Whether this machine and this torch have oneDNN's kernels for packed weights, and these compute what they did."""
    return proved(_packed_kernels_agree, "weights are not packed")


@torch.no_grad()
def _packed_kernels_agree() -> bool:
    draws = torch.Generator("cpu").manual_seed(0)
    randn = functools.partial(torch.randn, generator=draws, device="cpu", dtype=torch.float32)
    x, bias, wide, rows = randn(2, 4, 5, 5), randn(4), randn(4, 4, 4, 4), randn(3, 5)
    narrow, points = wide[:, :, 1:, 1:], wide[:, :, :1, :1]
    pairs = [
        (Kernel(narrow, bias, (5, 5), 1, 1, relu=True, packed=True)(x), F.conv2d(x, narrow, bias, padding=1).relu()),
        (Kernel(points, None, (5, 5), packed=True)(x, x.clone()), x + F.conv2d(x, points)),
        (Kernel(wide, bias, (5, 5), 2, 1, up=True, packed=True)(x), F.conv_transpose2d(x, wide, bias, 2, 1)),
        (LinearKernel(rows, None, packed=True)(x), F.linear(x, rows)),
    ]
    return all(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in pairs)


def packable(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and packs()


class Kernel:
    """A convolution's weight in the order in which it is read, and the call. Copies share it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        side: Side,  # of the images to come: others run too, but oneDNN picks an order that may be slow for them
        stride: int = 1,
        padding: int = 0,
        *,
        relu: bool = False,
        up: bool = False,
        packed: bool | None = None,  # None: where that is possible
    ):
        self.bias = None if bias is None else bias.detach().clone()
        self.relu, self.up = relu, up
        self.stride, self.padding = [stride] * 2, [padding] * 2
        self.packed = packable(weight) if packed is None else packed
        shape = [1, weight.shape[0 if up else 1], *side]
        if not self.packed:
            self.weight = weight.detach().clone(memory_format=CHANNELS_LAST)
        elif up:
            reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
            self.weight = reorder(weight.detach(), self.padding, [0, 0], self.stride, [1, 1], 1, shape)
        else:
            self.weight = self.pack(weight.detach(), shape)
        # Of what was tried, the order of 1x1 convolutions alone depends on the number of images and of threads, and
        # reading another one's takes oneDNN up to fifty times as long as the convolution.
        self.varies = self.packed and stride == 1 and tuple(weight.shape[2:]) == (1, 1)
        self.packed_for: tuple[int, ...] = ()

    def pack(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """[O, I, k, k] in oneDNN's order for images of a shape."""
        reorder = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
        if reorder is None:  # this one takes another copy of the weight
            reorder, weight = torch.ops.aten.mkldnn_reorder_conv2d_weight, weight.to_mkldnn()
        return reorder(weight, self.padding, self.stride, [1, 1], 1, list(shape))

    def repack(self, x: Tensor) -> None:
        case = (torch.get_num_threads(), *x.shape)
        if case != self.packed_for:
            self.weight, self.packed_for = self.pack(self.dense(), x.shape), case

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self

    def dense(self) -> Tensor:
        """The weight as it was given, bit by bit."""
        return self.weight.to_dense() if self.packed else self.weight.contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, I, H, W] -> [N, O, H', W'] in channels_last; the residual is overwritten by the sum."""
        x = x.contiguous(memory_format=CHANNELS_LAST)
        if self.packed:
            if self.varies:
                self.repack(x)
            geometry = (self.padding, self.stride, [1, 1], 1)
            act = "relu" if self.relu else "none"
            if residual is not None:
                residual = residual.contiguous(memory_format=CHANNELS_LAST)
                call = torch.ops.mkldnn._convolution_pointwise_
                return call(residual, x, self.weight, self.bias, *geometry, "add", None, None, [], "")
            if self.up:
                call = torch.ops.mkldnn._convolution_transpose_pointwise
                return call(x, self.weight, self.bias, self.padding, [0, 0], *geometry[1:], act, [], "")
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *geometry, act, [], "")
        convolve: Callable[..., Tensor] = F.conv_transpose2d if self.up else F.conv2d
        out = convolve(x, self.weight, self.bias, self.stride, self.padding)
        if residual is not None:
            return residual.add_(out)
        return out.relu_() if self.relu else out


class LinearKernel:
    """As `Kernel`, of a linear layer: [..., I] -> [..., O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: bool | None = None):
        weight, self.bias = weight.detach(), None if bias is None else bias.detach().clone()
        self.packed = packable(weight) if packed is None else packed
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearKernel:
        return self

    def dense(self) -> Tensor:
        """The weight as it was given, bit by bit."""
        return self.weight.to_dense() if self.packed else self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """ReLU(scale * x + shift) of [N, C, H, W] and [C, 1, 1]."""
    if packable(x) and x.shape[1] > 1 and x.is_contiguous(memory_format=CHANNELS_LAST):
        # A depthwise convolution of 1x1 is the one kernel that multiplies, adds and takes the ReLU in one pass.
        call = torch.ops.mkldnn._convolution_pointwise
        return call(x, scale[:, None], shift.flatten(), [0, 0], [1, 1], [1, 1], x.shape[1], "relu", [], "")
    return torch.addcmul(shift, x, scale).relu_()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value: [N, Q, D], [N, K, D], [N, K, E] -> [N, Q, E]."""
    # PyTorch's own takes its slow path for unequal head sizes, and for equal ones four times the work for the scores.
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    rows = max(SCORE_BYTES // (key.shape[1] * key.element_size()), 1)
    for q, k, v, o in zip(query, key, value, out, strict=True):
        for some, target in zip(q.split(rows), o.split(rows), strict=True):
            torch.mm(torch.softmax(some @ k.t(), dim=1), v, out=target)
    return out


def spread(h: Tensor, axis: int) -> Tensor:
    """[N, H, W, 3, C] of taps a, b, c -> [N, H, W, C] with `axis` doubled, as a window over pairs of equal pixels.

    Out at 2i is a[i - 1] + b[i] + c[i], at 2i + 1 it is a[i] + b[i] + c[i + 1]; outside there are zeros.
    """
    a, b, c = h.unbind(3)
    n = a.shape[axis]
    out = a.new_empty((*a.shape[: axis + 1], 2, *a.shape[axis + 1 :]))
    even, odd = out.unbind(axis + 1)
    torch.add(b, c, out=even)
    torch.add(a, b, out=odd)
    even.narrow(axis, 1, n - 1).add_(a.narrow(axis, 0, n - 1))
    odd.narrow(axis, 0, n - 1).add_(c.narrow(axis, 1, n - 1))
    return out.flatten(axis, axis + 1)
