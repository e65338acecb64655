"""Networks in graph form: the operations that a module recorded, as data, run by one small `nn.Module`.

The converter writes this form for a network that the port does not express. It computes what the module computes; it
has no training recipes, no fused form and no other resolution than the module's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bigbigan import modelfolder
from bigbigan.config import GraphConfig, GraphDiscriminatorConfig, GraphEncoderConfig, GraphGeneratorConfig
from bigbigan.discriminator import DiscriminatorOutput
from bigbigan.encoder import EncoderOutput
from bigbigan.graph_operations import MAX_RANK, MAX_SIZE, MIXED, OPERATIONS, Context, check_operation
from bigbigan.integrity import strict_json
from bigbigan.modelfolder import MAX_GRAPH_BYTES
from bigbigan.pretrained import Pretrained
from bigbigan.schema import ConfigError, require

FORMAT = "bigbigan-graph/1"
MAX_OPERATIONS = MAX_CONSTANTS = 20_000
MAX_VALUES = 1 << 27  # of one intermediate tensor, for two images; the widest full-size network has a quarter
MAX_TOTAL = 1 << 33  # of all intermediate tensors together
BATCHES = (2, 3)  # that a graph's shapes are checked at
CONSTANT = re.compile(r"c\d{1,5}(_[A-Za-z0-9_]{1,64})?")  # no attribute of nn.Module has such a name
LATENTS = ("z_sample", "z_mean", "z_stdev")
FEATURES = ("avepool_feat", "bn_crelu_feat")

Reference = int | str  # an earlier operation by number, or an input or a constant by name


@dataclass(frozen=True)
class Operation:
    """One step; its attributes are JSON values."""

    op: str
    inputs: tuple[Reference, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Sizes of inputs [N, …] without the batch axis, shapes of constants, operations in order, outputs."""

    inputs: dict[str, tuple[int, ...]]
    constants: dict[str, tuple[int, ...]]
    operations: tuple[Operation, ...]
    outputs: dict[str, Reference]

    def text(self) -> bytes:
        """The graph's file; the same graph gives the same bytes."""
        lines = [
            json.dumps({"op": o.op, "inputs": o.inputs, **({"attributes": o.attributes} if o.attributes else {})})
            for o in self.operations
        ]
        head = {"format": FORMAT, "inputs": self.inputs, "constants": self.constants, "outputs": self.outputs}
        body = ",\n".join(lines)
        return (json.dumps(head, sort_keys=True)[:-1] + ', "operations": [\n' + body + "\n]}\n").encode()

    def behind(self, *outputs: str) -> set[Reference]:
        """The operations, inputs and constants that some outputs depend on."""
        found: set[Reference] = {self.outputs[name] for name in outputs}
        for i in reversed(range(len(self.operations))):
            if i in found:
                found.update(self.operations[i].inputs)
        return found

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text()).hexdigest()


# ---- reading


def parse_graph(data: bytes, where: str) -> Graph:
    """A graph from its file's bytes; nothing is allocated.

    Raises:
        ConfigError: not of this format, an unknown operation, a reference to nothing, or beyond a limit.
    """
    require(len(data) <= MAX_GRAPH_BYTES, f"{where} is larger than {MAX_GRAPH_BYTES} bytes")
    try:
        document = strict_json(data)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}"[:500]) from error
    keys = {"format", "inputs", "constants", "outputs", "operations"}
    require(isinstance(document, dict) and set(document) == keys, f"{where} should have the fields {sorted(keys)}")
    require(document["format"] == FORMAT, f"{where} has format {str(document['format'])[:60]!r}, not {FORMAT!r}")
    listed = document["operations"]
    many = isinstance(listed, list) and 1 <= len(listed) <= MAX_OPERATIONS
    require(many, f"{where}: operations should be a list of 1 to {MAX_OPERATIONS}")
    inputs, constants = (_shapes(document[key], f"{where}: {key}") for key in ("inputs", "constants"))
    require(bool(constants), f"{where} has no constants")
    for name in constants:
        require(CONSTANT.fullmatch(name) is not None, f"{where}: {name[:60]!r} is not the name of a constant")
    require(not set(inputs) & set(constants), f"{where}: an input and a constant have the same name")
    known: set[Reference] = {*inputs, *constants}
    operations = []
    for i, item in enumerate(listed):
        operations.append(_operation(item, known, f"{where}: operation {i}"))
        known.add(i)
    outputs = document["outputs"]
    require(isinstance(outputs, dict) and 1 <= len(outputs) <= 16, f"{where}: outputs should be an object")
    for name, reference in outputs.items():
        _check_reference(reference, known, f"{where}: output {name[:60]!r}")
    return Graph(inputs, constants, tuple(operations), outputs)


