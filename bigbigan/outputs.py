"""The one rule for outputs, whatever command writes them: one writer at a time, never over an input, and only over an
earlier output of the same kind. `docs/outputs.md` states it for users.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbigan.files import LOCK, OutputError, hidden_name, hold

MAX_TEXT_BYTES = 64 << 20  # of a text file that may be an earlier output
MAX_HEADER_BYTES = 100_000_000  # what safetensors reads itself
PLOT_MARK = "bigbigan report"  # as the software that made a PNG
PICTURE_NAME = r"[0-9]{6}\.png|[1-9][0-9]{6,}\.png"  # of a folder that `generate` fills


@dataclass(frozen=True)
class Kind:
    """What a command writes to one file.

    Attributes:
        name: for messages, with its article.
        suffixes: that it may have, in lower case; any if empty.
        is_one: whether the content of a regular file is of this kind.
    """

    name: str
    suffixes: tuple[str, ...]
    is_one: Callable[[Path], bool]


def check_output(path: str | os.PathLike[str], kind: Kind, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuses, before any work, an output that must not be written.

    An empty file is nobody's and may be replaced. Links are followed.

    Raises:
        OutputError: another suffix; a folder, or anything else that is not a regular file; one of `inputs`, under
            whatever name; or a file of another kind.
    """
    text, target = os.fspath(path), Path(os.path.realpath(path))
    suffix = Path(text).suffix.lower()
    if target.is_dir():
        raise OutputError(f"{text} is a folder; name a file{_with_suffix(kind)}")
    if kind.suffixes and suffix not in kind.suffixes:
        known = ", ".join(suffix or "no suffix" for suffix in kind.suffixes)
        raise OutputError(f"{text}: cannot write {suffix or 'no suffix'!r}; use {known}")
    if not target.exists():
        return
    if any(os.path.exists(given) and os.path.samefile(given, target) for given in inputs):
        raise OutputError(f"{text} is an input and would be overwritten; choose another output")
    if not target.is_file():
        raise OutputError(f"{text} is not a regular file; name a file{_with_suffix(kind)}")
    if target.stat().st_size and not kind.is_one(target):
        raise OutputError(
            f"{text} exists and is not {kind.name}, so it is kept: move it away, or choose another output"
        )


def _with_suffix(kind: Kind) -> str:
    return f" with the suffix {', '.join(filter(None, kind.suffixes))}" if kind.suffixes else ""


@contextmanager
def claim(path: str | os.PathLike[str], kind: Kind, inputs: Iterable[str | os.PathLike[str]] = ()) -> Iterator[None]:
    """Keeps an output file for this process from the start of the work to its end.

    Raises:
        OutputError: as `check_output`, or another process is writing it.
    """
    check_output(path, kind, inputs)
    with hold(lock_beside(path), _busy(path)):
        yield


@contextmanager
def claim_pictures(folder: Path, *, overwrite: bool) -> Iterator[list[Path]]:
    """Keeps a folder for the pictures of one call; yields those of an earlier call, which `overwrite` gives up.

    Raises:
        OutputError: it is a file, another process is writing there, or it holds pictures of an earlier call.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; name a folder, or a picture with its suffix")
    with hold(folder / f".{LOCK}", _busy(folder)):
        earlier = sorted(path for path in folder.iterdir() if re.fullmatch(PICTURE_NAME, path.name))
        if earlier and not overwrite:
            raise OutputError(
                f"{folder} holds {len(earlier)} pictures of an earlier call ({earlier[0].name}, …), and the two would "
                "mix: name a new folder, or replace them with --overwrite"
            )
        for path in earlier:
            check_output(path, PICTURE)
        yield earlier


def lock_beside(path: str | os.PathLike[str]) -> Path:
    """The lock of an output file, or of a folder that is replaced as a whole."""
    target = Path(os.path.realpath(path))
    return target.with_name(f"{hidden_name(target)}.{LOCK}")


def _busy(path: str | os.PathLike[str]) -> OutputError:
    return OutputError(f"another process is writing {os.fspath(path)}; wait for it, or choose another output")


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _is_picture(path: Path) -> bool:
    head = _head(path, 12)
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _arrays(path: Path) -> set[str]:
    """The names of the arrays in an .npz file, and those of the texts beside the tensors of a .safetensors file."""
    head = _head(path, 8)
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError):
            return set()
    length = int.from_bytes(head, "little")
    if not 2 <= length <= min(path.stat().st_size - 8, MAX_HEADER_BYTES):
        return set()
    header = _json(_head(path, 8 + length)[8:])
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    return {*header, *texts} if isinstance(header, dict) and isinstance(texts, dict) else set()


def _is_features(path: Path) -> bool:
    if _head(path, 4) != b"PAR1":
        return "paths" in _arrays(path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    try:
        schema = parquet.read_schema(path)
    except pyarrow.ArrowException:
        return False
    return schema.names[:1] == ["path"] and all(pyarrow.types.is_fixed_size_list(kind) for kind in schema.types[1:])


def _text(path: Path) -> str:
    """Empty for what is too large or no text."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= MAX_TEXT_BYTES else ""
    except UnicodeDecodeError:
        return ""


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_record(path: Path) -> bool:
    found = _json(_text(path))
    return isinstance(found, dict) and {"protocol", "data", "results", "versions"} <= set(found)


def _is_samples(path: Path) -> bool:
    found = _json(_text(path))
    return isinstance(found, dict) and str(found.get("format")).startswith("bigbigan-samples/")


def _is_failures(path: Path) -> bool:
    lines = [_json(line) for line in _text(path).splitlines()]
    return bool(lines) and all(isinstance(line, dict) and set(line) == {"path", "reason"} for line in lines)


def _is_report(path: Path) -> bool:
    text = _text(path)
    records = "\nProtocol: " in text and "\nRecords:\n" in text
    return text.startswith("# ") and (records or "\n## Training runs\n" in text)


def _is_onnx(path: Path) -> bool:
    """By the properties that `export_onnx` gives a model, which its protobuf has at the end."""
    with path.open("rb") as file:
        head = file.read(1)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read()
    return head == b"\x08" and b"\n\npreprocess\x12" in tail and b"\n\x04part\x12" in tail


PICTURE = Kind("a picture", (".png", ".jpg", ".jpeg", ".webp"), _is_picture)
PLOT = Kind(
    "a plot of `bigbigan report`", (".png",), lambda path: f"tEXtSoftware\0{PLOT_MARK}".encode() in _head(path, 512)
)
FEATURES = Kind("a feature file of `bigbigan encode`", (".npz", ".safetensors", ".parquet"), _is_features)
FAILURES = Kind("a list of failures of `bigbigan encode`", (), _is_failures)
STATISTICS = Kind(
    "a file of `--save-statistics`", (".npz", ".safetensors"), lambda path: "network_digest" in _arrays(path)
)
RECORD = Kind("a record of `bigbigan evaluate`", (), _is_record)
SAMPLES = Kind("a record of `bigbigan generate`", (".json",), _is_samples)
REPORT = Kind("a document of `bigbigan report`", (".md", ".markdown", ".txt", ""), _is_report)
ONNX = Kind("an ONNX file of `bigbigan export-onnx`", (".onnx",), _is_onnx)
