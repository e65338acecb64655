"""Evaluates a module's graph along data edges, operation by operation, and records what depends on the inputs.

What depends on no input (variables, spectral norm, the choice between moving averages, constant conditions) turns
into constants on the way. Shapes count as constants too: a record holds for the batch size that was fed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch

from bigbigan.graph_operations import UNARY
from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.frames import (
    DEAD,
    ENTERS,
    EXITS,
    MAX_DEPTH,
    MERGES,
    NEXTS,
    SWITCHES,
    Constant,
    Frame,
    Output,
    Record,
    Value,
    Variable,
)
from weights_conversion.module import Module
from weights_conversion.operations import (
    FIRST,
    IDENTITIES,
    MAX_ELEMENTS,
    NOISE,
    SHAPE_ONLY,
    evaluate,
)

MAX_STEPS, MAX_WALKED, MAX_ITERATIONS = 500_000, 20_000_000, 1000
SMALL = 1 << 16  # constants up to this size remember what they were computed from
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
VARIABLES = ("VariableV2", "Variable")
LEAVES = ("Const", "VarHandleOp", *VARIABLES, "ReadVariableOp", "ResourceGather", "Placeholder")
INITIALIZED = ("IsVariableInitialized", "VarIsInitializedOp")
BRANCHES, CASES, WHILES = ("If", "StatelessIf"), ("Case", "StatelessCase"), ("While", "StatelessWhile")

Noise = Callable[[tuple[int, ...]], np.ndarray]


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

    def run(
        self, signature: str, feeds: dict[str, np.ndarray], outputs: Iterable[str] | None = None
    ) -> dict[str, Value]:
        """Values of a signature's outputs, or of those that are named; inputs without a value are left out."""
        tf = tensorflow()
        described = self.module.signatures[signature]
        names = list(described.outputs if outputs is None else outputs)
        frame = Frame(self.module.nodes, self.module.functions)
        for name, array in feeds.items():
            reference = described.inputs[name]
            node, port = frame.resolve(reference)
            if port or node not in frame.nodes:
                raise ConversionError(f"signature {signature!r}: input {name!r} is {reference!r}, which is no node")
            tensor = tf.constant(array, tf.float32)
            frame.done[node] = [self._output(Record(node, "Input", frame.nodes[node], []), [tensor])[0]]
        wanted = [frame.resolve(described.outputs[name]) for name in names]
        self._count_uses(frame, [node for node, _ in wanted])
        values = dict(zip(names, self._fetch(frame, wanted, 0), strict=True))
        for name, value in values.items():
            if value is DEAD or value.tensor is None:
                raise ConversionError(f"signature {signature!r}: output {name!r} is never computed")
        return values

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
                raise ConversionError(f"node {needed[0]!r} depends on itself")
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
            self._count_step()
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
        if node.op in FIRST:
            return [(yield frame.sources(node)[0])]
        if node.op in ENTERS and frame.parent is not None:
            return self._fetch(frame.parent, frame.sources(node), depth + 1)
        if node.op in EXITS:
            return [(yield from self._loop(frame, node, depth))]
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

    def _count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ConversionError(f"the graph takes more than {MAX_STEPS} steps; no BigBiGAN module does")

    def _loop(self, frame: Frame, node: Any, depth: int) -> Generator[Output, Value, Value]:
        """What leaves a `while_loop` of TensorFlow 1 whose condition does not depend on the data."""
        merge, predicate = frame.sources(frame.nodes[frame.sources(node)[0][0]])
        condition = frame.sources(frame.nodes[predicate[0]])[0]  # what its LoopCond takes
        if depth >= MAX_DEPTH or frame.op(merge[0]) not in MERGES:
            raise ConversionError(f"node {node.name!r} ({node.op}) does not end a loop that can be evaluated")
        following: dict[str, Output] = {}  # by the merge of each variable that matters
        state: dict[str, Value] = {}
        new = {merge[0], *self._loop_variables(frame, condition[0])}
        while new:
            for name in sorted(new):
                first, again = frame.sources(frame.nodes[name])
                if frame.op(first[0]) in NEXTS:
                    first, again = again, first
                following[name] = frame.sources(frame.nodes[again[0]])[0]
                state[name] = yield frame.sources(frame.nodes[first[0]])[0]
                if state[name] is DEAD:
                    return DEAD
            new = {m for source, _ in following.values() for m in self._loop_variables(frame, source)} - set(following)
        for _ in range(MAX_ITERATIONS):
            self._count_step()
            inner = Frame(frame.nodes, frame.functions, dict(state), parent=frame)
            if not self._condition(node, self._fetch(inner, [condition], depth + 1)[0]):
                return state[merge[0]]
            values = self._fetch(inner, list(following.values()), depth + 1)
            state = dict(zip(following, values, strict=True))
        raise ConversionError(f"node {node.name!r} ({node.op}) ends a loop of more than {MAX_ITERATIONS} iterations")

    def _loop_variables(self, frame: Frame, name: str) -> set[str]:
        found, count = frame.loop_variables(name)
        self._count_walk(frame.nodes[name], count)
        return found

    def _count_walk(self, node: Any, count: int) -> None:
        self.walked += count
        if self.walked > MAX_WALKED:
            raise ConversionError(f"node {node.name!r} ({node.op}) and others before it hang on too many edges")

    def _written(self, frame: Frame, node: Any) -> Generator[Output, Value, Value | None]:
        """For a read of a variable: what an assignment has put there just before; None if there is none."""
        if node.op != "ReadVariableOp" and not (node.op in IDENTITIES and frame.op(frame.variable(node)) in VARIABLES):
            return None
        (found, count), alive = frame.assignments(node), []
        self._count_walk(node, count)
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
        if node.op in CASES:
            branches = node.attr["branches"].list.func
            index = self._chosen(node, inputs[0])
            chosen = branches[index if 0 <= index < len(branches) else -1]
            return self._call(node, chosen.name, inputs[1:], depth)
        if node.op in WHILES:
            return self._while(node, inputs, depth)
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
            return self._noise(node, shape)
        return self._operation(node, inputs)

    def _noise(self, node: Any, shape: tuple[int, ...]) -> list[Value]:
        """A draw of N(0, 1), and the map of it to the node's distribution."""
        tf = tensorflow()
        array = self.noise(shape)
        dtype = tf.dtypes.as_dtype(node.attr["dtype"].type) if node.attr["dtype"].type else tf.float32
        outputs = self._output(Record(node.name, "Noise", node, []), [tf.cast(tf.constant(array, tf.float32), dtype)])
        if kind := NOISE[node.op]:
            mapped = UNARY[kind](torch.from_numpy(np.asarray(array, np.float32))).numpy()
            record = Record(node.name, kind, node, [outputs[0].source])
            outputs = self._output(record, [tf.cast(tf.constant(mapped), dtype)])
        return outputs

    def _condition(self, node: Any, value: Value) -> bool:
        return bool(self._chosen(node, value))

    def _chosen(self, node: Any, value: Value) -> int:
        if value.record is not None:
            raise ConversionError(f"node {node.name!r} ({node.op}) has a condition that depends on images or latents")
        return int(np.asarray(value.tensor).reshape(-1)[0])

    def _while(self, node: Any, state: list[Value], depth: int) -> list[Value]:
        for _ in range(MAX_ITERATIONS):
            self._count_step()
            if not self._condition(node, self._call(node, node.attr["cond"].func.name, state, depth)[0]):
                return state
            state = self._call(node, node.attr["body"].func.name, state, depth)
        raise ConversionError(f"node {node.name!r} ({node.op}) takes more than {MAX_ITERATIONS} iterations")

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
        record.shapes, record.dtypes = [tuple(t.shape) for t in tensors], [t.dtype.name for t in tensors]
        self.records.append(record)
        return [Value(t, None, record, port) for port, t in enumerate(tensors)]


def _selected(node: Any, inputs: list[Value]) -> Value | None:
    """What a selection by a constant condition takes as a whole."""
    if node.op not in ("Select", "SelectV2") or inputs[0].record is not None:
        return None
    condition = np.asarray(inputs[0].tensor)
    return inputs[1] if condition.all() else None if condition.any() else inputs[2]
