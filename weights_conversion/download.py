"""From a name, a folder or an archive to a module's folder."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import logging
import re
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.errors import ConversionError

logger = logging.getLogger(__name__)

# The first handle is stated by a public list of models; the second is inferred from it by analogy.
KAGGLE = {
    "bigbigan-resnet50": "deepmind/bigbigan/tensorFlow1/resnet50/1",
    "bigbigan-revnet50x4": "deepmind/bigbigan/tensorFlow1/revnet50x4/1",
}
MEMBERS = re.compile(r"saved_model\.pb|tfhub_module\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})")
MAX_MEMBER_BYTES, MAX_TOTAL_BYTES, MAX_MEMBERS = 8 << 30, 16 << 30, 10_000
GZIP = b"\x1f\x8b"
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """A module's folder, its name, and where it comes from as one line."""

    folder: Path
    name: str
    origin: str


@contextlib.contextmanager
def located(source: str | Path) -> Iterator[Source]:
    """The module behind a name, a folder or a .tar.gz; what was unpacked is removed afterwards.

    Raises:
        FileNotFoundError: there is neither such a file nor such a name.
        ConversionError: an archive that is damaged or holds more than a module.
        OSError: a name that cannot be downloaded; the message says how to do it by hand.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield Source(path, path.resolve().name, f"the module folder {path.resolve().name}")
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="bigbigan-") as temporary:
            unpack(path, Path(temporary))
            name = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
            yield Source(Path(temporary), name, f"the archive {path.name}")
    elif str(source) in KAGGLE:
        with tempfile.TemporaryDirectory(prefix="bigbigan-") as temporary:
            yield _download(str(source), Path(temporary))
    else:
        raise FileNotFoundError(f"{source} is neither a folder, nor a file, nor one of {', '.join(KAGGLE)}")


def address(name: str) -> str:
    """The module's former address, in its compressed form."""
    return f"https://tfhub.dev/deepmind/{name}/1?tf-hub-format=compressed"


def _download(name: str, temporary: Path) -> Source:
    failures = []
    try:
        return Source(_from_kaggle(name), name, f"Kaggle {KAGGLE[name]}")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        failures.append(f"kagglehub, {KAGGLE[name]}: {_short(error)}")
    archive = temporary / "module.tar.gz"
    try:
        _fetch(address(name), archive)
        folder = temporary / "module"
        folder.mkdir()
        unpack(archive, folder)
        return Source(folder, name, address(name))
    except (OSError, ConversionError) as error:
        failures.append(f"{address(name)}: {_short(error)}")
    tried = "\n".join(f"  {failure}" for failure in failures)
    raise OSError(
        f"{name} cannot be downloaded:\n{tried}\n"
        "By hand: open https://www.kaggle.com/models/deepmind/bigbigan in a browser, choose TensorFlow 1 and "
        f"{name.removeprefix('bigbigan-')}, download the archive, and convert it: "
        f"bigbigan convert ARCHIVE.tar.gz --name {name} (or unpack it, and name the folder)"
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _from_kaggle(name: str) -> Path:
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("kagglehub is not installed (pip install 'bigbigan[convert]')") from error
    try:
        return Path(kagglehub.model_download(KAGGLE[name]))
    except Exception as error:  # its errors, and those of the transport below it, share no base class
        raise OSError(_short(error)) from error


class _Encrypted(urllib.request.HTTPRedirectHandler):
    """Follows no redirect out of https."""

    def redirect_request(  # type: ignore[no-untyped-def]
        self, request, answer, code, message, headers, target
    ) -> urllib.request.Request | None:
        if not target.startswith("https://"):
            raise ConversionError(f"{request.full_url} leads to {target}, which is not encrypted")
        return super().redirect_request(request, answer, code, message, headers, target)


def _fetch(url: str, path: Path) -> None:
    """Downloads a .tar.gz.

    Raises:
        ConversionError: what comes is something else, or too large, or over an open connection.
        OSError: the server cannot be reached, refuses, or stops before the end.
    """
    logger.info("downloading %s", url)
    size = 0
    try:
        with urllib.request.build_opener(_Encrypted).open(url, timeout=TIMEOUT) as response, path.open("wb") as file:
            expected = response.length  # None if the server does not say
            while chunk := response.read(1 << 20):
                if not size and not chunk.startswith(GZIP):
                    kind = response.headers.get_content_type()
                    raise ConversionError(f"{url} gives no .tar.gz but {kind}, beginning with {chunk[:20]!r}")
                size += len(chunk)
                if max(size, expected or 0) > MAX_TOTAL_BYTES:
                    raise ConversionError(f"{url} gives more than {MAX_TOTAL_BYTES} bytes")
                file.write(chunk)
    except http.client.HTTPException as error:
        raise OSError(f"{url} broke off after {size} bytes ({type(error).__name__}); try again") from error
    if size != (expected or size) or not size:  # `read` in pieces does not tell
        raise OSError(f"{url} broke off after {size} of {expected} bytes; try again")


def unpack(archive: Path, folder: Path) -> None:
    """Streams a module's own files, and nothing else, from a .tar or .tar.gz into `folder`.

    Raises:
        ConversionError: the archive is damaged, or holds links, strange paths, or too much.
    """
    total, names = 0, set()
    try:
        with tarfile.open(archive, "r|*") as tar:
            for number, member in enumerate(tar):
                if number >= MAX_MEMBERS:
                    raise ConversionError(f"{archive} has more than {MAX_MEMBERS} members")
                name = _member(archive, member)
                if name is None:
                    continue
                if name in names:
                    raise ConversionError(f"{archive} holds {name} twice")
                names.add(name)
                total += member.size
                if member.size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES:
                    raise ConversionError(f"{archive}: {name} has {member.size} bytes, more than any module")
                _write(tar, member, folder / name)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConversionError(f"{archive} is no complete .tar.gz ({_short(error)}); download it anew") from error
    if "saved_model.pb" not in names:
        raise ConversionError(f"{archive} holds no saved_model.pb at its top, so it is no TF-Hub module")


def _member(archive: Path, member: tarfile.TarInfo) -> str | None:
    """The name under which a member is kept; None for what a module does not need (folders, assets)."""
    name = member.name.removeprefix("./")
    if name.startswith(("/", "\\")) or ".." in Path(name).parts or ":" in name:
        raise ConversionError(f"{archive} holds {member.name!r}, a path that leads outside")
    if member.isdir():
        return None
    if not member.isreg():
        raise ConversionError(f"{archive} holds {member.name!r}, which is a link or a device")
    return name if MEMBERS.fullmatch(name) else None


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        written = 0
        while chunk := source.read(1 << 20):
            written += len(chunk)
            file.write(chunk)
    if written != member.size:
        raise ConversionError(f"{member.name} is cut short")
