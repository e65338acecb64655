"""The operations that may be evaluated: pure, numeric, and each with its arguments and attributes.

An entry reads "inputs | attributes"; `*name` takes a list. Whatever is not here stops a conversion.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError, tensorflow

MAX_ELEMENTS = 1 << 30

_BINARY = """Add AddV2 Sub Mul RealDiv Div DivNoNan MulNoNan Maximum Minimum Pow SquaredDifference FloorDiv FloorMod Mod
    Greater GreaterEqual Less LessEqual Equal NotEqual LogicalAnd LogicalOr"""
_UNARY = "Neg Sqrt Rsqrt Square Exp Log Log1p Tanh Reciprocal Inv Abs LogicalNot ZerosLike OnesLike"
_REDUCTIONS = "Sum Mean Max Min Prod"
_STRIDED = "begin_mask end_mask ellipsis_mask new_axis_mask shrink_axis_mask"

ALLOWED: dict[str, str] = {
    **{name: "x y" for name in _BINARY.split()},
    **{name: "x" for name in _UNARY.split()},
    **{name: "input axis | keep_dims" for name in _REDUCTIONS.split()},
    "All": "input axis | keep_dims",
    "Any": "input axis | keep_dims",
    "AddN": "*inputs",
    "AvgPool": "value | ksize strides padding data_format",
    "BatchMatMul": "x y | adj_x adj_y",
    "BatchMatMulV2": "x y | adj_x adj_y",
    "BiasAdd": "value bias | data_format",
    "BroadcastTo": "input shape",
    "Cast": "x | DstT Truncate",
    "Concat": "concat_dim *values",
    "ConcatV2": "*values axis",
    "Conv2D": "input filter | strides padding explicit_paddings data_format dilations",
    "DepthToSpace": "input | block_size data_format",
    "Einsum": "*inputs | equation",
    "ExpandDims": "input axis",
    "Fill": "dims value",
    "FusedBatchNorm": "x scale offset mean variance | epsilon data_format is_training",
    "FusedBatchNormV2": "x scale offset mean variance | epsilon data_format is_training",
    "FusedBatchNormV3": "x scale offset mean variance | epsilon data_format is_training",
    "Gather": "params indices",
    "GatherV2": "params indices axis | batch_dims",
    "LeakyRelu": "features | alpha",
    "MatMul": "a b | transpose_a transpose_b",
    "MaxPool": "input | ksize strides padding explicit_paddings data_format",
    "OneHot": "indices depth on_value off_value | axis",
    "Pack": "*values | axis",
    "Pad": "input paddings",
    "PadV2": "input paddings constant_values",
    "Range": "start limit delta",
    "Rank": "input",
    "Relu": "features",
    "Reshape": "tensor shape",
    "ResizeBilinear": "images size | align_corners half_pixel_centers",
    "ResizeNearestNeighbor": "images size | align_corners half_pixel_centers",
    "Select": "condition x y",
    "SelectV2": "condition t e",
    "Shape": "input | out_type",
    "ShapeN": "*input | out_type",
    "Size": "input | out_type",
    "Slice": "input begin size",
    "Softmax": "logits",
    "Softplus": "features",
    "Split": "axis value | num_split",
    "SplitV": "value size_splits axis | num_split",
    "Squeeze": "input | squeeze_dims",
    "StridedSlice": f"input begin end strides | {_STRIDED}",
    "Tile": "input multiples",
    "Transpose": "x perm",
    "Unpack": "value | num axis",
}

IDENTITIES = (
    "Identity", "StopGradient", "PreventGradient", "Snapshot", "PlaceholderWithDefault", "CheckNumerics", "EnsureShape",
)  # fmt: skip
NOISE = ("RandomStandardNormal", "StatelessRandomNormal", "StatelessRandomNormalV2")
SHAPE_ONLY = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")  # see no values of their input
# Second and later outputs by name, as functions refer to them; other outputs start at 0.
OUTPUT_OFFSETS = {"output_true": 1, "value_index": 1, "batch_mean": 1, "batch_variance": 2}


def attribute(node: Any, name: str) -> Any:
    """An attribute as a Python value; None if the node has none of that name."""
    if name not in node.attr:
        return None
    value = node.attr[name]
    kind = value.WhichOneof("value")
    if kind == "s":
        return value.s.decode("utf-8", "replace")
    if kind == "type":
        return tensorflow().dtypes.as_dtype(value.type)
    if kind == "list":
        return list(value.list.i) or [s.decode("utf-8", "replace") for s in value.list.s]
    return getattr(value, kind) if kind in ("i", "f", "b") else None


def evaluate(node: Any, inputs: list[Any]) -> list[Any]:
    """Outputs of one allow-listed operation, evaluated alone.

    Raises:
        ConversionError: not on the list, malformed, or its result would be too large.
    """
    tf = tensorflow()
    if node.op not in ALLOWED:
        raise ConversionError(
            f"node {node.name!r} is a {node.op!r}, which is not among the numeric operations that a module may use"
        )
    arguments, _, attributes = ALLOWED[node.op].partition("|")
    names = arguments.split()
    extra = len(inputs) - len(names)
    if extra and not any(name.startswith("*") for name in names):
        raise ConversionError(f"node {node.name!r} ({node.op}) has {len(inputs)} inputs, not {len(names)}")
    _check_size(node, inputs)
    kwargs: dict[str, Any] = {}
    rest = list(inputs)
    for name in names:
        if name.startswith("*"):
            kwargs[name[1:]], rest = rest[: 1 + extra], rest[1 + extra :]
        else:
            kwargs[name] = rest.pop(0)
    for name in attributes.split():
        if (value := attribute(node, name)) is not None:
            kwargs["axis" if name == "squeeze_dims" else name] = value
    try:
        result = getattr(tf.raw_ops, node.op)(**kwargs)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConversionError(f"node {node.name!r} ({node.op}) cannot be evaluated: {text}") from error
    return list(result) if isinstance(result, list | tuple) else [result]


def _check_size(node: Any, inputs: list[Any]) -> None:
    """Refuses results that could fill the memory, before they are made."""
    shapes = [tuple(value.shape) for value in inputs]

    def numbers(index: int) -> list[int]:
        return [int(v) for v in np.asarray(inputs[index]).reshape(-1)[:64]]

    count = 0
    if node.op in ("Fill", "BroadcastTo", "Tile", "ResizeBilinear", "ResizeNearestNeighbor", "Pad", "PadV2"):
        index = 0 if node.op == "Fill" else 1
        values = numbers(index)
        count = math.prod(abs(v) for v in values)
        if node.op == "Tile":
            count *= math.prod(shapes[0])
        if node.op.startswith("Resize"):
            count *= shapes[0][0] * shapes[0][-1] if len(shapes[0]) == 4 else 1
        if node.op.startswith("Pad"):
            sides = zip(shapes[0], values[::2], values[1::2], strict=False)
            count = math.prod(s + abs(a) + abs(b) for s, a, b in sides)
    elif node.op == "Range":
        start, limit, delta = (float(np.asarray(value)) for value in inputs)
        count = int(abs((limit - start) / delta)) if delta else MAX_ELEMENTS + 1
    elif node.op == "OneHot":
        count = math.prod(shapes[0]) * abs(numbers(1)[0])
    elif node.op in _BINARY.split():
        a, b = (math.prod(shape) for shape in shapes)
        count = a * b if a * b > MAX_ELEMENTS else 0
        if count:
            try:
                count = math.prod(np.broadcast_shapes(*shapes))
            except ValueError:
                count = 0  # TensorFlow says what is wrong
    elif node.op in ("MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum") and len(shapes) == 2:
        count = math.prod(shapes[0][:-1]) * max(shapes[1], default=1) if node.op == "MatMul" else 0
    elif node.op in ("Gather", "GatherV2"):
        count = math.prod(shapes[1]) * (math.prod(shapes[0]) // max(min(shapes[0], default=1), 1))
    if count > MAX_ELEMENTS:
        raise ConversionError(f"node {node.name!r} ({node.op}) would make {count} values")
