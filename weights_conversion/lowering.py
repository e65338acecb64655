"""From records of two batch sizes to a graph of any batch size: shapes, constants and layouts.

What differs between the two runs is a multiple of the batch size N, or one row repeated for each image. Sizes are
symbolic: -k is k * N. Four-dimensional values that TensorFlow keeps as [N, H, W, C] are `planar`: held as [N, C, H, W].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbigan.graph import Graph, Operation
from weights_conversion.errors import ConversionError
from weights_conversion.frames import Constant, Record, Value
from weights_conversion.trace import describe

BATCHES = (2, 3)  # that the two runs are made with
Shape = tuple[int, ...]
PLANAR = (0, 2, 3, 1)  # where TensorFlow's axes are in a planar value
TO_PLANAR, TO_FLAT = [0, 3, 1, 2], [0, 2, 3, 1]


@dataclass(eq=False)
class Node:
    """An operation, an input or a constant of the graph in the making; `shape` is TensorFlow's."""

    op: str
    inputs: list[Node]
    attributes: dict[str, Any]
    shape: Shape
    planar: bool
    name: str
    array: np.ndarray | None = None  # of constants, as it is held

    @property
    def held(self) -> Shape:
        """The shape of the torch tensor."""
        return tuple(self.shape[i] for i in TO_PLANAR) if self.planar else self.shape

    def axis(self, axis: int) -> int:
        """TensorFlow's axis as an axis of the torch tensor."""
        axis %= len(self.shape)
        return PLANAR[axis] if self.planar else axis


@dataclass(eq=False)
class Fixed:
    """A constant operand as the two runs have it."""

    name: str
    runs: tuple[np.ndarray, np.ndarray]

    @property
    def same(self) -> bool:
        a, b = self.runs
        return a is b or (a.shape == b.shape and np.array_equal(a, b))

    @property
    def array(self) -> np.ndarray:
        """Raises ConversionError if it follows the batch size."""
        if not self.same:
            raise ConversionError(f"constant {self.name!r} depends on the number of images")
        return self.runs[0]

    def ints(self) -> list[int]:
        return [int(n) for n in self.array.reshape(-1)]


Operand = Node | Fixed


@dataclass
class Step:
    """A record in both runs."""

    records: tuple[Record, Record]
    shapes: list[Shape]

    @property
    def record(self) -> Record:
        return self.records[0]

    @property
    def op(self) -> str:
        return self.record.op

    @property
    def node(self) -> Any:
        return self.record.node

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def shape(self) -> Shape:
        return self.shapes[0]


