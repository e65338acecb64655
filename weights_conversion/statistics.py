"""Batch-norm statistics behind folded constants, so that a model keeps mean, variance, eps, gain and offset apart.

Found, they are checked against the values in use; not found, the exact product of them all is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from weights_conversion.algebra import Poly, decimal
from weights_conversion.frames import Constant


def _ancestors(constant: Constant, depth: int = 8) -> Iterator[Constant]:
    """A constant and what it is computed from, each once, nearest first."""
    seen, level = {id(constant)}, [constant]
    for _ in range(depth + 1):
        yield from level
        new = {id(source): source for c in level for source in c.inputs if id(source) not in seen}
        seen, level = seen | new.keys(), list(new.values())


def denominator(constant: Constant) -> tuple[np.ndarray | None, float | None]:
    """(var, eps) if the constant is made with sqrt(var + eps)."""
    for source in _ancestors(constant):
        power = source.op == "Pow" and len(source.inputs) == 2 and source.inputs[1].array.size == 1
        if source.op not in ("Rsqrt", "Sqrt") and not power:
            continue
        total = next((c for c in _ancestors(source.inputs[0], 3) if c.op in ("Add", "AddV2")), None)
        if total is None or len(total.inputs) != 2:
            continue
        a, b = total.inputs
        var, eps = (a, b) if b.array.size == 1 and a.array.size >= 1 else (b, a)
        if eps.array.size == 1 and 0 < float(eps.array.reshape(-1)[0]) < 0.1:
            value = np.asarray(var.array, np.float64).reshape(-1)
            return value, decimal(eps.array.reshape(-1)[0])
    return None, None


def subtracted_mean(a: Poly, shift: np.ndarray, constant: Constant, sign: float) -> np.ndarray | None:
    """The mean, if `a + shift` subtracts one: from data directly, or times the scale that the data has."""
    if a.only is not None and sign < 0:
        return -np.asarray(shift)
    layer = a.single
    if layer is None:
        return None
    scale = np.asarray(a.terms[(layer,)])
    for source in _ancestors(constant):
        if source.op != "Mul" or len(source.inputs) != 2:
            continue
        for factor, other in (source.inputs, source.inputs[::-1]):
            value = np.asarray(factor.array, np.float64).reshape(-1)
            if value.size == max(scale.size, 1) and np.allclose(value, scale.reshape(-1), rtol=1e-6, atol=0):
                mean = np.asarray(other.array, np.float64).reshape(-1)
                return -mean if other.op == "Neg" else mean
    return None
