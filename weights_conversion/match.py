"""From a module's layers to the port: configuration and weights of all three networks, or an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bigbigan.config import PARTS, BigBiGANConfig, PreprocessConfig
from bigbigan.model import BigBiGAN
from weights_conversion.algebra import Poly
from weights_conversion.errors import ConversionError
from weights_conversion.frames import Value
from weights_conversion.interpret import Interpreter
from weights_conversion.layers import LayerTable
from weights_conversion.match_discriminator import match_discriminator
from weights_conversion.match_encoder import match_encoder
from weights_conversion.match_generator import match_generator
from weights_conversion.module import Module
from weights_conversion.patterns import State
from weights_conversion.trace import Tracer

logger = logging.getLogger(__name__)

BATCH = 2
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
class Match:
    """The port with a module's weights, and what was worth telling on the way."""

    model: BigBiGAN
    default_output: str  # what `default` of the module's `encode` is
    dropped: set[str] = field(default_factory=set)  # nodes on control edges


def trace(module: Module, signature: str) -> tuple[Tracer, dict[str, Value], Interpreter]:
    """Layers of a signature and its outputs' values, from one run on random inputs."""
    interpreter = Interpreter(module, lambda shape: random_inputs(shape, 1))
    values = interpreter.run(signature, feeds(module, signature, BATCH))
    return Tracer(interpreter.records, values.values()), values, interpreter


def feeds(module: Module, signature: str, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: latents from N(0, 1), images in [-1, 1] with coarse structure and noise."""
    result = {}
    for name, shape in module.signatures[signature].shapes.items():
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


def check_signatures(module: Module) -> None:
    """Raises ConversionError unless the module has BigBiGAN's signatures, inputs and outputs; tells of others."""
    for name, (inputs, outputs) in SIGNATURES.items():
        if name not in module.signatures:
            raise ConversionError(
                f"{module.folder} has no signature {name!r}; it has {', '.join(module.signatures) or 'none'}"
            )
        found = module.signatures[name]
        for kind, wanted, names in (("inputs", inputs, found.inputs), ("outputs", outputs, found.outputs)):
            if set(names) != wanted:
                raise ConversionError(f"signature {name!r} has {kind} {sorted(names)}; BigBiGAN's are {sorted(wanted)}")
        if set(found.shapes) != inputs:
            raise ConversionError(f"signature {name!r}: the shapes of its inputs are unknown")
    for other in sorted(set(module.signatures) - {*SIGNATURES, "default"}):
        logger.warning("signature %r is no BigBiGAN's: the model will lack it", other)


def match(module: Module) -> Match:
    """The whole model with the module's weights; not yet proved (`verify`).

    Raises:
        ConversionError: something in the graph that the port does not express; it names the node and its neighbours.
    """
    check_signatures(module)
    states = {part: State() for part in PARTS}
    dropped: set[str] = set()
    generator, encoder, discriminator = (_match_part(module, part, states[part], dropped) for part in PARTS)
    config = BigBiGANConfig(generator, encoder.config, discriminator, PreprocessConfig(encoder.config.resolution))
    return Match(_fill(config, states), encoder.default, dropped)


def _match_part(module: Module, part: str, state: State, dropped: set[str]) -> Any:
    """Configuration of a part; a function of its own so that the trace with its constants is freed after each."""
    signature = PART_SIGNATURES[part]
    tracer, values, interpreter = trace(module, signature)
    dropped |= interpreter.dropped
    outputs = {name: tracer.poly(value) for name, value in values.items()}
    try:
        return MATCHES[part](outputs, tracer.table, state)
    except ConversionError as error:
        raise ConversionError(f"signature {signature!r}: {error}") from error


def _fill(config: BigBiGANConfig, states: dict[str, State]) -> BigBiGAN:
    with torch.device("meta"):
        model = BigBiGAN(config)
    for part in PARTS:
        network, state = getattr(model, part), states[part].tensors
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wanted != found:
            differing = sorted(set(wanted.items()) ^ set(found.items()))[:6]
            raise ConversionError(f"{part}: weights found do not fill the port: {differing}")
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise ConversionError(f"{part}: {name} is not finite")
        network.load_state_dict(state, strict=True, assign=True)
    return model.eval()
