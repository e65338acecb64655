"""`report`: what was measured, as a document."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bigbigan.commands.options import Commands, add_command, add_output
from bigbigan.evaluation.plots import draw_group, draw_runs, read_run
from bigbigan.evaluation.report import find_records, group_records, markdown_report, read_record
from bigbigan.files import atomic_write, file_name
from bigbigan.markdown import slug, table, target
from bigbigan.outputs import PICTURE, PLOT, REPORT, claim

logger = logging.getLogger(__name__)


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "One table a protocol, its settings and data: figures on other data or of other settings never share one.\n"
        "With --output, plots stand beside the document as PNG: bars, lines where k or labels vary, and the curves\n"
        "of runs over images seen.",
        "Example: bigbigan report linear.json knn.json runs/fashion --output report.md\n"
        "Exit codes: 0 done, 2 a file is no record.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="PATH", help="a record (.json), a folder of records, or a run folder of `train`"
    )
    add_output(
        parser,
        "-o",
        "--output",
        kind=REPORT,
        metavar="FILE",
        help="the document, .md or .txt (default: stdout, without plots)",
    )
    parser.add_argument("--title", default="Evaluation", help="(default: %(default)s)")


def _report(arguments: argparse.Namespace) -> int:
    records, runs = _read(list(map(Path, arguments.inputs)))
    groups = group_records(records)
    lines = [f"# {arguments.title}", ""]
    if not arguments.output:
        lines += markdown_report(groups, {})
        lines += ["## Training runs", "", *_run_lines(runs), ""] if runs else []
        print("\n".join(lines), end="")
        return 0
    output = Path(arguments.output)
    with contextlib.ExitStack() as stack:
        earlier = output.read_text(encoding="utf-8") if output.exists() else ""
        pictures: dict[int, str] = {}
        for number, group in enumerate(groups):
            picture = _claim_plot(stack, output, f"{slug(group.name)}-{number + 1}", earlier)
            if draw_group(group, picture):
                pictures[number] = picture.name
        lines += markdown_report(groups, pictures)
        if runs:
            picture = _claim_plot(stack, output, "runs", earlier)
            draw_runs(runs, picture)
            lines += ["## Training runs", "", *_run_lines(runs), "", f"![training runs]({target(picture.name)})", ""]
        text = "\n".join(lines)
        with atomic_write(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if unused := sorted(_shown(earlier) - _shown(text)):
        logger.info("no longer in %s, and left where they are: %s", output, ", ".join(unused))
    return 0


def _claim_plot(stack: contextlib.ExitStack, output: Path, name: str, earlier: str) -> Path:
    """The place of a plot beside the document. Plots of earlier versions carry no mark, but the document shows them."""
    picture = output.with_name(f"{output.stem}-{name}.png")
    stack.enter_context(claim(picture, PICTURE if picture.name in _shown(earlier) else PLOT))
    return picture


def _shown(document: str) -> set[str]:
    return set(map(unquote, re.findall(r"^!\[[^\]]*\]\((.+\.png)\)$", document, re.MULTILINE)))


def _read(inputs: list[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Records and runs by short names that tell them apart."""
    runs = [path for path in inputs if (path / "metrics.jsonl").is_file()]
    files = [file for path in inputs if path not in runs for file in (find_records(path) if path.is_dir() else [path])]
    return (
        {name: read_record(path) for name, path in _short_names(files).items()},
        {name: read_run(path) for name, path in _short_names(runs).items()},
    )


def _short_names(paths: list[Path]) -> dict[str, Path]:
    paths = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in paths]
    return {file_name(name if names.count(name) == 1 else path): path for name, path in zip(names, paths, strict=True)}


def _run_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of each run how far it is, and the best of each held-out score."""
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
    return list(table(["Run", "Images seen", *(f"Best {name} %" for name in scores)], rows))
