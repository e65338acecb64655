"""The index of a variables bundle, checked before TensorFlow reads it.

TensorFlow's reader verifies checksums, but it ends the whole process on an entry behind a right checksum that no writer
makes: one that does not parse, a negative size, an unknown type.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from weights_conversion.errors import DamagedModule, tensorflow

NUMBERS = {
    "float16", "bfloat16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64",
}  # fmt: skip
MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER, MAX_BYTES = 48, 64 << 20


def check_index(prefix: Path) -> None:
    """Refuses an index whose entries are not numbers that lie within the data files, or strings, which are not read.

    Raises:
        DamagedModule: naming the file and the entry.
    """
    path = Path(f"{prefix}.index")
    if path.stat().st_size > MAX_BYTES:
        raise DamagedModule(f"{path} has more than {MAX_BYTES} bytes; a module's index is far smaller")
    name = "the table"
    try:
        entries = _entries(path.read_bytes())
        name = "the header"
        shards = _shards(prefix, entries.pop(b"", b""))
        for key, value in entries.items():
            name = repr(key.decode("utf-8", "replace"))
            _check_entry(value, shards)
    except (ValueError, IndexError, TypeError) as error:
        raise DamagedModule(f"{path} cannot be read: {name}: {error}; download the module anew") from error


def _entries(data: bytes) -> dict[bytes, bytes]:
    footer = data[-FOOTER:]
    if len(footer) < FOOTER or not footer.endswith(MAGIC):
        raise ValueError("it does not end as an index does")
    at = _handle(footer, 0)[2]
    blocks = _block(data, *_handle(footer, at)[:2])
    pairs = [pair for _, handle in blocks for pair in _block(data, *_handle(handle, 0)[:2])]
    if any(a >= b for (a, _), (b, _) in itertools.pairwise(pairs)):
        raise ValueError("its keys are not in order")
    return dict(pairs)


def _block(data: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Keys and values; where a search may enter a block is checked, so that it finds no others."""
    block = data[offset : offset + size]
    if len(data) < offset + size + 5 or data[offset + size]:
        raise ValueError("a block is cut short or compressed")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    if size < 8 or not 0 <= end <= size - 8:
        raise ValueError("a block has no such list of entry points")
    found: list[tuple[bytes, bytes]] = []
    at, key, starts = 0, b"", {0}
    while at < end:
        start = at
        shared, at = _varint(block, at)
        more, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + more + length > end:
            raise ValueError("an entry reaches beyond its block")
        if not shared:
            starts.add(start)
        key = key[:shared] + block[at : at + more]
        found.append((key, block[at + more : at + more + length]))
        at += more + length
    if not {int.from_bytes(block[i : i + 4], "little") for i in range(end, size - 4, 4)} <= starts:
        raise ValueError("a block's entry points are none")
    return found


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value, at + i + 1
    raise ValueError("a number does not end")


def _parsed(kind: str, data: bytes) -> Any:
    tensorflow()
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import tensor_bundle_pb2

    try:
        return getattr(tensor_bundle_pb2, kind).FromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _shards(prefix: Path, data: bytes) -> list[int]:
    """Sizes of the data files."""
    header = _parsed("BundleHeaderProto", data)
    files = sorted(prefix.parent.glob(f"{prefix.name}.data-*-of-{header.num_shards:05d}"))
    if header.endianness or len(files) != header.num_shards:
        raise ValueError(f"{header.num_shards} data files, little-endian, are wanted; there are {len(files)}")
    return [path.stat().st_size for path in files]


def _check_entry(data: bytes, shards: list[int]) -> None:
    entry = _parsed("BundleEntryProto", data)
    if entry.dtype == tensorflow().string.as_datatype_enum and not entry.slices:
        return  # notes that some savers keep beside the variables
    dtype, shape = tensorflow().dtypes.as_dtype(entry.dtype), [d.size for d in entry.shape.dim]
    if dtype.name not in NUMBERS or entry.shape.unknown_rank:
        raise ValueError(f"{dtype.name}{shape} is not an array of numbers")
    if entry.slices:  # a partitioned variable: the slices themselves have entries of their own
        _check_slices(entry, shape)
        return
    if min(shape, default=1) < 0 or entry.size != math.prod(shape) * dtype.size:
        raise ValueError(f"{dtype.name}{shape} does not take {entry.size} bytes")
    if not 0 <= entry.shard_id < len(shards) or not 0 <= entry.offset <= shards[entry.shard_id] - entry.size:
        raise ValueError(f"bytes {entry.offset} to {entry.offset + entry.size} are not in data file {entry.shard_id}")


def _check_slices(entry: Any, shape: list[int]) -> None:
    for part in entry.slices:
        spans = [(e.start, e.length if e.HasField("length") else n) for e, n in zip(part.extent, shape, strict=True)]
        if any(low < 0 or n < 1 or low + n > size for (low, n), size in zip(spans, shape, strict=True)):
            raise ValueError(f"it has a slice {spans} of {shape}")
    if entry.size or entry.offset or min(shape, default=0) < 1:
        raise ValueError(f"it has slices and values of its own, or is empty: {shape}")
