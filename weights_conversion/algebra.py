"""Polynomials in layer outputs: one form for every way of writing biases, batch norms, residual sums and scalings.

A tensor is `sum of coefficient * product of layer outputs + constant`, with coefficients per channel (the last axis).
Batch norm, bias, scaling and their many spellings all turn into coefficients; what is left are the layers proper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError

Coefficient = np.ndarray  # float64, of shape [] or [C]
Monomial = tuple["Layer", ...]  # at most two layers: data times a gain, or a deviation times noise


@dataclass(eq=False)
class Layer:
    """An operation that is more than a per-channel polynomial of its inputs; equal layers are one object."""

    kind: str
    inputs: tuple[Poly, ...]
    shape: tuple[int, ...]
    name: str  # of the node it comes from
    number: int
    attributes: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["attributes"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def input(self) -> Poly:
        return self.inputs[0]

    def __str__(self) -> str:
        shown = {k: v.shape if isinstance(v, np.ndarray) else v for k, v in self.attributes.items() if k != "key"}
        facts = "".join(f" {k}={v}" for k, v in shown.items())
        return f"#{self.number} {self.kind}{list(self.shape[1:])}{facts} of {', '.join(map(str, self.inputs))}"


@dataclass(frozen=True)
class Hint:
    """Batch-norm statistics that a polynomial was seen to come from; None where it was not."""

    var: np.ndarray | None = None
    eps: float | None = None
    mean: np.ndarray | None = None

    def merge(self, other: Hint) -> Hint:
        known = self.var is not None
        return Hint(
            self.var if known else other.var,
            self.eps if known else other.eps,
            self.mean if self.mean is not None else other.mean,
        )


NO_HINT = Hint()


@dataclass(eq=False)
class Poly:
    """See the module's first lines. `shape` is the tensor's, with the batch size of the run."""

    terms: dict[Monomial, Coefficient]
    shape: tuple[int, ...]
    hint: Hint = NO_HINT

    @property
    def const(self) -> Coefficient:
        return self.terms.get((), np.zeros(()))

    @property
    def monomials(self) -> list[Monomial]:
        return [monomial for monomial in self.terms if monomial]

    @property
    def layers(self) -> list[Layer]:
        return sorted({layer for monomial in self.terms for layer in monomial}, key=lambda layer: layer.number)

    @property
    def single(self) -> Layer | None:
        """The layer, if this is coefficient * layer + constant."""
        monomials = self.monomials
        return monomials[0][0] if len(monomials) == 1 and len(monomials[0]) == 1 else None

    @property
    def only(self) -> Layer | None:
        """The layer, if this is just its output."""
        layer = self.single
        return layer if layer is not None and equal(self.terms[(layer,)], 1) and equal(self.const, 0) else None

    def coefficient(self, *layers: Layer) -> Coefficient:
        return self.terms.get(order(layers), np.zeros(()))

    def key(self) -> tuple[Any, ...]:
        """Equal for equal polynomials."""
        return tuple(sorted((tuple(layer.number for layer in m), c.shape, c.tobytes()) for m, c in self.terms.items()))

    def __add__(self, other: Poly) -> Poly:
        terms = dict(self.terms)
        for monomial, c in other.terms.items():
            terms[monomial] = terms[monomial] + c if monomial in terms else c
        shape = self.shape if np.prod(self.shape) >= np.prod(other.shape) else other.shape
        return make(terms, shape, self.hint.merge(other.hint))

    def scale(self, c: Coefficient | float) -> Poly:
        return make({m: value * c for m, value in self.terms.items()}, self.shape, self.hint)

    def shift(self, c: Coefficient | float) -> Poly:
        return make({**self.terms, (): self.const + c}, self.shape, self.hint)

    def __mul__(self, other: Poly) -> Poly:
        terms: dict[Monomial, Coefficient] = {}
        for a, ca in self.terms.items():
            for b, cb in other.terms.items():
                monomial = order((*a, *b))
                if len(monomial) > 2:
                    raise ConversionError(f"{self} times {other} is no batch norm, gain or noise")
                terms[monomial] = terms[monomial] + ca * cb if monomial in terms else ca * cb
        shape = self.shape if np.prod(self.shape) >= np.prod(other.shape) else other.shape
        return make(terms, shape, self.hint.merge(other.hint))

    def __str__(self) -> str:
        def shown(c: Coefficient) -> str:
            return f"{float(c):.4g}" if c.ndim == 0 else f"c[{c.size}]"

        parts = []
        for monomial, c in self.terms.items():
            layers = "*".join(f"#{layer.number}" for layer in monomial)
            parts.append(layers if layers and equal(c, 1) else f"{shown(c)}{'*' if layers else ''}{layers}")
        return " + ".join(parts) or "0"


def make(terms: dict[Monomial, Coefficient], shape: tuple[int, ...], hint: Hint = NO_HINT) -> Poly:
    """Coefficients in their shortest form; a zero constant is left out."""
    short = {monomial: collapse(c) for monomial, c in terms.items()}
    if () in short and equal(short[()], 0):
        del short[()]
    return Poly(short, shape, hint)


def of_layer(layer: Layer) -> Poly:
    return Poly({(layer,): np.ones(())}, layer.shape)


def collapse(c: Any) -> Coefficient:
    """[C] of equal values becomes []."""
    array = np.asarray(c, np.float64)
    return array.reshape(-1)[0].reshape(()) if array.size and (array == array.reshape(-1)[0]).all() else array


def equal(c: Coefficient, value: float) -> bool:
    return c.ndim == 0 and float(c) == value


def order(layers: tuple[Layer, ...]) -> Monomial:
    return tuple(sorted(layers, key=lambda layer: layer.number))


def slice_coefficient(c: Coefficient, low: int, high: int) -> Coefficient:
    return c if c.ndim == 0 else c[low:high]


def vector(c: Coefficient | float, size: int) -> np.ndarray:
    """[size] float64."""
    return np.broadcast_to(np.asarray(c, np.float64), (size,)).copy()


def decimal(value: float) -> float:
    """A float32 as the decimal it was written as."""
    return float(str(np.float32(value)))


def same_pads(sides: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """Zeros (top, bottom, left, right) of TensorFlow's SAME."""
    pads: list[int] = []
    for side, size in zip(sides, kernel, strict=True):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
    return tuple(pads)


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one; a trace has more than one image."""
    return tuple(n for n in shape if n != 1)