def _shapes(data: Any, where: str) -> dict[str, tuple[int, ...]]:
    fits = isinstance(data, dict) and len(data) <= MAX_CONSTANTS
    require(fits, f"{where} should be an object of at most {MAX_CONSTANTS} shapes")
    for name, shape in data.items():
        whole = isinstance(shape, list) and len(shape) <= MAX_RANK
        whole = whole and all(type(n) is int and 1 <= n <= MAX_SIZE for n in shape)
        require(whole, f"{where}: {name[:60]!r} has shape {str(shape)[:60]}")
        require(math.prod(shape) <= MAX_VALUES, f"{where}: {name[:60]!r} has {math.prod(shape)} values")
    return {name: tuple(shape) for name, shape in data.items()}


def _operation(item: Any, known: set[Reference], where: str) -> Operation:
    fields = isinstance(item, dict) and {"op", "inputs"} <= set(item) <= {"op", "inputs", "attributes"}
    require(fields, f"{where} should have op, inputs and perhaps attributes")
    inputs, attributes = item["inputs"], item.get("attributes", {})
    require(isinstance(inputs, list) and isinstance(attributes, dict), f"{where}: inputs or attributes are malformed")
    for reference in inputs:
        _check_reference(reference, known, where)
    check_operation(item["op"], len(inputs), attributes, where)
    return Operation(item["op"], tuple(inputs), attributes)


def _check_reference(reference: Any, known: set[Reference], where: str) -> None:
    fits = type(reference) in (int, str) and reference in known
    require(fits, f"{where} refers to {str(reference)[:60]!r}, which is neither an input nor an earlier operation")


def check_graph(graph: Graph, config: GraphConfig, where: str) -> None:
    """Compares a graph with its configuration: inputs, outputs, and the shapes of all values, without making any.

    Raises:
        ConfigError: they do not agree, an operation does not fit its inputs, or values would be too large.
    """
    image: tuple[int, ...] = (config.image_channels, config.resolution, config.resolution)
    latent: tuple[int, ...] = (config.z_dim,)
    inputs: dict[str, tuple[int, ...]]
    wanted: dict[str, tuple[int, ...]]
    if isinstance(config, GraphGeneratorConfig):
        inputs, optional = {"z": latent, "image": image}, {"image"}
        large = (config.image_channels, config.upsample_size, config.upsample_size)
        wanted = {"default": image, **({"upsampled": large} if "upsampled" in graph.outputs else {})}
        plain = "upsampled" in graph.outputs or config.upsample_size == config.resolution
        require(plain, f"{where} has no output 'upsampled' of {config.upsample_size} pixels")
        for name, other in (("default", "image"), ("upsampled", "z")):
            apart = name not in graph.outputs or other not in graph.behind(name)
            require(apart, f"{where}: output {name!r} depends on {other!r}, which is not there when it is made")
    elif isinstance(config, GraphEncoderConfig):
        inputs, optional = {"x": image, "noise": latent}, {"noise"}
        wanted = {**dict.fromkeys(LATENTS, latent), FEATURES[0]: (config.num_features,)}
        wanted[FEATURES[1]] = (2 * config.num_features,)
        require(("noise" in graph.inputs) == (config.output == "stochastic"), f"{where}: noise and output disagree")
    else:
        scores = cast(GraphDiscriminatorConfig, config).scores
        inputs, optional = {"x": image, "z": latent}, {"x", "z"}
        wanted = {f"score_{name}": () for name in scores}
    for name, shape in graph.inputs.items():
        require(inputs.get(name) == shape, f"{where}: input {name[:60]!r} of {list(shape)} does not fit config.json")
    require(set(inputs) - optional <= set(graph.inputs), f"{where}: inputs are {', '.join(graph.inputs) or 'none'}")
    require(set(wanted) == set(graph.outputs), f"{where}: outputs are {', '.join(graph.outputs)[:200]}")
    for batch in BATCHES:
        _check_values(graph, wanted, batch, where)


