"""A network as its module has it: from two runs of its signature to a network in graph form."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from bigbigan.config import GraphConfig, GraphDiscriminatorConfig, GraphEncoderConfig, GraphGeneratorConfig
from bigbigan.graph import GraphDiscriminator, GraphEncoder, GraphGenerator, GraphNetwork
from bigbigan.schema import ConfigError
from weights_conversion.errors import ConversionError
from weights_conversion.frames import Constant, Record, Value
from weights_conversion.lowering import (
    Builder,
    Fixed,
    Lowered,
    Node,
    Shape,
    Step,
    fixed,
    needed,
    ordered,
    paired,
    write,
)
from weights_conversion.lowering_rules import EXACT, RULES
from weights_conversion.trace import describe

logger = logging.getLogger(__name__)

FEATURES = ("z_sample", "z_mean", "z_stdev", "avepool_feat", "bn_crelu_feat")
HALF = ("bfloat16", "float16")


@dataclass
class Run:
    """What one run of a signature gave: its records, and its outputs' values by name."""

    records: list[Record]
    values: dict[str, Value]
    inputs: dict[str, str]  # names of the signature's inputs by node


@dataclass
class GraphMatch:
    """A network in graph form, and whether it computes in half precision somewhere."""

    config: GraphConfig
    network: GraphNetwork
    half: bool


class _Lowering:
    """Nodes of the graph form for some outputs of two runs."""

    def __init__(self, first: Run, second: Run, outputs: list[str]):
        self.runs, self.builder, self.half = (first, second), Builder(), False
        kept = []
        for run in self.runs:
            ids = needed(run.records, (run.values[name] for name in outputs))
            kept.append([record for record in run.records if id(record) in ids])
        self.steps = paired(*kept)

    def nodes(self, outputs: list[str], cut: dict[tuple[int, int], Node] | None = None) -> dict[str, Node]:
        """The outputs' nodes; values that `cut` names are taken as they are there."""
        found: dict[tuple[int, int], Node] = dict(cut or {})
        values = [self.runs[0].values[name] for name in outputs]
        wanted = self._behind(values, set(found))
        for step in self.steps:
            if id(step.record) in wanted:
                self.builder.where = step.name
                results = self._step(step, found)
                found.update({(id(step.record), port): node for port, node in enumerate(results)})
        return {name: self._output(name, found) for name in outputs}

    def _behind(self, values: list[Value], known: set[tuple[int, int]]) -> set[int]:
        wanted = {id(v.record) for v in values if v.record is not None and (id(v.record), v.port) not in known}
        for step in reversed(self.steps):
            if id(step.record) in wanted:
                sources = [source for source in step.record.inputs if not isinstance(source, Constant)]
                wanted.update(id(record) for record, port in sources if (id(record), port) not in known)
        return wanted

    def _output(self, name: str, found: dict[tuple[int, int], Node]) -> Node:
        first, second = (run.values[name] for run in self.runs)
        self.builder.where = name
        if first.record is not None:
            return found[id(first.record), first.port]
        assert first.constant is not None and second.constant is not None
        node = self.builder.node(fixed(first.constant, second.constant))
        # A copy: a caller who changes an output must not change the network.
        return self.builder.emit("scalar", [node], node.shape, node.planar, factor=1.0, term=0.0)

    def _step(self, step: Step, found: dict[tuple[int, int], Node]) -> list[Node]:
        record = step.record
        if record.op == "Input":
            name, rank = self.runs[0].inputs[record.name], len(step.shape)
            return [self.builder.emit("input", [], step.shape, rank == 4, name=name)]
        if record.op == "Noise":
            return [self._noise(step)]
        operands: list[Node | Fixed] = [
            fixed(a, b) if isinstance(a, Constant) and isinstance(b, Constant) else found[id(a[0]), a[1]]  # type: ignore[index]
            for a, b in zip(record.inputs, step.records[1].inputs, strict=True)
        ]
        rule = RULES.get(record.op)
        if rule is None:
            raise ConversionError(f"{describe(record)}: the graph form has no such operation on data")
        try:
            made = rule(self.builder, step, *operands)
        except ConversionError as error:
            raise ConversionError(f"{describe(record)}: {error}") from error
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{describe(record)}: it cannot be written in the graph form ({error!r})") from error
        results = made if isinstance(made, list) else [made]
        if record.dtypes[0] in HALF:
            self.half = True
            if record.op not in EXACT:
                results = [
                    self.builder.emit("round_to", [node], node.shape, node.planar, dtype=record.dtypes[0])
                    for node in results
                ]
        return results

    def _noise(self, step: Step) -> Node:
        sizes = list(step.shape)
        batch = next((i for i, n in enumerate(sizes) if n < 0), -1)
        if batch < 0 or any(n != 1 for n in sizes[:batch]) or min(sizes[batch + 1 :], default=1) < 1:
            raise ConversionError(f"{describe(step.record)}: it does not draw noise for each image")
        width = math.prod(map(abs, sizes))
        node = self.builder.emit("input", [], (-1, width), False, name="noise")
        return self.builder.reshape(node, step.shape)

    def image(self, node: Node) -> Node:
        """[N, C, S, S]."""
        if len(node.shape) != 4 or node.shape[0] != -1 or node.shape[1] != node.shape[2]:
            raise ConversionError(f"an output has shape {_shown(node.shape)}, which is not that of square images")
        return self.builder.planar(node)

    def rows(self, node: Node, scalar: bool = False) -> Node:
        """[N, F], or with `scalar` [N]."""
        sizes = [n for n in node.shape[1:] if n != 1]
        if node.shape[:1] != (-1,) or len(sizes) > (0 if scalar else 1):
            raise ConversionError(f"an output has shape {_shown(node.shape)}")
        return self.builder.reshape(node, (-1,) if scalar else (-1, sizes[0] if sizes else 1))


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("N" if n == -1 else f"{-n} N" if n < 0 else str(n) for n in shape) + "]"


