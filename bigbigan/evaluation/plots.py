"""Plots of records and of training runs, as PNG, by matplotlib's figures alone: no window, no global state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbigan.evaluation.report import Group
from bigbigan.evaluation.tables import is_number
from bigbigan.files import atomic_write
from bigbigan.markdown import one_line
from bigbigan.outputs import PLOT_MARK

DPI = 120
SCORES = "Discriminator scores"
# Panels of a training run: title, unit, and the beginnings of the names that belong there.
PANELS = (
    ("Held-out accuracy", "%", ("linear_", "knn_")),
    ("Reconstruction error", "mean |difference|", ("pixel_l1",)),
    ("Losses", "", ("loss_",)),
    (SCORES, "", ("score_",)),
)


def draw_group(group: Group, path: Path) -> bool:
    """The figure that the records name: lines where an x varies, else bars. Returns whether there was anything."""
    table = group.table
    columns = {column["key"]: column for column in table["columns"]}
    plot = table["plot"]
    if plot is None or plot["y"] not in columns:
        return False
    y = columns[plot["y"]]

    def labelled(swept: str) -> list[tuple[str, dict[str, Any]]]:
        named = zip(_short_labels(group.labels(plot["series"], swept)), group.rows, strict=True)
        return [(label, row) for label, (_, row) in named if is_number(row.get(y["key"]))]

    def varies(key: str) -> bool:
        values = {(label, row[key]) for label, row in labelled(key) if is_number(row.get(key))}
        return len(values) > len({label for label, _ in values})

    swept = next(filter(varies, plot["x"]), "")
    rows = labelled(swept)
    if not rows:
        return False
    scale, title = 100 if y["format"] == "percent" else 1, plain(y["label"])
    if swept:
        series: dict[str, list[tuple[float | None, float]]] = {}
        for label, row in rows:
            x = row.get(swept)
            series.setdefault(label, []).append((x if is_number(x) else None, scale * row[y["key"]]))
        _draw_lines(path, title, plain(swept.replace("_", " ")), series)
        return True
    _draw_bars(path, title, [label for label, _ in rows], [scale * row[y["key"]] for _, row in rows])
    return True


def _short_labels(labels: Sequence[Sequence[str]]) -> list[str]:
    """The first parts that tell rows apart, or the very first if none does."""

    def told(places: Sequence[int]) -> int:
        return len({tuple(label[place] for place in places) for label in labels})

    telling: list[int] = []
    for place in range(len(labels[0]) if labels else 0):
        if told([*telling, place]) > max(1, told(telling)):
            telling.append(place)
    telling = telling or [0]
    return [plain(" · ".join(part for part in (label[i] for i in telling) if part != "-")) for label in labels]


def plain(text: str) -> str:
    """A text that matplotlib draws as it is: `$` would open a formula, and a legend leaves out what begins with `_`."""
    return (" " if text.startswith("_") else "") + one_line(text).replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'bigbigan[eval]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": PLOT_MARK})  # equal figures give equal bytes


def _draw_bars(path: Path, title: str, labels: Sequence[str], values: Sequence[float]) -> None:
    figure = _figure(8, 0.8 + 0.36 * len(labels))
    axes = figure.subplots()
    bars = axes.barh(range(len(labels)), values, color="#4878a8")
    axes.bar_label(bars, [f"{value:.4g}" for value in values], padding=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(min(0, 1.12 * min(values)), max(1.12 * max(values), 1e-12))
    figure.suptitle(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_lines(path: Path, title: str, swept: str, series: Mapping[str, Sequence[tuple[float | None, float]]]) -> None:
    """What has no x is a level line."""
    figure = _figure(8, 4 + 0.22 * len(series))  # the legend has a line each
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "label": label}
        along = sorted((x, y) for x, y in points if x is not None)
        if along:
            axes.plot(*zip(*along, strict=True), marker="os^D"[number // 10 % 4], **style)
        else:
            axes.axhline(points[0][1], linestyle="--", **style)
    ticks = sorted({x for points in series.values() for x, _ in points if x is not None})
    if swept == "images seen":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        if ticks[0] > 0 and ticks[-1] / ticks[0] >= 8:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=swept, ylabel=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    _save(figure, path)


def read_run(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged; the last line may be half written.

    Raises:
        ValueError: a line is no log entry.
    """
    path = folder / "metrics.jsonl"
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries.append({"num_images": int(entry["num_images"]), **entry})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} line {number} is no log entry of a training run ({error!r})") from error
    if not entries:
        raise ValueError(f"{path} holds nothing yet; `bigbigan train` writes a line every log_images")
    return entries


def draw_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Held-out scores, reconstruction error and losses of runs over the images they saw, a panel each."""
    names = list(dict.fromkeys(name for entries in runs.values() for entry in entries for name in entry))
    panels = [
        (title, unit, found)
        for title, unit, starts in PANELS
        if (found := [name for name in names if name.startswith(starts)])
    ]
    if len(runs) > 1:  # six lines a run, and what differs between runs shows in the losses
        panels = [panel for panel in panels if panel[0] != SCORES]
    figure = _figure(9, 2.4 * max(1, len(panels)) + 0.4)
    styles = ("-", "--", ":", "-.")
    every = figure.subplots(max(1, len(panels)), squeeze=False, sharex=True)[:, 0]
    for axes, (title, unit, found) in zip(every[: len(panels)], panels, strict=True):
        scale = 100 if unit == "%" else 1
        for number, (run, entries) in enumerate(runs.items()):
            for place, name in enumerate(found):
                points = [(e["num_images"], scale * e[name]) for e in entries if isinstance(e.get(name), int | float)]
                if not points:
                    continue
                # Of several runs each has a colour, and lines differ by style; of one, lines differ by colour.
                color = f"C{(number if len(runs) > 1 else place) % 10}"
                style = styles[place % 4] if len(runs) > 1 else "-"
                label = plain(f"{run}: {name}" if len(runs) > 1 else name)
                marker = "" if name.startswith(("loss_", "score_")) else "."
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=marker, linewidth=1.2)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    every[-1].set_xlabel("images seen")
    every[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    _save(figure, path)
