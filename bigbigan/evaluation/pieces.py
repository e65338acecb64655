"""The unfinished work of `encode`: finished pieces in `OUTPUT.partial/`, which a kill leaves usable.

OUTPUT.partial/manifest.json               what the pieces belong to
OUTPUT.partial/{rank}/000000.safetensors   rows, and in the metadata how many files are done and which failed
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bigbigan.files import TEMPORARY, atomic_write, foreign, remove_own

PIECE_NAME = "{:06d}.safetensors"
_MANIFEST_TEMPORARY = rf"\.manifest\.json{TEMPORARY}"
# Everything that OUTPUT.partial holds.
WORK_FILES = rf"manifest\.json|{_MANIFEST_TEMPORARY}|whole|[0-9]+/|[0-9]+/\.?[0-9]{{6,}}\.safetensors({TEMPORARY})?"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    path: Path
    rows: int
    stop: int  # files up to this one are done
    failed: list[tuple[int, str]]  # index of the file, reason


def save_piece(work: Path, number: int, stop: int, failed: list[tuple[int, str]], rows: dict[str, Tensor]) -> Piece:
    path = work / PIECE_NAME.format(number)
    with atomic_write(path) as temporary:  # by Python, whose errors say what the disk said
        temporary.write_bytes(save(rows, {"stop": str(stop), "failed": json.dumps(failed)}))
    return Piece(path, len(next(iter(rows.values()))), stop, failed)


def finished_pieces(work: Path) -> list[Piece]:
    """Those before the first damaged one, from which on all are removed, to be computed again."""
    pieces: list[Piece] = []
    while (path := work / PIECE_NAME.format(len(pieces))).exists():
        try:
            with safe_open(path, framework="np") as file:
                metadata, name = file.metadata(), next(iter(file.keys()))
                failed = [(index, reason) for index, reason in json.loads(metadata["failed"])]
                pieces.append(Piece(path, file.get_slice(name).get_shape()[0], int(metadata["stop"]), failed))
        except (SafetensorError, StopIteration, TypeError, KeyError, ValueError) as error:
            logger.warning("%s is damaged (%s): it and what follows it are computed again", path, error)
            for number in itertools.count(len(pieces)):
                if not (damaged := work / PIECE_NAME.format(number)).exists():
                    return pieces
                damaged.unlink()
    return pieces


def open_work_folder(work: Path, manifest: dict[str, Any]) -> None:
    """Leaves `work` with this manifest, and with pieces only if they belong to it.

    Raises:
        FileExistsError: it is a link or a file, or holds anything but the unfinished work of an earlier call.
    """
    path = work / "manifest.json"
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise FileExistsError(f"{work} is needed as a folder for unfinished work: move what is there away")
    if work.exists():
        found = _read_manifest(path)
        if strangers := foreign(work, _MANIFEST_TEMPORARY if found is None else WORK_FILES):
            raise FileExistsError(
                f"{work} is needed for unfinished work and holds other files ({', '.join(strangers[:3])}): move it away"
            )
        if found == manifest:
            return
        if found is not None:
            changed = sorted(key for key in found.keys() | manifest if found.get(key) != manifest.get(key))
            logger.warning("%s was written with other settings (%s): starting afresh", work, ", ".join(changed))
        remove_own(work, WORK_FILES)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(manifest), encoding="utf-8")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none, or somebody else's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    known = {"format", "encoder", "files", "outputs", "batch size"}
    return found if isinstance(found, dict) and known <= set(found) else None


@contextlib.contextmanager
def resumable(work: Path) -> Iterator[None]:
    """Errors of the disk say that the same command continues."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the disk
            raise
        hint = f"{error.strerror}. Finished work is kept in {work}: make room, then run the same command again"
        raise OSError(error.errno, hint, error.filename or os.fspath(work)) from error
