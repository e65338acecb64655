"""Reversible back-propagation (Gomez et al. 2017, arXiv:1707.04585): streams are recomputed from those that follow.

Memory for activations stays that of one unit and the last streams, whatever the depth, for one more evaluation of every
residual function. It changes the memory of a training step and nothing of its mathematics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from bigbigan.crossreplica import Moments
from bigbigan.layers import BatchNorm, SpectralNorm


def couple(units: nn.ModuleList, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit f in turn makes of (x1, x2) the streams (x2, x1 + f(x2))."""
    for unit in units:
        x1, x2 = x2, unit(x2, x1)
    return x1, x2


def reversible(units: nn.ModuleList, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """`couple` without storing what lies between; units may not be random.

    Batch norms recompute by the moments of the forward pass, so that they neither count a batch twice nor communicate
    more than their gradient needs. Streams come back up to rounding in float32 at least: under `torch.autocast` the
    additions are in float32 here, and streams in half precision are rounded at the end alone.

    Raises:
        RuntimeError: in the backward pass, if a weight has changed in place since the forward pass.
    """
    narrow, wide = x1.dtype, torch.promote_types(x1.dtype, torch.float32)
    x1, x2 = x1.to(wide), x2.to(wide)  # bfloat16 brings six units' inputs back with errors of 2 %
    streams: list[Tensor] = []
    for unit in units:
        first, last = unit is units[0], unit is units[-1]
        x1, x2 = _Reversible.apply(unit, streams, first, last, x1, x2, *unit.parameters())
    return x1.to(narrow), x2.to(narrow)


@contextlib.contextmanager
def _taped(unit: nn.Module, tape: dict[nn.Module, Moments]) -> Iterator[None]:
    """Norms write the moments of a pass to the tape, or read them where it has some."""
    norms = [m for m in unit.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.tape = tape
    try:
        yield
    finally:
        for norm in norms:
            norm.tape = None


class _Reversible(torch.autograd.Function):
    """One unit; in the backward pass it takes the streams behind it from the list `streams` and leaves those before it.

    So the gradients of its parameters leave as soon as they are known.
    """

    @staticmethod
    def forward(
        ctx: Any, unit: nn.Module, streams: list[Tensor], first: bool, last: bool, x1: Tensor, x2: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.unit, ctx.streams, ctx.first, ctx.last, ctx.tape = unit, streams, first, last, {}
        device = x1.device.type
        # Cached casts of weights would outlive the unit.
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
        if first:  # [C, 1, 1]: RevNet pads with channels of zeros, which a norm without a bias puts on the ReLU's kink;
            ctx.zeros = ~x2.any(dim=0).flatten(1).any(dim=1)[:, None, None]  # rounding would tip them to either side
        with ctx.autocast(), _taped(unit, ctx.tape):
            x1, x2 = x2, x1 + unit(x2)
        vectors = [m.u for m in unit.modules() if isinstance(m, SpectralNorm)]  # saved to notice that they change
        ctx.save_for_backward(*unit.parameters(), *vectors, *((x1, x2) if last else ()))
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x1, x2 = saved[-2:] if ctx.last else ctx.streams
        # Copies of the parameters as leaves: what hangs on these, like DDP's hooks, sees finished sums of gradients.
        names = [name for name, _ in ctx.unit.named_parameters()]
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor in zip(names, saved[: len(names)], strict=True)
        }
        x = (x1.masked_fill(ctx.zeros, 0) if ctx.first else x1.detach()).requires_grad_()
        with torch.enable_grad(), ctx.autocast(), _taped(ctx.unit, ctx.tape):
            residual = functional_call(ctx.unit, leaves, (x,))
        dx, *grads = torch.autograd.grad(residual, [x, *leaves.values()], grad2.to(residual.dtype))
        ctx.streams[:] = [] if ctx.first else [x2 - residual.detach(), x1]
        return None, None, None, None, grad2, grad1 + dx, *grads