def symbolic(a: Iterable[int], b: Iterable[int], name: str) -> Shape:
    """One shape of two runs."""
    sizes = []
    for x, y in zip(a, b, strict=True):
        if x != y and (x * BATCHES[1] != y * BATCHES[0] or x % BATCHES[0]):
            raise ConversionError(f"node {name!r} has a size of {x} for {BATCHES[0]} images and {y} for {BATCHES[1]}")
        sizes.append(int(x) if x == y else -int(x) // BATCHES[0])
    return tuple(sizes)


def concrete(shape: Iterable[int], batch: int) -> Shape:
    return tuple(-n * batch if n < 0 else n for n in shape)


class Builder:
    """Makes nodes, in the order in which they run."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._layouts: dict[tuple[int, bool], Node] = {}
        self.where = ""  # the node in TensorFlow's graph that constants are named after

    def emit(self, op: str, inputs: list[Node], shape: Shape, planar: bool = False, /, **attributes: Any) -> Node:
        node = Node(op, inputs, attributes, shape, planar, self.where)
        self.nodes.append(node)
        return node

    def constant(self, array: np.ndarray, planar: bool = False) -> Node:
        """A constant of TensorFlow's shape; a planar one is transposed here."""
        array = np.asarray(array)
        held = np.transpose(array, TO_PLANAR) if planar else array
        return Node("constant", [], {}, tuple(array.shape), planar, self.where, held)

    def node(self, operand: Operand) -> Node:
        """An operand as a tensor."""
        if isinstance(operand, Node):
            return operand
        a, b = operand.runs
        if operand.same:
            return self.constant(a)
        if a.shape == b.shape:
            if not np.allclose(a.astype(np.float64) * BATCHES[1], b.astype(np.float64) * BATCHES[0], rtol=1e-6):
                raise ConversionError(f"constant {operand.name!r} is not a multiple of the number of images")
            return self.emit("times_batch", [self.constant(a / BATCHES[0])], tuple(a.shape))
        if a.ndim != b.ndim:
            raise ConversionError(f"constant {operand.name!r} has {a.ndim} or {b.ndim} axes, by the number of images")
        shape = symbolic(a.shape, b.shape, operand.name)
        (axis, *others) = [i for i, n in enumerate(shape) if n < 0]
        split = [array.reshape(*array.shape[:axis], n, -shape[axis], *array.shape[axis + 1 :])
                 for array, n in zip((a, b), BATCHES, strict=True)]  # fmt: skip
        row = split[0].take([0], axis=axis)
        if others or not all((array == row).all() for array in split):
            raise ConversionError(f"constant {operand.name!r} differs between images: it is not one row repeated")
        expanded = (*shape[:axis], -1, -shape[axis], *shape[axis + 1 :])
        node = self.emit("expand", [self.constant(row)], expanded, shape=list(expanded))
        return self.emit("reshape", [node], shape, shape=list(shape))

    # ---- layouts

    def flat(self, node: Node) -> Node:
        """In TensorFlow's order of axes."""
        return self._layout(node, False) if node.planar else node

    def planar(self, node: Node) -> Node:
        """Four axes, channels second."""
        return node if node.planar else self._layout(node, True)

    def _layout(self, node: Node, planar: bool) -> Node:
        key = id(node), planar
        if key not in self._layouts:
            if node.array is not None:
                array = np.transpose(node.array, TO_FLAT) if node.planar else node.array
                self._layouts[key] = self.constant(array, planar)
            else:
                axes = TO_PLANAR if planar else TO_FLAT
                self._layouts[key] = self.emit("permute", [node], node.shape, planar, axes=axes)
        return self._layouts[key]

    def reshape(self, node: Node, shape: Shape) -> Node:
        """To another TensorFlow shape of as many values, flat."""
        if shape == node.shape and not node.planar:
            return node
        node = self.flat(node)
        if node.array is not None and all(n >= 0 for n in shape):
            return self.constant(node.array.reshape(shape))
        return self.emit("reshape", [node], shape, shape=list(shape))

    def broadcast(self, nodes: list[Node], rank: int) -> tuple[list[Node], bool]:
        """Operands of an elementwise operation in one layout; whether that is planar."""
        wide = [n for n in nodes if len(n.shape) == 4]
        if rank != 4 or not any(n.planar for n in wide):
            return [self.flat(n) for n in nodes], False
        if any(len(n.shape) in (2, 3) and n.array is None for n in nodes):
            return [self.flat(n) for n in nodes], False
        result = []
        for n in nodes:
            if 0 < len(n.shape) < 4:
                n = self.reshape(n, (*[1] * (4 - len(n.shape)), *n.shape))
            result.append(self.planar(n) if n.shape else n)
        return result, True

    # ---- scales and shifts of channels

    def affine(self, x: Node, scale: np.ndarray | float, shift: np.ndarray | float) -> Node:
        """x * scale + shift, each one number or one for each value of torch's axis 1."""
        arrays = [np.asarray(value, np.float64).reshape(-1) for value in (scale, shift)]
        return self.emit("affine", [x], x.shape, x.planar, scale=arrays[0], shift=arrays[1])

    def channels(self, x: Node, operand: Operand) -> tuple[Node, np.ndarray] | None:
        """x and a constant as `affine` takes them, if the constant is one number, or one a channel."""
        if isinstance(operand, Node) or not operand.same:
            return None
        array = operand.array
        if array.size == 1 and array.ndim <= len(x.shape):
            return x, array.reshape(-1)
        size = x.shape[-1] if x.shape else 0
        fits = array.shape[-1:] == (size,) and array.size == size and array.ndim <= len(x.shape)
        if not fits or len(x.shape) not in (2, 4):
            return None
        return (self.planar(x) if len(x.shape) == 4 else x), array.reshape(-1)


# ---- folding and writing


def ordered(outputs: Iterable[Node]) -> list[Node]:
    """All nodes behind the outputs, each after its inputs."""
    result: list[Node] = []
    done: set[int] = set()
    stack: list[tuple[Node, Iterator[Node]]] = [(node, iter(node.inputs)) for node in outputs]
    while stack:
        node, inputs = stack[-1]
        if id(node) in done:
            stack.pop()
            continue
        following = next((n for n in inputs if id(n) not in done), None)
        if following is None:
            done.add(id(node))
            result.append(node)
            stack.pop()
        else:
            stack.append((following, iter(following.inputs)))
    return result


WEIGHTED = {"conv2d": 0, "linear": 0, "conv_transpose2d": 1}  # the axis of outputs in the weight


def fold(outputs: list[Node]) -> None:
    """Scales and shifts go into the layer, or the other scale and shift, whose only use they are."""
    nodes = ordered(outputs)
    uses: dict[int, int] = {}
    for node in (*outputs, *(n for m in nodes for n in m.inputs)):
        uses[id(node)] = uses.get(id(node), 0) + 1
    for node in nodes:
        if node.op != "affine" or uses[id(node.inputs[0])] != 1:
            continue
        source, scale, shift = node.inputs[0], node.attributes["scale"], node.attributes["shift"]
        if source.op == "affine":
            node.attributes = {
                "scale": source.attributes["scale"] * scale,
                "shift": source.attributes["shift"] * scale + shift,
            }
            node.inputs = source.inputs
        elif source.op in WEIGHTED and all(n.array is not None for n in source.inputs[1:]):
            x, weight, *bias = source.inputs
            assert weight.array is not None
            axis = WEIGHTED[source.op]
            size = weight.array.shape[axis]
            column = [1] * weight.array.ndim
            column[axis] = -1
            old = np.asarray(bias[0].array, np.float64) if bias else np.zeros(1)
            folded = weight.array.astype(np.float64) * scale.reshape(column)
            total = np.broadcast_to(old * scale + shift, (size,))
            arrays = [folded, *([total] if bias or total.any() else [])]
            constants = [Node("constant", [], {}, a.shape, False, source.name, a) for a in arrays]
            node.op, node.inputs, node.attributes = source.op, [x, *constants], source.attributes
            node.name = source.name


def finished(node: Node) -> Node:
    """An `affine` of the builder as an operation of the graph form; it replaces the node."""
    if node.op != "affine" or "scale" not in node.attributes:
        return node
    scale, shift = node.attributes["scale"], node.attributes["shift"]
    node.attributes = {}
    if scale.size == shift.size == 1:
        node.op, node.attributes = "scalar", {"factor": float(scale[0]), "term": float(shift[0])}
        return node
    size = max(scale.size, shift.size)
    vectors = [np.broadcast_to(value, (size,)) for value in (scale, shift)]
    column = (size,) if len(node.shape) == 2 else (size, 1, 1)
    if not shift.any():
        node.op, vectors = "mul", [vectors[0].reshape(column)]
    elif (scale == 1).all():
        node.op, vectors = "add", [vectors[1].reshape(column)]
    node.inputs = [node.inputs[0], *(Node("constant", [], {}, v.shape, False, node.name, v) for v in vectors)]
    return node


@dataclass
class Lowered:
    """A graph and the values of its constants, by their names in the network's state dict."""

    graph: Graph
    state: dict[str, Tensor] = field(default_factory=dict)


def write(outputs: dict[str, Node]) -> Lowered:
    """The graph behind some outputs."""
    fold(list(outputs.values()))
    for node in ordered(outputs.values()):
        finished(node)
    references: dict[int, int | str] = {}
    inputs: dict[str, Shape] = {}
    state: dict[str, Tensor] = {}
    operations: list[Operation] = []
    for node in ordered(outputs.values()):
        if node.op == "input":
            references[id(node)] = node.attributes["name"]
            inputs[node.attributes["name"]] = node.held[1:]
        elif node.array is not None:
            name = f"c{len(state)}_{_short(node.name)}"
            references[id(node)] = name
            state[name] = torch.from_numpy(np.array(node.array, np.float32, order="C", copy=True))
            if not torch.isfinite(state[name]).all():
                raise ConversionError(f"node {node.name!r}: a constant is not finite")
        else:
            references[id(node)] = len(operations)
            operations.append(Operation(node.op, tuple(references[id(n)] for n in node.inputs), node.attributes))
    graph = Graph(
        inputs,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        tuple(operations),
        {name: references[id(node)] for name, node in outputs.items()},
    )
    return Lowered(graph, {f"constants.{name}": tensor for name, tensor in state.items()})


def _short(name: str) -> str:
    """What a node is part of, as a name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name.rpartition("/")[0] or name)[-60:].strip("_") or "x"


def paired(first: list[Record], second: list[Record]) -> list[Step]:
    """The records of two runs, which must be the same steps.

    Raises:
        ConversionError: they are not.
    """
    places = [{id(record): i for i, record in enumerate(records)} for records in (first, second)]

    def kinds(record: Record, place: dict[int, int]) -> list[Any]:
        return [None if isinstance(s, Constant) else (place[id(s[0])], s[1]) for s in record.inputs]

    if len(first) != len(second):
        raise ConversionError(f"the graph takes {len(first)} or {len(second)} operations, by the number of images")
    steps = []
    for a, b in zip(first, second, strict=True):
        same = (a.name, a.op, len(a.shapes)) == (b.name, b.op, len(b.shapes))
        if not same or kinds(a, places[0]) != kinds(b, places[1]):
            raise ConversionError(f"{describe(a)}: another operation for another number of images")
        try:
            shapes = [symbolic(x, y, a.name) for x, y in zip(a.shapes, b.shapes, strict=True)]
        except ValueError as error:
            raise ConversionError(f"{describe(a)}: its rank depends on the number of images") from error
        steps.append(Step((a, b), shapes))
    return steps


def fixed(a: Constant, b: Constant) -> Fixed:
    return Fixed(a.name, (np.asarray(a.value), np.asarray(b.value)))


def needed(records: list[Record], values: Iterable[Value]) -> set[int]:
    """Ids of the records behind some values."""
    found = {id(value.record) for value in values if value.record is not None}
    for record in reversed(records):
        if id(record) in found:
            found.update(id(source[0]) for source in record.inputs if not isinstance(source, Constant))
    return found
