"""How each of TensorFlow's operations on data is written in the graph form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from weights_conversion.algebra import same_pads
from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.lowering import BATCHES, Builder, Fixed, Node, Operand, Shape, Step, concrete
from weights_conversion.operations import attribute, evaluate

Result = Node | list[Node]
Rule = Callable[..., Result]

UNARY = {
    "Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Expm1": "expm1", "Floor": "floor",
    "Inv": "reciprocal", "Log": "log", "Log1p": "log1p", "LogicalNot": "logical_not", "Reciprocal": "reciprocal",
    "Relu": "relu", "Relu6": "relu6", "Rint": "round", "Round": "round", "Rsqrt": "rsqrt", "Selu": "selu",
    "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin", "Softplus": "softplus", "Softsign": "softsign", "Sqrt": "sqrt",
    "Square": "square", "Tanh": "tanh", "truncated_normal": "truncated_normal", "standard_uniform": "standard_uniform",
}  # fmt: skip
BINARY = {
    "Add": "add", "AddV2": "add", "Div": "div", "DivNoNan": "div_no_nan", "Equal": "equal", "FloorDiv": "floor_div",
    "FloorMod": "floor_mod", "Greater": "greater", "GreaterEqual": "greater_equal", "Less": "less",
    "LessEqual": "less_equal", "LogicalAnd": "logical_and", "LogicalOr": "logical_or", "Maximum": "maximum",
    "Minimum": "minimum", "Mod": "floor_mod", "Mul": "mul", "MulNoNan": "mul", "NotEqual": "not_equal", "Pow": "pow",
    "RealDiv": "div", "Sub": "sub",
}  # fmt: skip
REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "max", "Min": "min", "Prod": "prod"}
MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def data(operand: Operand, what: str) -> Node:
    if isinstance(operand, Fixed):
        raise ConversionError(f"{what} is a constant")
    return operand


def constant(operand: Operand, what: str) -> Fixed:
    if isinstance(operand, Node):
        raise ConversionError(f"{what} depends on images or latents")
    return operand


# ---- element by element


def elementwise(b: Builder, step: Step, op: str, *operands: Operand) -> Node:
    nodes, planar = b.broadcast([b.node(operand) for operand in operands], len(step.shape))
    return b.emit(op, nodes, step.shape, planar)


def unary(b: Builder, step: Step, x: Operand) -> Node:
    node = data(x, "its input")
    return b.emit(UNARY[step.op], [node], step.shape, node.planar)


def binary(b: Builder, step: Step, x: Operand, y: Operand) -> Node:
    op = BINARY[step.op]
    if (made := _scaled(b, step, op, x, y)) is not None:
        return made
    for one, other in ((x, y), (y, x)):
        zero = isinstance(other, Fixed) and other.same and other.runs[0].size == 1 and not other.array.any()
        if op == "maximum" and zero and isinstance(one, Node) and one.shape == step.shape:
            return b.emit("relu", [one], step.shape, one.planar)
    return elementwise(b, step, op, x, y)


def _scaled(b: Builder, step: Step, op: str, x: Operand, y: Operand) -> Node | None:
    """Sums, products and quotients with one number a channel."""
    if op not in ("add", "sub", "mul", "div") or isinstance(x, Node) == isinstance(y, Node):
        return None
    node, other = (x, y) if isinstance(x, Node) else (y, x)
    assert isinstance(node, Node)
    if node.shape != step.shape or (op == "div" and node is y) or (found := b.channels(node, other)) is None:
        return None
    node, array = found[0], found[1].astype(np.float64)
    if op == "add":
        return b.affine(node, 1.0, array)
    if op == "sub":
        return b.affine(node, 1.0, -array) if isinstance(x, Node) else b.affine(node, -1.0, array)
    if op == "div" and not array.all():
        return None
    return b.affine(node, array if op == "mul" else 1 / array, 0.0)


def negated(b: Builder, step: Step, x: Operand) -> Node:
    return b.affine(data(x, "its input"), -1.0, 0.0)


def squared_difference(b: Builder, step: Step, x: Operand, y: Operand) -> Node:
    node = elementwise(b, step, "sub", x, y)
    return b.emit("square", [node], step.shape, node.planar)


def add_n(b: Builder, step: Step, *operands: Operand) -> Node:
    total = b.node(operands[0])
    for operand in operands[1:]:
        total = elementwise(b, step, "add", total, operand)
    return total


def bias_add(b: Builder, step: Step, x: Operand, bias: Operand) -> Node:
    node = data(x, "its input")
    if attribute(step.node, "data_format") == "NCHW" and len(node.shape) == 4:
        return b.affine(b.flat(node), 1.0, constant(bias, "its bias").array)
    return _scaled(b, step, "add", x, bias) or elementwise(b, step, "add", x, bias)


def batch_norm(b: Builder, step: Step, x: Operand, *parameters: Operand) -> list[Node]:
    if attribute(step.node, "is_training") is not False:
        raise ConversionError("it normalises by the batch it sees, not by stored statistics")
    scale, offset, mean, var = (constant(p, "a parameter").array.astype(np.float64) for p in parameters)
    gain = scale / np.sqrt(var + float(attribute(step.node, "epsilon")))
    node = data(x, "its input")
    node = b.flat(node) if attribute(step.node, "data_format") == "NCHW" else b.planar(node)
    return [b.affine(node, gain, offset - mean * gain)]


def sloped(op: str, name: str, default: float | None = None) -> Rule:
    def rule(b: Builder, step: Step, x: Operand) -> Node:
        node = data(x, "its input")
        value = default if default is not None else float(attribute(step.node, "alpha"))
        return b.emit(op, [node], step.shape, node.planar, **{name: value})

    return rule


def clip(b: Builder, step: Step, x: Operand, low: Operand, high: Operand) -> Node:
    bounds = [float(constant(bound, "a bound").array.reshape(())) for bound in (low, high)]
    node = data(x, "its input")
    return b.emit("clamp", [node], step.shape, node.planar, low=bounds[0], high=bounds[1])


def select(b: Builder, step: Step, condition: Operand, x: Operand, y: Operand) -> Node:
    node = b.node(condition)
    if step.op == "Select" and len(node.shape) == 1 < len(step.shape):  # rows
        node = b.reshape(node, (node.shape[0], *[1] * (len(step.shape) - 1)))
    return elementwise(b, step, "where", node, x, y)


def cast(b: Builder, step: Step, x: Operand) -> Node:
    tf, node = tensorflow(), data(x, "its input")
    source, target = attribute(step.node, "SrcT"), attribute(step.node, "DstT")
    if target == tf.bool:
        return b.emit("not_equal", [node, b.constant(np.float32(0))], step.shape, node.planar)
    if source == tf.bool:
        return b.emit("number", [node], step.shape, node.planar)
    if target.is_integer and source.is_floating:
        return b.emit("truncate", [node], step.shape, node.planar)
    return node  # what is rounded by a cast is rounded behind it


def softmax(b: Builder, step: Step, x: Operand) -> Node:
    node = data(x, "its input")
    op = "softmax" if step.op == "Softmax" else "log_softmax"
    return b.emit(op, [node], step.shape, node.planar, axis=node.axis(-1))


# ---- layers with weights


def matmul(b: Builder, step: Step, x: Operand, y: Operand) -> Node:
    flags = [bool(attribute(step.node, f"transpose_{side}")) for side in "ab"]
    if isinstance(x, Node) and isinstance(y, Fixed) and y.same and not flags[0]:
        weight = y.array if flags[1] else y.array.T
        return b.emit("linear", [b.flat(x), b.constant(weight)], step.shape)
    return _product(b, step, x, y, flags)


def _product(b: Builder, step: Step, x: Operand, y: Operand, flags: list[bool]) -> Node:
    return b.emit("matmul", [b.flat(b.node(operand)) for operand in (x, y)], step.shape, transpose=flags)


def batch_matmul(b: Builder, step: Step, x: Operand, y: Operand) -> Node:
    return _product(b, step, x, y, [bool(attribute(step.node, f"adj_{side}")) for side in "xy"])


def einsum(b: Builder, step: Step, *operands: Operand) -> Node:
    equation = str(attribute(step.node, "equation")).replace(" ", "")
    names = {letter: chr(ord("a") + i) for i, letter in enumerate(dict.fromkeys(c for c in equation if c.isalpha()))}
    if "." in equation or len(names) > 26:
        raise ConversionError(f"the product {equation[:80]!r}")
    equation = "".join(names.get(c, c) for c in equation)
    return b.emit("einsum", [b.flat(b.node(operand)) for operand in operands], step.shape, equation=equation)


def _image(b: Builder, step: Step, x: Operand, what: str = "its input") -> tuple[Node, bool]:
    """The input with channels on torch's axis 1; whether TensorFlow has them last."""
    node, last = data(x, what), attribute(step.node, "data_format") in (None, "NHWC")
    return (b.planar(node) if last else b.flat(node)), last


