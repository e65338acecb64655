"""The model card (README.md) of a model folder: Markdown with the Hugging Face Hub's metadata block."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from bigbigan.config import BigBiGANConfig, DiscriminatorConfig, GraphConfig, ModelInfo
from bigbigan.markdown import escape, one_line, table

USES = {
    "generator": "images = model.generate(8, seed=0)  # [8, C, S, S] in [-1, 1]",
    "encoder": 'out = model.encode("image.png")  # out.z_mean, out.avepool_feat, …',
    "discriminator": "scores = model.discriminate(x, z)  # score_x, score_z, score_xz",
}


def model_card(
    config: BigBiGANConfig,
    info: ModelInfo,
    states: Mapping[str, Mapping[str, Tensor]],
    where: str = "path/to/this/folder",
) -> str:
    """Text of README.md for a model with the state dicts of these parts.

    `where` is what `load` takes to get the model: a folder, or `org/name` on the Hub.
    """
    method, title, arxiv = _method(config)
    name = info.name or f"{method} model"
    code = [
        "from bigbigan import load",
        "",
        f"model = load({json.dumps(where)})",
        *(USES[part] for part in states),
    ]
    parts = []
    for part, state in states.items():
        tensors = list(state.values())
        size, numbers = sum(t.numel() * t.element_size() for t in tensors), sum(t.numel() for t in tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        parts.append((f"`{part}.safetensors`", f"{numbers:,}", dtype, f"{size / 1e6:,.1f} MB"))
    sections = [
        _metadata(info, states),
        f"# {escape(name)}",
        f"{method} ({', '.join(states)}) for the Python package `bigbigan`. The method is that of "
        f"[{title}](https://arxiv.org/abs/{arxiv}).",
        "```python\n" + "\n".join(code) + "\n```",
        _table(("File", "Values", "Type", "Size"), parts, ready=True),
        "`config.json` has the architecture, and the size and SHA-256 of each file; loading checks them.",
        *_graphs(config, states),
        f"**Source:** {escape(info.source) or 'not stated'}\n\n**License:** {escape(info.license) or 'not stated'}",
    ]
    tables = {key: value for key, value in info.provenance.items() if _is_table(value)}
    if facts := list(flatten({key: value for key, value in info.provenance.items() if key not in tables})):
        sections += ["## Provenance", _table(("Fact", "Value"), facts)]
    for key, rows in tables.items():  # such as a converted model's differences to its source, output by output
        sections += [f"### {escape(key)}", _table(tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])]
    return "\n\n".join(sections) + "\n"


def _graphs(config: BigBiGANConfig, parts: Iterable[str]) -> list[str]:
    parts = [part for part in parts if isinstance(getattr(config, part), GraphConfig)]
    if not parts:
        return []
    files = ", ".join(f"`{part}.graph.json`" for part in parts)
    return [
        f"Graph networks: {', '.join(parts)} (operations in {files}). They run the operations of the module that they "
        "were converted from, and cannot be trained by a recipe, fused, or used at other resolutions."
    ]


def _method(config: BigBiGANConfig) -> tuple[str, str, str]:
    """Name, title and arXiv number of the method that has these parts and scores."""
    d = config.discriminator
    if isinstance(d, DiscriminatorConfig) and d.rotation_head and config.encoder is None:
        return "SS-GAN", "Self-Supervised GANs via Auxiliary Rotation Loss", "1811.11212"
    if d and d.scores == ("x",):
        return "BigGAN", "Large Scale GAN Training for High Fidelity Natural Image Synthesis", "1809.11096"
    if d and d.scores == ("xz",):
        return "BiGAN", "Adversarial Feature Learning", "1605.09782"
    return "BigBiGAN", "Large Scale Adversarial Representation Learning", "1907.02544"


def _metadata(info: ModelInfo, parts: Iterable[str]) -> str:
    task = {"generator": "unconditional-image-generation", "encoder": "image-feature-extraction"}
    lines = ["library_name: bigbigan"]
    if info.license:
        if re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", info.license):
            lines.append(f"license: {info.license}")
        else:  # the Hub knows licences by lower-case identifiers; a JSON string is a YAML string
            lines += ["license: other", f"license_name: {json.dumps(one_line(info.license)[:80])}"]
    if tasks := [task[part] for part in parts if part in task]:
        lines.append(f"pipeline_tag: {tasks[0]}")
    lines += ["tags:", "- bigbigan", "- gan", "- representation-learning"]
    return "\n".join(["---", *lines, "---"])


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested dictionaries as (dotted path, text)."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from flatten(child, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_table(value: Any) -> bool:
    """Whether it is a list of records with the same fields."""
    records = isinstance(value, list) and value and all(isinstance(row, dict) and row for row in value)
    return bool(records) and all(row.keys() == value[0].keys() for row in value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, ready: bool = False) -> str:
    return "\n".join(table(header, rows, ready=ready))
