"""`list`, `info`: what models there are, and what one is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from bigbigan import factory, hub, list_models, modelfolder
from bigbigan.commands.options import Commands, add_command, columns_text
from bigbigan.config import BigBiGANConfig
from bigbigan.graph import Graph
from bigbigan.model import BigBiGAN
from bigbigan.modelcard import flatten
from bigbigan.presets import EMBEDDED, PRESETS, normalize
from bigbigan.schema import to_dict


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "list",
        _list,
        "Columns: resolution of the generator and of the encoder, millions of parameters of each part (G, E, D),\n"
        "weights at hand (embedded, a folder, hub: in the Hub's cache, or -), what it is and who described it.",
        "Example: bigbigan list 'bigbigan-resnet*'\nExit codes: 0 done.",
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern (default: all)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")

    parser = add_command(
        commands,
        "info",
        _info,
        "Name, licence, source, files with size and sha256, parameters, architecture, provenance; for a named model\n"
        "without weights here, the architecture and how to get weights. Files of a repository are downloaded.",
        "Example: bigbigan info path/to/model --json\nExit codes: 0 done, 2 no such model, or a damaged one.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name, a model folder, or org/name on the Hub")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a repository")
    parser.add_argument("--json", action="store_true", help="JSON instead of lines")


def count_parameters(
    config: BigBiGANConfig, parts: Iterable[str] | None = None, graphs: Mapping[str, Graph] | None = None
) -> dict[str, int]:
    """Parameters by part, counted without allocating any."""
    with torch.device("meta"):
        model = BigBiGAN(config, None if parts is None else tuple(parts), graphs=graphs)
    return {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in model.parts}


def _weights(name: str) -> str | None:
    if not hub.has_weights(name):
        return None
    folder = hub.cache_dir() / "models" / name
    return "embedded" if name == EMBEDDED else str(folder) if folder.is_dir() else "hub"


def _list(arguments: argparse.Namespace) -> int:
    found = []
    for preset in map(PRESETS.__getitem__, list_models(arguments.pattern)):
        config = preset.config
        found.append(
            {
                "name": preset.name,
                "generator_resolution": config.generator.resolution if config.generator else None,
                "encoder_resolution": config.encoder.resolution if config.encoder else None,
                "parameters": count_parameters(config),
                "weights": _weights(preset.name),
                "description": preset.description,
                "origin": preset.origin,
            }
        )
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        header = ("NAME", "G PX", "E PX", "G + E + D (M)", "WEIGHTS", "DESCRIPTION", "ORIGIN")
        print(columns_text(header, [[*map(_cell, row.values())] for row in found]))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # parameters by part
        return " + ".join(f"{number / 1e6:.3g}" for number in value.values())
    return "-" if value is None else str(value)


def _info(arguments: argparse.Namespace) -> int:
    document: dict[str, Any]
    try:
        folder = hub.resolve(arguments.model, revision=arguments.revision)
        described = modelfolder.read_config(folder)
    except FileNotFoundError as error:
        preset = PRESETS.get(normalize(arguments.model))
        if preset is None:
            raise
        config = preset.config
        document = {"name": preset.name, "description": preset.description, "origin": preset.origin}
        document |= {"weights": None, "how_to_get_weights": " ".join(str(error).split())}
        counted = count_parameters(config)
    else:
        config = described.config
        graphs = factory.read_graphs(folder, described.files, config)
        graphless = modelfolder.graph_parts(config, [part for part in config.parts if part not in graphs])
        known = [part for part in config.parts if part not in graphless]
        counted = count_parameters(config, known, graphs)
        document = {**asdict(described.info), "weights": str(folder)}
        document["files"] = {part: asdict(entry) for part, entry in described.files.items()}
    document |= {"parameters": counted, "architecture": to_dict(config)}
    if arguments.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        lines = list(flatten(document))
        width = max(len(key) for key, _ in lines)
        print("\n".join(f"{key:<{width}}  {value}" for key, value in lines))
    return 0
