"""Ways to damage bytes, each drawn from a random generator."""

from __future__ import annotations

import random

EXTREMES = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\x00" * 8, b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01",
    b"\x80" * 9 + b"\x01", b"\xff\xff\xff\x7f", (2**31).to_bytes(4, "little"), (2**63).to_bytes(8, "little"),
)  # fmt: skip


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` after one to four of: flip, overwrite with an extreme number, insert, delete, repeat, swap, cut."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return rng.randbytes(rng.randrange(64))
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 16, 64, len(data))))
        kind = rng.choice(("flip", "flip", "flip", "extreme", "extreme", "insert", "delete", "repeat", "swap", "cut"))
        if kind == "flip":
            data = flipped(data, min(a, len(data) - 1), rng.randrange(8))
        elif kind == "extreme":
            value = rng.choice(EXTREMES)
            data = data[:a] + value + data[a + len(value) :]
        elif kind == "insert":
            data = data[:a] + rng.choice((rng.randbytes(rng.randrange(1, 65)), rng.choice(EXTREMES))) + data[a:]
        elif kind == "delete":
            data = data[:a] + data[b:]
        elif kind == "repeat":
            data = data[:b] + data[a:b] + data[b:]
        elif kind == "swap":
            c = rng.randrange(b, len(data) + 1)
            data = data[:a] + data[b:c] + data[a:b] + data[c:]
        else:
            data = data[:a]
    return data
