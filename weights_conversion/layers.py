"""Builds layers in one canonical form each, whatever order the graph had harmless operations in."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from weights_conversion.algebra import Layer, Poly, equal, make, of_layer, order, slice_coefficient, squeezed
from weights_conversion.errors import ConversionError

MAX_REQUESTS = 20_000  # a full-size network takes a few hundred


class LayerTable:
    """Makes layers; the same kind, inputs and attributes give the same layer."""

    def __init__(self) -> None:
        self._table: dict[tuple[Any, ...], Layer] = {}
        self.layers: list[Layer] = []
        self._requests = 0

    def layer(self, kind: str, inputs: tuple[Poly, ...], shape: tuple[int, ...], name: str, **attributes: Any) -> Poly:
        self._requests += 1
        if self._requests > MAX_REQUESTS:  # sums of sums of one tensor, cut in slices, could go on for ever
            raise ConversionError(f"more than {MAX_REQUESTS} layers; no BigBiGAN has as many")
        facts = tuple((k, v) for k, v in sorted(attributes.items()) if not isinstance(v, np.ndarray))
        key = (kind, tuple(p.key() for p in inputs), shape, facts)
        if key not in self._table:
            self._table[key] = Layer(kind, inputs, shape, name, len(self.layers), attributes)
            self.layers.append(self._table[key])
        return of_layer(self._table[key])

    # ---- channels

    def concat(self, parts: list[Poly], shape: tuple[int, ...], name: str) -> Poly:
        """Along the last axis; constant rows are parts without layers."""
        return parts[0] if len(parts) == 1 else self.layer("Concat", tuple(parts), shape, name)

    def slice(self, poly: Poly, low: int, high: int, name: str) -> Poly:
        """Channels low to high."""
        if (low, high) == (0, poly.shape[-1]):
            return poly
        shape = (*poly.shape[:-1], high - low)
        result = make({(): slice_coefficient(poly.const, low, high)}, shape, poly.hint)
        for monomial in poly.monomials:
            if len(monomial) > 1:
                raise ConversionError(f"node {name!r} cuts a product of layers in two")
            c = slice_coefficient(poly.terms[monomial], low, high)
            result = result + self._slice_layer(monomial[0], low, high, name).scale(c)
        return make(result.terms, shape)

    def _slice_layer(self, layer: Layer, low: int, high: int, name: str) -> Poly:
        shape = (*layer.shape[:-1], high - low)
        if layer.kind == "Slice":
            return self.slice(layer.input, layer.low + low, layer.low + high, name)
        if layer.kind == "Dense":  # half a linear layer is a linear layer
            key = (*layer.key, "columns", low, high)
            facts = {"weight": layer.weight[:, low:high], "shared": layer.shared, "key": key}
            return self.layer("Dense", layer.inputs, shape, layer.name, **facts)
        if layer.kind == "Add":
            parts = tuple(self.slice(part, low, high, name) for part in layer.inputs)
            return self.layer("Add", parts, shape, layer.name)
        if layer.kind == "Tanh":  # an image of which only the first channels are kept
            return self.layer("Tanh", (self.slice(layer.input, low, high, name),), shape, layer.name)
        if layer.kind == "Concat":
            cut: list[Poly] = []
            start = 0
            for part in layer.inputs:
                end = start + part.shape[-1]
                a, b = max(low, start), min(high, end)
                if a < b:
                    cut.append(self.slice(part, a - start, b - start, name))
                start = end
            return self.concat(cut, shape, name)
        return self.layer("Slice", (of_layer(layer),), shape, name, low=low, high=high)

    # ---- linear layers

    def dense(self, poly: Poly, weight: np.ndarray, key: tuple[Any, ...], name: str) -> Poly:
        """[N, K] @ weight [K, M]; rows that meet constants become a constant."""
        layer = poly.only
        if layer is not None and layer.kind == "Concat" and any(not part.monomials for part in layer.inputs):
            const, parts, rows, start = np.zeros(weight.shape[1]), [], [], 0
            for part in layer.inputs:
                end = start + part.shape[-1]
                if part.monomials:
                    parts.append(part)
                    rows.append((start, end))
                else:
                    row = np.broadcast_to(part.const, (end - start,))
                    const = const + row @ weight[start:end].astype(np.float64)
                start = end
            if parts:
                kept = np.concatenate([weight[a:b] for a, b in rows])
                inputs = self.concat(parts, (*poly.shape[:-1], len(kept)), name)
                shared = len(weight) - len(kept)
                return self._dense(inputs, kept, (*key, "rows", *rows), name, shared).shift(const)
        return self._dense(poly, weight, key, name)

    def _dense(self, poly: Poly, weight: np.ndarray, key: tuple[Any, ...], name: str, shared: int = 0) -> Poly:
        shape = (*poly.shape[:-1], weight.shape[1])
        return self.layer("Dense", (poly,), shape, name, weight=weight, shared=shared, key=key)

    def conv(
        self, poly: Poly, kernel: np.ndarray, key: tuple[Any, ...], name: str,
        *, shape: tuple[int, ...], stride: int, pads: tuple[int, ...],
    ) -> Poly:  # fmt: skip
        """Convolution with HWIO kernel after zero padding (top, bottom, left, right)."""
        layer = poly.only
        if layer is not None and layer.kind == "Pad" and layer.value == 0 and not any(pads):
            poly, pads, layer = layer.input, layer.pads, layer.input.only
        if kernel.shape[:2] == (1, 1) and stride == 1 and layer is not None and layer.kind == "Upsample":
            small = (shape[0], *layer.input.shape[1:3], shape[3])
            inner = self.conv(layer.input, kernel, key, name, shape=small, stride=1, pads=pads)
            return self.upsample(inner, shape, layer.name)
        return self.layer("Conv", (poly,), shape, name, kernel=kernel, stride=stride, pads=pads, key=key)

    def narrow(self, poly: Poly) -> Poly:
        """A convolution whose first channels alone are kept, as networks padded for TPUs have it."""
        cut = poly.single
        layer = cut.input.only if cut is not None and cut.kind == "Slice" else None
        if cut is None or layer is None or layer.kind != "Conv":
            return poly
        facts = {**layer.attributes, "kernel": layer.kernel[..., cut.low : cut.high]}
        facts["key"] = (*layer.key, "channels", cut.low, cut.high)
        narrowed = self.layer("Conv", layer.inputs, cut.shape, layer.name, **facts)
        return narrowed.scale(poly.terms[(cut,)]).shift(poly.const)

    # ---- sums

    def add(self, a: Poly, b: Poly, name: str) -> Poly:
        """Sum of two tensors of one shape; of four strided slices that are one, four times its average pool."""
        total = self.layer("Add", (a, b), a.shape, name)
        slices: list[Layer] = []
        parts: list[Layer | None] = [total.only]
        while parts and len(slices) + len(parts) <= 4:
            part = parts.pop()
            if part is None or part.kind not in ("Add", "Move"):
                return total
            if part.kind == "Move":
                slices.append(part)
            else:
                parts += [operand.only for operand in part.inputs]
        if parts or len(slices) != 4 or len({part.input.key() for part in slices}) > 1:
            return total
        mean = self.mean_of(slices[0].input, np.stack([part.index for part in slices], axis=-1), name)
        return total if mean is None else mean.scale(4)

    def mean_of(self, poly: Poly, groups: np.ndarray, name: str) -> Poly | None:
        """Mean over groups of places [..., k]: of all positions, or of blocks of two by two; None for other groups."""
        if len(poly.shape) != 4:
            return None
        n, h, w, c = poly.shape
        shape, found = groups.shape[:-1], np.sort(groups.reshape(-1, groups.shape[-1]))
        places = np.arange(n * h * w * c).reshape(poly.shape)
        if len(shape) == 2 and np.array_equal(found, np.moveaxis(places, 3, 1).reshape(-1, h * w)):
            return self.layer("Mean", (poly,), (n, c), name)
        if shape != (n, h // 2, w // 2, c) or h % 2 or w % 2:
            return None
        blocks = places.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
        return self.average_pool(poly, shape, name) if np.array_equal(found, blocks.reshape(-1, 4)) else None

    # ---- space

    def upsample(self, poly: Poly, shape: tuple[int, ...], name: str) -> Poly:
        """Nearest, by two; scaling and shifts come after it."""
        return self._outward("Upsample", poly, shape, name)

    def average_pool(self, poly: Poly, shape: tuple[int, ...], name: str) -> Poly:
        """2x2 of stride 2; scaling and shifts come after it, 1x1 convolutions too."""
        layer = poly.only
        if not poly.monomials:
            return Poly(poly.terms, shape)
        if layer is not None and layer.kind == "Concat":
            parts = [self.average_pool(part, (*shape[:3], part.shape[-1]), name) for part in layer.inputs]
            return self.concat(parts, shape, name)
        if layer is not None and layer.kind == "Conv" and layer.kernel.shape[:2] == (1, 1) and layer.stride == 1:
            pooled = self.average_pool(layer.input, (*shape[:3], layer.input.shape[-1]), name)
            return self.conv(pooled, layer.kernel, layer.key, layer.name, shape=shape, stride=1, pads=(0, 0, 0, 0))
        return self._outward("AvgPool", poly, shape, name)

    def _outward(self, kind: str, poly: Poly, shape: tuple[int, ...], name: str) -> Poly:
        layer = poly.single
        if layer is None or poly.only is not None:
            return self.layer(kind, (poly,), shape, name)
        inner = of_layer(layer)
        outer = self.average_pool(inner, shape, name) if kind == "AvgPool" else self.upsample(inner, shape, name)
        return make(outer.scale(poly.terms[(layer,)]).shift(poly.const).terms, shape)

    def relu(self, poly: Poly, name: str) -> Poly:
        if not poly.monomials:
            return make({(): np.maximum(poly.const, 0)}, poly.shape)
        small = [x for x in poly.layers if x.shape[1:-1] not in ((), (1, 1))]  # beside gains and offsets
        inner = small[0].input.only if len(small) == 1 and small[0].kind == "Upsample" else None
        if inner is not None:  # ReLU first, at a quarter of the cost
            terms = {order(tuple(inner if x is small[0] else x for x in m)): c for m, c in poly.terms.items()}
            return self.upsample(self.relu(Poly(terms, inner.shape, poly.hint), name), poly.shape, name)
        return self.layer("Relu", (poly,), poly.shape, name)

    # ---- movement of values

    def move(self, poly: Poly, index: np.ndarray, name: str) -> Poly:
        """Values of a tensor in another arrangement: index holds, for every place, the place it comes from."""
        layer = poly.only
        if layer is not None and layer.kind == "Move":
            return self.move(layer.input, layer.index.reshape(-1)[index], name)
        shape = tuple(index.shape)
        flat = index.reshape(-1)
        ordered = flat.size == np.prod(poly.shape) and bool((flat == np.arange(flat.size)).all())
        if ordered and shape == poly.shape:
            return poly
        if ordered and layer is not None and layer.kind == "Noise":  # drawn in another shape
            return self.layer("Noise", (), shape, name, key="")
        if (
            ordered
            and squeezed(shape) == squeezed(poly.shape)
            and (shape[-1:] == poly.shape[-1:] or all(c.ndim == 0 for c in poly.terms.values()))
        ):
            return Poly(poly.terms, shape, poly.hint)
        if len(shape) == 4 and not (shape[1] % 2 or shape[2] % 2):
            small = index[:, ::2, ::2]
            if (index == small.repeat(2, axis=1).repeat(2, axis=2)).all():
                return self.upsample(self.move(poly, small, name), shape, name)
        key = hashlib.sha256(np.ascontiguousarray(index).tobytes()).hexdigest()
        return self.layer("Move", (poly,), shape, name, index=index, ordered=ordered, key=key)


def doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], 2 * shape[2], shape[3])


def is_scaled(q: Poly, p: Poly) -> float | None:
    """c with q = c * p for a scalar c, or None."""
    if set(q.terms) != set(p.terms) or not p.monomials:
        return None
    monomial = p.monomials[0]
    ratio = float(np.reshape(q.terms[monomial], -1)[0] / np.reshape(p.terms[monomial], -1)[0])
    same = all(np.allclose(q.terms[m], ratio * p.terms[m], rtol=1e-6, atol=0) for m in p.terms)
    return ratio if same and not equal(np.asarray(ratio), 1) else None
