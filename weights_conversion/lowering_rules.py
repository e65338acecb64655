"""How each of TensorFlow's operations on data is written in the graph form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from weights_conversion.algebra import same_pads
from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.lowering import Builder, Fixed, Node, Operand, Step
from weights_conversion.lowering_moves import MOVES, Rule, constant, data, image
from weights_conversion.operations import attribute

UNARY = {
    "Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Erfc": "erfc",
    "Exp": "exp", "Expm1": "expm1", "Floor": "floor",
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
        return b.emit("not_equal", [node, b.constant(np.zeros(()))], step.shape, node.planar)
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
    node, last = image(b, step, x)
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
    node, last = image(b, step, x)
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
    node, last = image(b, step, x)
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


RULES: dict[str, Rule] = {
    **MOVES,
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), batch_norm),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), batch_matmul),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2dNative"), conv),
    **dict.fromkeys(("MaxPool", "AvgPool"), pool),
    **dict.fromkeys(("Select", "SelectV2"), select),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    "AddN": add_n,
    "BiasAdd": bias_add,
    "Cast": cast,
    "ClipByValue": clip,
    "Conv2DBackpropInput": conv_transpose,
    "Einsum": einsum,
    "Elu": sloped("elu", "alpha", 1.0),
    "LeakyRelu": sloped("leaky_relu", "slope"),
    "MatMul": matmul,
    "Neg": negated,
    "SquaredDifference": squared_difference,
}
# Their results need no rounding where their inputs are rounded.
EXACT = {
    "Reshape", "Squeeze", "ExpandDims", "Transpose", "Pad", "PadV2", "MirrorPad", "Concat", "ConcatV2", "Split",
    "SplitV", "Pack", "Unpack", "Slice", "StridedSlice", "Gather", "GatherV2", "Tile", "BroadcastTo", "ReverseV2",
    "Relu", "MaxPool", "DepthToSpace", "SpaceToDepth", "SpaceToBatchND", "BatchToSpaceND", "Select", "SelectV2",
    "Neg", "Abs", "Sign", "Maximum", "Minimum",
}  # fmt: skip
