"""What the protocols of `evaluate` share: options of the data, and the record of what was measured on what."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.commands.options import add_output, positive
from bigbigan.outputs import RECORD

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.data.dataset import ImageDataset
    from bigbigan.model import BigBiGAN

DATA = (
    "Data: a folder with train.parquet and test.parquet (Hugging Face layout: image, label; also in shards),\n"
    "or with train/ and test/, each with a folder of images a class.\n"
    "PATH?column=img&label=fine names other columns.\n"
)
ENDING = (
    "Prints a Markdown table, then the record: figures, protocol, digests of model and data, versions.\n"
    "`bigbigan report` puts records together.\n"
    "Exit codes: 0 done, 2 wrong usage, no such model, or data that do not fit."
)


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
    """Before hours of work what would end in an error after them."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in none; name a file in a folder that is there")
    return text


def check_classes(labels: Tensor, path: str, split: str) -> None:
    """
    Raises:
        ValueError: all labels are one.
    """
    if len(labels.unique()) < 2:
        raise ValueError(
            f"{path}: all {len(labels)} images of {split} have the one label {int(labels[0])}; give images of two "
            "classes or more"
        )


def make_record(
    model: BigBiGAN | None,
    protocol: dict[str, Any],
    *,
    results: list[dict[str, Any]],
    **data: ImageDataset | Mapping[str, Any],
) -> dict[str, Any]:
    """`bigbigan.evaluation.report.make_record`, with data sets in place of facts about them."""
    from bigbigan.evaluation.report import make_record

    facts = {
        name: dict(part)
        if isinstance(part, Mapping)
        else {"digest": part.digest, "images": len(part), "unreadable": len(part.bad)}
        for name, part in data.items()
    }
    return make_record(model, protocol, results=results, data=facts)


def print_record(
    arguments: argparse.Namespace, header: Sequence[str], rows: Sequence[Sequence[str]], record: dict[str, Any]
) -> None:
    """Prints a Markdown table, and the record unless --json has a file for it, or if that cannot be written."""
    from bigbigan.evaluation.report import record_text
    from bigbigan.files import atomic_write
    from bigbigan.markdown import table

    text = record_text({**record, "command": shlex.join(["bigbigan", *arguments.argv])})
    print(*table(header, rows), sep="\n")
    if not arguments.json:
        print(f"\n{text}", end="")
        return
    try:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError:  # a full disk must not cost hours of work
        print(f"\n{text}", end="")
        raise
