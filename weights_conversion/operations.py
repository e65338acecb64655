"""The operations that may be evaluated: pure, numeric, and each with its arguments and attributes.

An entry reads "inputs | attributes"; `*name` takes a list. Whatever is not here stops a conversion.
"""

from __future__ import annotations

import math
from typing import Any

from weights_conversion.errors import ConversionError, tensorflow

MAX_ELEMENTS = 1 << 28  # the largest tensor of a full-size module has a fifth of it
MAX_KNOWN = 1 << 10  # arguments up to this size (shapes, paddings, axes) tell the shape of a result

_BINARY = """Add AddV2 Sub Mul RealDiv Div DivNoNan MulNoNan Maximum Minimum Pow SquaredDifference FloorDiv FloorMod Mod
    Greater GreaterEqual Less LessEqual Equal NotEqual LogicalAnd LogicalOr"""
_UNARY = """Neg Sqrt Rsqrt Square Exp Expm1 Log Log1p Tanh Sigmoid Reciprocal Inv Abs Sign Floor Ceil Round Rint Erf
    Erfc Sin Cos LogicalNot ZerosLike OnesLike"""
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
    "BatchToSpaceND": "input block_shape crops",
    "BatchMatMul": "x y | adj_x adj_y",
    "BatchMatMulV2": "x y | adj_x adj_y",
    "BatchMatMulV3": "x y | Tout adj_x adj_y",
    "BiasAdd": "value bias | data_format",
    "BroadcastArgs": "s0 s1",
    "BroadcastTo": "input shape",
    "Cast": "x | DstT Truncate",
    "ClipByValue": "t clip_value_min clip_value_max",
    "Concat": "concat_dim *values",
    "ConcatV2": "*values axis",
    "Conv2D": "input filter | strides padding explicit_paddings data_format dilations",
    "Conv2DBackpropInput": "input_sizes filter out_backprop | strides padding explicit_paddings data_format dilations",
    "DepthwiseConv2dNative": "input filter | strides padding explicit_paddings data_format dilations",
    "DepthToSpace": "input | block_size data_format",
    "Einsum": "*inputs | equation",
    "Elu": "features",
    "ExpandDims": "input axis",
    "Fill": "dims value",
    "FusedBatchNorm": "x scale offset mean variance | epsilon data_format is_training",
    "FusedBatchNormV2": "x scale offset mean variance | epsilon data_format is_training",
    "FusedBatchNormV3": "x scale offset mean variance | epsilon data_format is_training",
    "Gather": "params indices",
    "GatherV2": "params indices axis | batch_dims",
    "InvertPermutation": "x",
    "L2Loss": "t",
    "LeakyRelu": "features | alpha",
    "LogSoftmax": "logits",
    "MatMul": "a b | transpose_a transpose_b",
    "MatrixDiag": "diagonal",
    "MirrorPad": "input paddings | mode",
    "MaxPool": "input | ksize strides padding explicit_paddings data_format",
    "OneHot": "indices depth on_value off_value | axis",
    "Pack": "*values | axis",
    "Pad": "input paddings",
    "PadV2": "input paddings constant_values",
    "Range": "start limit delta",
    "Rank": "input",
    "Relu": "features",
    "Relu6": "features",
    "Reshape": "tensor shape",
    "ResizeArea": "images size | align_corners",
    "ResizeBicubic": "images size | align_corners half_pixel_centers",
    "ResizeBilinear": "images size | align_corners half_pixel_centers",
    "ResizeNearestNeighbor": "images size | align_corners half_pixel_centers",
    "ReverseV2": "tensor axis",
    "Select": "condition x y",
    "SelectV2": "condition t e",
    "Selu": "features",
    "Shape": "input | out_type",
    "ShapeN": "*input | out_type",
    "Size": "input | out_type",
    "Slice": "input begin size",
    "Softmax": "logits",
    "Softplus": "features",
    "Softsign": "features",
    "SpaceToBatchND": "input block_shape paddings",
    "SpaceToDepth": "input | block_size data_format",
    "Split": "axis value | num_split",
    "SplitV": "value size_splits axis | num_split",
    "Squeeze": "input | squeeze_dims",
    "StridedSlice": f"input begin end strides | {_STRIDED}",
    "Tile": "input multiples",
    "Transpose": "x perm",
    "Unpack": "value | num axis",
}

_IMAGES = {
    "AvgPool", "Conv2D", "DepthToSpace", "DepthwiseConv2dNative", "FusedBatchNorm", "FusedBatchNormV2",
    "FusedBatchNormV3", "MaxPool", "SpaceToDepth",
}  # fmt: skip
# Results of all others hold at most as many values as their arguments.
_GROWING = {
    *_BINARY.split(), "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "BroadcastTo", "Concat", "ConcatV2", "Conv2D",
    "AvgPool", "MaxPool", "Einsum", "Fill", "Gather", "GatherV2", "MatMul", "OneHot", "Pack", "Pad", "PadV2", "Range",
    "ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor", "Select", "SelectV2", "Tile",
    "Conv2DBackpropInput", "DepthwiseConv2dNative", "MatrixDiag", "MirrorPad", "SpaceToBatchND",
}  # fmt: skip