def graph_network(part: str, first: Run, second: Run) -> GraphMatch:
    """A part of a model from runs with 2 and 3 images, with the values that the module has; not yet proved.

    Raises:
        ConversionError: an operation or a constant that the graph form cannot hold, with the node's name.
    """
    make = {"generator": _generator, "encoder": _encoder, "discriminator": _discriminator}[part]
    try:
        match, lowered = make(first, second)
    except ConversionError:
        raise
    except ConfigError as error:
        raise ConversionError(str(error)) from error
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"it cannot be written in the graph form ({error!r})"[:300]) from error
    match.network.load_state_dict(lowered.state, strict=True, assign=True)
    match.network.eval()
    return match


def _sizes(lowered: Lowered, image: Shape, latent: int) -> dict[str, object]:
    return {
        "resolution": image[1], "image_channels": image[0], "z_dim": latent, "sha256": lowered.graph.sha256
    }  # fmt: skip


def _single_draw(run: Run, outputs: list[str]) -> bool:
    """Whether outputs depend on random draws; each may depend on one at most."""
    drawn = False
    for name in outputs:
        ids = needed(run.records, [run.values[name]])
        draws = [record for record in run.records if record.op == "Noise" and id(record) in ids]
        if len(draws) > 1:
            raise ConversionError(f"output {name!r} depends on {len(draws)} random draws; one at most is supported")
        drawn = drawn or bool(draws)
    return drawn


def _generator(first: Run, second: Run) -> tuple[GraphMatch, Lowered]:
    outputs: list[str] = [name for name in ("default", "upsampled") if name in first.values]
    if _single_draw(first, outputs):
        raise ConversionError("the images depend on random noise beside z")
    lowering = _Lowering(first, second, outputs)
    image = lowering.image(lowering.nodes(["default"])["default"])
    nodes, size = {"default": image}, image.shape[1]
    value = first.values["default"]
    if "upsampled" in outputs and value.record is not None:
        stand_in = lowering.builder.emit("input", [], image.shape, True, name="image")
        cut = {(id(value.record), value.port): stand_in}
        large = lowering.image(lowering.nodes(["upsampled"], cut)["upsampled"])
        if any(n.op == "input" and n.attributes["name"] == "z" for n in ordered([large])):
            logger.warning("the output 'upsampled' is not made from the image alone: the model will lack it")
        elif large is not stand_in:
            nodes["upsampled"], size = large, large.shape[1]
    lowered = write(nodes)
    latent = lowered.graph.inputs.get("z", (0,))[-1]
    facts = _sizes(lowered, image.held[1:], latent)
    config = GraphGeneratorConfig(upsample_size=size, **facts)  # type: ignore[arg-type]
    return GraphMatch(config, _empty(GraphGenerator, config, lowered), lowering.half), lowered


def _encoder(first: Run, second: Run) -> tuple[GraphMatch, Lowered]:
    outputs = list(FEATURES)
    noisy = _single_draw(first, outputs)
    lowering = _Lowering(first, second, outputs)
    nodes = {name: lowering.rows(node) for name, node in lowering.nodes(outputs).items()}
    lowered = write(nodes)
    facts = _sizes(lowered, lowered.graph.inputs.get("x", (0, 0, 0)), nodes["z_mean"].shape[1])
    config = GraphEncoderConfig(
        output="stochastic" if noisy else "deterministic",
        num_features=nodes["avepool_feat"].shape[1],
        **facts,  # type: ignore[arg-type]
    )
    return GraphMatch(config, _empty(GraphEncoder, config, lowered), lowering.half), lowered


def _discriminator(first: Run, second: Run) -> tuple[GraphMatch, Lowered]:
    outputs = [f"score_{name}" for name in ("x", "z", "xz") if f"score_{name}" in first.values]
    if _single_draw(first, outputs):
        raise ConversionError("the scores depend on random noise")
    lowering = _Lowering(first, second, outputs)
    lowered = write({name: lowering.rows(node, scalar=True) for name, node in lowering.nodes(outputs).items()})
    inputs = lowered.graph.inputs
    if set(inputs) != {"x", "z"}:
        raise ConversionError(f"its scores depend on {', '.join(inputs) or 'nothing'} alone, not on x and z")
    facts = _sizes(lowered, inputs["x"], inputs["z"][0])
    scores = tuple(name.removeprefix("score_") for name in outputs)
    config = GraphDiscriminatorConfig(scores=scores, **facts)  # type: ignore[arg-type]
    return GraphMatch(config, _empty(GraphDiscriminator, config, lowered), lowering.half), lowered


def _empty(make: type[GraphNetwork], config: GraphConfig, lowered: Lowered) -> GraphNetwork:
    with torch.device("meta"):
        network = make(config, lowered.graph)
    network.check()
    return network
