"""`evaluate`: its protocols, what they share, and how an evaluation becomes a table and a record."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.commands.options import Commands, add_output, choose_device, help_formatter, positive, set_threads
from bigbigan.commands.verbs import ABOUT, add_protocols
from bigbigan.outputs import RECORD

if TYPE_CHECKING:
    from bigbigan.evaluation import Evaluation

DATA = (
    "Data: a folder with train.parquet and test.parquet (Hugging Face layout: image, label; also in shards),\n"
    "or with train/ and test/, each with one folder of images per class.\n"
    "PATH?column=img&label=fine names other columns.\n"
)
ENDING = (
    "Prints a Markdown table, then the record: figures, protocol, digests of model and data, versions.\n"
    "`bigbigan report` puts records together.\n"
    "Exit codes: 0 done, 2 wrong usage, no such model, or data that do not fit."
)


def add_evaluate(commands: Commands, argv: Sequence[str] | None) -> None:
    about = ABOUT["evaluate"]
    evaluate = commands.add_parser("evaluate", help=about, description=about, formatter_class=help_formatter)
    protocols = evaluate.add_subparsers(dest="protocol", metavar="PROTOCOL", required=True, title="protocols")
    add_protocols(protocols, argv)


def add_data_options(parser: argparse.ArgumentParser, *, train: bool = True) -> None:
    parser.add_argument("--data", required=True, metavar="PATH", help="labelled training and test images")
    if train:
        parser.add_argument(
            "--train-split",
            default="train",
            metavar="SPLIT",
            help="(default: %(default)s); train[:50000] is its first 50,000 images",
        )
    parser.add_argument("--test-split", default="test", metavar="SPLIT", help="(default: %(default)s)")
    add_workers_option(parser)
    add_record_option(parser)


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes that decode images (default: by cores)"
    )


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--feature-cache",
        metavar="FOLDER",
        help="cache features in FOLDER and stream them from disk, for sets larger than the memory. Logistic "
        "regression still loads all of them into memory. Data in folders are recognised by names, sizes and times of "
        "their files. Default: no cache",
    )


def add_record_option(parser: argparse.ArgumentParser) -> None:
    add_output(
        parser,
        "--json",
        kind=RECORD,
        type=_record_path,
        metavar="FILE",
        help="write the record there instead of printing it",
    )


def _record_path(text: str) -> str:
    """Refuses, before the work, a path that cannot be written after it."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"cannot write to {text!r}: it is a folder, or its parent folder does not exist; name a file in a folder "
            "that is there"
        )
    return text


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model, device and data workers that the options name, for an evaluate function."""
    set_threads(arguments)
    return {
        "model": arguments.model,
        "revision": arguments.revision,
        "device": choose_device(arguments.device),
        "workers": arguments.workers,
    }


def print_evaluation(arguments: argparse.Namespace, evaluation: Evaluation) -> None:
    """Prints a Markdown table, and the record unless --json has a file for it, or if that cannot be written."""
    from bigbigan.evaluation.report import record_text
    from bigbigan.files import atomic_write
    from bigbigan.markdown import table

    text = record_text({**evaluation.record, "command": shlex.join(["bigbigan", *arguments.argv])})
    print(*table(evaluation.header, evaluation.rows), sep="\n")
    if not arguments.json:
        print(f"\n{text}", end="")
        return
    try:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError:  # a full disk must not cost hours of work
        print(f"\n{text}", end="")
        raise