def _window(step: Step, node: Node, kernel: tuple[int, int], last: bool) -> dict[str, Any]:
    """Stride, dilation, and zeros (top, bottom, left, right)."""
    first = 1 if last else 2
    strides, dilations = (attribute(step.node, name) or [1, 1, 1, 1] for name in ("strides", "dilations"))
    padding = attribute(step.node, "padding")
    stride, dilation = strides[first : first + 2], dilations[first : first + 2]
    sides = node.held[2:4]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [0, 0, 0, 0]
    if padding == "EXPLICIT":
        pads = list(attribute(step.node, "explicit_paddings")[2 * first : 2 * first + 4])
    elif padding == "SAME":
        pads = [n for i in range(2) for n in same_pads((sides[i],), (reach[i],), stride[i])]
    return {"stride": stride, "dilation": dilation, "padding": pads}


def _padded(node: Node, pads: list[int], test: Callable[[float], bool]) -> tuple[Node, list[int]]:
    """A padding before a window goes into it."""
    if node.op == "pad" and not any(pads) and test(node.attributes["value"]):
        margins = node.attributes["margins"]
        if not any(map(any, margins[:2])):
            return node.inputs[0], [*margins[2], *margins[3]]
    return node, pads


def conv(b: Builder, step: Step, x: Operand, kernel: Operand) -> Node:
    array = constant(kernel, "its kernel").array  # [height, width, inputs, outputs]
    node, last = _image(b, step, x)
    facts = _window(step, node, array.shape[:2], last)
    node, facts["padding"] = _padded(node, facts["padding"], lambda value: value == 0)
    if step.op == "DepthwiseConv2dNative":
        groups = array.shape[2]
        weight = array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)[:, None]
    else:
        groups, weight = node.held[1] // array.shape[2], array.transpose(3, 2, 0, 1)
    return b.emit("conv2d", [node, b.constant(weight)], step.shape, last, groups=groups, **facts)