def _check_values(graph: Graph, wanted: dict[str, tuple[int, ...]], batch: int, where: str) -> None:
    """Runs the graph on tensors without values."""
    values: dict[Reference, Tensor] = {}
    for name, shape in graph.inputs.items():
        values[name] = torch.empty((batch, *shape), device="meta")
    for name, shape in graph.constants.items():
        values[name] = torch.empty(shape, device="meta")
    context, total = Context(batch, torch.float32), 0
    last = _last_uses(graph.operations, graph.outputs.values())
    for i, operation in enumerate(graph.operations):
        kinds = {values[reference].dtype for reference in operation.inputs}
        fits = operation.op in MIXED or kinds == {torch.float32}
        require(fits, f"{where}: operation {i} ({operation.op}) takes numbers, not true and false")
        try:
            value = OPERATIONS[operation.op].run(
                context, *(values[reference] for reference in operation.inputs), **operation.attributes
            )
        except (RuntimeError, ValueError, IndexError, TypeError, OverflowError, NotImplementedError) as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(f"{where}: operation {i} ({operation.op}) does not fit its inputs: {text}") from error
        total += value.numel()
        fits = value.ndim <= MAX_RANK and value.numel() <= MAX_VALUES and total <= MAX_TOTAL
        require(fits, f"{where}: operation {i} ({operation.op}) makes {list(value.shape)[:9]}, which is too large")
        values[i] = value
        for done in last[i]:
            values.pop(done, None)
    for name, reference in graph.outputs.items():
        shape, found = (batch, *wanted[name]), values[reference]
        fits = found.shape == shape and found.dtype == torch.float32
        require(fits, f"{where}: output {name!r} is {list(found.shape)}, not {list(shape)} for {batch} images")


def _last_uses(operations: Iterable[Operation], outputs: Iterable[Reference]) -> list[list[int]]:
    """Earlier operations whose values nothing needs after each operation."""
    kept, seen = set(outputs), set()
    result: list[list[int]] = []
    for i, operation in reversed(list(enumerate(operations))):
        new = [n for n in dict.fromkeys((*operation.inputs, i)) if type(n) is int and n not in seen and n not in kept]
        seen.update(new)
        result.append(new)
    return result[::-1]


def read_graph(folder: Path, part: str, config: GraphConfig) -> Graph:
    """The graph of a part in a model folder, checked against its configuration; nothing is allocated.

    Raises:
        ConfigError: it is missing, malformed, beyond a limit, or not the one that the configuration names.
    """
    where = str(folder / modelfolder.graph_file(part))
    graph = parse_graph(modelfolder.read_graph_file(folder, part, config), where)
    check_graph(graph, config, where)
    return graph


# ---- networks


