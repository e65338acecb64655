"""From records of operations to layers: the vocabulary of the match."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from weights_conversion.algebra import NO_HINT, Hint, Poly, decimal, make, of_layer, same_pads, squeezed
from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.frames import Constant, Record, Value
from weights_conversion.layers import LayerTable, doubled, is_scaled
from weights_conversion.operations import attribute, evaluate
from weights_conversion.statistics import denominator, subtracted_mean

Operand = Poly | Constant


class Tracer:
    """Layers of one run; `poly` gives what one of `values` is made of."""

    def __init__(self, records: list[Record], values: Iterable[Value]):
        self.table = LayerTable()
        self._outputs: dict[tuple[int, int], Poly] = {}
        needed = {id(value.record) for value in values}
        used: list[Record] = []
        for record in reversed(records):  # what a constant condition discards may be anything
            if id(record) in needed:
                used.append(record)
                needed.update(id(source[0]) for source in record.inputs if not isinstance(source, Constant))
        for record in reversed(used):
            self._record(record)

    def poly(self, value: Value) -> Poly:
        """What a value of the run is."""
        if value.record is None:
            return make({(): self._channel(value.constant, tuple(value.tensor.shape))}, tuple(value.tensor.shape))
        return self._outputs[id(value.record), value.port]

    def _record(self, record: Record) -> None:
        operands: list[Operand] = [
            source if isinstance(source, Constant) else self._outputs[id(source[0]), source[1]]
            for source in record.inputs
        ]
        if record.op in ("Input", "Noise"):  # all noise is alike
            key = record.name if record.op == "Input" else ""
            results = [self.table.layer(record.op, (), record.shapes[0], record.name, key=key)]
        else:
            rule = RULES.get(record.op)
            if rule is None:
                raise ConversionError(f"{describe(record)}: the port has no such operation on data")
            try:
                made = rule(self, record, *operands)
            except ConversionError as error:
                raise ConversionError(f"{describe(record)}: {error}") from error
            except (AssertionError, IndexError, TypeError, ValueError) as error:
                raise ConversionError(f"{describe(record)}: not written as in a BigBiGAN ({error!r})") from error
            results = made if isinstance(made, list) else [made]
        for port, result in enumerate(results):
            self._outputs[id(record), port] = Poly(result.terms, record.shapes[port], result.hint)

    # ---- constants

    def _channel(self, constant: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A constant operand as one value a channel."""
        array = np.asarray(constant.array, np.float64)
        if array.size == 1:
            return array.reshape(())
        rows = array.reshape(-1, array.shape[-1])
        if not np.allclose(rows, rows[:1], rtol=1e-6, atol=1e-12):
            raise ConversionError(f"constant {constant.name!r} of shape {list(array.shape)} varies between positions")
        if array.shape[-1] not in (1, shape[-1]):
            raise ConversionError(f"constant {constant.name!r} of shape {list(array.shape)} meets {list(shape)}")
        return rows[0] if array.shape[-1] > 1 else rows[0].reshape(())

    # ---- sums and products

    def add(self, record: Record, a: Operand, b: Operand, sign: float = 1.0) -> Poly:
        if isinstance(a, Constant) and isinstance(b, Poly):
            return self.shift(record, b.scale(sign), a, 1.0)
        assert isinstance(a, Poly)
        if isinstance(b, Constant):
            return self.shift(record, a, b, sign)
        if sign > 0 and a.shape == b.shape and len(squeezed(a.shape)) > 1:
            return self.table.add(a, b, record.name)
        return a + b.scale(sign)

    def _spread(self, record: Record, a: Poly) -> Poly:
        """`a` repeated as broadcasting against a larger constant does."""
        places = np.arange(np.prod(a.shape, dtype=np.int64)).reshape(a.shape)
        larger = np.prod(record.shapes[0]) > places.size
        return self.table.move(a, np.broadcast_to(places, record.shapes[0]), record.name) if larger else a

    def shift(self, record: Record, a: Poly, constant: Constant, sign: float) -> Poly:
        a = self._spread(record, a)
        c = sign * self._channel(constant, record.shapes[0])
        mean = subtracted_mean(a, c, constant, sign)
        hint = Hint(mean=mean) if mean is not None else NO_HINT
        return make(a.shift(c).terms, a.shape, a.hint.merge(hint))

    def multiply(self, record: Record, a: Operand, b: Operand) -> Poly:
        if isinstance(a, Constant):
            a, b = b, a
        assert isinstance(a, Poly)
        if isinstance(b, Poly):
            return a * b
        a, (var, eps) = self._spread(record, a), denominator(b)
        return make(a.scale(self._channel(b, record.shapes[0])).terms, a.shape, a.hint.merge(Hint(var, eps)))

    def divide(self, record: Record, a: Operand, b: Operand) -> Poly:
        if isinstance(a, Constant) or isinstance(b, Poly):
            raise ConversionError("a division by data")
        a, (var, eps) = self._spread(record, a), denominator(b)
        return make(a.scale(1 / self._channel(b, record.shapes[0])).terms, a.shape, a.hint.merge(Hint(var, eps)))

    def batch_norm(self, record: Record, x: Operand, *parameters: Operand) -> Poly:
        if attribute(record.node, "is_training") is not False or not isinstance(x, Poly):
            raise ConversionError("it normalises by the batch it sees, not by stored statistics")
        if not all(isinstance(p, Constant) for p in parameters):
            raise ConversionError("its scale, offset or statistics depend on the data")
        scale, offset, mean, var = (np.asarray(p.array, np.float64) for p in parameters if isinstance(p, Constant))
        eps = decimal(float(attribute(record.node, "epsilon")))
        gain = scale / np.sqrt(var + eps)
        return make(x.scale(gain).shift(offset - mean * gain).terms, x.shape, Hint(var, eps, mean))

    # ---- activations

    def maximum(self, record: Record, a: Operand, b: Operand) -> Poly:
        if isinstance(a, Constant):
            a, b = b, a
        if isinstance(a, Poly) and isinstance(b, Constant):
            if b.array.size and (b.array == 0).all():
                return self.table.relu(a, record.name)
        elif isinstance(a, Poly) and isinstance(b, Poly):
            for p, q in ((a, b), (b, a)):
                slope = is_scaled(q, p)
                if slope is not None and 0 < slope < 1:
                    return self.leaky_relu(record, p, slope)
        raise ConversionError("a maximum that is neither a ReLU nor a leaky ReLU")

    def leaky_relu(self, record: Record, x: Operand, slope: float | None = None) -> Poly:
        assert isinstance(x, Poly)
        slope = float(attribute(record.node, "alpha")) if slope is None else slope
        return self.table.layer("LeakyRelu", (x,), x.shape, record.name, slope=decimal(slope))

    def log(self, record: Record, x: Operand, added: float = 0.0) -> Poly:
        """log(1 + exp(p)) is softplus."""
        assert isinstance(x, Poly)
        layer = x.shift(added - 1).only
        if layer is not None and layer.kind == "Exp":
            return self.table.layer("Softplus", layer.inputs, layer.shape, record.name)
        raise ConversionError("a logarithm that is no softplus")

    # ---- layers with weights

    def matmul(self, record: Record, a: Operand, b: Operand) -> Poly:
        if not isinstance(a, Poly) or not isinstance(b, Constant) or attribute(record.node, "transpose_a"):
            raise ConversionError("a matrix product that is not data times a weight")
        return self._dense(record, a, b, bool(attribute(record.node, "transpose_b")))

    def _dense(self, record: Record, a: Poly, b: Constant, transposed: bool) -> Poly:
        weight = b.array.T if transposed else b.array
        return self.table.dense(a, weight, (b.name, id(b.value), transposed), record.name)

    def conv(self, record: Record, x: Operand, kernel: Operand) -> Poly:
        if not isinstance(x, Poly) or not isinstance(kernel, Constant):
            raise ConversionError("a convolution whose kernel depends on the data")
        if attribute(record.node, "dilations") not in (None, [], [1, 1, 1, 1]):
            raise ConversionError("a dilated convolution")
        stride, pads = self._window(record, x, kernel.array.shape[:2], attribute(record.node, "strides"))
        key = (kernel.name, id(kernel.value))
        return self.table.conv(x, kernel.array, key, record.name, shape=record.shapes[0], stride=stride, pads=pads)

    def _window(
        self, record: Record, x: Poly, kernel: tuple[int, ...], strides: list[int]
    ) -> tuple[int, tuple[int, ...]]:
        """Stride and zeros (top, bottom, left, right)."""
        if attribute(record.node, "data_format") not in (None, "NHWC"):
            raise ConversionError("channels do not come last")
        if strides[0] != 1 or strides[3] != 1 or strides[1] != strides[2]:
            raise ConversionError(f"strides {strides}")
        padding, stride = attribute(record.node, "padding"), strides[1]
        if padding == "EXPLICIT":
            explicit = attribute(record.node, "explicit_paddings")
            return stride, tuple(explicit[2:6])
        if padding == "VALID":
            return stride, (0, 0, 0, 0)
        return stride, same_pads(x.shape[1:3], kernel, stride)

    def batch_matmul(self, record: Record, a: Operand, b: Operand) -> Poly:
        flags = bool(attribute(record.node, "adj_x")), bool(attribute(record.node, "adj_y"))
        return self._product(record, a, b, *flags)

    def _product(self, record: Record, a: Operand, b: Operand, adjoint_a: bool, adjoint_b: bool) -> Poly:
        if not isinstance(a, Poly) or not isinstance(b, Poly) or len(a.shape) != 3 or len(b.shape) != 3:
            raise ConversionError("a batched matrix product that is no attention")
        a, b = (self._transpose(p, record.name) if flag else p for p, flag in ((a, adjoint_a), (b, adjoint_b)))
        return self.table.layer("BatchMatMul", (a, b), record.shapes[0], record.name)

    def _transpose(self, poly: Poly, name: str) -> Poly:
        index = np.arange(np.prod(poly.shape)).reshape(poly.shape).swapaxes(-1, -2)
        return self.table.move(poly, index, name)

    def einsum(self, record: Record, a: Operand, b: Operand) -> Poly:
        equation = str(attribute(record.node, "equation")).replace(" ", "")
        left, _, out = equation.partition("->")
        x, _, y = left.partition(",")
        linear = len(x) == len(y) == len(out) == 2 and x[1] in y and x[0] == out[0] and out[1] in y
        if isinstance(a, Poly) and isinstance(b, Constant) and linear and len({*x, *y}) == 3:
            return self._dense(record, a, b, transposed=y[0] != x[1])
        if len(x) == len(y) == len(out) == 3 and x[0] == y[0] == out[0] and len({*x, *y}) == 4:
            (contracted,) = set(x) & set(y) - {x[0]}
            if contracted not in out and out[1] in x and out[2] in y:
                return self._product(record, a, b, x[1] == contracted, y[2] == contracted)
        raise ConversionError(f"the product {equation!r}")

    # ---- pooling, padding, resizing

    def reduce(self, record: Record, x: Operand, axis: Operand) -> Poly:
        assert isinstance(x, Poly) and isinstance(axis, Constant)
        axes = sorted(int(i) % len(x.shape) for i in axis.array.reshape(-1))
        area = int(np.prod([x.shape[i] for i in axes]))
        if area == 1:
            return x
        if len(x.shape) == 4 and axes == [1, 2]:
            mean = self.table.layer("Mean", (x,), (x.shape[0], x.shape[3]), record.name)
            return mean.scale(area) if record.op == "Sum" else mean
        if len(x.shape) == 2 and axes == [1] and record.op == "Sum" and (layer := x.single) is not None:
            weight = np.broadcast_to(x.terms[(layer,)], (x.shape[1],))[:, None].astype(np.float32)
            key = (record.name, "sum")
            dense = self.table.dense(of_layer(layer), weight, key, record.name)
            return dense.shift(np.broadcast_to(x.const, (x.shape[1],)).sum())
        if (layer := x.only) is not None and layer.kind == "Move":
            places = np.moveaxis(layer.index.reshape(x.shape), axes, range(-len(axes), 0))
            groups = places.reshape(*(n for i, n in enumerate(x.shape) if i not in axes), area)
            if (found := self.table.mean_of(layer.input, groups, record.name)) is not None:
                return found.scale(area) if record.op == "Sum" else found
        raise ConversionError(f"a {record.op.lower()} over axes {axes} of {list(x.shape)}")

    def average_pool(self, record: Record, x: Operand) -> Poly:
        assert isinstance(x, Poly)
        size, out = attribute(record.node, "ksize"), record.shapes[0]
        stride, pads = self._window(record, x, tuple(size[1:3]), attribute(record.node, "strides"))
        if any(pads):
            raise ConversionError(f"a padded average pool {pads}")
        if tuple(size[1:3]) == x.shape[1:3] and out[1:3] == (1, 1) and x.shape[1:3] != (2, 2):
            return self.table.layer("Mean", (x,), (x.shape[0], x.shape[3]), record.name)
        if size[1:3] != [2, 2] or stride != 2 or x.shape[1] % 2 or x.shape[2] % 2:
            raise ConversionError(f"an average pool of {size[1:3]} with stride {stride}")
        return self.table.average_pool(x, out, record.name)

    def max_pool(self, record: Record, x: Operand) -> Poly:
        assert isinstance(x, Poly)
        size = attribute(record.node, "ksize")
        stride, pads = self._window(record, x, tuple(size[1:3]), attribute(record.node, "strides"))
        layer, value = x.only, "same"
        if layer is not None and layer.kind == "Pad" and not any(pads):
            x, pads = layer.input, layer.pads
            value = "zero" if layer.value == 0 else "ignore" if layer.value < -1e30 else str(layer.value)
        facts = {"size": tuple(size[1:3]), "stride": stride, "pads": pads, "value": value}
        return self.table.layer("MaxPool", (x,), record.shapes[0], record.name, **facts)

    def pad(self, record: Record, x: Operand, paddings: Operand, value: Operand | None = None) -> Poly:
        assert isinstance(x, Poly) and isinstance(paddings, Constant)
        pads = [tuple(int(v) for v in row) for row in paddings.array]
        fill = float(value.array) if isinstance(value, Constant) else 0.0
        if not any(map(any, pads)):
            return x
        if len(pads) == 4 and not any(pads[0]) and not any(pads[3]):
            return self.table.layer("Pad", (x,), record.shapes[0], record.name, pads=(*pads[1], *pads[2]), value=fill)
        if not any(map(any, pads[:-1])) and fill == 0:
            parts = [Poly({}, (*x.shape[:-1], n)) for n in pads[-1]]
            parts = [p for p in (parts[0], x, parts[1]) if p.shape[-1]]
            return self.table.concat(parts, record.shapes[0], record.name)
        raise ConversionError(f"padding by {pads}")

    def nearest(self, record: Record, x: Operand, _: Operand) -> Poly:
        assert isinstance(x, Poly)
        out = record.shapes[0]
        if out == x.shape:
            return x
        if out == doubled(x.shape) and not attribute(record.node, "align_corners"):
            return self.table.upsample(x, out, record.name)
        if attribute(record.node, "align_corners") or out[1] % x.shape[1] or out[2] % x.shape[2]:
            raise ConversionError(f"nearest resizing of {list(x.shape[1:3])} to {list(out[1:3])}")
        return self.table.layer("Nearest", (x,), out, record.name)

    def area(self, record: Record, x: Operand, size: Operand) -> Poly:
        assert isinstance(x, Poly)
        if any(out % side for out, side in zip(record.shapes[0][1:3], x.shape[1:3], strict=True)):
            raise ConversionError(f"an area resize of {list(x.shape[1:3])} to {list(record.shapes[0][1:3])}")
        return self.nearest(record, x, size)  # each new pixel lies within an old one

    def bilinear(self, record: Record, x: Operand, _: Operand) -> Poly:
        aligned, centers = (bool(attribute(record.node, n)) for n in ("align_corners", "half_pixel_centers"))
        kind = "bicubic" if record.op == "ResizeBicubic" else "bilinear"
        mode = f"{kind}-aligned" if aligned else kind if centers else f"{kind}-asymmetric"
        assert isinstance(x, Poly)
        if record.shapes[0] == x.shape:
            return x
        return self.table.layer("Bilinear", (x,), record.shapes[0], record.name, mode=mode)

    # ---- cutting, joining, moving

    def concat(self, record: Record, *operands: Operand) -> Poly | list[Poly]:
        *parts, axis = operands if record.op == "ConcatV2" else (*operands[1:], operands[0])
        assert isinstance(axis, Constant)
        out = record.shapes[0]
        if int(axis.array) % len(out) == len(out) - 1:
            shapes = [p.shape if isinstance(p, Poly) else tuple(p.array.shape) for p in parts]
            polys = [
                p if isinstance(p, Poly) else make({(): self._channel(p, s)}, s)
                for p, s in zip(parts, shapes, strict=True)
            ]
            same = len({p.key() for p in polys}) == 1 and len(polys) > 1 and polys[0].monomials
            return self.table.concat(polys, out, record.name) if not same else self.moved(record, *operands)
        return self.moved(record, *operands)

    def split(self, record: Record, *operands: Operand) -> list[Poly]:
        x = operands[1] if record.op == "Split" else operands[0]
        axis = operands[0] if record.op == "Split" else operands[2]
        assert isinstance(x, Poly) and isinstance(axis, Constant)
        if int(axis.array.reshape(-1)[0]) % len(x.shape) != len(x.shape) - 1:
            raise ConversionError("a split along another axis than channels")
        parts, start = [], 0
        for shape in record.shapes:
            parts.append(self.table.slice(x, start, start + shape[-1], record.name))
            start += shape[-1]
        return parts

    def moved(self, record: Record, *operands: Operand) -> Poly | list[Poly]:
        """Any operation that only moves values: run on their positions."""
        polys = [p for p in operands if isinstance(p, Poly)]
        x = polys[0]
        if any(p.key() != x.key() for p in polys):
            raise ConversionError("different tensors put together along another axis than channels")
        if record.op in ("Reshape", "ExpandDims", "Squeeze") and squeezed(record.shapes[0]) == squeezed(x.shape):
            scalar = all(c.ndim == 0 for c in x.terms.values())
            if scalar or record.shapes[0][-1] == x.shape[-1]:  # axes of one come and go
                return Poly(x.terms, record.shapes[0], x.hint)
        tf = tensorflow()
        positions = np.arange(np.prod(x.shape, dtype=np.int64)).reshape(x.shape)
        inputs = [tf.constant(positions) if isinstance(p, Poly) else p.value for p in operands]
        indices = [np.asarray(t) for t in evaluate(record.node, inputs)]
        results = []
        for index in indices:
            low = int(index.reshape(-1)[0]) if index.size else 0
            width = index.shape[-1] if index.ndim == len(x.shape) else 1
            cut = positions[..., low : low + width] if low + width <= x.shape[-1] else None
            if cut is not None and width < x.shape[-1] and np.array_equal(cut.reshape(-1), index.reshape(-1)):
                part = self.table.slice(x, low, low + width, record.name)
                results.append(Poly(part.terms, tuple(index.shape), part.hint))
            else:
                results.append(self.table.move(x, index, record.name))
        return results


