"""From a module to its networks, one by one: as the port where it matches, else as the graph that the module has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from bigbigan.config import PARTS, BigBiGANConfig, PreprocessConfig
from bigbigan.model import PART_CLASSES, BigBiGAN
from bigbigan.schema import ConfigError
from weights_conversion.algebra import Poly
from weights_conversion.errors import ConversionError, DamagedModule
from weights_conversion.frames import Value
from weights_conversion.graph_form import Run, graph_network
from weights_conversion.interpret import Interpreter
from weights_conversion.layers import LayerTable
from weights_conversion.lowering import BATCHES
from weights_conversion.match_discriminator import match_discriminator
from weights_conversion.match_encoder import match_encoder
from weights_conversion.match_generator import match_generator
from weights_conversion.module import Module
from weights_conversion.patterns import State
from weights_conversion.trace import Tracer

logger = logging.getLogger(__name__)

BATCH = BATCHES[0]
Form = Literal["auto", "port", "graph"]
MATCHES: dict[str, Callable[[dict[str, Poly], LayerTable, State], Any]] = {
    "generator": match_generator,
    "encoder": match_encoder,
    "discriminator": match_discriminator,
}
SIGNATURES = {
    "generate": ({"z"}, {"default", "upsampled"}),
    "encode": ({"x"}, {"default", "z_sample", "z_mean", "z_stdev", "avepool_feat", "bn_crelu_feat"}),
    "discriminate": ({"x", "z"}, {"score_x", "score_z", "score_xz"}),
}
PART_SIGNATURES = {"generator": "generate", "encoder": "encode", "discriminator": "discriminate"}


@dataclass
class Found:
    """A network with a module's weights.

    `reason` says why it is not the port, `default` what the encoder's default output is.
    """

    config: Any
    network: nn.Module
    form: Literal["port", "graph"]
    reason: str = ""
    default: str = "z_sample"
    half: bool = False  # computes in bfloat16 or float16 somewhere


@dataclass
class Match:
    """The networks of a module, why the others could not be had, and the nodes on control edges that were dropped."""

    parts: dict[str, Found] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    @property
    def default_output(self) -> str:
        """What `default` of the module's `encode` is."""
        return self.parts["encoder"].default if "encoder" in self.parts else "z_sample"

    @property
    def model(self) -> BigBiGAN:
        return self.of(*self.parts)

    def of(self, *parts: str) -> BigBiGAN:
        """A model of some of the networks, which it shares.

        Raises:
            ConversionError: the networks do not fit together.
        """
        configs = {part: self.parts[part].config if part in parts else None for part in PART_SIGNATURES}
        reads = configs["encoder"] or configs["discriminator"]
        preprocess = PreprocessConfig(reads.resolution) if reads else PreprocessConfig()
        try:
            config = BigBiGANConfig(**configs, preprocess=preprocess)
        except ConfigError as error:
            raise ConversionError(f"the networks do not fit together: {error}") from error
        networks = {part: self.parts[part].network for part in parts}
        with torch.device("meta"):
            model = BigBiGAN(config, networks=networks)
        return model.eval()


def trace(module: Module, signature: str) -> tuple[Tracer, dict[str, Value], Interpreter]:
    """Layers of a signature and its outputs' values, from one run on random inputs."""
    values, interpreter = run(module, signature, BATCH)
    return Tracer(interpreter.records, values.values()), values, interpreter


def run(module: Module, signature: str, batch: int) -> tuple[dict[str, Value], Interpreter]:
    """The values of a signature's known outputs, and how they were computed."""
    interpreter = Interpreter(module, lambda shape: random_inputs(shape, 1))
    known = SIGNATURES.get(signature, (set(), set(module.signatures[signature].outputs)))[1]
    wanted = [name for name in module.signatures[signature].outputs if name in known]
    return interpreter.run(signature, feeds(module, signature, batch), wanted), interpreter