def conv_transpose(b: Builder, step: Step, size: Operand, kernel: Operand, x: Operand) -> Node:
    array = constant(kernel, "its kernel").array  # [height, width, outputs, inputs]
    node, last = _image(b, step, x)
    if attribute(step.node, "dilations") not in (None, [], [1, 1, 1, 1]):
        raise ConversionError("a dilated transposed convolution")
    shape = step.shape
    wanted = shape[1:3] if last else shape[2:4]
    stub = Node("", [], {}, (1, wanted[0], wanted[1], 1) if last else (1, 1, *wanted), last, "")
    facts = _window(step, stub, array.shape[:2], last)
    stride, pads = facts["stride"], facts["padding"]
    full = [(n - 1) * s + k for n, s, k in zip(node.held[2:4], stride, array.shape[:2], strict=True)]
    held = [node.held[0], array.shape[2], *full]
    result = Node("conv_transpose2d", [], {}, tuple(held), False, "")
    whole = (held[0], full[0], full[1], held[1]) if last else tuple(held)
    result = b.emit("conv_transpose2d", [node, b.constant(array.transpose(3, 2, 0, 1))], whole, last, stride=stride)
    for i, low in enumerate((pads[0], pads[2])):
        missing = low + wanted[i] - full[i]
        if missing > 0:
            margins = [[0, 0], [0, 0], [0, 0], [0, 0]]
            margins[2 + i] = [0, missing]
            result = b.emit("pad", [result], shape, last, margins=margins, value=0.0)
        result = b.emit("slice", [result], shape, last, axis=2 + i, start=low, stop=low + wanted[i], step=1)
    return result


