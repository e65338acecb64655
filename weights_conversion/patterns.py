"""What the matches of the three networks share: expectations with telling errors, weights, norms, attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weights_conversion.algebra import Hint, Layer, Poly, make, squeezed, vector
from weights_conversion.errors import ConversionError
from weights_conversion.layers import LayerTable

AFFINE_TOLERANCE = 1e-5


def mismatch(where: str, expected: str, found: Poly | Layer) -> ConversionError:
    """The error for a part of the graph that the port cannot express."""
    text = f"{where}: expected {expected}, found {str(found)[:400]}"
    for layer in found.layers if isinstance(found, Poly) else [found]:
        inputs = ", ".join(f"{x.kind} from {x.name!r}" for poly in layer.inputs for x in poly.layers)
        text += f"\n  {str(layer)[:300]}\n    from node {layer.name!r}; its inputs: {inputs or 'none'}"
    return ConversionError(text)


def expect(where: str, poly: Poly, kind: str) -> Layer:
    """The layer of that kind which `poly` is, without scale or shift."""
    layer = poly.only
    if layer is None or layer.kind != kind:
        raise mismatch(where, f"{kind} alone", poly)
    return layer


def affine(where: str, poly: Poly, kind: str) -> Layer:
    """The layer of that kind which `poly` is, up to scale and shift."""
    layer = poly.single
    if layer is None or layer.kind != kind:
        raise mismatch(where, f"{kind}, scaled and shifted at most", poly)
    return layer


def scaled(where: str, poly: Poly, kind: str) -> tuple[Layer, float]:
    """The layer of that kind which `poly` is, times one positive number."""
    layer = affine(where, poly, kind)
    scale = poly.terms[(layer,)]
    if scale.ndim or float(scale) <= 0 or np.any(poly.const != 0):
        raise mismatch(where, f"{kind}, times one positive number at most", poly)
    return layer, float(scale)


def expand(poly: Poly, keep: tuple[int, ...] | None = None) -> Poly:
    """Sums opened, so that order and nesting of additions do not matter; those of the shape `keep` stay."""
    while sums := [layer for layer in poly.layers if layer.kind == "Add" and layer.shape != keep]:
        opened = sums[-1]  # the last made: none comes twice
        result = make({}, poly.shape, poly.hint)
        for monomial, c in poly.terms.items():
            if opened not in monomial:
                result = result + make({monomial: c}, poly.shape)
                continue
            rest = make({tuple(x for x in monomial if x is not opened): c}, poly.shape)
            for part in opened.inputs:
                result = result + part * rest
        poly = Poly(result.terms, poly.shape, poly.hint)
    return poly


def parts_of(poly: Poly) -> tuple[Poly, Poly] | None:
    """The two summands of a residual sum; a bias behind it goes to the first."""
    layer = poly.single
    if layer is None or layer.kind != "Add" or poly.terms[(layer,)].size != 1 or float(poly.terms[(layer,)]) != 1:
        return None
    first, second = layer.inputs
    return first.shift(poly.const), second


@dataclass
class FoundNorm:
    """A batch norm: effective scale and shift, and the statistics behind them as far as they were found."""

    scale: np.ndarray
    shift: np.ndarray
    hint: Hint
    affine: bool = True  # False: gain and offset come from elsewhere; shift is -mean * scale

    def settle(self, eps: float) -> dict[str, np.ndarray]:
        """running_mean, running_var (for `eps`), weight and bias, whose product is exactly scale and shift."""
        size = self.scale.size
        total, var, eps_found = 1 / self.scale**2, self.hint.var, self.hint.eps
        if var is not None and eps_found is not None and var.size in (1, size):
            total = vector(var, size) + eps_found
        gain = self.scale * np.sqrt(total)
        mean = self.hint.mean
        mean = vector(mean, size) if mean is not None and mean.size in (1, size) else -self.shift / self.scale
        offset = self.shift + mean * self.scale
        return {"running_mean": mean, "running_var": total - eps, "weight": gain, "bias": offset}


@dataclass
class State:
    """A state dict in the making."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, FoundNorm] = field(default_factory=dict)

    def put(self, name: str, value: np.ndarray) -> None:
        assert name not in self.tensors, name
        self.tensors[name] = torch.from_numpy(np.array(value, np.float32, order="C", copy=True))

    def conv(self, name: str, where: str, poly: Poly, kernel: int, bias: bool, free: bool = False) -> Layer:
        """Writes a convolution, with whatever scale it has; with `free`, scale and shift belong to what follows."""
        layer = affine(where, poly, "Conv")
        if layer.kernel.shape[:2] != (kernel, kernel):
            raise mismatch(where, f"a {kernel}x{kernel} convolution", poly)
        outputs = layer.kernel.shape[3]
        if not bias and not free and np.any(poly.const != 0):
            raise mismatch(where, "a convolution without bias", poly)
        scale = 1.0 if free else poly.terms[(layer,)]
        self.put(f"{name}.weight", (layer.kernel * scale).transpose(3, 2, 0, 1))
        if bias:
            self.put(f"{name}.bias", np.zeros(outputs) if free else vector(poly.const, outputs))
        return layer

    def linear(self, name: str, where: str, poly: Poly, bias: bool = True) -> Layer:
        layer = affine(where, poly, "Dense")
        outputs = layer.weight.shape[1]
        if not bias and np.any(poly.const != 0):
            raise mismatch(where, "a linear layer without bias", poly)
        self.put(f"{name}.weight", (layer.weight * poly.terms[(layer,)]).T)
        if bias:
            self.put(f"{name}.bias", vector(poly.const, outputs))
        return layer

    def norm(self, name: str, where: str, poly: Poly) -> Layer:
        """Notes a batch norm; `settle_norms` writes it."""
        layer = poly.single
        if layer is None:
            raise mismatch(where, "a batch norm of one layer", poly)
        size = poly.shape[-1]
        self.norms[name] = FoundNorm(vector(poly.terms[(layer,)], size), vector(poly.const, size), poly.hint)
        if not (self.norms[name].scale != 0).all():
            raise mismatch(where, "a batch norm without zero scales", poly)
        return layer

    def common_eps(self, names: list[str], default: float) -> float:
        """The eps that most of these norms were seen to have."""
        found = Counter(e for n in names if (e := self.norms[n].hint.eps) is not None)
        return found.most_common(1)[0][0] if found else default

    def settle_norms(self, names: list[str], eps: float) -> bool:
        """Writes norms with one eps (others go into the variance); whether they have gains and offsets."""
        settled = {name: self.norms[name].settle(eps) for name in names}

        def plain(values: dict[str, np.ndarray]) -> bool:
            offsets = np.abs(values["bias"]).max() / (1 + np.abs(values["running_mean"]).max())
            return np.abs(values["weight"] - 1).max() < AFFINE_TOLERANCE and offsets < AFFINE_TOLERANCE

        has_affine = any(self.norms[n].affine and not plain(values) for n, values in settled.items())
        for name, values in settled.items():
            found = self.norms[name]
            if found.affine and not has_affine:  # the exact scale and shift, without the rounding of gain 1
                values["running_var"] = 1 / found.scale**2 - eps
                values["running_mean"] = -found.shift / found.scale
            keys = ["running_mean", "running_var", *(["weight", "bias"] if found.affine and has_affine else [])]
            for key in keys:
                self.put(f"{name}.{key}", values[key])
        return has_affine


