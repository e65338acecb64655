"""A module folder into a model folder: match, verify, save; all or nothing."""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigbigan import __version__, hub
from bigbigan import images as image_io
from bigbigan.config import ModelInfo
from bigbigan.modelfolder import claim_folder
from bigbigan.presets import PRESETS, normalize
from bigbigan.schema import to_dict
from weights_conversion.download import Source, located
from weights_conversion.errors import tensorflow
from weights_conversion.match import PART_SIGNATURES, Match, check_signatures, match, trace
from weights_conversion.module import Module
from weights_conversion.verify import Difference, table, verify

logger = logging.getLogger(__name__)

LICENSE = "unknown: see the module's page"
MAX_IMAGES = 8


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    images: Sequence[str | Path] = (),
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Converts a module and returns the model folder, by default the one where `bigbigan.load` finds it by name.

    `source` is "bigbigan-resnet50", "bigbigan-revnet50x4", a module's folder or its .tar.gz; `name` is the model's, by
    default the source's. At most eight `images` (files) are compared beside random inputs. `report` gets the
    configuration and the table of differences as text.

    Raises:
        ConversionError: the source is no BigBiGAN module, holds what the port does not express, or the port's
            outputs differ from the module's; nothing is written then.
        FileNotFoundError, OSError: there is no such source, it cannot be downloaded, or `output` holds anything but a
            model folder.
        OutputError: another process is writing `output`.
    """
    with located(source) as found:
        if name is not None:
            found = replace(found, name=normalize(name) if normalize(name) in PRESETS else name)
        target = Path(output) if output is not None else default_folder(found.name)
        with claim_folder(target):
            module = Module(found.folder)
            matched = match(module)
            report(_summary(found.name, matched))
            differences = verify(module, matched.model, matched.default_output, _read(images, matched))
            report(table(differences))
            matched.model.info = _info(found, module, matched, differences)
            matched.model.save(target)
        return target


def inspect(source: str | Path, report: Callable[[str], None]) -> None:
    """Reports a module's signatures and the layers traced behind each, without weights.

    Raises:
        ConversionError: as `convert`, for what cannot be traced.
    """
    with located(source) as found:
        module = Module(found.folder)
        for name, signature in module.signatures.items():
            report(f"signature {name}: {', '.join(signature.inputs)} -> {', '.join(signature.outputs)}")
        check_signatures(module)
        for name in PART_SIGNATURES.values():
            tracer, values, interpreter = trace(module, name)
            report(f"\n{name}: {len(interpreter.records)} operations on data, {len(tracer.table.layers)} layers")
            for layer in tracer.table.layers:
                report(f"  {layer}  ({layer.name})")
            for output, value in values.items():
                report(f"  -> {output} = {tracer.poly(value)}")
            if interpreter.dropped:
                report(f"  dropped, on control edges: {', '.join(sorted(interpreter.dropped)[:20])}")


def default_folder(name: str) -> Path:
    """Where `bigbigan.load` looks for a local conversion of that name."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no model's name: say which model it is with --name, or where to write with -o")
    return hub.cache_dir() / "models" / name


def _read(paths: Sequence[str | Path], matched: Match) -> Tensor | None:
    if not paths:
        return None
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"{len(paths)} pictures to compare on; {MAX_IMAGES} are the most")
    config = matched.model.config
    return image_io.preprocess(list(paths), config.preprocess, config.image_channels)


def _differing(name: str, matched: Match) -> list[str]:
    """What the module has otherwise than the preset of its name."""
    if name not in PRESETS:
        return []
    found, preset = (_flat(to_dict(config)) for config in (matched.model.config, PRESETS[name].config))
    return [f"{key}: {found[key]} (preset: {preset.get(key)})" for key in found if found[key] != preset.get(key)]


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    pairs = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in data.items())
    return {key: value for part in pairs for key, value in part.items()}


def _summary(name: str, matched: Match) -> str:
    lines = [f"{key} = {value}" for key, value in _flat(to_dict(matched.model.config)).items()]
    lines += [f"differs from the preset: {line}" for line in _differing(name, matched)]
    return "\n".join([f"{name}: configuration found", *(f"  {line}" for line in lines)])


def _info(source: Source, module: Module, matched: Match, differences: list[Difference]) -> ModelInfo:
    provenance = {
        "converted_from": source.origin,
        "sha256": module.sha256,
        "versions": {
            "bigbigan": __version__,
            "tensorflow": tensorflow().__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "encode_default_output": matched.default_output,
        "differs_from_preset": _differing(source.name, matched),
        "unused_variables": module.variables.check_unused(),
        "dropped_control_inputs": len(matched.dropped),
        "differences": [
            {
                "output": f"{d.signature}.{d.output}",
                "inputs": d.inputs,
                "max_absolute": float(f"{d.absolute:.3g}"),
                "relative_to_max": float(f"{d.relative:.3g}"),
            }
            for d in differences
        ],
    }
    return ModelInfo(source.name, LICENSE, f"converted from {source.origin}"[:4096], provenance)
