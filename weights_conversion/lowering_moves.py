"""How TensorFlow's operations that resize, cut, join and move values are written in the graph form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.lowering import BATCHES, Builder, Fixed, Node, Operand, Shape, Step, concrete
from weights_conversion.operations import attribute, evaluate

Rule = Callable[..., Node | list[Node]]
MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def data(operand: Operand, what: str) -> Node:
    if isinstance(operand, Fixed):
        raise ConversionError(f"{what} is a constant")
    return operand


def constant(operand: Operand, what: str) -> Fixed:
    if isinstance(operand, Node):
        raise ConversionError(f"{what} depends on images or latents")
    return operand


def image(b: Builder, step: Step, x: Operand, what: str = "its input") -> tuple[Node, bool]:
    """The input with channels on torch's axis 1; whether TensorFlow has them last."""
    node, last = data(x, what), attribute(step.node, "data_format") in (None, "NHWC")
    return (b.planar(node) if last else b.flat(node)), last


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
    node, last = image(b, step, x)
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


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), reshape),
    **dict.fromkeys(("ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"), resize),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), depth_to_space),
    **dict.fromkeys(("Concat", "ConcatV2"), concat),
    **dict.fromkeys(("Split", "SplitV"), split),
    **dict.fromkeys(("Gather", "GatherV2"), gather),
    **dict.fromkeys(("Pad", "PadV2"), pad),
    "BatchToSpaceND": batch_to_space,
    "BroadcastTo": broadcast_to,
    "MirrorPad": mirror_pad,
    "Pack": pack,
    "ReverseV2": reverse,
    "Slice": cut,
    "SpaceToBatchND": space_to_batch,
    "StridedSlice": strided_slice,
    "Tile": tile,
    "Transpose": transpose,
    "Unpack": unpack,
}
