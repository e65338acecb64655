"""Evaluates a module's graph along data edges, operation by operation, and records what depends on the inputs.

What depends on no input (variables, spectral norm, the choice between moving averages, constant conditions) turns
into constants on the way. Shapes count as constants too: a record holds for the batch size that was fed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.module import Module
from weights_conversion.operations import (
    IDENTITIES,
    MAX_ELEMENTS,
    NOISE,
    SHAPE_ONLY,
    definition,
    evaluate,
    output_offset,
)

MAX_STEPS, MAX_WALKED, MAX_DEPTH = 500_000, 20_000_000, 32
SMALL = 1 << 16  # constants up to this size remember what they were computed from
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
VARIABLES = ("VariableV2", "Variable")
LEAVES = ("Const", "VarHandleOp", *VARIABLES, "ReadVariableOp", "ResourceGather", "Placeholder")
INITIALIZED = ("IsVariableInitialized", "VarIsInitializedOp")
BRANCHES = ("If", "StatelessIf")
SWITCHES, MERGES = ("Switch", "RefSwitch"), ("Merge", "RefMerge")

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


@dataclass(eq=False)
class Variable:
    """A resource handle."""

    node: Any


DEAD = Value(None)  # the output of a switch that is not taken
Output = tuple[str, int]  # a node and which of its outputs


@dataclass(eq=False)
class Frame:
    """The main graph, or one call of a function."""

    nodes: dict[str, Any]
    functions: dict[str, Any]
    arguments: dict[str, Value] = field(default_factory=dict)
    done: dict[str, list[Value]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)

    def resolve(self, reference: str) -> Output:
        """Node and output of "node:1", or of "node:output:1" inside a function."""
        name, *rest = reference.split(":")
        if rest and not rest[-1].isdecimal():
            raise ConversionError(f"the graph refers to {reference[:200]!r}, which names no output of a node")
        port = int(rest[-1]) if rest else 0
        if len(rest) == 2 and (node := self.nodes.get(name)) is not None:
            function = self.functions.get(node.op)
            port += output_offset(node, rest[0], function.signature if function else definition(node.op))
        return name, port

    def sources(self, node: Any) -> list[Output]:
        """What a node takes along data edges."""
        return [self.resolve(reference) for reference in node.input if not reference.startswith("^")]

    def op(self, name: str) -> str:
        return self.nodes[name].op if name in self.nodes else ""

    def gates(self, node: Any) -> list[Output]:
        """The switches whose branch a node belongs to by a control edge alone, as the constants of a `tf.cond` do."""
        pivots = [self.nodes.get(reference[1:]) for reference in node.input if reference.startswith("^")]
        sources = [self.sources(pivot)[0] for pivot in pivots if pivot is not None and pivot.op == "Identity"]
        return [source for source in sources if self.op(source[0]) in SWITCHES]

    def variable(self, node: Any) -> str:
        """The variable behind a node's first input, past switches and copies of its handle."""
        name = self.sources(node)[0][0]
        for _ in range(MAX_DEPTH):
            if self.op(name) not in (*SWITCHES, *IDENTITIES):
                break
            name = self.sources(self.nodes[name])[0][0]
        return name

    def assignments(self, node: Any) -> tuple[list[Any], int]:
        """Assignments to a variable that control edges put before this read of it; how many nodes were looked at."""
        found, seen = [], {node.name}
        before = [reference[1:] for reference in node.input if reference.startswith("^")]
        while before:
            other = self.nodes.get(before.pop())
            if other is None or other.name in seen:
                continue
            seen.add(other.name)
            before += [reference.removeprefix("^").partition(":")[0] for reference in other.input]
            if other.op.startswith("Assign") and self.variable(other) == self.variable(node):
                found.append(other)
        return found, len(seen)


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
        self.steps = self.walked = 0
        self._bodies: dict[str, dict[str, Any]] = {}  # nodes by name, of functions

    def run(self, signature: str, feeds: dict[str, np.ndarray]) -> dict[str, Value]:
        """Values of all outputs of a signature."""
        tf = tensorflow()
        described = self.module.signatures[signature]
        frame = Frame(self.module.nodes, self.module.functions)
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
            for source, _ in frame.sources(frame.nodes[name]):
                frame.uses[source] = frame.uses.get(source, 0) + 1
                stack.append(source)

    def _fetch(self, frame: Frame, wanted: list[Output], depth: int) -> list[Value]:
        return [self._value(frame, output, depth) for output in wanted]

    def _value(self, frame: Frame, wanted: Output, depth: int) -> Value:
        """Walks down to what is needed on a stack of its own: graphs are deeper than Python's may be."""
        stack, path = [(wanted[0], self._visit(frame, *wanted, depth))], {wanted[0]}
        answer: Any = None
        while stack:
            name, visit = stack[-1]
            try:
                needed = visit.send(answer)
            except StopIteration as result:
                answer = result.value
                path.discard(stack.pop()[0])
                continue
            except ConversionError:
                raise
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                text = f"node {name!r} ({frame.op(name)}) is malformed: {type(error).__name__}: {error}"
                raise ConversionError(text[:400]) from error
            if needed[0] in path:
                raise ConversionError(f"node {needed[0]!r} depends on itself: loops are not supported")
            path.add(needed[0])
            stack.append((needed[0], self._visit(frame, *needed, depth)))
            answer = None
        return answer

    def _visit(self, frame: Frame, name: str, port: int, depth: int) -> Generator[Output, Value, Value]:
        """One output of a node; yields the outputs that it needs first, and is sent their values.

        What only a branch that is not taken needs is never evaluated.
        """
        if name in frame.arguments:
            return frame.arguments[name]
        if name not in frame.done:
            if name not in frame.nodes:
                raise ConversionError(f"the graph refers to a node {name!r} that it lacks")
            node = frame.nodes[name]
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise ConversionError(f"the graph takes more than {MAX_STEPS} steps; no BigBiGAN module does")
            if node.op in SWITCHES:
                data, predicate = frame.sources(node)
                condition = yield predicate
                dead = condition is DEAD or self._condition(node, condition) != bool(port)
                return DEAD if dead else (yield data)
            frame.done[name] = yield from self._outputs(frame, node, depth)
        outputs = frame.done[name]
        if len(outputs) == 1 and outputs[0] is DEAD:
            return DEAD
        if port >= len(outputs):
            raise ConversionError(f"the graph refers to output {port} of node {name!r}, which has {len(outputs)}")
        return outputs[port]

    def _outputs(self, frame: Frame, node: Any, depth: int) -> Generator[Output, Value, list[Value]]:
        for gate in frame.gates(node):
            if (yield gate) is DEAD:
                return [DEAD]
        self.dropped.update(reference[1:] for reference in node.input if reference.startswith("^"))
        if node.op in INITIALIZED:
            return [self._constant(node, True)]
        if node.op == "Assign":  # gives what it writes
            return [(yield frame.sources(node)[1])]
        if (written := (yield from self._written(frame, node))) is not None:
            return [written]
        sources, inputs = frame.sources(node), []
        for source in sources:
            inputs.append((yield source))
            if inputs[-1] is DEAD and node.op not in MERGES:
                return [DEAD]
        outputs = self._step(frame, node, inputs, depth)
        for name, _ in sources:
            self._release(frame, name)
        return outputs

    def _written(self, frame: Frame, node: Any) -> Generator[Output, Value, Value | None]:
        """For a read of a variable: what an assignment has put there just before; None if there is none."""
        if node.op != "ReadVariableOp" and not (node.op in IDENTITIES and frame.op(frame.variable(node)) in VARIABLES):
            return None
        (found, count), alive = frame.assignments(node), []
        self.walked += count
        if self.walked > MAX_WALKED:
            raise ConversionError(f"node {node.name!r} ({node.op}) and others before it hang on too many control edges")
        for other in found:
            for source in (*frame.gates(other), frame.sources(other)[0]):
                if (yield source) is DEAD:
                    break
            else:
                alive.append(other)
        if not alive:
            return None
        if len(alive) > 1 or alive[0].op not in ("Assign", "AssignVariableOp"):
            names = ", ".join(f"{other.name!r} ({other.op})" for other in alive)
            raise ConversionError(f"{names} changes a variable before {node.name!r} reads it")
        return (yield frame.sources(alive[0])[1])

    def _release(self, frame: Frame, name: str) -> None:
        if name in frame.uses and name in frame.done:
            frame.uses[name] -= 1
            if frame.uses[name] == 0:
                del frame.done[name]

    def _step(self, frame: Frame, node: Any, inputs: list[Value], depth: int) -> list[Value]:
        if node.op in MERGES:
            alive = [(i, value) for i, value in enumerate(inputs) if value is not DEAD]
            if len(alive) > 1:
                raise ConversionError(f"node {node.name!r} ({node.op}) has {len(alive)} live inputs instead of one")
            return [alive[0][1], self._constant(node, np.int32(alive[0][0]))] if alive else [DEAD]
        if node.op in IDENTITIES:
            return inputs
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
            shape = tuple(int(n) for n in np.asarray(inputs[0].tensor).reshape(-1))
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
        if name not in self._bodies:
            self._bodies[name] = {n.name: n for n in function.node_def}
        frame = Frame(self._bodies[name], self.module.functions, dict(zip(names, inputs, strict=True)))
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
            return [Value(None, Constant(node.name, Variable(node)))]
        if node.op in VARIABLES:
            return [self._constant(node, self.module.variables.read(node))]
        handle = inputs[0].constant.value if inputs and inputs[0].constant else None
        if not isinstance(handle, Variable):
            raise ConversionError(f"node {node.name!r} ({node.op}) reads no variable of the module")
        value = self.module.variables.read(handle.node)
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
        if (taken := _selected(node, inputs)) is not None and taken.tensor.shape == outputs[0].shape:
            return [taken]
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


def _selected(node: Any, inputs: list[Value]) -> Value | None:
    """What a selection by a constant condition takes as a whole."""
    if node.op not in ("Select", "SelectV2") or inputs[0].record is not None:
        return None
    condition = np.asarray(inputs[0].tensor)
    return inputs[1] if condition.all() else None if condition.any() else inputs[2]
