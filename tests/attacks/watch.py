"""An audit hook that notes what a reader of foreign files has no business doing."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
_PATHS = {sys.prefix, sys.base_prefix, str(ROOT), *(path for path in sysconfig.get_paths().values())}
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/share", "/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/ld.so.cache")
INSTALLATION = tuple(os.path.realpath(path) for path in (*_PATHS, *_SYSTEM))
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "ctypes.dlopen",
    "pty.",
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
    "shutil.",
)


def within(path: str | bytes, folders: Iterable[str | Path]) -> bool:
    """Whether the file behind any links lies in one of the folders, or is one of them."""
    real = os.path.realpath(os.fsdecode(path))
    return any(real == str(f) or real.startswith(f"{f}{os.sep}") for f in map(os.path.realpath, folders))


def _folder(descriptor: object) -> str:
    """What a path is relative to, if the call names it by a descriptor."""
    opened = f"/proc/self/fd/{descriptor}"
    return os.readlink(opened) if isinstance(descriptor, int) and os.path.lexists(opened) else ""


class Watch:
    """Notes opens outside `reads` (and the installation), changes outside `writes`, sockets and processes."""

    current: Watch | None = None
    installed = False

    def __init__(self, reads: list[Path], writes: list[Path]):
        self.reads, self.writes = [*reads, *writes], writes
        self.events: list[str] = []

    def __enter__(self) -> Watch:
        if not Watch.installed:
            sys.addaudithook(_hook)  # there is no way to remove one
            Watch.installed = True
        Watch.current = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Watch.current = None

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = arguments[0], arguments[2]
            writing = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            allowed: list[Path | str] = [*self.writes] if writing else [*self.reads, *INSTALLATION]
            if not within(path, allowed) and not (writing and os.fsdecode(path).find("__pycache__") >= 0):
                self.events.append(f"open {path!r} {flags}")
        elif event.startswith(CHANGES):
            folder = _folder(arguments[-1])
            paths = [os.path.join(folder, os.fsdecode(a)) for a in arguments if isinstance(a, str | bytes)]
            if not all(within(path, self.writes) or "__pycache__" in path for path in paths):
                self.events.append(f"{event} {arguments}")
        elif event.startswith(FORBIDDEN):
            self.events.append(f"{event} {arguments}"[:300])


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    watch, Watch.current = Watch.current, None  # what the check itself opens is none of a case's doing
    if watch is not None:
        try:
            watch.see(event, arguments)
        finally:
            Watch.current = watch
