"""Proof on the module itself: its graph and the model on the same inputs, every output of every signature."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bigbigan.graph import GraphGenerator
from bigbigan.model import BigBiGAN
from weights_conversion.algebra import squeezed
from weights_conversion.errors import ConversionError
from weights_conversion.interpret import Interpreter
from weights_conversion.match import PART_SIGNATURES, feeds, random_inputs
from weights_conversion.module import Module

logger = logging.getLogger(__name__)

WARNING, REFUSAL, HALF = 2e-5, 1e-4, 1e-2
BATCH = 4  # not one that a trace was made with


@dataclass(frozen=True)
class Difference:
    """max |module - port| of one output, and the same over max |module|.

    Above `limit`, `rounding` is how far the model in float32 is from the model in float64, by the same measure.
    """

    signature: str
    output: str
    inputs: str
    absolute: float
    relative: float
    rounding: float = 0.0
    limit: float = REFUSAL

    @property
    def sound(self) -> bool:
        return self.relative <= self.limit


def verify(
    module: Module,
    model: BigBiGAN,
    default_output: str = "z_sample",
    images: Tensor | None = None,
    half: bool = False,
) -> list[Difference]:
    """Differences of all outputs of a model's parts on random inputs, and on `images` [N, C, S, S] in [-1, 1].

    Where the module computes in `half` precision 1e-2 of the largest value is allowed, else 1e-4.

    Raises:
        ConversionError: one is above that, or an output has another shape.
    """
    found: list[Difference] = []
    for part in model.parts:
        signature = PART_SIGNATURES[part]
        given = feeds(module, signature, BATCH, seed=10)
        compare = partial(_compare, module, model, default_output, limit=HALF if half else REFUSAL)
        found += compare(signature, given, "random")
        if images is not None and "x" in given:
            side = given["x"].shape[1]
            resized = torch.nn.functional.interpolate(images, size=(side, side), mode="area")
            pictures = {name: value[:1].repeat(len(resized), axis=0) for name, value in given.items()}
            pictures["x"] = np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
            found += compare(signature, pictures, "images")
        if part == "encoder" and default_output and (own := _default(module)) is not None:
            try:
                more = compare("default", own, "random")
            except ConversionError as error:
                logger.warning("signature 'default' cannot be compared: %s", error)
                continue
            if all(difference.sound for difference in more):
                found += more
            else:
                logger.warning("signature 'default' is not %s, as the default of 'encode' is", default_output)
    if bad := [d for d in found if not d.sound]:
        # A module whose activations grow may differ by rounding alone: whoever reports it can say so.
        rounding = ", ".join(f"{d.signature} {d.output} {d.rounding:.1e}" for d in bad)
        raise ConversionError(
            f"its outputs are not the module's.\n{table(found)}\n"
            f"The result's own rounding (float32 against float64): {rounding}"
        )
    for difference in found:
        if WARNING < difference.relative <= REFUSAL:
            logger.warning("%s %s differs by %.1e", difference.signature, difference.output, difference.relative)
    return found


def _default(module: Module) -> dict[str, np.ndarray] | None:
    """Inputs of the signature `default`, where it is an encoder's."""
    described = module.signatures.get("default")
    if described is None:
        return None
    if set(described.shapes) != {"x"} or "default" not in described.outputs:
        logger.warning("signature 'default' is not an encoder's: it is ignored")
        return None
    return feeds(module, "default", BATCH, seed=10)


def table(differences: list[Difference]) -> str:
    """As text, one line an output."""
    rows = [f"{'signature':13} {'output':14} {'inputs':7} {'max |diff|':>11} {'relative':>9}"]
    for d in differences:
        note = f"  (allowed: {d.limit:g}, since the module computes in half precision)" if d.limit != REFUSAL else ""
        rows.append(f"{d.signature:13} {d.output:14} {d.inputs:7} {d.absolute:11.2e} {d.relative:9.1e}{note}")
    return "\n".join(rows)


def _compare(
    module: Module,
    model: BigBiGAN,
    default: str,
    signature: str,
    given: Mapping[str, np.ndarray],
    inputs: str,
    limit: float,
) -> list[Difference]:
    noise = random_inputs((len(next(iter(given.values()))), model.config.z_dim), 11)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if np.prod(shape) != noise.size:
            raise ConversionError(f"signature {signature!r} draws noise of shape {shape}, not {noise.shape}")
        return noise.reshape(shape)

    ported = _outputs(model, signature, given, noise, default)
    names = [name for name in module.signatures[signature].outputs if name in ported]
    values = Interpreter(module, draw, record=False).run(signature, dict(given), names)
    exact: dict[str, Tensor] = {}
    result = []
    for name, value in values.items():
        got, wanted = ported[name].double().numpy(), np.asarray(value.tensor, np.float64)
        if squeezed(got.shape) == squeezed(wanted.shape):
            wanted = wanted.reshape(got.shape)
        if got.shape != wanted.shape:
            raise ConversionError(f"{signature} {name}: the module gives {wanted.shape}, the result {got.shape}")
        absolute, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max()) or 1.0
        rounding = 0.0
        if not absolute <= limit * largest:
            exact = exact or _outputs(copy.deepcopy(model).double(), signature, given, noise, default)
            rounding = float(np.abs(exact[name].numpy() - got).max()) / largest
        result.append(Difference(signature, name, inputs, absolute, absolute / largest, rounding, limit))
    return result


@torch.no_grad()
def _outputs(
    model: BigBiGAN, signature: str, given: Mapping[str, np.ndarray], noise: np.ndarray, default: str
) -> dict[str, Tensor]:
    """The model's outputs under the module's names, NHWC."""
    tensors = {name: torch.from_numpy(value).to(model.dtype) for name, value in {**given, "noise": noise}.items()}
    inputs = {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in tensors.items()}
    if signature == "generate":
        generator = model.part("generator")
        image = generator(inputs["z"])
        outputs = {"default": image.permute(0, 2, 3, 1)}
        if not isinstance(generator, GraphGenerator) or "upsampled" in generator.graph.outputs:
            outputs["upsampled"] = generator.upsample(image).permute(0, 2, 3, 1)
        return outputs
    if signature in ("encode", "default"):
        out = model.part("encoder")(inputs["x"], inputs["noise"])
        outputs = {f.name: out[f.name] for f in fields(out)}
        return {**outputs, "default": out[default]} if default else outputs
    scores = model.part("discriminator")(inputs["x"], inputs["z"])
    found = {name: getattr(scores, name) for name in ("score_x", "score_z", "score_xz")}
    return {name: score for name, score in found.items() if score is not None}
