"""`report`: what was measured, as a document."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bigbigan.commands.options import Commands, add_command


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "put records of `evaluate` and training runs together in a Markdown document\n\n"
        "One table a protocol, its settings and data: figures on other data or of other settings never share one.\n"
        "With --output, plots stand beside the document as PNG: bars, lines where k or labels vary, and the curves\n"
        "of runs over images seen.",
        "Example: bigbigan report linear.json knn.json runs/fashion --output report.md\n"
        "Exit codes: 0 done, 2 a file is no record.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="PATH", help="a record (.json), a folder of records, or a run folder of `train`"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the document (default: stdout, without plots)")
    parser.add_argument("--title", default="Evaluation", help="(default: %(default)s)")


def _report(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.plots import draw_group, draw_runs
    from bigbigan.evaluation.report import group_records, markdown_report
    from bigbigan.files import atomic_write

    records, runs = _read(list(map(Path, arguments.inputs)))
    output = Path(arguments.output) if arguments.output else None
    if output is not None and (output.is_dir() or output.suffix.lower() in (".json", ".jsonl", ".png")):
        raise ValueError(f"{output} is no place for a document; name a file such as report.md")
    groups = group_records(records)
    pictures: dict[int, str] = {}
    lines = [f"# {arguments.title}", ""]
    for number, group in enumerate(groups):
        if output is not None:
            picture = output.with_name(f"{output.stem}-{group.name}-{number + 1}.png")
            if draw_group(group, picture):
                pictures[number] = picture.name
    lines += markdown_report(groups, pictures)
    if runs:
        lines += ["## Training runs", "", *_run_lines(runs), ""]
        if output is not None:
            picture = output.with_name(f"{output.stem}-runs.png")
            draw_runs(runs, picture)
            lines += [f"![training runs]({picture.name})", ""]
    text = "\n".join(lines)
    if output is None:
        print(text, end="")
        return 0
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 0


def _read(inputs: list[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Records and runs by short names that tell them apart."""
    from bigbigan.evaluation.plots import read_run
    from bigbigan.evaluation.report import find_records, read_record

    runs = [path for path in inputs if (path / "metrics.jsonl").is_file()]
    files = [file for path in inputs if path not in runs for file in (find_records(path) if path.is_dir() else [path])]
    return (
        {name: read_record(path) for name, path in _short_names(files).items()},
        {name: read_run(path) for name, path in _short_names(runs).items()},
    )


def _short_names(paths: list[Path]) -> dict[str, Path]:
    paths = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)}


def _run_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of each run how far it is, and the best of each held-out score."""
    from bigbigan.evaluation.report import table_lines

    scores = list(
        dict.fromkeys(
            name for entries in runs.values() for e in entries for name in e if name.startswith(("linear_", "knn_"))
        )
    )
    rows = []
    for run, entries in runs.items():
        row = [run, f"{entries[-1]['num_images']:,}"]
        for name in scores:
            scored = [entry for entry in entries if name in entry]
            best = max(scored, key=lambda entry: entry[name], default=None)
            row.append("-" if best is None else f"{100 * best[name]:.2f} at {best['num_images']:,}")
        rows.append(row)
    return list(table_lines(["Run", "Images seen", *(f"Best {name} %" for name in scores)], rows))