IDENTITIES = (
    "Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot", "PlaceholderWithDefault", "CheckNumerics",
    "EnsureShape", "RefIdentity", "CheckNumericsV2", "DeepCopy", "Copy", "CopyHost", "LoopCond",
)  # fmt: skip
FIRST = ("Print",)  # identities of their first input that do something with the others, which is never done here
# Random draws, and what makes them from draws of N(0, 1), which is what the networks here take.
NOISE = {
    "RandomStandardNormal": "", "StatelessRandomNormal": "", "StatelessRandomNormalV2": "",
    "TruncatedNormal": "truncated_normal", "StatelessTruncatedNormal": "truncated_normal",
    "RandomUniform": "standard_uniform", "StatelessRandomUniform": "standard_uniform",
}  # fmt: skip
SHAPE_ONLY = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")  # see no values of their input


def definition(op: str) -> Any:
    """TensorFlow's definition of an operation; None for an unknown one."""
    tensorflow()
    from tensorflow.python.framework import op_def_registry

    return op_def_registry.get(op)


def attribute(node: Any, name: str) -> Any:
    """An attribute as a Python value; its default where the node lacks it, as hub modules are saved without those."""
    if name in node.attr:
        value = node.attr[name]
    else:
        known = definition(node.op)
        value = next((a.default_value for a in (known.attr if known else ()) if a.name == name), None)
    kind = value.WhichOneof("value") if value is not None else None
    if kind == "s":
        return value.s.decode("utf-8", "replace")
    if kind == "type":
        return tensorflow().dtypes.as_dtype(value.type)
    if kind == "list":
        return list(value.list.i) or [s.decode("utf-8", "replace") for s in value.list.s]
    return getattr(value, kind) if kind in ("i", "f", "b") else None


def output_offset(node: Any, name: str, known: Any) -> int:
    """Where a named output begins among those of a node whose operation or function has the definition `known`."""
    offset = 0
    for argument in known.output_arg if known else ():
        if argument.name == name:
            return offset
        listed = argument.type_list_attr and len(node.attr[argument.type_list_attr].list.type)
        offset += node.attr[argument.number_attr].i if argument.number_attr else listed or 1
    raise ConversionError(f"node {node.name!r} ({node.op}) has no output {name!r}")


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
    if node.op in _IMAGES and attribute(node, "data_format") == "NCHW":
        return _channels_first(node, inputs)
    arguments, _, attributes = ALLOWED[node.op].partition("|")
    names = arguments.split()
    extra = len(inputs) - len(names)
    if extra and not any(name.startswith("*") for name in names):
        raise ConversionError(f"node {node.name!r} ({node.op}) has {len(inputs)} inputs, not {len(names)}")
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
    function = getattr(tf.raw_ops, node.op)
    try:
        if node.op in _GROWING:
            _check_size(node, function, kwargs)
        result = function(**kwargs)
    except ConversionError:
        raise
    except (tf.errors.OpError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConversionError(f"node {node.name!r} ({node.op}) cannot be evaluated: {text}") from error
    return list(result) if isinstance(result, list | tuple) else [result]


def _channels_first(node: Any, inputs: list[Any]) -> list[Any]:
    """Outputs of an operation on [N, C, H, W], by its twin on [N, H, W, C], which is all that CPUs have."""
    tf, twin = tensorflow(), type(node)()
    twin.CopyFrom(node)
    twin.attr["data_format"].s = b"NHWC"
    for name, width in (("strides", 1), ("ksize", 1), ("dilations", 1), ("explicit_paddings", 2)):
        values = list(node.attr[name].list.i) if name in node.attr else []
        if len(values) == 4 * width:
            groups = [values[i : i + width] for i in range(0, len(values), width)]
            twin.attr[name].list.i[:] = [n for i in (0, 2, 3, 1) for n in groups[i]]
    if len(inputs[0].shape) != 4:
        raise ConversionError(f"node {node.name!r} ({node.op}) takes {len(inputs[0].shape)} axes")
    first, *others = evaluate(twin, [tf.transpose(inputs[0], [0, 2, 3, 1]), *inputs[1:]])
    return [tf.transpose(first, [0, 3, 1, 2]), *others]


def _check_size(node: Any, function: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a result that could fill the memory before it is made, by TensorFlow's own shape inference."""
    tf = tensorflow()

    def stand_in(value: Any) -> Any:
        if isinstance(value, list):
            return [stand_in(item) for item in value]
        if not tf.is_tensor(value):
            return value
        small = math.prod(value.shape) <= MAX_KNOWN
        return tf.constant(value.numpy()) if small else tf.compat.v1.placeholder(value.dtype, value.shape)

    shapes = {tuple(value.shape) for value in kwargs.values() if tf.is_tensor(value)}
    if node.op in _BINARY.split() and len(shapes - {()}) <= 1:
        return  # as large as its operands
    with tf.Graph().as_default():
        count = function(**{name: stand_in(value) for name, value in kwargs.items()}).shape.num_elements()
    if count is None or count > MAX_ELEMENTS:
        raise ConversionError(f"node {node.name!r} ({node.op}) would make {count or 'untold'} values")
