"""Which files of a folder are pictures, and which are left out."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".apng", ".jpe", ".jfif", ".mpo", ".dib"),  # the same formats under other names, as Pillow has them
)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All files under `folder` with one of IMAGE_SUFFIXES (any case), sorted by their relative path with slashes.

    Hidden names (leading dot) are left out; other files without such an ending, and what is no regular file, too,
    with one warning that counts them. Links are followed; a folder reached twice, as in a loop of links, is listed
    once.

    Raises:
        ValueError: no such folder, or no picture in it.
        OSError: a folder in it cannot be read.
    """
    found, others = _listed(Path(folder))
    if others:
        warnings.warn(f"{os.fspath(folder)}: {_left_out(others)}", stacklevel=2)
    return found


def _left_out(others: list[Path]) -> str:
    """Files that `list_images` does not list, in words: how many, and their endings or names."""
    ended = [path for path in others if path.suffix.lower() not in IMAGE_SUFFIXES]
    special = [path.name for path in others if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = []
    if ended:
        counts = Counter(path.suffix.lower() or "none" for path in ended)
        endings = sorted(counts, key=lambda ending: (-counts[ending], ending))
        shown = ", ".join(endings[:8]) + (", …" if len(endings) > 8 else "")
        one = len(ended) == 1
        texts.append(f"{len(ended)} file{'' if one else 's'} with {'another ending' if one else 'other endings'} "
                     f"{'was' if one else 'were'} left out ({shown})")  # fmt: skip
    if special:
        shown = ", ".join(sorted(special)[:3]) + (", …" if len(special) > 3 else "")
        texts.append(f"{len(special)} left out that lead to no regular file ({shown})")
    return "; ".join(texts)


def _listed(root: Path) -> tuple[list[Path], list[Path]]:
    """The pictures, and the other visible files and links."""

    def fail(error: OSError) -> NoReturn:  # `os.walk` would skip the folder in silence
        raise error

    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        for path in paths:
            (found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() else others).append(path)
    if not found:
        hint = f" ({_left_out(others)})" if others else ""
        raise ValueError(f"{root}: no pictures in it; looked for {', '.join(IMAGE_SUFFIXES)}{hint}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix()), others


def has_images(folder: str | os.PathLike[str]) -> bool:
    """Whether `list_images` finds any picture in a folder."""
    try:
        return bool(_listed(Path(folder))[0])
    except ValueError:
        return False


def asset_images() -> list[Path]:
    """The pictures inside the package: 32 of Fashion-MNIST's test set, which its model has not seen in training."""
    return _listed(Path(__file__).with_name("assets") / "fashion_mnist_test")[0]
