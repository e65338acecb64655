"""Records of what was measured, a JSON object a run, and the Markdown document that puts them together."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.evaluation.tables import Table, cell, describe, is_table
from bigbigan.files import file_name
from bigbigan.markdown import code, escape, slug, table, target

if TYPE_CHECKING:
    from bigbigan.data.dataset import ImageDataset
    from bigbigan.model import BigBiGAN

# Versions of those in use, beside torch's and Python's.
PACKAGES = ("numpy", "PIL", "sklearn", "torchmetrics", "torch_fidelity", "timm", "transformers", "pyarrow")


def make_record(
    model: BigBiGAN | None,
    protocol: Mapping[str, Any],
    *,
    results: Sequence[Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any] | ImageDataset],
) -> dict[str, Any]:
    """What was measured, how, on what, JSON-able; "table" describes the columns and the plot (`tables`).

    Args:
        model: None for features, samples or reconstructions that came as files.
        protocol: its "name", and every setting that makes figures comparable only if it is the same.
        results: a row each. Texts say what was measured; numbers are figures, or say how many.
        data: each set by its role: a data set, or its "digest" and number of "images".
    """
    import torch

    from bigbigan import __version__
    from bigbigan.evaluation.features import digest

    versions = {"bigbigan": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES}
    versions |= {name: str(version) for name, version in found.items() if version is not None}
    facts, rows = None, [dict(row) for row in results]
    if model is not None:
        seen, own = images_seen(model), model.info.name or "model"
        for row in rows:  # of other methods' reconstructions, the model is but the judge
            if seen is not None and row.get("representation", row.get("reconstructor", own)) == own:
                row["images_seen"] = seen
        digests = {f"{part}_digest": digest(getattr(model, part)) for part in model.parts}
        facts = {"name": model.info.name, "source": model.info.source, **digests}
    return {
        "protocol": dict(protocol),
        "model": facts,
        "data": {role: dict(part) if isinstance(part, Mapping) else data_facts(part) for role, part in data.items()},
        "results": rows,
        "table": describe(protocol, rows),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def data_facts(dataset: ImageDataset) -> dict[str, Any]:
    """What a record says of a data set."""
    return {"digest": dataset.digest, "images": len(dataset), "unreadable": len(dataset.bad)}


def images_seen(model: BigBiGAN) -> int | None:
    """How many images G and E saw in training, if the model folder says so."""
    return (model.info.provenance or {}).get("num_images")


def record_text(record: Mapping[str, Any]) -> str:
    """As JSON; NaN and infinity, which JSON has not, become null, and bytes of file names that are no text `\\xNN`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return file_name(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """A record in a file.

    Raises:
        ValueError: it is no JSON, or another document.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give files that `bigbigan evaluate --json` wrote") from error
    kinds: dict[str, Any] = {"protocol": dict, "data": dict, "results": list | dict, "versions": dict}
    wrong = [
        name for name, kind in kinds.items() if not isinstance(record, dict) or not isinstance(record.get(name), kind)
    ]
    if not wrong:
        rows = record["results"] = record["results"] if isinstance(record["results"], list) else [record["results"]]
        if not isinstance(record["protocol"].get("name"), str):
            wrong = ["protocol.name"]
        elif not all(isinstance(row, dict) for row in rows):
            wrong = ["results"]
        elif not all(isinstance(part, dict) for part in record["data"].values()):
            wrong = ["data"]
        elif not is_table(record.setdefault("table", describe(record["protocol"], rows))):  # older records lack it
            wrong = ["table"]
    if wrong:
        raise ValueError(f"{path} is no record of `bigbigan evaluate`: {', '.join(wrong)} missing or of another kind")
    return record


def find_records(folder: Path) -> list[Path]:
    """The .json files in a folder.

    Raises:
        ValueError: there are none.
    """
    if found := sorted(path for path in folder.glob("*.json") if path.is_file()):
        return found
    raise ValueError(f"{folder} holds neither records (.json) nor a run (metrics.jsonl)")


@dataclass(frozen=True)
class Group:
    """Rows that may stand in one table: of one protocol, its settings (seeds apart) and the same data.

    Attributes:
        records: by the name of their file.
        rows: name of the record and row, as they came.
    """

    protocol: dict[str, Any]
    data: dict[str, Any]
    records: dict[str, dict[str, Any]]
    rows: list[tuple[str, dict[str, Any]]]

    @property
    def name(self) -> str:
        return self.protocol["name"]

    @property
    def table(self) -> Table:
        """All columns that a record has, and the plot of the first that has one."""
        tables = [r.get("table") or describe(r["protocol"], r["results"]) for r in self.records.values()]
        columns = {column["key"]: column for table in tables for column in table["columns"]}
        return {"columns": list(columns.values()), "plot": next((t["plot"] for t in tables if t["plot"]), None)}

    def labels(self, keys: Sequence[str], swept: str = "") -> list[list[str]]:
        """The cells of `keys`, and the record's name if there are several; snapshots of one run are one series."""
        columns = {column["key"]: column for column in self.table["columns"]}
        labels = [[cell(columns[key], row) for key in keys if key in columns] for _, row in self.rows]
        if len(self.records) > 1 and swept != "images_seen":
            labels = [[*label, name] for label, (name, _) in zip(labels, self.rows, strict=True)]
        return labels


def group_records(records: Mapping[str, dict[str, Any]]) -> list[Group]:
    """Groups in the order of their first record; records of other data or settings never meet in one."""
    groups: dict[str, Group] = {}
    for name, record in records.items():
        protocol = {key: value for key, value in record["protocol"].items() if key != "seed"}
        digests = {role: part.get("digest") for role, part in record["data"].items()}
        key = json.dumps([protocol, digests], sort_keys=True)
        group = groups.setdefault(key, Group(protocol, record["data"], {}, []))
        group.records[name] = record
        group.rows.extend((name, row) for row in record["results"])
    return sorted(groups.values(), key=lambda group: [g.name for g in groups.values()].index(group.name))


def markdown_report(groups: Sequence[Group], pictures: Mapping[int, str]) -> Iterator[str]:
    """The lines of a document; `pictures` are names of files by the number of their group."""
    for number, group in enumerate(groups):
        alike = [other for other in groups if other.name == group.name]
        part = "" if len(alike) == 1 else f" ({alike.index(group) + 1} of {len(alike)}: other data or settings)"
        yield from (f"## {escape(group.name)}{part}", "")
        yield from table(*group_table(group))
        yield ""
        if number in pictures:
            yield from (f"![{slug(group.name)}]({target(pictures[number])})", "")
        settings = "; ".join(
            f"{escape(key)}: {escape(_text(value))}" for key, value in group.protocol.items() if key != "name"
        )
        data = ", ".join(
            escape(f"{role} {str(part.get('digest'))[:12]} ({_text(part.get('images'))} images)")
            for role, part in group.data.items()
        )
        yield from (f"Protocol: {settings}.", f"Data: {data}.", "", "Records:", "")
        yield from (f"- {escape(f'{name}:')} {_record_line(record)}" for name, record in group.records.items())
        yield ""


def group_table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and cells: texts, the record's name if there are several, then figures."""
    columns = group.table["columns"]
    texts = {column["key"]: column["label"] for column in columns if column["format"] == "text"}
    figures = [
        column
        for column in columns
        if column["format"] != "text" and any(row.get(column["key"]) is not None for _, row in group.rows)
    ]
    several = ["Record"] if len(group.records) > 1 else []
    cells = [
        [*label, *(cell(column, row) for column in figures)]
        for label, (_, row) in zip(group.labels(list(texts)), group.rows, strict=True)
    ]
    return [*texts.values(), *several, *(column["label"] for column in figures)], cells


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, str) and len(value) == 64 and value.isalnum():  # a digest
        return value[:12]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _record_line(record: Mapping[str, Any]) -> str:
    model, versions = record.get("model"), record["versions"]
    parts = [_text(model)] if isinstance(model, dict) else []
    parts += [f"seed {record['protocol']['seed']}"] if "seed" in record["protocol"] else []
    parts += [str(record["date"])] if "date" in record else []
    parts += [", ".join(f"{name} {version}" for name, version in versions.items())]
    return "; ".join([*map(escape, parts), *([code(str(record["command"]))] if "command" in record else [])])
