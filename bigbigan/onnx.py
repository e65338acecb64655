"""Each part as a `torch.export` program, and as an ONNX file that was compared with it in ONNX Runtime."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigbigan.arrays import seeded
from bigbigan.config import select_parts
from bigbigan.files import atomic_write
from bigbigan.model import BigBiGAN
from bigbigan.outputs import ONNX, claim
from bigbigan.schema import to_dict

BATCHES = (1, 2, 3)  # that an exported file is compared at
TOLERANCE = 1e-4  # of an output's largest value; other orders of summation stay a tenth of it
OPSET = 20


@dataclass(frozen=True)
class OnnxReport:
    """A written file, its inputs and outputs with shapes ("N" is free), and how far it is from the model.

    `difference` is the largest over `BATCHES` and outputs of max|difference| / max|output|.
    """

    part: str
    path: Path
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    difference: float


class _Part(nn.Module):
    """A network with tensors in and a tuple of tensors out."""

    def __init__(self, network: nn.Module, outputs: Sequence[str]):
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.network(*inputs)
        # Outputs of a deterministic encoder are one tensor, which would get one name.
        values = [out] if isinstance(out, Tensor) else [getattr(out, name) for name in self.outputs]
        return tuple(value.clone() if value is values[i - 1] else value for i, value in enumerate(values))


def part_inputs(model: BigBiGAN, part: str, batch_size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a part by name: z; x and noise; or x and z, each [N, …]. Noise only where z_sample takes it."""
    config = model.part(part).config
    draws = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=draws).to(model.device, model.dtype)

    if part == "generator":
        return {"z": normal(config.z_dim)}
    inputs = {"x": normal(config.image_channels, config.resolution, config.resolution).tanh()}
    if part == "encoder" and getattr(config, "output", "") == "stochastic":
        inputs["noise"] = normal(config.z_dim)
    if part == "discriminator" and set(config.scores) != {"x"}:
        inputs["z"] = normal(config.z_dim)
    return inputs


def export_program(model: BigBiGAN, part: str) -> torch.export.ExportedProgram:
    """A part as a `torch.export` program of any batch size, its inputs in the order of `part_inputs`.

    It gives a tuple: the images; the encoder's outputs in the order of `EncoderOutput`; or the scores that there are.

    Raises:
        ValueError: the model was loaded without that part.
    """
    return _export(model, part)[0]


def _export(model: BigBiGAN, part: str) -> tuple[torch.export.ExportedProgram, dict[str, Tensor], list[str]]:
    inputs = part_inputs(model, part)
    with torch.no_grad():
        out = model.part(part)(*inputs.values())
    names = ["images"] if isinstance(out, Tensor) else [f.name for f in fields(out) if getattr(out, f.name) is not None]
    batch = torch.export.Dim("N", min=1)
    # One tuple, as forward takes *inputs.
    shapes = (tuple({0: batch} for _ in inputs),)
    program = torch.export.export(_Part(model.part(part), names), tuple(inputs.values()), dynamic_shapes=shapes)
    return program, inputs, names


def export_onnx(
    model: BigBiGAN, folder: str | os.PathLike[str], *, parts: Sequence[str] | None = None
) -> list[OnnxReport]:
    """Writes `{part}.onnx` into a folder, each with a free batch size, after comparing it with the model.

    Images are [N, C, S, S] in [-1, 1]. The noise of z_sample is an input, [N, z_dim] from N(0, 1). The file's metadata
    holds the model's name and preprocessing.

    Raises:
        ImportError: without onnx, onnxscript or onnxruntime.
        ValueError: the model lacks a part, or a file differs from the model by more than 1e-4; it is not written then.
        OutputError: a file of that name is something else, or another process is writing it.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}; install it: pip install 'bigbigan[onnx]'") from error
    with ExitStack() as stack:
        chosen = {part: Path(folder) / f"{part}.onnx" for part in select_parts(parts, model.parts, "this model")}
        for path in chosen.values():
            stack.enter_context(claim(path, ONNX))
        return [_write(onnx, onnxruntime, model, part, path) for part, path in chosen.items()]


def _write(onnx: Any, onnxruntime: Any, model: BigBiGAN, part: str, path: Path) -> OnnxReport:
    metadata = {"model": model.info.name, "preprocess": json.dumps(to_dict(model.config.preprocess)), "part": part}
    program, inputs, names = _export(model, part)
    with _quiet():
        written = torch.onnx.export(
            program, input_names=list(inputs), output_names=names, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert written is not None
    proto = written.model_proto
    _name_batch(proto.graph)
    _guard_padding(onnx, proto.graph)
    onnx.helper.set_model_props(proto, metadata)
    with atomic_write(path) as temporary:
        onnx.save(proto, temporary)
        difference = _difference(onnxruntime, temporary, model, part, names)
        if not difference <= TOLERANCE:
            raise ValueError(f"{part} in ONNX Runtime differs from the model by {difference:.1e}; {path} not written")
    shapes = [_shapes(values) for values in (proto.graph.input, proto.graph.output)]
    return OnnxReport(part, path, shapes[0], shapes[1], difference)


def _difference(onnxruntime: Any, path: Path, model: BigBiGAN, part: str, names: list[str]) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in BATCHES:
        inputs = part_inputs(model, part, size, seed=size)
        with torch.no_grad():
            out = model.part(part)(*inputs.values())
        wanted = [out] if isinstance(out, Tensor) else [getattr(out, name) for name in names]
        found = session.run(names, {name: value.cpu().numpy() for name, value in inputs.items()})
        for value, tensor in zip(found, wanted, strict=True):
            exact = tensor.cpu().numpy()
            worst = max(worst, float(np.abs(value - exact).max() / max(np.abs(exact).max(), 1e-12)))
    return worst


def _name_batch(graph: Any) -> None:
    """The exporter's own name for the one free size becomes N."""
    name = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = size.dim_param.replace(name, "N")


def _guard_padding(onnx: Any, graph: Any) -> None:
    """Pads a max-pool's input by next to nothing instead of zero.

    ONNX Runtime merges a padding of zeros into the pooling, whose own padding never wins; here zeros can.
    """
    pooled = {name for node in graph.node if node.op_type == "MaxPool" for name in node.input}
    numbers = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        zero = len(node.input) > 2 and not np.any(numbers.get(node.input[2], 0))  # SAME pads with minus infinity
        if node.op_type == "Pad" and zero and pooled & set(node.output):
            value = np.array(1e-30, np.float32)
            name = f"{node.output[0]}_value"
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
            node.input[2] = name


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: of its own deprecations, and that torchvision is absent."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registry.setLevel(before)
