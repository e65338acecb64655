"""Paths of data with options behind them: `PATH?column=img&label=fine`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbigan.data.splits import parquet_files, subfolders

OPTIONS = ("column", "label", "max_bad_fraction")


def holds_rows(path: str | Path) -> bool:
    """Whether a path given as data leads to rows, in Parquet or "hf:…", and not to image files.

    Raises:
        ValueError: as `split_options`.
    """
    if str(path).startswith("hf:"):
        return True
    folder = Path(split_options(str(path))[0])
    if not folder.is_dir():
        return folder.suffix == ".parquet" and folder.is_file()
    return bool(parquet_files(folder)) or any(parquet_files(inner) for inner in subfolders(folder))


def split_options(spec: str, known: Sequence[str] = OPTIONS) -> tuple[str, dict[str, Any]]:
    """`NAME?option=value&…` as name and options, literally; a file or folder of that very name has none.

    Raises:
        ValueError: an unknown option, one without a value or given twice; or `max_bad_fraction` is not from 0 to 1.
    """
    if os.path.exists(spec):
        return spec, {}
    name, _, query = spec.partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if key not in known or not equals or key in options:
            raise ValueError(
                f"{spec!r} is not there, and as NAME?option=value&… it has no option {pair!r}, or has it twice; "
                f"options are {', '.join(known)}"
            )
        options[key] = value
    if "max_bad_fraction" in options:
        fraction = options["max_bad_fraction"]
        try:
            options["max_bad_fraction"] = float(fraction)
        except ValueError:
            options["max_bad_fraction"] = math.nan
        if not 0 <= options["max_bad_fraction"] <= 1:
            raise ValueError(f"{spec}: max_bad_fraction is {fraction!r}; give a number from 0 to 1")
    return name, options
