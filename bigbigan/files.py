"""Files on disk: written whole or not at all, by one process at a time, and removed only under this package's names."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

TEMPORARY = r"\.[a-z0-9_]+\.tmp"  # how the hidden names of unfinished files and folders end
LOCK = "bigbigan-lock"
MAX_NAME_BYTES = 200  # of the 255 that file systems allow, so that hidden names derived from a name fit too

_mutexes: dict[str, threading.RLock] = {}  # by lock file: locks of the system do not tell threads apart
_held: set[str] = set()


class OutputError(ValueError):
    """An output that another process is writing, or that would replace something other than an earlier output."""


def hidden_name(path: Path) -> str:
    """`.NAME`, with which unfinished files and locks beside `path` begin; of a long name a part and its digest."""
    name = path.name
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success syncs it and renames it to `path`, on error removes it.

    A link is followed: the file that it leads to is written.

    Raises:
        OutputError: `path` exists and is not a regular file.
        OSError: from the disk; its `filename` is `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError(f"{os.fspath(path)} is {'a folder' if target.is_dir() else 'no regular file'}; name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{hidden_name(target)}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(path, name):
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp is 0600; a user expects the folder's usual mode
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str], temporary: str | None = None) -> Iterator[None]:
    """Errors of the disk that name no file, or only a temporary one, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def sync(path: Path) -> None:
    """fsync of a file or folder, so that a rename that follows survives power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold(lock: Path, busy: Exception, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `lock`, so that no other process or thread does; within one thread it may be nested.

    However a process ends, the system lets go of its locks. Children do not inherit them. Where the system or its
    file system has no locks, a warning says so. Missing folders are made, and removed at the end if still empty.

    Raises:
        Exception: `busy`, if another process or thread holds it; with `wait` its text is logged, and this one waits.
    """
    key = os.path.realpath(lock)
    mutex = _mutexes.setdefault(key, threading.RLock())
    if not mutex.acquire(blocking=False):
        if not wait:
            raise busy
        logger.warning("%s", busy)
        mutex.acquire()
    try:
        if key in _held:  # by this thread
            yield
            return
        with _parents(Path(key)), _locked(Path(key), busy, wait):
            _held.add(key)
            try:
                yield
            finally:
                _held.discard(key)
    finally:
        mutex.release()


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            try:
                if any(folder.iterdir()):
                    break
                folder.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):  # another process was there
                    raise


@contextlib.contextmanager
def _locked(path: Path, busy: Exception, wait: bool) -> Iterator[None]:
    descriptor, process = _open_locked(path, busy, wait), os.getpid()
    try:
        yield
    finally:
        # Removed while it is still locked. A file with content is not this package's; a forked child owns nothing.
        if sys.platform != "win32" and os.getpid() == process and os.fstat(descriptor).st_size == 0:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path, busy: Exception, wait: bool) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the empty folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            _lock(descriptor, wait=False)
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, depending on the system
            if not wait:
                os.close(descriptor)
                raise busy from error
            logger.warning("%s", busy)
            _lock(descriptor, wait=True)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing keeps another process from writing there", path, error)
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the owner before this one removed the file


def _lock(descriptor: int, wait: bool) -> None:
    if sys.platform == "win32":
        raise OSError("Windows has no fcntl")
    fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def foreign(folder: Path, own: str) -> list[str]:
    """What lies in a folder at any depth and is not this package's, sorted.

    Args:
        own: regular expression of the package's names: files as "a/b", folders as "a/b/". Links are never its own.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        for name in [*files, *folders]:
            path = (inside / name).as_posix()
            if Path(parent, name).is_symlink() or not re.fullmatch(own, path + "/" * (name in folders)):
                found.append(path)
    return sorted(found)


def remove_own(folder: Path, own: str) -> bool:
    """Deletes a folder of this package; with anything foreign in it, it is left as it is, and a warning says so."""
    if strangers := foreign(folder, own):
        logger.warning("%s is left as it is: bigbigan did not write %s in it", folder, ", ".join(strangers[:5]))
        return False
    shutil.rmtree(folder)
    return True


def file_name(path: str | os.PathLike[str]) -> str:
    r"""A path as text that any format can hold and that `path_named` turns back, slashes between its parts.

    Bytes that are not UTF-8 become `\xNN`, and so does the backslash of a name that holds such a text itself.
    """
    text = os.fspath(path).replace(os.sep, "/")
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", text)
    return os.fsencode(escaped).decode("utf-8", "backslashreplace")


def path_named(name: str) -> Path:
    """The path whose `file_name` is `name`."""
    parts = re.split(r"\\x([0-9a-f]{2})", name)
    pieces = [bytes.fromhex(part) if i % 2 else os.fsencode(part) for i, part in enumerate(parts)]
    return Path(os.fsdecode(b"".join(pieces)))
