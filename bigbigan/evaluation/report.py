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

from bigbigan.files import file_name
from bigbigan.markdown import code, escape, slug, table, target

if TYPE_CHECKING:
    from bigbigan.model import BigBiGAN

# Fractions of 1, shown as percentages, and what they are called there. What is first is what plots show.
PERCENT = {
    "accuracy": "Top-1 %",
    "top5": "Top-5 %",
    "label_agreement": "Label agreement %",
    "classifier_agreement": "Classifier agreement %",
    "classifier_accuracy": "Classifier accuracy %",
    "precision": "Precision %",
}
STD = ", std"  # ends the name of a figure's deviation
SWEPT = ("k", "labels_per_class", "labels", "fraction", "images_seen")  # what varies from row to row, along an axis
# Versions of those in use, beside torch's and Python's.
PACKAGES = ("numpy", "PIL", "sklearn", "torchmetrics", "torch_fidelity", "timm", "transformers", "pyarrow")


def make_record(
    model: BigBiGAN | None,
    protocol: Mapping[str, Any],
    *,
    results: Sequence[Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What was measured, how, on what, JSON-able.

    Args:
        model: None for features, samples or reconstructions that came as files.
        protocol: its "name", and every setting that makes figures comparable only if it is the same.
        results: a row each. Texts say what was measured; numbers are figures, or say how many.
        data: "digest" and number of "images" of each set, by its role.
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
        "data": {name: dict(part) for name, part in data.items()},
        "results": rows,
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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

    def columns(self) -> tuple[list[str], list[str]]:
        """Names of texts, which say what a row is, and of numbers, in the order of their first appearance."""
        keys = dict.fromkeys(key for _, row in self.rows for key in row)
        values = {key: [row[key] for _, row in self.rows if row.get(key) is not None] for key in keys}
        numbers = [key for key, found in values.items() if found and all(map(_is_number, found))]
        texts = [key for key, found in values.items() if found and all(isinstance(value, str) for value in found)]
        return [key for key in texts if not key.endswith("_digest")], numbers

    def labels(self, swept: str = "") -> list[list[str]]:
        """Of each row the texts, and the record's name if there are several that are no snapshots of one run."""
        texts, _ = self.columns()
        labels = [[str(row.get(key) or "-") for key in texts] for _, row in self.rows]
        if len(self.records) > 1 and swept != "images_seen":
            labels = [[*label, name] for label, (name, _) in zip(labels, self.rows, strict=True)]
        return labels

    def main_figure(self) -> str | None:
        """What a plot shows: the first accuracy or agreement, else the first score that is no setting or count."""
        numbers = [key for key in self.columns()[1] if key not in SWEPT]
        scores = [key for key in numbers if any(isinstance(row.get(key), float) for _, row in self.rows)]
        return next((key for key in PERCENT if key in numbers), scores[0] if scores else None)


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
    """Header and cells; None is "-", and a figure's deviation ("FID, std") stands beside it."""
    texts, numbers = group.columns()
    figures = [key for key in numbers if key.removesuffix(STD) == key or key.removesuffix(STD) not in numbers]
    several = ["Record"] if len(group.records) > 1 else []
    header = [*map(_title, texts), *several, *(PERCENT.get(key, _title(key)) for key in figures)]
    cells = [
        [*label, *(_number(key, row.get(key), row.get(key + STD)) for key in figures)]
        for label, (_, row) in zip(group.labels(), group.rows, strict=True)
    ]
    return header, cells


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _title(key: str) -> str:
    return key if " " in key else (key[:1].upper() + key[1:]).replace("_", " ")  # "FID (NAME)" is a title already


def _number(key: str, value: Any, deviation: Any = None) -> str:
    if value is None:
        return "-"
    if deviation is not None:
        return f"{_number(key, value)} ± {_number(key, deviation)}"
    if key in PERCENT:
        return f"{100 * value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


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
