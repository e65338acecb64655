"""The index of a variables bundle (a sorted string table), read and written so that its checksums hold.

Damage behind right checksums reaches what a flipped byte never does: the parser of the entries.
"""

from __future__ import annotations

MAGIC = 0xDB4775248B80FB57
FOOTER = 48


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC = _table()


def checksum(data: bytes) -> int:
    """Masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


def _block(data: bytes, handle: bytes) -> list[tuple[bytes, bytes]]:
    start, at = _read_varint(handle, 0)
    size, _ = _read_varint(handle, at)
    block = data[start : start + size]
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    found: list[tuple[bytes, bytes]] = []
    at = 0
    while at < end:
        shared, at = _read_varint(block, at)
        more, at = _read_varint(block, at)
        length, at = _read_varint(block, at)
        key = (found[-1][0][:shared] if shared else b"") + block[at : at + more]
        found.append((key, block[at + more : at + more + length]))
        at += more + length
    return found


def entries(index: bytes) -> list[tuple[bytes, bytes]]:
    """Keys and serialised values of a sound index; the first has the empty key: the bundle's header."""
    footer = index[-FOOTER:]
    _, at = _read_varint(footer, 0)
    _, at = _read_varint(footer, at)
    return [pair for _, handle in _block(index, footer[at:]) for pair in _block(index, handle)]


def written(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """An index of these entries in this order, in one block, with the right checksums."""
    out = b""

    def add(pairs: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal out
        starts, body = [], b""
        for key, value in pairs:
            starts.append(len(body))
            body += varint(0) + varint(len(key)) + varint(len(value)) + key + value
        body += b"".join(start.to_bytes(4, "little") for start in starts or [0])
        body += max(len(starts), 1).to_bytes(4, "little")
        handle = varint(len(out)) + varint(len(body))
        out += body + b"\0" + checksum(body + b"\0").to_bytes(4, "little")
        return handle

    data = add(pairs)
    meta = add([])
    handles = meta + add([(b"\xff" * 8, data)])
    return out + handles.ljust(FOOTER - 8, b"\0") + MAGIC.to_bytes(8, "little")
