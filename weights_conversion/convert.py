"""A module folder into a model folder: match each network, prove it, save those that were proved."""

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
from bigbigan.config import PARTS, ModelInfo
from bigbigan.model import BigBiGAN
from bigbigan.modelfolder import claim_folder
from bigbigan.presets import PRESETS, normalize
from bigbigan.schema import to_dict
from weights_conversion.download import Source, located
from weights_conversion.errors import ConversionError, DamagedModule, tensorflow
from weights_conversion.match import BATCH, PART_SIGNATURES, Form, Match, check_signature, find, match, run
from weights_conversion.module import Module
from weights_conversion.trace import Tracer, describe
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
    form: Form = "auto",
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Converts a module and returns the model folder, by default the one where `bigbigan.load` finds it by name.

    `source` is "bigbigan-resnet50", "bigbigan-revnet50x4", a module's folder or its .tar.gz; `name` is the model's, by
    default the source's. At most eight `images` (files) are compared beside random inputs. `report` gets the
    configuration and the table of differences as text.

    Each network becomes the port's where it matches, else a graph network, which has the module's own operations. With
    `form` "port" or "graph" all become that. A network that can be neither is left out with a warning.

    Raises:
        ConversionError: the source is not a BigBiGAN module, is damaged, or none of its networks can be converted; with
            `form` "port", one of them cannot. Nothing is written then.
        FileNotFoundError, OSError: there is no such source, or it cannot be downloaded.
        OutputError: another process is writing `output`.
    """
    with located(source) as found:
        if name is not None:
            found = replace(found, name=normalize(name) if normalize(name) in PRESETS else name)
        target = Path(output) if output is not None else default_folder(found.name)
        with claim_folder(target):
            module = Module(found.folder)
            matched = match(module, form)
            differences = _prove(module, matched, form, images)
            unused = module.variables.check_unused()
            if not matched.parts:
                reasons = "\n".join(f"{part}: {reason}" for part, reason in matched.refused.items())
                raise ConversionError(f"none of the module's networks can be converted.\n{reasons}\n{ADVICE}")
            for part, reason in matched.refused.items():
                logger.warning("the %s is left out: %s\n%s", part, reason, ADVICE)
            report(_summary(found.name, matched))
            report(table(differences))
            model = matched.model
            model.info = _info(found, module, matched, differences, unused)
            model.save(target)
        return target


ADVICE = (
    "Please report this message, with what `bigbigan convert SOURCE --inspect` prints: it holds names and shapes, no "
    "weights"
)


def _prove(module: Module, matched: Match, form: Form, images: Sequence[str | Path]) -> list[Difference]:
    """Differences of all networks; one that differs becomes a graph network, and is left out if that differs too."""
    differences: list[Difference] = []
    for part in list(matched.parts):
        while (found := matched.parts.get(part)) is not None:
            try:
                model = matched.of(part)
                differences += verify(module, model, found.default, _read(images, model), half=found.half)
                break
            except DamagedModule:
                raise
            except ConversionError as error:
                if form == "port":
                    raise ConversionError(f"{error}\nNothing is written. {ADVICE}") from error
                del matched.parts[part]
                if found.form == "graph":
                    matched.refused[part] = str(error)
                    continue
                logger.info("%s: the port differs: %s", part, error)
                try:
                    matched.parts[part] = find(module, part, "graph", matched.dropped, str(error))
                except ConversionError as second:
                    matched.refused[part] = f"as a port, {error}\nas a graph, {second}"
    return differences


def inspect(source: str | Path, report: Callable[[str], None]) -> None:
    """Reports a module's signatures and the layers traced behind each, without weights.

    Raises:
        ConversionError: the source is not a module, or is damaged.
    """
    with located(source) as found:
        module = Module(found.folder)
        for name, signature in module.signatures.items():
            report(f"signature {name}: {', '.join(signature.inputs)} -> {', '.join(signature.outputs)}")
        for part, name in PART_SIGNATURES.items():
            try:
                check_signature(module, part)
                _inspect(module, name, report)
            except DamagedModule:
                raise
            except ConversionError as error:
                report(f"\n{name}: {error}")


def _inspect(module: Module, name: str, report: Callable[[str], None]) -> None:
    values, interpreter = run(module, name, BATCH)
    report(f"\n{name}: {len(interpreter.records)} operations on data")
    if interpreter.dropped:
        report(f"  dropped, on control edges: {', '.join(sorted(interpreter.dropped)[:20])}")
    try:
        tracer = Tracer(interpreter.records, values.values())
    except ConversionError as error:
        report(f"  not the port's layers: {error}")
        for record in interpreter.records:
            report(f"  {record.op}{[list(shape) for shape in record.shapes]}: {describe(record)}")
        return
    report(f"  {len(tracer.table.layers)} layers")
    for layer in tracer.table.layers:
        report(f"  {layer}  ({layer.name})")
    for output, value in values.items():
        report(f"  -> {output} = {tracer.poly(value)}")


def default_folder(name: str) -> Path:
    """Where `bigbigan.load` looks for a local conversion of that name."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no model's name: say which model it is with --name, or where to write with -o")
    return hub.cache_dir() / "models" / name


def _read(paths: Sequence[str | Path], model: BigBiGAN) -> Tensor | None:
    if not paths:
        return None
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"{len(paths)} pictures to compare on; {MAX_IMAGES} are the most")
    config = model.config
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
    lines = [f"{part}: {_form(matched, part)}" for part in PARTS]
    lines += [f"{key} = {value}" for key, value in _flat(to_dict(matched.model.config)).items()]
    lines += [f"differs from the preset: {line}" for line in _differing(name, matched)]
    return "\n".join([f"{name}: configuration found", *(f"  {line}" for line in lines)])


def _form(matched: Match, part: str) -> str:
    """In what form a part was converted, and why not as a port."""
    if part not in matched.parts:
        return "left out"
    found = matched.parts[part]
    return "port" if found.form == "port" else f"graph network, because {found.reason}"


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _info(source: Source, module: Module, matched: Match, differences: list[Difference], unused: int) -> ModelInfo:
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
        "forms": {part: found.form for part, found in matched.parts.items()},
        "why_graph": {part: _line(f.reason) for part, f in matched.parts.items() if f.form == "graph"},
        "left_out": {part: _line(reason) for part, reason in matched.refused.items()},
        "unused_variables": unused,
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
