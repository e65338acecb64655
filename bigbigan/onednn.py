"""oneDNN's kernels, which torch has on x86 CPUs but makes no promises about; and a linear layer that trains by them."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)


def proved(agree: Callable[[], bool], otherwise: str) -> bool:
    """Whether this machine has oneDNN and `agree` finds that its kernels compute what they should.

    Where they do not, a warning says so, and `otherwise` what follows.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        found = agree()
    except (AttributeError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        logger.warning("%s: torch %s has other kernels for that: %s", otherwise, torch.__version__, error)
        return False
    if not found:
        logger.warning("%s: torch %s computes something else with them", otherwise, torch.__version__)
    return found


@functools.cache
def trains_linear() -> bool:
    """Whether `trained_linear` takes oneDNN's kernels here."""
    return proved(_products_agree, "linear layers train by PyTorch's own kernels")


@torch.no_grad()
def _products_agree() -> bool:
    rows = torch.randn(3, 5, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    return all(torch.allclose(_matmul(x, x), F.linear(x, x), rtol=1e-4, atol=1e-4) for x in (rows, rows.t()))


class _TrainedLinear(torch.autograd.Function):
    """x W^T, and both of its gradients, by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _matmul(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _matmul(grad.t(), x.t()) if ctx.needs_input_grad[1] else None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """[N, K], [M, K] -> [N, M]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def trained_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) of [N, I] and [O, I]; where gradients are to be had, by oneDNN's kernels.

    PyTorch takes MKL's, which needed twice the time on an AMD EPYC.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()
    fits = x.dim() == 2 and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if plain or not fits or not trains_linear():
        return F.linear(x, weight)
    return _TrainedLinear.apply(x, weight)