def pool(b: Builder, step: Step, x: Operand) -> Node:
    node, last = _image(b, step, x)
    first = 1 if last else 2
    size = attribute(step.node, "ksize")[first : first + 2]
    facts = _window(step, node, tuple(size), last)
    stride, pads = facts["stride"], facts["padding"]
    if step.op == "MaxPool":
        node, pads = _padded(node, pads, lambda value: value < -1e30)
        return b.emit("max_pool", [node], step.shape, last, size=size, stride=stride, padding=pads)
    if not any(pads):
        return b.emit("avg_pool", [node], step.shape, last, size=size, stride=stride)
    ones = np.pad(np.ones(node.held[2:4]), [pads[:2], pads[2:]])  # TensorFlow leaves the border out of the mean
    sides = step.shape[first : first + 2]
    count = np.array([
        [ones[i * stride[0] : i * stride[0] + size[0], j * stride[1] : j * stride[1] + size[1]].sum()
         for j in range(sides[1])] for i in range(sides[0])
    ])  # fmt: skip
    margins = [[0, 0], [0, 0], pads[:2], pads[2:]]
    padded = b.emit("pad", [node], node.shape, last, margins=margins, value=0.0)
    mean = b.emit("avg_pool", [padded], step.shape, last, size=size, stride=stride)
    return b.emit("mul", [mean, b.constant(math.prod(size) / count)], step.shape, last)


def reduce(b: Builder, step: Step, x: Operand, axis: Operand) -> Node:
    node, keep = data(x, "its input"), bool(attribute(step.node, "keep_dims"))
    axes = sorted({n % len(node.shape) for n in constant(axis, "its axis").ints()})
    if not keep and axes not in ([1, 2], [3], [1, 2, 3]):
        node = b.flat(node)
    held = sorted(node.axis(n) for n in axes)
    return b.emit(REDUCTIONS[step.op], [node], step.shape, node.planar and keep, axes=held, keep=keep)


# ---- space


