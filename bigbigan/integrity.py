"""Is a file what it claims to be: strict JSON, strict safetensors headers, digests, finite values.

Digests and finite values are checked once a file; `verified.json` under `cache_dir()` remembers what was checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigbigan.files import atomic_write

logger = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 4 * 1024 * 1024  # the largest network here needs a twentieth of it
MAX_JSON_DEPTH = 32
MAX_REMEMBERED = 1000
CLOCK_TICK_NS = 100_000_000  # file times move in steps of a few milliseconds
SHA256 = re.compile(r"[0-9a-f]{64}")


class WeightsError(ValueError):
    """A weight file that is damaged, hostile, or not the one its model folder describes."""


@dataclass(frozen=True)
class Header:
    """What a safetensors header says."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: frozenset[torch.dtype]
    metadata: dict[str, str]


def cache_dir() -> Path:
    """Where this package keeps files: `$BIGBIGAN_HOME`, else `bigbigan` under `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("BIGBIGAN_HOME")
    return Path(home or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bigbigan").expanduser()


def strict_json(data: bytes) -> Any:
    """JSON without its ambiguities.

    Raises:
        ValueError: for anything but UTF-8, and for duplicate keys, NaN, infinities, lone surrogates or deep nesting.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        _check_depth(value, MAX_JSON_DEPTH)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on lone surrogates
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)[:100]!r}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:100]} is not a finite number")
    return value


def _check_depth(value: Any, limit: int) -> None:
    if limit == 0:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(child, limit - 1)


def impostor(head: bytes) -> str | None:
    """What a file is in place of the real one, by its first bytes, and what to do; None if nothing is known."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it again"
    # A safetensors file may start with "<" too (a length), but has a zero among its first eight bytes.
    if head.lstrip().startswith(b"<") and b"\0" not in head[:8]:
        return "is an HTML page, as proxies and login pages send it; check the network, then download it again"
    return None


def read_header(path: Path) -> Header:
    """The header of a safetensors file, without reading its tensors.

    Raises:
        WeightsError: if the file is no well-formed safetensors file of float32, float16 or bfloat16 tensors.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise WeightsError(f"{path} is not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
            if advice := impostor(head):
                raise WeightsError(f"{path} {advice}")
            length = int.from_bytes(head[:8], "little")
            if status.st_size < 10 or not 2 <= length <= min(status.st_size - 8, MAX_HEADER_BYTES):
                raise WeightsError(f"{path} is no safetensors file: {status.st_size} bytes, header of {length} bytes")
            file.seek(8)
            text = file.read(length)
        header = _parse_header(strict_json(text))
        with safe_open(path, framework="pt"):  # its own checks: offsets, sizes, no hole, nothing behind the data
            return header
    except WeightsError:
        raise
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path} is no well-formed safetensors file: {error}"[:500]) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose header `read_header` has checked, each in memory of its own: not mapped."""
    tensors = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        document = strict_json(file.read(length))
        document.pop("__metadata__", None)
        for name, entry in document.items():
            start, end = entry["data_offsets"]
            data = torch.empty(end - start, dtype=torch.uint8, device="cpu")
            file.seek(8 + length + start)
            if file.readinto(data.numpy().data) != end - start:
                raise WeightsError(f"{path} ended within {name}: it became shorter while it was read; load it again")
            tensors[name] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def _parse_header(document: Any) -> Header:
    if not isinstance(document, dict):
        raise ValueError("the header is not an object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    shapes, dtypes = {}, set()
    for name, entry in document.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {name[:100]!r} is not {{dtype, shape, data_offsets}}")
        shape, dtype = entry["shape"], entry["dtype"]
        if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name[:100]!r} has shape {str(shape)[:100]}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name[:100]!r} has dtype {str(dtype)[:20]}; weights are {', '.join(DTYPES)}")
        shapes[name] = tuple(shape)
        dtypes.add(DTYPES[dtype])
    return Header(shapes, frozenset(dtypes), metadata)


def verify_file(path: Path, size: int, sha256: str, *, remember: bool = True) -> None:
    """Checks size, digest and finite values, once a file: `remember` keeps and believes the record of earlier checks.

    Raises:
        WeightsError: if one of them is wrong.
    """
    status = path.stat()
    if status.st_size != size:
        raise WeightsError(f"{path} has {status.st_size} bytes, config.json says {size}; download or write it again")
    key, record = os.path.realpath(path), [*_identity(status), sha256]
    if remember and _recall().get(key) == record:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise WeightsError(
            f"{path} has sha256 {digest.hexdigest()}, config.json says {sha256}: the file is damaged or another one; "
            "download or write it again"
        )
    # A caller's `with torch.device("meta")` would reach the tensors in older versions of torch.
    with torch.device("cpu"), safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            check_finite(tensors.get_tensor(name), name, path)
    # A file changed in the last tick of the clock could change again without a trace.
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > CLOCK_TICK_NS
    if remember and settled and _identity(path.stat()) == _identity(status):
        _remember(key, record)


def check_finite(tensor: torch.Tensor, name: str, where: object) -> None:
    """Raises WeightsError if a value is NaN or infinite."""
    # The extremes of values with a NaN among them are NaN; to look at each value would take a copy of all.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightsError(f"{where}: {name} has {bad} NaN or infinite values out of {tensor.numel()}")


def _identity(status: os.stat_result) -> list[int]:
    # The change time too: unlike the modification time, no program sets it back.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _recall() -> dict[str, Any]:
    try:
        memory = json.loads((cache_dir() / "verified.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home directory, or hostile nesting
        logger.debug("verified files are checked again: %s", error)
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(key: str, record: list[Any]) -> None:
    memory = _recall()
    memory.pop(key, None)
    memory[key] = record
    try:
        with atomic_write(cache_dir() / "verified.json") as temporary:
            temporary.write_text(json.dumps(dict(list(memory.items())[-MAX_REMEMBERED:])))
    except (OSError, RuntimeError) as error:
        logger.debug("%s will be checked again next time: %s", key, error)
