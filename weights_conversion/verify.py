"""Proof on the module itself: its graph and the port on the same inputs, every output of every signature."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bigbigan.model import BigBiGAN
from weights_conversion.errors import ConversionError
from weights_conversion.interpret import Interpreter
from weights_conversion.match import SIGNATURES, feeds, random_inputs
from weights_conversion.module import Module

logger = logging.getLogger(__name__)

WARNING, REFUSAL = 2e-5, 1e-4
BATCH = 3  # not the batch that the trace was made with


@dataclass(frozen=True)
class Difference:
    """max |module - port| of one output, and the same over max |module|.

    Above `REFUSAL`, `rounding` is how far the port in float32 is from the port in float64, by the same measure.
    """

    signature: str
    output: str
    inputs: str
    absolute: float
    relative: float
    rounding: float = 0.0

    @property
    def sound(self) -> bool:
        return self.relative <= REFUSAL


def verify(
    module: Module, model: BigBiGAN, default_output: str = "z_sample", images: Tensor | None = None
) -> list[Difference]:
    """Differences of all outputs on random inputs, and on `images` [N, C, S, S] in [-1, 1] where given.

    Raises:
        ConversionError: one is above 1e-4 of the largest value, or an output has another shape.
    """
    found: list[Difference] = []
    for signature in sorted(module.signatures.keys() & {*SIGNATURES, "default"}):
        given = feeds(module, signature, BATCH, seed=10)
        found += _compare(module, model, default_output, signature, given, "random")
        if images is not None and "x" in given:
            side = given["x"].shape[1]
            resized = torch.nn.functional.interpolate(images, size=(side, side), mode="area")
            given = {name: value[:1].repeat(len(resized), axis=0) for name, value in given.items()}
            given["x"] = np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
            found += _compare(module, model, default_output, signature, given, "images")
    if bad := [d for d in found if not d.sound]:
        # A module whose activations grow may differ by rounding alone: whoever reports it can say so.
        rounding = ", ".join(f"{d.signature} {d.output} {d.rounding:.1e}" for d in bad)
        raise ConversionError(
            f"the port does not give the module's outputs; nothing is written.\n{table(found)}\n"
            f"The port's own rounding (float32 against float64): {rounding}"
        )
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
    if not given:
        raise ConversionError(f"signature {signature!r} takes no inputs, so there is nothing to compare")
    noise = random_inputs((len(next(iter(given.values()))), model.config.z_dim), 11)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if np.prod(shape) != noise.size:
            raise ConversionError(f"signature {signature!r} draws noise of shape {shape}, not {noise.shape}")
        return noise.reshape(shape)

    interpreter = Interpreter(module, draw, record=False)
    values = interpreter.run(signature, dict(given))
    reference = {name: np.asarray(value.tensor, np.float64) for name, value in values.items()}
    ported = _port(model, signature, given, noise, default)
    exact: dict[str, Tensor] = {}
    result = []
    for name, value in ported.items():
        if name not in reference:
            continue  # of `encode`, whose `default` alone is a signature too
        got, wanted = value.double().numpy(), reference[name]
        if got.shape != wanted.shape:
            raise ConversionError(f"{signature} {name}: the module gives {wanted.shape}, the port {got.shape}")
        absolute, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max()) or 1.0
        rounding = 0.0
        if not absolute <= REFUSAL * largest:
            exact = exact or _port(copy.deepcopy(model).double(), signature, given, noise, default)
            rounding = float(np.abs(exact[name].numpy() - got).max()) / largest
        result.append(Difference(signature, name, inputs, absolute, absolute / largest, rounding))
    return result


@torch.no_grad()
def _port(
    model: BigBiGAN, signature: str, given: Mapping[str, np.ndarray], noise: np.ndarray, default: str
) -> dict[str, Tensor]:
    """The port's outputs under the module's names, NHWC."""
    tensors = {name: torch.from_numpy(value).to(model.dtype) for name, value in {**given, "noise": noise}.items()}
    inputs = {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in tensors.items()}
    if signature == "generate":
        image = model.part("generator")(inputs["z"])
        large = model.part("generator").upsample(image)
        return {"default": image.permute(0, 2, 3, 1), "upsampled": large.permute(0, 2, 3, 1)}
    if signature in ("encode", "default"):
        out = model.part("encoder")(inputs["x"], inputs["noise"])
        return {**{f.name: out[f.name] for f in fields(out)}, "default": out[default]}
    scores = model.part("discriminator")(inputs["x"], inputs["z"])
    return {name: getattr(scores, name) for name in ("score_x", "score_z", "score_xz")}