def resize(b: Builder, step: Step, x: Operand, size: Operand) -> Node:
    """Every way of resizing is a matrix along each axis, which TensorFlow itself gives."""
    node = b.planar(data(x, "its input"))
    tf, matrices = tensorflow(), []
    for side, out in zip(node.shape[1:3], step.shape[1:3], strict=True):
        eye = np.eye(side, dtype=np.float32)[:, :, None, None]
        (result,) = evaluate(step.node, [tf.constant(eye), tf.constant([out, 1])])
        matrices.append(np.asarray(result)[:, :, 0, 0].T)
    factors = [len(m) // m.shape[1] for m in matrices]
    if all(np.array_equal(m, np.eye(m.shape[1]).repeat(f, 0)) for m, f in zip(matrices, factors, strict=True)):
        if factors == [1, 1]:
            return node
        return b.emit("nearest", [node], step.shape, True, factors=factors)
    return b.emit("resize", [node, *map(b.constant, matrices)], step.shape, True)


def depth_to_space(b: Builder, step: Step, x: Operand) -> Node:
    node, last = _image(b, step, x)
    n, c, h, w = node.held
    k = int(attribute(step.node, "block_size"))
    if step.op == "SpaceToDepth":
        node = _moved(b, node, (n, c, h // k, k, w // k, k), [0, 3, 5, 1, 2, 4], (n, c * k * k, h // k, w // k))
    else:
        node = _moved(b, node, (n, k, k, c // (k * k), h, w), [0, 3, 4, 1, 5, 2], (n, c // (k * k), h * k, w * k))
    node.shape, node.planar = step.shape, last
    return node


def _moved(b: Builder, node: Node, split: Shape, axes: list[int], joined: Shape) -> Node:
    """Reshaped, permuted and reshaped, all in torch's order."""
    node = b.emit("reshape", [node], split, shape=list(split))
    node = b.emit("permute", [node], tuple(split[i] for i in axes), axes=axes)
    return b.emit("reshape", [node], joined, shape=list(joined))


def space_to_batch(b: Builder, step: Step, x: Operand, block: Operand, margins: Operand) -> Node:
    node, k = b.flat(data(x, "its input")), constant(block, "its block").ints()
    pads = constant(margins, "its margins").array.reshape(-1, 2).tolist()
    shape = list(node.shape)
    m, rest = len(k), list(range(1 + 2 * len(k), len(shape) + len(k)))
    for i, (low, high) in enumerate(pads):
        shape[1 + i] += low + high
    every = [[0, 0], *pads, *[[0, 0]] * (len(shape) - 1 - m)]
    if any(map(any, every)):
        node = b.emit("pad", [node], tuple(shape), margins=every, value=0.0)
    split = [shape[0], *(n for i in range(m) for n in (shape[1 + i] // k[i], k[i])), *shape[1 + m :]]
    axes = [*(2 + 2 * i for i in range(m)), 0, *(1 + 2 * i for i in range(m)), *rest]
    return _moved(b, node, tuple(split), axes, step.shape)


def batch_to_space(b: Builder, step: Step, x: Operand, block: Operand, crops: Operand) -> Node:
    node, k = b.flat(data(x, "its input")), constant(block, "its block").ints()
    cuts = constant(crops, "its crops").array.reshape(-1, 2).tolist()
    m, shape = len(k), node.shape
    batch = -(-shape[0] // math.prod(k)) if shape[0] < 0 else shape[0] // math.prod(k)
    split = (*k, batch, *shape[1:])
    axes = [m, *(n for i in range(m) for n in (m + 1 + i, i)), *range(2 * m + 1, len(split))]
    joined = (batch, *(shape[1 + i] * k[i] for i in range(m)), *shape[1 + m :])
    node = _moved(b, node, split, axes, joined)
    for i, (low, _) in enumerate(cuts):
        stop = low + step.shape[1 + i]
        node = b.emit("slice", [node], step.shape, axis=1 + i, start=low, stop=stop, step=1)
    return node


# ---- cutting, joining, moving


def reshape(b: Builder, step: Step, x: Operand, *_: Operand) -> Node:
    return b.reshape(data(x, "its input"), step.shape)


def transpose(b: Builder, step: Step, x: Operand, perm: Operand) -> Node:
    node = data(x, "its input")
    axes = constant(perm, "its order").ints()
    if axes == [0, 3, 1, 2] and node.planar:  # channels come first from here: they are already
        return _renamed(b, node, step.shape, False)
    node = b.flat(node)
    if axes == [0, 2, 3, 1]:
        return _renamed(b, node, step.shape, True)
    return b.emit("permute", [node], step.shape, axes=axes)


def _renamed(b: Builder, node: Node, shape: Shape, planar: bool) -> Node:
    """The same tensor under another of TensorFlow's shapes."""
    return b.emit("reshape", [node], shape, planar, shape=list(node.held))


def pad(b: Builder, step: Step, x: Operand, paddings: Operand, value: Operand | None = None) -> Node:
    node = data(x, "its input")
    margins = constant(paddings, "its margins").array.reshape(-1, 2).tolist()
    if not any(map(any, margins)):
        return node
    fill = float(constant(value, "its value").array.reshape(())) if value is not None else 0.0
    held = [margins[i] for i in ([0, 3, 1, 2] if node.planar else range(len(margins)))]
    return b.emit("pad", [node], step.shape, node.planar, margins=held, value=fill)


def mirror_pad(b: Builder, step: Step, x: Operand, paddings: Operand) -> Node:
    node, mode = data(x, "its input"), str(attribute(step.node, "mode")).lower()
    shape = list(node.shape)
    for axis, (low, high) in enumerate(constant(paddings, "its margins").array.reshape(-1, 2).tolist()):
        if low or high:
            indices = np.pad(np.arange(shape[axis]), (low, high), mode=mode).tolist()  # type: ignore[call-overload]
            shape[axis] = len(indices)
            node = b.emit("gather", [node], tuple(shape), node.planar, axis=node.axis(axis), indices=indices)
    return node


def concat(b: Builder, step: Step, *operands: Operand) -> Node:
    *parts, axis = operands if step.op == "ConcatV2" else (*operands[1:], operands[0])
    (where,) = constant(axis, "its axis").ints()
    nodes = [b.node(part) for part in parts]
    nodes = [node for node in nodes if 0 not in node.shape]
    planar = any(node.planar for node in nodes)
    nodes = [b.planar(node) if planar else node for node in nodes]
    return b.emit("concat", nodes, step.shape, planar, axis=nodes[0].axis(where))


def pack(b: Builder, step: Step, *operands: Operand) -> Node:
    axis = int(attribute(step.node, "axis") or 0) % len(step.shape)
    one = (*step.shape[:axis], 1, *step.shape[axis + 1 :])
    nodes = [b.reshape(b.node(operand), one) for operand in operands]
    return b.emit("concat", nodes, step.shape, axis=axis)


def unpack(b: Builder, step: Step, x: Operand) -> list[Node]:
    node = data(x, "its input")
    axis = int(attribute(step.node, "axis") or 0) % len(node.shape)
    return [b.reshape(_cut(b, node, axis, i, i + 1), shape) for i, shape in enumerate(step.shapes)]


def _cut(b: Builder, node: Node, axis: int, start: int, stop: int, step: int = 1) -> Node:
    if (start, stop, step) == (0, node.shape[axis], 1):
        return node
    if node.shape[axis] < 0:
        raise ConversionError("it cuts the batch")
    shape = (*node.shape[:axis], len(range(start, stop, step)), *node.shape[axis + 1 :])
    return b.emit("slice", [node], shape, node.planar, axis=node.axis(axis), start=start, stop=stop, step=step)


def split(b: Builder, step: Step, *operands: Operand) -> list[Node]:
    x, axis = (operands[1], operands[0]) if step.op == "Split" else (operands[0], operands[2])
    node = data(x, "its input")
    where = constant(axis, "its axis").ints()[0] % len(node.shape)
    ends = list(itertools.accumulate(shape[where] for shape in step.shapes))
    return [_cut(b, node, where, end - s[where], end) for end, s in zip(ends, step.shapes, strict=True)]


def cut(b: Builder, step: Step, x: Operand, begin: Operand, size: Operand) -> Node:
    node = data(x, "its input")
    for axis, low in enumerate(constant(begin, "its beginning").ints()):
        if node.shape[axis] != step.shape[axis]:
            node = _cut(b, node, axis, low, low + step.shape[axis])
    return node


def strided_slice(b: Builder, step: Step, x: Operand, *bounds: Operand) -> Node:
    node = data(x, "its input")
    fixed = [constant(bound, "a bound") for bound in bounds]
    masks = {name: int(attribute(step.node, name) or 0) for name in MASKS}
    spans = []
    for run, batch in enumerate(BATCHES):
        values = [[int(n) for n in bound.runs[run].reshape(-1)] for bound in fixed]
        spans.append(_spans(values, masks, concrete(node.shape, batch)))
    for axis, (first, second) in enumerate(zip(*spans, strict=True)):
        if node.shape[axis] < 0 and [first, second] == [(0, -node.shape[axis] * n, 1) for n in BATCHES]:
            continue
        if first != second:
            raise ConversionError("its bounds depend on the number of images")
        start, stop, stride = first
        if stride < 0:
            if (start, stop, stride) != (node.shape[axis] - 1, -1, -1):
                raise ConversionError(f"it steps backwards, by {stride}")
            node = b.emit("flip", [node], node.shape, node.planar, axes=[node.axis(axis)])
        else:
            node = _cut(b, node, axis, start, stop, stride)
    return node if node.shape == step.shape else b.reshape(node, step.shape)


def _spans(values: list[list[int]], masks: dict[str, int], sizes: Shape) -> list[tuple[int, int, int]]:
    """Start, stop and step along each axis of the input."""
    count = len(values[0])
    new = sum(masks["new_axis_mask"] >> i & 1 for i in range(count) if not masks["ellipsis_mask"] >> i & 1)
    result: list[tuple[int, int, int]] = []
    for i, (low, high, stride) in enumerate(zip(*values, strict=True)):
        if masks["ellipsis_mask"] >> i & 1:
            skipped = len(sizes) - (count - 1 - new)
            result += [(0, n, 1) for n in sizes[len(result) : len(result) + skipped]]
        elif not masks["new_axis_mask"] >> i & 1:
            n = sizes[len(result)]
            if masks["shrink_axis_mask"] >> i & 1:
                low = low % n
                result.append((low, low + 1, 1))
                continue
            bounds = slice(
                None if masks["begin_mask"] >> i & 1 else low, None if masks["end_mask"] >> i & 1 else high, stride
            )
            start, stop, stride = bounds.indices(n)
            result.append((start, max(stop, start) if stride > 0 else stop, stride))
    return result + [(0, n, 1) for n in sizes[len(result) :]]


def gather(b: Builder, step: Step, x: Operand, indices: Operand, axis: Operand | None = None) -> Node:
    node, places = data(x, "what it takes from"), constant(indices, "its index").array
    where = constant(axis, "its axis").ints()[0] % len(node.shape) if axis is not None else 0
    if attribute(step.node, "batch_dims") or node.shape[where] < 0:
        raise ConversionError("it takes rows of the batch")
    shape = (*node.shape[:where], places.size, *node.shape[where + 1 :])
    flat = [int(n) for n in places.reshape(-1)]
    node = b.emit("gather", [node], shape, node.planar, axis=node.axis(where), indices=flat)
    return node if shape == step.shape else b.reshape(node, step.shape)


def tile(b: Builder, step: Step, x: Operand, multiples: Operand) -> Node:
    node, fixed = data(x, "its input"), constant(multiples, "its multiples")
    if not fixed.same:
        return broadcast_to(b, step, x)
    repeats = [0] * len(node.shape)
    for axis, n in enumerate(fixed.ints()):
        repeats[node.axis(axis)] = n
    return b.emit("tile", [node], step.shape, node.planar, repeats=repeats)


def broadcast_to(b: Builder, step: Step, x: Operand, *_: Operand) -> Node:
    node = b.flat(data(x, "its input"))
    sides = zip(reversed(node.shape), reversed(step.shape), strict=False)
    if any(a not in (1, out) for a, out in sides):
        raise ConversionError("its multiples depend on the number of images")
    return b.emit("expand", [node], step.shape, shape=list(step.shape))


def reverse(b: Builder, step: Step, x: Operand, axis: Operand) -> Node:
    node = data(x, "its input")
    axes = [node.axis(n) for n in constant(axis, "its axes").ints()]
    return b.emit("flip", [node], step.shape, node.planar, axes=axes)


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), reshape),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), batch_norm),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), batch_matmul),
    **dict.fromkeys(("ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"), resize),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2dNative"), conv),
    **dict.fromkeys(("MaxPool", "AvgPool"), pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), depth_to_space),
    **dict.fromkeys(("Concat", "ConcatV2"), concat),
    **dict.fromkeys(("Split", "SplitV"), split),
    **dict.fromkeys(("Gather", "GatherV2"), gather),
    **dict.fromkeys(("Select", "SelectV2"), select),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(("Pad", "PadV2"), pad),
    "AddN": add_n,
    "BatchToSpaceND": batch_to_space,
    "BiasAdd": bias_add,
    "BroadcastTo": broadcast_to,
    "Cast": cast,
    "ClipByValue": clip,
    "Conv2DBackpropInput": conv_transpose,
    "Einsum": einsum,
    "Elu": sloped("elu", "alpha", 1.0),
    "LeakyRelu": sloped("leaky_relu", "slope"),
    "MatMul": matmul,
    "MirrorPad": mirror_pad,
    "Neg": negated,
    "Pack": pack,
    "ReverseV2": reverse,
    "Slice": cut,
    "SpaceToBatchND": space_to_batch,
    "SquaredDifference": squared_difference,
    "StridedSlice": strided_slice,
    "Tile": tile,
    "Transpose": transpose,
    "Unpack": unpack,
}
# Their results need no rounding where their inputs are rounded.
EXACT = {
    "Reshape", "Squeeze", "ExpandDims", "Transpose", "Pad", "PadV2", "MirrorPad", "Concat", "ConcatV2", "Split",
    "SplitV", "Pack", "Unpack", "Slice", "StridedSlice", "Gather", "GatherV2", "Tile", "BroadcastTo", "ReverseV2",
    "Relu", "MaxPool", "DepthToSpace", "SpaceToDepth", "SpaceToBatchND", "BatchToSpaceND", "Select", "SelectV2", "Neg", "Abs",
    "Sign", "Maximum", "Minimum",
}  # fmt: skip
