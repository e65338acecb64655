"""Evaluates a module's graph along data edges, operation by operation, and records what depends on the inputs.

What depends on no input (variables, spectral norm, the choice between moving averages, constant conditions) turns
into constants on the way. Shapes count as constants too: a record holds for the batch size that was fed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.module import Module
from weights_conversion.operations import (
    IDENTITIES,
    MAX_ELEMENTS,
    NOISE,
    OUTPUT_OFFSETS,
    SHAPE_ONLY,
    attribute,
    evaluate,
)

MAX_STEPS, MAX_DEPTH = 500_000, 32
SMALL = 1 << 16  # constants up to this size remember what they were computed from
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
LEAVES = ("Const", "VarHandleOp", "VariableV2", "Variable", "ReadVariableOp", "ResourceGather", "Placeholder")
BRANCHES = ("If", "StatelessIf")

Noise = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(eq=False)
class Constant:
    """A value that depends on no input; small ones know the operation and the constants they come from."""

    name: str
    value: Any
    op: str = ""
    inputs: list[Constant] = field(default_factory=list)
    eps: float | None = None

    @property
    def array(self) -> np.ndarray:
        return np.asarray(self.value)


@dataclass(eq=False)
class Record:
    """An operation on data: its node, and its inputs, each a constant or (record, output)."""

    name: str
    op: str
    node: Any
    inputs: list[Constant | tuple[Record, int]]
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(eq=False)
class Value:
    """What one output of a node holds: always a tensor, and the record behind it if it depends on an input."""

    tensor: Any
    constant: Constant | None = None
    record: Record | None = None
    port: int = 0

    @property
    def source(self) -> Constant | tuple[Record, int]:
        if self.record is not None:
            return self.record, self.port
        assert self.constant is not None
        return self.constant


@dataclass(frozen=True)
class Variable:
    """A resource handle."""

    node: str
    key: str


DEAD = Value(None)  # the output of a switch that is not taken


@dataclass(eq=False)
class Frame:
    """The main graph, or one call of a function."""

    nodes: dict[str, Any]
    arguments: dict[str, Value]
    function: bool
    done: dict[str, list[Value]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)

    def resolve(self, reference: str) -> tuple[str, int]:
        """Node and output of "node:1", or of "node:output:1" inside a function."""
        parts = reference.split(":")
        port = int(parts[-1]) if len(parts) > 1 else 0
        if self.function and len(parts) == 3:
            port += OUTPUT_OFFSETS.get(parts[1], 0)
        return parts[0], port


class Interpreter:
    """One run of a module's signature.

    Args:
        noise: gives the values of the standard normal draws, by shape.
        record: keep records of operations on data (`records`), in order of evaluation.
    """

    def __init__(self, module: Module, noise: Noise, record: bool = True):
        self.module, self.noise, self.recording = module, noise, record
        self.records: list[Record] = []
        self.dropped: set[str] = set()  # nodes that hang on control edges of the data path
        self.steps = 0

    def run(self, signature: str, feeds: dict[str, np.ndarray]) -> dict[str, Value]:
        """Values of all outputs of a signature."""
        tf = tensorflow()
        described = self.module.signatures[signature]
        frame = Frame(self.module.nodes, {}, function=False)
        for name, reference in described.inputs.items():
            node, port = frame.resolve(reference)
            if port or node not in frame.nodes:
                raise ConversionError(f"signature {signature!r}: input {name!r} is {reference!r}, which is no node")
            tensor = tf.constant(feeds[name], tf.float32)
            frame.done[node] = [self._output(Record(node, "Input", frame.nodes[node], []), [tensor])[0]]
        outputs = [frame.resolve(reference) for reference in described.outputs.values()]
        self._count_uses(frame, [node for node, _ in outputs])
        values = self._fetch(frame, outputs, 0)
        for name, value in zip(described.outputs, values, strict=True):
            if value is DEAD:
                raise ConversionError(f"signature {signature!r}: output {name!r} is never computed")
        return dict(zip(described.outputs, values, strict=True))

    def _count_uses(self, frame: Frame, outputs: list[str]) -> None:
        """How often each node is read, so that what was read last can be dropped."""
        stack, seen = list(outputs), set(frame.done)
        for name in outputs:
            frame.uses[name] = frame.uses.get(name, 0) + 1
        while stack:
            name = stack.pop()
            if name in seen or name not in frame.nodes:
                continue
            seen.add(name)
            for reference in _data_inputs(frame.nodes[name]):
                source = frame.resolve(reference)[0]
                frame.uses[source] = frame.uses.get(source, 0) + 1
                stack.append(source)

    def _fetch(self, frame: Frame, wanted: list[tuple[str, int]], depth: int) -> list[Value]:
        stack = [name for name, _ in reversed(wanted)]
        open_nodes: set[str] = set()
        while stack:
            name = stack[-1]
            if name in frame.done or name in frame.arguments:
                stack.pop()
                continue
            if name not in frame.nodes:
                raise ConversionError(f"the graph refers to a node {name!r} that it lacks")
            node = frame.nodes[name]
            sources = [frame.resolve(reference) for reference in _data_inputs(node)]
            needs = [s for s, _ in sources if s not in frame.done and s not in frame.arguments]
            if needs:
                if name in open_nodes:
                    raise ConversionError(f"node {name!r} ({node.op}) depends on itself: loops are not supported")
                open_nodes.add(name)
                stack.extend(reversed(needs))
                continue
            stack.pop()
            open_nodes.discard(name)
            frame.done[name] = self._step(frame, node, [self._get(frame, *source) for source in sources], depth)
            for source, _ in sources:
                self._release(frame, source)
        return [self._get(frame, *source) for source in wanted]

    def _get(self, frame: Frame, name: str, port: int) -> Value:
        if name in frame.arguments:
            return frame.arguments[name]
        outputs = frame.done[name]
        if outputs and outputs[0] is DEAD and len(outputs) == 1:
            return DEAD
        if port >= len(outputs):
            raise ConversionError(f"the graph refers to output {port} of node {name!r}, which has {len(outputs)}")
        return outputs[port]

    def _release(self, frame: Frame, name: str) -> None:
        if name in frame.uses:
            frame.uses[name] -= 1
            if frame.uses[name] == 0:
                frame.done[name] = []

    def _step(self, frame: Frame, node: Any, inputs: list[Value], depth: int) -> list[Value]:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ConversionError(f"the graph takes more than {MAX_STEPS} steps; no BigBiGAN module does")
        self.dropped.update(reference[1:] for reference in node.input if reference.startswith("^"))
        if node.op == "Merge":
            alive = [(i, value) for i, value in enumerate(inputs) if value is not DEAD]
            if len(alive) != 1:
                raise ConversionError(f"node {node.name!r} (Merge) has {len(alive)} live inputs instead of one")
            index, value = alive[0]
            return [value, self._constant(node, np.int32(index))]
        if any(value is DEAD for value in inputs):
            return [DEAD]
        if node.op == "Switch":
            taken = self._condition(node, inputs[1])
            return [DEAD, inputs[0]] if taken else [inputs[0], DEAD]
        if node.op in IDENTITIES:
            if not inputs:
                raise ConversionError(f"node {node.name!r} ({node.op}) has no input")
            return inputs[:1]
        if node.op in BRANCHES:
            branch = "then_branch" if self._condition(node, inputs[0]) else "else_branch"
            return self._call(node, node.attr[branch].func.name, inputs[1:], depth)
        if node.op in CALLS:
            return self._call(node, node.attr["f"].func.name, inputs, depth)
        if node.op in self.module.functions:
            return self._call(node, node.op, inputs, depth)
        if node.op in LEAVES:
            return self._leaf(node, inputs)
        if node.op in NOISE:
            shape = tuple(int(n) for n in np.asarray(inputs[0].tensor))
            if math.prod(shape) > MAX_ELEMENTS:
                raise ConversionError(f"node {node.name!r} ({node.op}) would draw {math.prod(shape)} values")
            tensor = tensorflow().constant(self.noise(shape), tensorflow().float32)
            return self._output(Record(node.name, "Noise", node, []), [tensor])
        return self._operation(node, inputs)

    def _condition(self, node: Any, value: Value) -> bool:
        if value.record is not None:
            raise ConversionError(f"node {node.name!r} ({node.op}) depends on the data: it is no plain network")
        return bool(np.asarray(value.tensor).reshape(-1)[0])

    def _call(self, node: Any, name: str, inputs: list[Value], depth: int) -> list[Value]:
        function = self.module.functions.get(name)
        if function is None:
            raise ConversionError(f"node {node.name!r} ({node.op}) calls {name!r}, which the module lacks")
        if depth >= MAX_DEPTH:
            raise ConversionError(f"node {node.name!r} ({node.op}): functions are nested more than {MAX_DEPTH} deep")
        names = [argument.name for argument in function.signature.input_arg]
        if len(names) != len(inputs):
            raise ConversionError(f"node {node.name!r} ({node.op}) gives {len(inputs)} arguments to {name!r}")
        frame = Frame({n.name: n for n in function.node_def}, dict(zip(names, inputs, strict=True)), function=True)
        results = [function.ret[argument.name] for argument in function.signature.output_arg]
        return self._fetch(frame, [frame.resolve(reference) for reference in results], depth + 1)

    def _leaf(self, node: Any, inputs: list[Value]) -> list[Value]:
        """A constant or a variable."""
        tf = tensorflow()
        if node.op == "Placeholder":
            raise ConversionError(f"node {node.name!r} is an input that the signature does not name")
        if node.op == "Const":
            proto = node.attr["value"].tensor
            if math.prod(d.size for d in proto.tensor_shape.dim) > MAX_ELEMENTS:
                raise ConversionError(f"constant {node.name!r} is too large")
            try:
                return [self._constant(node, tf.make_ndarray(proto))]
            except (ValueError, TypeError) as error:
                raise ConversionError(f"constant {node.name!r} is damaged: {error}"[:300]) from error
        if node.op == "VarHandleOp":
            key = attribute(node, "shared_name") or node.name
            return [Value(None, Constant(node.name, Variable(node.name, key)))]
        if node.op in ("VariableV2", "Variable"):
            key = attribute(node, "shared_name") or node.name
            return [self._constant(node, self.module.variables.read(node.name, key))]
        handle = inputs[0].constant.value if inputs and inputs[0].constant else None
        if not isinstance(handle, Variable):
            raise ConversionError(f"node {node.name!r} ({node.op}) reads no variable of the module")
        value = self.module.variables.read(handle.node, handle.key)
        if node.op == "ResourceGather":
            return [self._constant(node, value[np.asarray(inputs[1].tensor)])]
        return [self._constant(node, value)]

    def _constant(self, node: Any, value: Any) -> Value:
        tensor = value if hasattr(value, "numpy") else tensorflow().convert_to_tensor(value)
        return Value(tensor, Constant(node.name, tensor, node.op))

    def _operation(self, node: Any, inputs: list[Value]) -> list[Value]:
        if any(value.tensor is None for value in inputs):
            raise ConversionError(f"node {node.name!r} ({node.op}) takes a variable's handle as a number")
        outputs = evaluate(node, [value.tensor for value in inputs])
        if all(value.record is None for value in inputs) or node.op in SHAPE_ONLY:
            sources = [value.constant for value in inputs if value.constant is not None]
            small = all(math.prod(t.shape) <= SMALL for t in outputs)
            constant = [Constant(node.name, t, node.op, sources if small else []) for t in outputs]
            return [Value(t, c) for t, c in zip(outputs, constant, strict=True)]
        return self._output(Record(node.name, node.op, node, [value.source for value in inputs]), outputs)

    def _output(self, record: Record, tensors: list[Any]) -> list[Value]:
        if not self.recording:
            return [Value(t, Constant(record.name, t)) for t in tensors]
        record.shapes = [tuple(t.shape) for t in tensors]
        self.records.append(record)
        return [Value(t, None, record, port) for port, t in enumerate(tensors)]


def _data_inputs(node: Any) -> list[str]:
    return [reference for reference in node.input if not reference.startswith("^")]