def attention(state: State, name: str, where: str, table: LayerTable, poly: Poly) -> Poly | None:
    """x, if `poly` is x + gamma * attention(x); its weights are written. None if it is something else."""
    parts = parts_of(poly)
    for main, x in (parts, parts[::-1]) if parts else ():
        out = main.single
        if out is None or out.kind != "Conv" or out.kernel.shape[:2] != (1, 1):
            continue
        moved = out.input.only
        product = moved.input.only if moved is not None and moved.kind == "Move" and moved.ordered else None
        if product is None or product.kind != "BatchMatMul":
            continue
        where = f"{where}, attention"
        weights = expect(where, product.inputs[0], "Softmax")
        logits, scale = scaled(where, weights.input, "BatchMatMul")
        theta, theta_scale = scaled(where, logits.inputs[0], "Move")
        phi, phi_scale = scaled(where, logits.inputs[1], "Move")
        g, g_scale = scaled(where, product.inputs[1], "Move")
        if not theta.ordered or not g.ordered or len(squeezed(x.shape)) != 4:
            raise mismatch(where, "queries and values in the order of positions", product)
        transposed = np.arange(phi.index.size).reshape(g.shape[0], g.shape[1], -1).swapaxes(1, 2)
        if not np.array_equal(phi.index, transposed):
            raise mismatch(where, "keys transposed", phi)
        pools = [expect(where, layer.input, "MaxPool") for layer in (phi, g)]
        if any((p.size, p.stride, p.pads) != ((2, 2), 2, (0, 0, 0, 0)) for p in pools):
            raise mismatch(where, "keys and values pooled by two", pools[0])
        scale *= theta_scale * phi_scale
        convs = {"theta": theta.input.scale(scale), "phi": pools[0].input, "g": pools[1].input.scale(g_scale)}
        for key, conv in convs.items():
            layer = state.conv(f"{name}.{key}", f"{where}, {key}", conv, 1, bias=False)
            if layer.input.key() != x.key():
                raise mismatch(f"{where}, {key}", f"an input {x}", layer)
        gamma = main.terms[(out,)]
        state.put(f"{name}.gamma", gamma if gamma.ndim == 0 else np.ones(()))
        rest = make({(out,): np.ones(()) if gamma.ndim == 0 else gamma, (): main.const}, main.shape)
        state.conv(f"{name}.o", f"{where}, o", rest, 1, bias=False)
        return x
    return None
