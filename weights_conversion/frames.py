"""What the interpreter works on: values, and the nodes of the main graph, of a function's call or of an iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError
from weights_conversion.operations import IDENTITIES, definition, output_offset

MAX_DEPTH = 32  # of functions and loops in each other
SWITCHES, MERGES = ("Switch", "RefSwitch"), ("Merge", "RefMerge")
ENTERS, EXITS, NEXTS = ("Enter", "RefEnter"), ("Exit", "RefExit"), ("NextIteration", "RefNextIteration")


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
    dtypes: list[str] = field(default_factory=list)


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
    """The main graph, one call of a function, or one iteration of a loop; then `parent` is what it lies in."""

    nodes: dict[str, Any]
    functions: dict[str, Any]
    arguments: dict[str, Value] = field(default_factory=dict)
    done: dict[str, list[Value]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    parent: Frame | None = None

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
            if self.op(name) not in (*SWITCHES, *IDENTITIES, *ENTERS):
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

    def loop_variables(self, name: str) -> tuple[set[str], int]:
        """The merges of a loop of TensorFlow 1 that a node of its body reads; how many nodes were looked at."""
        found: set[str] = set()
        stack, seen = [name], {name}
        while stack:
            node = self.nodes.get(stack.pop())
            if node is None or node.op in ENTERS:
                continue
            sources = [source for source, _ in self.sources(node)]
            if node.op in MERGES and any(self.op(source) in NEXTS for source in sources):
                found.add(node.name)
                continue
            if node.op in EXITS:  # of a loop inside this one: past it to what enters there
                sources = self._entering(sources[0])
            stack += [source for source in sources if source not in seen]
            seen.update(sources)
        return found, len(seen)

    def _entering(self, name: str) -> list[str]:
        """What enters the loop that a switch of its belongs to."""
        merge = self.nodes[self.sources(self.nodes[name])[0][0]]
        enters = [self.nodes[source] for source, _ in self.sources(merge) if self.op(source) in ENTERS]
        scopes = {enter.attr["frame_name"].s for enter in enters}
        same = [node for node in self.nodes.values() if node.op in ENTERS and node.attr["frame_name"].s in scopes]
        return [self.sources(enter)[0][0] for enter in same]
