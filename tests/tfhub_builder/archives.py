"""Hostile archives."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from .registry import HOSTILE, Hostile, marker, secret


def pack(folder: Path, archive: Path, prefix: str = "./") -> Path:
    """A good `.tar.gz`, laid out as TF-Hub serves them."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, prefix + str(file.relative_to(folder)), recursive=False)
    return archive


def _file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


def _special(name: str, kind: bytes, target: str = "", numbers: tuple[int, int] = (0, 0)) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.devmajor, info.devminor = numbers
    return info


def _with(good: Path, path: Path, *members: tuple[tarfile.TarInfo, io.BytesIO | None], only: bool = False) -> Path:
    """The good module with extra members before it (or these alone)."""
    archive = path.with_name(path.name + ".tar.gz")
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for info, data in members:
            tar.addfile(info, data)
        if not only:
            for file in sorted(good.rglob("*")):
                tar.add(file, f"./{file.relative_to(good)}", recursive=False)
    return archive


def tar_parent(good: Path, path: Path) -> Path:
    return _with(good, path, _file(f"../{marker(path).name}"))


def tar_hidden_parent(good: Path, path: Path) -> Path:
    return _with(good, path, _file(f"variables/../../{marker(path).name}"))


def tar_absolute(good: Path, path: Path) -> Path:
    return _with(good, path, _file(str(marker(path).absolute())))


def tar_symlink_out(good: Path, path: Path) -> Path:
    """A link out of the folder, then a file written through it."""
    link = _special("out", tarfile.SYMTYPE, str(path.parent.absolute()))
    return _with(good, path, (link, None), _file(f"out/{marker(path).name}"))


def tar_symlinked_data(good: Path, path: Path) -> Path:
    link = _special("./variables/variables.data-00000-of-00001", tarfile.SYMTYPE, str(secret(path).absolute()))
    return _with(good, path, (link, None))


def tar_hardlink(good: Path, path: Path) -> Path:
    return _with(good, path, (_special("./saved_model.pb", tarfile.LNKTYPE, str(secret(path).absolute())), None))


def tar_device(good: Path, path: Path) -> Path:
    return _with(good, path, (_special("./saved_model.pb", tarfile.CHRTYPE, numbers=(1, 5)), None))  # /dev/zero


def tar_fifo(good: Path, path: Path) -> Path:
    return _with(good, path, (_special("./saved_model.pb", tarfile.FIFOTYPE), None))


def tar_twice(good: Path, path: Path) -> Path:
    """Two members of one name: the first is no graph."""
    return _with(good, path, _file("./saved_model.pb", b"garbage"))


def tar_declared_bomb(good: Path, path: Path) -> Path:
    """A member that says it is 10 TB."""
    info = tarfile.TarInfo("./saved_model.pb")
    info.size = 10**13
    archive = path.with_name(path.name + ".tar.gz")
    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20)))
    return archive


def tar_bomb(good: Path, path: Path) -> Path:
    """1 GB of zeros in about 1 MB, under the name of the graph."""
    info = tarfile.TarInfo("./saved_model.pb")
    info.size = 2**30
    archive = path.with_name(path.name + ".tar.gz")
    zeros = gzip.compress(bytes(2**24))  # gzip streams may follow one another
    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + 64 * zeros + gzip.compress(bytes(1024)))
    return archive


def tar_truncated(good: Path, path: Path) -> Path:
    archive = pack(good, path.with_name(path.name + ".tar.gz"))
    archive.write_bytes(archive.read_bytes()[:-1000])
    return archive


def tar_garbage(good: Path, path: Path) -> Path:
    archive = path.with_name(path.name + ".tar.gz")
    archive.write_bytes(b"\x1f\x8b" + bytes(1000))
    return archive


# Members outside the module's own files may be passed over: writing them anywhere is the fault.
_STRAY = (tar_parent, tar_hidden_parent, tar_absolute, tar_symlink_out)
_WRONG = (
    tar_symlinked_data, tar_hardlink, tar_device, tar_fifo, tar_twice, tar_declared_bomb, tar_bomb, tar_truncated,
    tar_garbage,
)  # fmt: skip
for _make in _STRAY:
    HOSTILE[_make.__name__] = Hostile(_make.__name__, "not_run", _make)
for _make in _WRONG:
    HOSTILE[_make.__name__] = Hostile(_make.__name__, "refuse", _make)
