"""What the table and the plot of a record are: a closed description that each record carries.

    {"columns": [{"key": "accuracy", "label": "Top-1 %", "format": "percent"}, …],
     "plot": {"y": "accuracy", "x": ["k", "images_seen"], "series": ["representation", "feature", "metric"]}}

A column may also have "deviation", the key of the standard deviation shown behind the value, and "report": true if
reports show it and `bigbigan evaluate` does not print it. A plot shows `y`: as lines over the first key of `x` that
varies within a series, else as bars. Records of earlier versions get their description from the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigbigan.evaluation.feature_networks import INCEPTION
from bigbigan.evaluation.generation import figure_names

Column = dict[str, Any]
Table = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

FORMATS = ("text", "count", "number", "percent")
STD = ", std"  # ends the key of a score's standard deviation


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def describe(protocol: Mapping[str, Any], rows: Rows) -> Table:
    """The table and plot of a protocol's results; of a protocol that is not ours, all texts and numbers."""
    columns, plot = TABLES.get(str(protocol.get("name")), _foreign)(protocol, rows)
    present = {key for row in rows for key in row}
    columns = [column for column in columns if column["key"] in present]
    series = [column["key"] for column in columns if column["format"] == "text"]
    return {"columns": columns, "plot": {**plot, "series": series} if plot else None}


def is_table(table: Any) -> bool:
    """Whether this is such a description."""
    if not isinstance(table, dict) or not isinstance(table.get("columns"), list) or "plot" not in table:
        return False
    for column in table["columns"]:
        if not isinstance(column, dict) or column.get("format") not in FORMATS:
            return False
        if not all(isinstance(column.get(name, ""), str) for name in ("key", "label", "deviation")):
            return False
        if not {"key", "label"} <= column.keys():
            return False
    plot = table["plot"]
    if plot is None:
        return True
    lists = [plot.get("x"), plot.get("series")] if isinstance(plot, dict) else [None]
    found = all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in lists)
    return found and isinstance(plot.get("y"), str)


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """A value as text; "-" where there is none."""
    text = _formatted(column["format"], row.get(column["key"]))
    deviation = row.get(column.get("deviation", ""))
    return text if deviation is None else f"{text} ± {_formatted(column['format'], deviation)}"


def printed(table: Table, rows: Rows) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the columns that `bigbigan evaluate` prints."""
    columns = [column for column in table["columns"] if not column.get("report")]
    return tuple(c["label"] for c in columns), [tuple(cell(c, row) for c in columns) for row in rows]


def title(key: str) -> str:
    return key if " " in key else (key[:1].upper() + key[1:]).replace("_", " ")  # "FID (NAME)" is a title already


def _formatted(form: str, value: Any) -> str:
    if value is None:
        return "-"
    if form == "text" or not is_number(value):
        return str(value)
    if form == "percent":
        return f"{100 * value:.2f}"
    return f"{value:,}" if form == "count" and isinstance(value, int) else f"{value:.4g}"


def _texts(*keys: str) -> list[Column]:
    return [{"key": key, "label": title(key), "format": "text"} for key in keys]


def _column(key: str, form: str, label: str | None = None, **more: Any) -> Column:
    return {"key": key, "label": label or title(key), "format": form, **more}


_SEEN = _column("images_seen", "count", report=True)


def _linear(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    columns = [
        *_texts("representation", "feature"),
        _column("num_features", "count", "Width"),
        *([_column("labels", "count")] if "labels" in protocol else []),  # each row states it; here they differ
        _column("accuracy", "percent", "Top-1 %"),
        _column("top5", "percent", "Top-5 %"),
        _column("l2", "number", "L2"),
        _column("lr", "number", "LR"),
        _column("n_train", "count", "Training images", report=True),
        _column("n_test", "count", "Test images", report=True),
        _SEEN,
    ]
    return columns, {"y": "accuracy", "x": ["labels", "images_seen"]}


def _knn(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    columns = [
        *_texts("representation", "feature"),
        _column("num_features", "count", "Width"),
        *_texts("metric"),
        _column("k", "count", "k"),
        _column("accuracy", "percent", "Top-1 %"),
        _SEEN,
    ]
    return columns, {"y": "accuracy", "x": ["k", "images_seen"]}


def _retrieval(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    columns = [
        *_texts("representation", "feature", "metric"),
        _column("k", "count", "k"),
        _column("precision", "percent", "Precision %"),
        _column("num_queries", "count", report=True),
        _SEEN,
    ]
    return columns, {"y": "precision", "x": ["k", "images_seen"]}


def _generation(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    names = figure_names(str(protocol.get("network", INCEPTION)))
    scores = [
        _column(name, "number", **({"deviation": name + STD} if any(name + STD in row for row in rows) else {}))
        for name in names.values()
    ]
    columns = [
        *_texts("samples", "truncation", "weights"),
        _column("resolution", "count"),
        _column("num_samples", "count"),
        *scores,
        _SEEN,
    ]
    return columns, {"y": names["frechet"], "x": ["images_seen"]}


def _reconstruction(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    percentages = ("label_agreement", "classifier_agreement", "classifier_accuracy")
    errors = ("pixel_l1", "mean_image_l1", "mean_color_l1", "random_pair_l1", "pixel_mse")
    ratios = ("pixel_error_ratio", "pixel_l2_ratio", "feature_distance_ratio")
    columns = [
        *_texts("reconstructor", "latent", "features"),
        *(_column(key, "percent", f"{title(key)} %") for key in percentages),
        *(_column(key, "number") for key in (*errors, *ratios)),
        _column("num_images", "count"),
        _SEEN,
    ]
    return columns, {"y": "label_agreement", "x": ["images_seen"]}


def _rotation(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    columns = [_column("accuracy", "percent", "Top-1 %"), _column("num_images", "count"), _SEEN]
    return columns, {"y": "accuracy", "x": ["images_seen"]}


def _foreign(protocol: Mapping[str, Any], rows: Rows) -> tuple[list[Column], Table]:
    """Texts say what a row is; numbers are its figures, and the first that is no count is the plot's."""
    columns, scores = [], []
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and all(isinstance(value, str) for value in values) and not key.endswith("_digest"):
            columns += _texts(key)
        elif values and all(map(is_number, values)) and key != "images_seen" and not key.endswith(STD):
            counts = all(isinstance(value, int) for value in values)
            columns.append(_column(key, "count" if counts else "number"))
            scores += [] if counts else [key]
    columns = [column for column in columns if column["format"] == "text"] + [
        column for column in columns if column["format"] != "text"
    ]
    plot = {"y": scores[0], "x": ["images_seen"]} if scores else {}
    return [*columns, _SEEN], plot


TABLES: dict[str, Callable[[Mapping[str, Any], Rows], tuple[list[Column], Table]]] = {
    "linear": _linear,
    "knn": _knn,
    "retrieval": _retrieval,
    "generation": _generation,
    "reconstruction": _reconstruction,
    "rotation": _rotation,
}
