"""Batch norm in training mode: by the moments of a batch, of all processes' batches, or of an earlier pass.

Moments that come from elsewhere are values here, yet the gradient is that of normalisation by the batch's own: it runs
through mean and variance too, and over all processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Moments(NamedTuple):
    """Mean and variance of each channel, [C] in float32 at least, and the number of values that gave them."""

    mean: Tensor
    var: Tensor  # divided by size, not size - 1
    size: Tensor | float


def batch_norm_and_moments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Moments]:
    """x: [N, C, …] by the moments of its batch or, with a group, of the batches of all its processes."""
    if group is not None:
        moments = global_moments(x, group)
        return batch_norm(x, moments, weight, bias, eps, group), moments
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = x.new_zeros(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
    # Momentum 1 leaves the batch's own moments, the variance over size - 1, in what are else moving averages.
    out = F.batch_norm(x, mean, var, _to(weight, wide), _to(bias, wide), True, 1.0, eps)
    size = x.numel() / x.shape[1]
    return out, Moments(mean, var * ((size - 1) / size), size)


@torch.no_grad()
def global_moments(x: Tensor, group: torch.distributed.ProcessGroup) -> Moments:
    """Moments over all axes of x but the second and over the processes of `group`: the same bits on each of them.

    Every process gives size, mean and sum of squared deviations (Chan, Golub and LeVeque 1979): means of squares, as
    in the TPU code of BigGAN, cancel where the mean is large. Batches may differ in size, but none may be empty.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=[axis for axis in range(x.ndim) if axis != 1], correction=0)  # [C] each
    size = mean.new_full((1,), x.numel() / x.shape[1])
    own = torch.cat([mean, var * size, size])  # [2 C + 1]
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, own, group)
    means, squares, sizes = torch.stack(gathered).split([len(mean), len(mean), 1], dim=1)  # [processes, C or 1]
    total = sizes.sum()
    mean = (sizes * means).sum(0) / total
    return Moments(mean, (squares + sizes * (means - mean) ** 2).sum(0) / total, total)


def batch_norm(
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """x: [N, C, …] by `moments`, which are those of x itself or, with a group, of the x of all its processes.

    With a group the backward pass is one all-reduce, so every process has to run it.
    """
    dtype = moments.mean.dtype
    weight = torch.ones_like(moments.mean) if weight is None else weight.to(dtype)
    return _BatchNorm.apply(x, weight, _to(bias, dtype), *moments, eps, group)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        size: Tensor | float,
        eps: float,
        group: torch.distributed.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.size, ctx.eps, ctx.group = size, eps, group
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        inverse = torch.rsqrt(var + ctx.eps)  # [C]
        own = ctx.group is None
        # What autograd itself calls. With the last flag the gradient runs through x's own moments, else they are
        # constants: then the part through the moments is taken off below, from sums over all processes.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, inverse, own, ctx.eps, [True, True, True]
        )
        if not own:
            sums = torch.stack([dweight, dbias])  # [2, C]: of gradients times normalised x, and of gradients
            torch.distributed.all_reduce(sums, group=ctx.group)
            scale, shift = sums * (weight * inverse / ctx.size)
            dx = dx - F.batch_norm(x, mean, var, scale, shift, False, 0.0, ctx.eps)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None, None, None
