"""Damaged .pth files: `python -m tests.attacks.fuzz_pth --seed 1 --count 5000` (see README.md).

Kinds, mixed: `file` damages the zip that torch.save writes, `legacy` its older format, `pickle` and `record` a part of
the zip behind a right checksum, `tensors` shapes, types and names of a state dict that is then saved soundly.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch

from .harness import run_children, run_here
from .mutations import mutated

KINDS = ("file", "legacy", "pickle", "record", "tensors")


def saved(value: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


class Attack:
    """One case by its number: the same for the same seed, in any process."""

    def __init__(self, seed: int, work: Path):
        from tests.test_biggan_pth import checkpoint

        self.seed, self.path, self.target = seed, work / "G.pth", work / "out.safetensors"
        self.state = checkpoint()
        self.zip, self.legacy = saved(self.state), saved(self.state, legacy=True)
        with zipfile.ZipFile(io.BytesIO(self.zip)) as archive:
            self.parts = {info.filename: archive.read(info) for info in archive.infolist()}
        self.path.write_bytes(self.zip)
        assert self.read() == "converted"

    def read(self) -> str:
        from safetensors.torch import load_file

        from weights_conversion.biggan_pth import _child, match_checkpoint
        from weights_conversion.errors import ConversionError

        self.target.unlink(missing_ok=True)
        try:
            with warnings.catch_warnings(action="ignore"):
                _child(str(self.path), str(self.target))
        except SystemExit as error:
            assert error.code and "\n" not in str(error.code), "no sentence"
            assert not self.target.exists(), "refused, and yet there is output"
            return "refused"
        try:
            match_checkpoint(load_file(self.target))
        except ConversionError:
            return "read, and refused as a generator"
        return "converted"

    def __call__(self, case: int) -> tuple[str, int]:
        rng = random.Random(f"{self.seed} {case}")
        kind = rng.choice(KINDS)
        data = self.damage(kind, rng)
        self.path.write_bytes(data)
        return f"{kind} {self.read()}", len(data)

    def damage(self, kind: str, rng: random.Random) -> bytes:
        if kind == "file":
            return mutated(self.zip, rng)
        if kind == "legacy":
            # the pickles are at the front; most of the file is numbers, which no checksum guards
            return mutated(self.legacy[:20_000], rng) + self.legacy[20_000:]
        if kind == "tensors":
            return saved(self.changed(rng))
        parts = dict(self.parts)
        pickled = next(name for name in parts if name.endswith("data.pkl"))
        name = pickled if kind == "pickle" else rng.choice(sorted(parts))
        parts[name] = mutated(parts[name], rng)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    def changed(self, rng: random.Random) -> dict[str, torch.Tensor]:
        state = dict(self.state)
        for _ in range(rng.choice((1, 1, 2, 3))):
            key = rng.choice(sorted(state))
            value = state[key]
            change = rng.choice(("flat", "scalar", "empty", "turned", "cut", "type", "value", "drop", "other", "name"))
            if change == "drop":
                del state[key]
            elif change == "name":
                state[rng.choice((key + "x", key.replace("0", "99"), "blocks.7.0.bn1.gain.weight", ""))] = state.pop(
                    key
                )
            else:
                state[key] = {
                    "flat": lambda v: v.flatten(),
                    "scalar": lambda v: v.sum(),
                    "empty": lambda v: v[:0] if v.ndim else v,
                    "turned": lambda v: v.movedim(0, -1) if v.ndim else v,
                    "cut": lambda v: v[..., :-1] if v.ndim else v,
                    "type": lambda v: v.to(rng.choice((torch.float64, torch.float16, torch.int8, torch.bool))),
                    "value": lambda v: v * rng.choice((0.0, -1.0, 1e30, 1e-30)),
                    "other": lambda v: state[rng.choice(sorted(state))],
                }[change](value)
        return {key: value.clone() for key, value in state.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.fuzz_pth", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
            run_here(Attack(args.seed, Path(temporary)), *args.child)
        return 0
    start = time.monotonic()
    result = run_children("tests.attacks.fuzz_pth", ["--seed", str(args.seed)], args.count, args.first)
    print(f"pth, seed {args.seed}: {args.count} cases, {len(result.findings)} findings")
    print(result, f"\n{time.monotonic() - start:.0f} s", sep="")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