class Constants(nn.Module):
    """The floating constants of a graph, by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class GraphNetwork(nn.Module, Pretrained):
    """Runs a graph. Its parameters are the graph's constants; the batch size is free, the resolution is not.

    Raises:
        ValueError: made without a graph, as `create_model` and training would.
    """

    def __init__(self, config: GraphConfig, graph: Graph | None = None, *, spectral_norm: bool = False):
        super().__init__()
        if graph is None:
            raise ValueError(
                f"a {self.part} in graph form comes from a model folder: it cannot be made with random weights or "
                "trained by a recipe, because only the operations of the module are known"
            )
        self.config, self.graph = config, graph
        self.constants = Constants(graph.constants)
        self._plans: dict[tuple[str, ...], list[tuple[int, Operation, list[int]]]] = {}

    @classmethod
    def build(cls, config: GraphConfig, folder: Path) -> GraphNetwork:
        """The network of a model folder, without its constants."""
        return cls(config, read_graph(folder, cls.part, config))

    def check(self, config: GraphConfig | None = None) -> None:
        """Raises ConfigError if the graph is not the one that a configuration names, or could not be loaded."""
        fits = self.graph.sha256 == (config or self.config).sha256
        require(fits, f"the {self.part}'s graph is not the one of its configuration")
        check_graph(parse_graph(self.graph.text(), self.part), self.config, self.part)

    def _plan(self, outputs: tuple[str, ...]) -> list[tuple[int, Operation, list[int]]]:
        """The operations that these outputs need, and what can be freed after each."""
        if outputs not in self._plans:
            needed = self.graph.behind(*outputs)
            steps = [(i, operation) for i, operation in enumerate(self.graph.operations) if i in needed]
            ends = {n: i for i, operation in steps for n in operation.inputs if type(n) is int}
            kept = {self.graph.outputs[name] for name in outputs}
            frees: dict[int, list[int]] = {i: [] for i, _ in steps}
            for n, i in ends.items():
                if n not in kept:
                    frees[i].append(n)
            self._plans[outputs] = [(i, operation, frees[i]) for i, operation in steps]
        return self._plans[outputs]

    def run(self, outputs: tuple[str, ...], **inputs: Tensor) -> list[Tensor]:
        """Values of some outputs.

        Raises:
            ValueError: an input of another size than the module's.
        """
        for name, tensor in inputs.items():
            if name in self.graph.inputs and tuple(tensor.shape[1:]) != self.graph.inputs[name]:
                raise ValueError(
                    f"{name} is {list(tensor.shape)}; this {self.part} in graph form takes "
                    f"[N, {', '.join(map(str, self.graph.inputs[name]))}] and no other size"
                )
        first = next(iter(inputs.values()))
        context = Context(first.shape[0], first.dtype)
        values: dict[Reference, Tensor] = {name: tensor for name, tensor in inputs.items()}
        values.update((name, tensor) for name, tensor in self.constants.named_parameters())
        for i, operation, free in self._plan(outputs):
            given = [values[n] for n in operation.inputs]
            values[i] = OPERATIONS[operation.op].run(context, *given, **operation.attributes)
            for done in free:
                del values[done]
        return [values[self.graph.outputs[name]] for name in outputs]

    def extra_repr(self) -> str:
        return f"{len(self.graph.operations)} operations"


class GraphGenerator(GraphNetwork):
    """Draws images from latents."""

    part, config_class = "generator", GraphGeneratorConfig
    config: GraphGeneratorConfig

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_dim] -> images [N, image_channels, resolution, resolution], with values as the module has them."""
        return self.run(("default",), z=z)[0]

    def upsample(self, images: Tensor) -> Tensor:
        """images: [N, C, S, S] -> [N, C, upsample_size, upsample_size], as the module's `upsampled` output.

        Images themselves where the module has no such output.
        """
        return self.run(("upsampled",), image=images)[0] if "upsampled" in self.graph.outputs else images


class GraphEncoder(GraphNetwork):
    """Features and latents of images."""

    part, config_class = "encoder", GraphEncoderConfig
    config: GraphEncoderConfig

    @property
    def num_features(self) -> int:
        """Width of avepool_feat."""
        return self.config.num_features

    def forward(self, x: Tensor, noise: Tensor | None = None) -> EncoderOutput:
        """x: [N, C, S, S] in [-1, 1]; noise: [N, z_dim] from N(0, 1), which z_sample is made with.

        Without noise it is drawn afresh, without touching torch's global generator.
        """
        inputs = {"x": x}
        if self.config.output == "stochastic":
            if noise is None:
                generator = torch.Generator(x.device)
                generator.seed()
                shape = (len(x), self.config.z_dim)
                noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
            inputs["noise"] = noise
        return EncoderOutput(*self.run((*LATENTS, *FEATURES), **inputs))


class GraphDiscriminator(GraphNetwork):
    """Scores pairs of image and latent."""

    part, config_class = "discriminator", GraphDiscriminatorConfig
    config: GraphDiscriminatorConfig

    def forward(self, x: Tensor, z: Tensor | None = None) -> DiscriminatorOutput:
        """x: [N, C, resolution, resolution] in [-1, 1]; z: [N, z_dim], not needed where no score takes it."""
        if z is None and "z" in self.graph.inputs:
            raise ValueError(f"the scores {', '.join(self.config.scores)} need latents; z is None")
        names = tuple(f"score_{name}" for name in self.config.scores)
        values = self.run(names, x=x, **({} if z is None else {"z": z}))
        found = dict(zip(names, values, strict=True))
        return DiscriminatorOutput(*(found.get(f"score_{name}") for name in ("x", "z", "xz")))
