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
        x1, x2 = x2, x1 + unit(x2)
    return x1, x2


def reversible(units: nn.ModuleList, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """`couple` without storing what lies between; units may not be random.

    Batch norms recompute by the moments of the forward pass, so that they neither count a batch twice nor communicate
    more than their gradient needs. Values come back up to the rounding of the additions, in the streams' own dtype:
    under `torch.autocast` that of the autocast.

    Raises:
        RuntimeError: in the backward pass, if a weight has changed in place since the forward pass.
    """
    return _Reversible.apply(units, x1, x2, *units.parameters())


@contextlib.contextmanager
def _taped(units: nn.ModuleList, tape: dict[nn.Module, Moments]) -> Iterator[None]:
    """Norms write the moments of a pass to the tape, or read them where it has some."""
    norms = [m for m in units.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.tape = tape
    try:
        yield
    finally:
        for norm in norms:
            norm.tape = None


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units: nn.ModuleList, x1: Tensor, x2: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        device = x1.device.type
        # Casts of weights would be cached without their graph here, for a later pass that needs it.
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
        ctx.units, ctx.tape = units, {}
        # RevNet pads with channels of zeros. Normalised they are the bias, zero at first, and rounding would put them
        # on either side of the ReLU's kink: the first unit is given the zeros again.
        ctx.zeros = ~x2.any(dim=0).flatten(1).any(dim=1)[:, None, None]  # [C, 1, 1]
        with ctx.autocast(), _taped(units, ctx.tape):
            x1, x2 = couple(units, x1, x2)
        vectors = [m.u for m in units.modules() if isinstance(m, SpectralNorm)]
        ctx.save_for_backward(x1, x2, *parameters, *vectors)  # the latter two so that changes are noticed
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, *parameters = ctx.saved_tensors
        grads: list[Tensor] = []
        end = sum(1 for _ in ctx.units.parameters())
        with ctx.autocast(), _taped(ctx.units, ctx.tape):
            for unit in reversed(ctx.units):
                names = [name for name, _ in unit.named_parameters()]
                # Copies as leaves: what hangs on the parameters (hooks, DDP's among them) sees the sum of gradients
                # alone, when the engine has it.
                leaves = [t.detach().requires_grad_() for t in parameters[end - len(names) : end]]
                x = (x1.masked_fill(ctx.zeros, 0) if unit is ctx.units[0] else x1.detach()).requires_grad_()
                with torch.enable_grad():
                    residual = functional_call(unit, dict(zip(names, leaves, strict=True)), (x,))
                dx, *found = torch.autograd.grad(residual, [x, *leaves], grad2.to(residual.dtype))
                x1, x2 = x2 - residual.detach(), x1
                grad1, grad2 = grad2, grad1 + dx
                grads, end = [*found, *grads], end - len(names)
        return None, grad1, grad2, *grads
