"""Which files or which folder a split's name means, in any case and usual spelling."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from bigbigan.images import IMAGE_SUFFIXES

SPELLINGS = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
_FAMILY = {name: names[0] for names in SPELLINGS for name in names}
_WORDS = "dataset|data|sets?|splits?|images?|imgs?|pictures|photos|files"  # beside it, as in test_set or train2017
_LIKE = re.compile(f"(?:{_WORDS})*(?:{'|'.join(sorted(_FAMILY, key=len, reverse=True))})(?:{_WORDS})*")


def family(name: str) -> str:
    """What all spellings of a split share: "train", "val", "test", or the name itself in lower case."""
    return _FAMILY.get(name.casefold(), name.casefold())


def looks_like_split(name: str) -> bool:
    """Whether a folder of that name probably holds a split and no class, such as Train, test_set or val2017."""
    return _LIKE.fullmatch(re.sub(r"[\W\d_]", "", name).casefold()) is not None


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def parquet_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def split_names(folder: Path) -> list[str]:
    """Names of the splits in a folder, as they are written there; usual ones first."""
    names = {re.split(r"-(?=\d)", file.stem)[0] for file in parquet_files(folder)}
    names |= {path.name for path in subfolders(folder) if looks_like_split(path.name)} if not names else set()
    order = [spellings[0] for spellings in SPELLINGS]
    return sorted(names, key=lambda name: (order.index(family(name)) if family(name) in order else 9, name))


def find_parquet(folder: Path, split: str) -> list[Path]:
    """`{split}.parquet` or the shards `{split}-*.parquet`; else those of another spelling, if there is one only.

    Raises:
        ValueError: several other spellings, or shards are missing.
    """
    files = _exact(folder, split)
    if not files:
        stems = (re.match(r"[^\W\d_]+", file.stem) for file in parquet_files(folder))
        spelled = _chosen({match[0] for match in stems if match}, split, folder)
        files = _exact(folder, spelled) if spelled else []
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)$", file.stem))}
    if counts and counts != {len(files)}:
        name = files[0].name.partition("-")[0]
        raise ValueError(f"{folder} holds {len(files)} of {max(counts)} {name}-*.parquet shards; fetch the others")
    return files


def _exact(folder: Path, split: str) -> list[Path]:
    whole = folder / f"{split}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{glob.escape(split)}-*.parquet"))


def find_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of a split; of another spelling, if there is one only.

    Raises:
        ValueError: several other spellings.
    """
    if (folder / split).is_dir():
        return folder / split
    spelled = _chosen((path.name for path in subfolders(folder)), split, folder)
    return folder / spelled if spelled else None


def _chosen(names: Iterable[str], split: str, folder: Path) -> str | None:
    fitting = sorted(name for name in names if family(name) == family(split))
    same = [name for name in fitting if name.casefold() == split.casefold()] or fitting
    if len(same) > 1:
        raise ValueError(f"{folder} holds {', '.join(same)}: {split!r} may mean any of them; name one as the split")
    return same[0] if same else None


def nested_parquet(folder: Path, split: str) -> Path | None:
    """The one subfolder with Parquet files of a split, as in a download of a Hub data set (data/train-….parquet).

    Raises:
        ValueError: several of them.
    """
    found = [path for path in subfolders(folder) if find_parquet(path, split)]
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ValueError(f"{folder} holds several sets with a split {split!r}; name one of {names}")
    return found[0] if found else None


def check_no_splits(folder: Path, relative: Iterable[str]) -> None:
    """Refuses to take splits for classes, in a folder whose pictures have these relative names.

    Raises:
        ValueError: names them.
    """
    first, second = set[str](), set[str]()
    for name in relative:
        parts = name.split("/")[:-1]
        if parts[:1] and looks_like_split(parts[0]):
            first.add(parts[0])
        if parts[1:2] and looks_like_split(parts[1]):
            second.add("/".join(parts[:2]))
    if first:
        names = sorted(first)
        raise ValueError(
            f"{folder} holds {', '.join(f'{name}/' for name in names)}: these look like splits, and none is the "
            f"training split. Name a split (such as {names[0]}), or the folder of the training images itself; rename a "
            "class that is called so"
        )
    if second:
        names = sorted(second)[:3]
        raise ValueError(
            f"{folder} holds {', '.join(f'{name}/' for name in names)}: these look like splits inside other folders. "
            f"Name the folder that holds the splits, such as {folder / names[0].split('/')[0]}"
        )


def classes_beside(folder: Path) -> list[str]:
    """Folders beside a split's that hold pictures and are no splits: then its name may be that of a class."""
    found = []
    for path in subfolders(folder.parent):
        if not looks_like_split(path.name) and any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in path.iterdir()):
            found.append(path.name)
    return found
