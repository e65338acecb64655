"""Proof on the module itself: its graph and the port on the same inputs, every output of every signature."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bigbigan.model import BigBiGAN
from weights_conversion.errors import ConversionError
from weights_conversion.interpret import Interpreter
from weights_conversion.match import feeds, random_inputs
from weights_conversion.module import Module

logger = logging.getLogger(__name__)

WARNING, REFUSAL = 2e-5, 1e-4
BATCH = 3  # not the batch that the trace was made with


@dataclass(frozen=True)
class Difference:
    """max |module - port| of one output, and the same over max |module|."""

    signature: str
    output: str
    inputs: str
    absolute: float
    relative: float


def verify(
    module: Module, model: BigBiGAN, default_output: str = "z_sample", images: Tensor | None = None
) -> list[Difference]:
    """Differences of all outputs on random inputs, and on `images` [N, C, S, S] in [-1, 1] where given.

    Raises:
        ConversionError: one is above 1e-4 of the largest value, or an output has another shape.
    """
    found: list[Difference] = []
    for signature in module.signatures:
        given = feeds(module, signature, BATCH, seed=10)
        found += _compare(module, model, default_output, signature, given, "random")
        if images is not None and "x" in given:
            side = given["x"].shape[1]
            resized = torch.nn.functional.interpolate(images, size=(side, side), mode="area")
            given = {name: value[:1].repeat(len(resized), axis=0) for name, value in given.items()}
            given["x"] = np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
            found += _compare(module, model, default_output, signature, given, "images")
    bad = [d for d in found if not d.relative <= REFUSAL]
    if bad:
        raise ConversionError(f"the port does not give the module's outputs; nothing is written.\n{table(found)}")
    for difference in found:
        if difference.relative > WARNING:
            logger.warning("%s %s differs by %.1e", difference.signature, difference.output, difference.relative)
    return found


def table(differences: list[Difference]) -> str:
    """As text, one line an output."""
    rows = [f"{'signature':13} {'output':14} {'inputs':7} {'max |diff|':>11} {'relative':>9}"]
    rows += [f"{d.signature:13} {d.output:14} {d.inputs:7} {d.absolute:11.2e} {d.relative:9.1e}" for d in differences]
    return "\n".join(rows)


def _compare(
    module: Module, model: BigBiGAN, default: str, signature: str, given: Mapping[str, np.ndarray], inputs: str
) -> list[Difference]:
    noise = random_inputs((len(next(iter(given.values()))), model.config.z_dim), 11)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if np.prod(shape) != noise.size:
            raise ConversionError(f"signature {signature!r} draws noise of shape {shape}, not {noise.shape}")
        return noise.reshape(shape)

    interpreter = Interpreter(module, draw, record=False)
    values = interpreter.run(signature, dict(given))
    reference = {name: np.asarray(value.tensor, np.float64) for name, value in values.items()}
    ported = _port(model, signature, given, noise, default)
    unknown = sorted(set(reference) - set(ported))
    if unknown:
        raise ConversionError(f"signature {signature!r} has outputs that the port lacks: {', '.join(unknown)}")
    result = []
    for name, wanted in reference.items():
        got = ported[name].double().numpy()
        if got.shape != wanted.shape:
            raise ConversionError(f"{signature} {name}: the module gives {wanted.shape}, the port {got.shape}")
        absolute, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
        result.append(Difference(signature, name, inputs, absolute, absolute / largest if largest else absolute))
    return result


@torch.no_grad()
def _port(
    model: BigBiGAN, signature: str, given: Mapping[str, np.ndarray], noise: np.ndarray, default: str
) -> dict[str, Tensor]:
    """The port's outputs under the module's names, NHWC."""
    inputs = {
        name: torch.from_numpy(value).permute(0, 3, 1, 2) if value.ndim == 4 else torch.from_numpy(value)
        for name, value in given.items()
    }
    if signature == "generate":
        image = model.part("generator")(inputs["z"])
        large = model.part("generator").upsample(image)
        return {"default": image.permute(0, 2, 3, 1), "upsampled": large.permute(0, 2, 3, 1)}
    if signature in ("encode", "default"):
        out = model.part("encoder")(inputs["x"], torch.from_numpy(noise))
        return {**{f.name: out[f.name] for f in fields(out)}, "default": out[default]}
    if signature == "discriminate":
        scores = model.part("discriminator")(inputs["x"], inputs["z"])
        return {name: getattr(scores, name) for name in ("score_x", "score_z", "score_xz")}
    return {}