def feeds(module: Module, signature: str, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: latents from N(0, 1), images in [-1, 1] with coarse structure and noise."""
    result = {}
    known = SIGNATURES.get(signature, ({"x", "z"}, set()))[0]
    for name, shape in module.signatures[signature].shapes.items():
        if name not in known:
            continue
        if any(n is None or not 0 < n <= 4096 for n in shape[1:]) or len(shape) not in (2, 4):
            raise ConversionError(f"signature {signature!r}: input {name!r} has shape {shape}")
        result[name] = random_inputs((batch, *(n or 0 for n in shape[1:])), seed)
        if len(shape) == 4:  # noise alone gives all images nearly the same features
            rows, columns = (np.arange(n or 0) // 16 for n in shape[1:3])
            coarse = random_inputs((batch, len(rows), len(columns), shape[3] or 0), seed + 1)[:, rows][:, :, columns]
            result[name] = np.tanh(coarse + 0.3 * result[name])
    return result


def random_inputs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def check_signature(module: Module, part: str) -> None:
    """Raises ConversionError unless the module has the signature of a part, with all that the part needs."""
    name = PART_SIGNATURES[part]
    if name not in module.signatures:
        has = ", ".join(module.signatures) or "none"
        raise ConversionError(f"the module has no signature {name!r}; its signatures are: {has}")
    found, (inputs, outputs) = module.signatures[name], SIGNATURES[name]
    optional = {"default", "upsampled"} if part != "generator" else {"upsampled"}
    if part == "discriminator":
        optional = outputs - {next(iter(sorted(outputs & set(found.outputs))), "score_xz")}
    if missing := sorted(inputs - set(found.shapes)):
        raise ConversionError(f"signature {name!r} has no float32 input {missing[0]!r} of known shape")
    if missing := sorted(outputs - optional - set(found.outputs)):
        raise ConversionError(f"signature {name!r} has no float32 output {', '.join(missing)}")
    for missing_one in sorted(outputs - set(found.outputs)):
        logger.warning("signature %r has no output %r: the model will lack it", name, missing_one)
    others = {*found.inputs, *found.outputs, *found.others} - inputs - outputs
    for other in sorted(others):
        logger.warning("signature %r has %r, which a BigBiGAN does not have: it is ignored", name, other)


def match(module: Module, form: Form = "auto") -> Match:
    """All networks with the module's weights; not yet proved (`verify`).

    Raises:
        ConversionError: no network can be had, or with the form "port" one is not as the port expresses it.
        DamagedModule: the module's files are damaged.
    """
    for other in sorted(set(module.signatures) - {*SIGNATURES, "default"}):
        logger.warning("signature %r is not one of BigBiGAN's: the model will lack it", other)
    result = Match()
    for part in PARTS:
        try:
            result.parts[part] = find(module, part, form, result.dropped)
        except DamagedModule:
            raise
        except ConversionError as error:
            if form == "port":
                raise
            result.refused[part] = str(error)
    return result


def find(module: Module, part: str, form: Form, dropped: set[str], reason: str = "") -> Found:
    """One network; `reason` says why the port was given up, where that is known already.

    Raises:
        ConversionError: it can be had in none of the forms asked for.
    """
    signature = PART_SIGNATURES[part]
    check_signature(module, part)
    try:
        values, interpreter = run(module, signature, BATCH)
        dropped |= interpreter.dropped
        if form != "graph":
            try:
                return _port(part, interpreter, values)
            except ConversionError as error:
                if form == "port":
                    raise
                reason = str(error)
                logger.info("%s: the port does not match: %s", part, reason)
        return _graph(module, part, interpreter, values, reason or "asked for")
    except DamagedModule:
        raise
    except ConversionError as error:
        raise ConversionError(f"signature {signature!r}: {error}") from error


def _port(part: str, interpreter: Interpreter, values: dict[str, Value]) -> Found:
    tracer, state = Tracer(interpreter.records, values.values()), State()
    try:
        found = MATCHES[part]({name: tracer.poly(value) for name, value in values.items()}, tracer.table, state)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"it is not written as in a BigBiGAN ({error!r})"[:300]) from error
    config, default = (found.config, found.default) if part == "encoder" else (found, "z_sample")
    with torch.device("meta"):
        network = PART_CLASSES[type(config)](config)
    _fill(part, network, state)
    return Found(config, network.eval(), "port", default=default)


def _graph(module: Module, part: str, interpreter: Interpreter, values: dict[str, Value], reason: str) -> Found:
    signature = PART_SIGNATURES[part]
    inputs = {reference.partition(":")[0]: name for name, reference in module.signatures[signature].inputs.items()}
    second, other = run(module, signature, BATCHES[1])
    found = graph_network(part, Run(interpreter.records, values, inputs), Run(other.records, second, inputs))
    default = "z_sample"
    if part == "encoder" and "default" in values:
        arrays = {name: np.asarray(values[name].tensor, np.float32) for name in ("default", "z_sample", "z_mean")}
        same = [name for name in ("z_sample", "z_mean") if np.allclose(arrays[name], arrays["default"], atol=1e-5)]
        if not same:
            logger.warning("signature 'encode': its 'default' is neither z_sample nor z_mean: the model will lack it")
        default = same[0] if same else ""
    return Found(found.config, found.network, "graph", reason, default, found.half)


def _fill(part: str, network: nn.Module, state: State) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    if wanted != found:
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:6]
        raise ConversionError(f"{part}: weights found do not fill the port: {differing}")
    for name, tensor in state.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{part}: {name} is not finite")
    network.load_state_dict(state.tensors, strict=True, assign=True)