def describe(record: Record) -> str:
    """Node, type and neighbours, for errors."""
    names = [source.name if isinstance(source, Constant) else source[0].name for source in record.inputs]
    return f"node {record.name!r} ({record.op}), fed by {', '.join(names) or 'nothing'}"


def _activation(kind: str) -> Callable[[Tracer, Record, Poly], Poly]:
    return lambda tracer, record, x: tracer.table.layer(kind, (x,), record.shapes[0], record.name)


def _add_n(tracer: Tracer, record: Record, *operands: Operand) -> Poly:
    total = operands[0]
    for operand in operands[1:]:
        total = tracer.add(record, total, operand)
    assert isinstance(total, Poly)
    return total


MOVES = (
    "Reshape", "Squeeze", "ExpandDims", "Transpose", "Tile", "DepthToSpace", "SpaceToDepth", "Slice", "StridedSlice",
    "Pack", "Unpack", "BroadcastTo", "ReverseV2", "Gather", "GatherV2",
)  # fmt: skip
RULES: dict[str, Callable[..., Poly | list[Poly]]] = {
    "Add": Tracer.add,
    "AddV2": Tracer.add,
    "BiasAdd": Tracer.add,
    "AddN": _add_n,
    "Sub": lambda tracer, record, a, b: tracer.add(record, a, b, -1.0),
    "Neg": lambda tracer, record, x: x.scale(-1.0),
    "Cast": lambda tracer, record, x: _same_dtype(record, x),
    "Mul": Tracer.multiply,
    "RealDiv": Tracer.divide,
    "Div": Tracer.divide,
    "FusedBatchNorm": Tracer.batch_norm,
    "FusedBatchNormV2": Tracer.batch_norm,
    "FusedBatchNormV3": Tracer.batch_norm,
    "Relu": lambda tracer, record, x: tracer.table.relu(x, record.name),
    "Maximum": Tracer.maximum,
    "LeakyRelu": Tracer.leaky_relu,
    **{kind: _activation(kind) for kind in ("Tanh", "Softmax", "Softplus", "Exp")},
    "Log1p": lambda tracer, record, x: tracer.log(record, x, 1.0),
    "Log": Tracer.log,
    "MatMul": Tracer.matmul,
    "Conv2D": Tracer.conv,
    "BatchMatMul": Tracer.batch_matmul,
    "BatchMatMulV2": Tracer.batch_matmul,
    "BatchMatMulV3": Tracer.batch_matmul,
    "Einsum": Tracer.einsum,
    "Mean": Tracer.reduce,
    "Sum": Tracer.reduce,
    "AvgPool": Tracer.average_pool,
    "MaxPool": Tracer.max_pool,
    "Pad": Tracer.pad,
    "PadV2": Tracer.pad,
    "ResizeNearestNeighbor": Tracer.nearest,
    "ResizeArea": Tracer.area,
    "ResizeBicubic": Tracer.bilinear,
    "ResizeBilinear": Tracer.bilinear,
    "Concat": Tracer.concat,
    "ConcatV2": Tracer.concat,
    "Split": Tracer.split,
    "SplitV": Tracer.split,
    **{op: Tracer.moved for op in MOVES},
}


def _same_dtype(record: Record, x: Poly) -> Poly:
    if attribute(record.node, "DstT") != tensorflow().float32:
        raise ConversionError("a cast away from float32")
    return x
