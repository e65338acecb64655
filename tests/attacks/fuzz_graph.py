"""Damaged folders of graph networks: `python -m tests.attacks.fuzz_graph --seed 1 --count 10000` (see README.md).

A folder with three graph networks is mutated (names, references, attributes, shapes, bytes), its digests are put right
in most cases, and it is loaded and run. It must end in ConfigError, WeightsError, or outputs of the declared shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .harness import run_children, run_here
from .mutations import mutated

PARTS = ("generator", "encoder", "discriminator")
VALUES: tuple[Any, ...] = (
    -(2**63), -(2**24), -7, -2, -1, 0, 1, 2, 3, 7, 8, 64, 4096, 2**16, 2**24, 2**31, 2**63, 10**30, 0.5, -1e38, 1e308,
    True, False, None, "", "x", "z", "noise", "image", "../x", "c0_conv", "forward", [], [0], [[0, 0]], [1, 1], [-1, 8],
    {}, "add",
)  # fmt: skip


def build(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_graph_network import make

    make().save(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, child in children for place in places(child, (*path, key))]


def change(document: Any, rng: random.Random) -> None:
    """One place of a document: another value, another's value, gone, doubled, or a number moved."""
    path = rng.choice(places(document))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    kind = rng.choice(("value", "value", "operation", "similar", "rewire", "copy", "delete", "double", "near"))
    from bigbigan.graph_operations import BINARY, OPERATIONS, UNARY

    steps = document.get("operations")
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    if kind in ("operation", "similar", "rewire") and steps:
        step = rng.choice(steps)
        alike = next((names for names in (UNARY, BINARY) if str(step.get("op")) in names), None)
        if kind == "similar" and alike:
            step["op"] = rng.choice(sorted(alike))
        elif kind == "rewire" and isinstance(step.get("inputs"), list) and step["inputs"]:
            other = rng.choice((rng.randrange(len(steps)), rng.randrange(len(steps)), "x", "z", "noise", "image"))
            step["inputs"][rng.randrange(len(step["inputs"]))] = other
        else:
            step["op"] = rng.choice(sorted(OPERATIONS))
            if rng.random() < 0.5 and isinstance(document["operations"], list):
                step["attributes"] = {
                    name: rng.choice(
                        (0, 1, 2, [2, 2], [1, 1], [0, 0, 0, 0], [0, 1], True, 0.5, [-1, 3], "ab->ba", [2, 3])
                    )
                    for name in OPERATIONS[step["op"]].attributes
                }
    elif kind == "copy":
        other = document
        for part in rng.choice(places(document)):
            other = other[part]
        owner[key] = json.loads(json.dumps(other))
    elif kind == "delete":
        del owner[key]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, json.loads(json.dumps(owner[key])))
    elif kind == "near" and type(owner[key]) in (int, float):
        owner[key] += rng.choice((-2, -1, 1, 2))
    else:
        owner[key] = rng.choice(VALUES)


class Attack:
    """One case by its number: the same for the same seed, in any process."""

    def __init__(self, seed: int, good: Path, work: Path):
        import torch

        import bigbigan

        torch.set_num_threads(1)
        self.seed, self.good, self.folder = seed, good, work / "model"
        bigbigan.load(good).generate(1, seed=0)  # what is loaded on the first use

    def __call__(self, case: int) -> tuple[str, int]:
        import bigbigan
        from bigbigan.integrity import WeightsError
        from bigbigan.schema import ConfigError

        rng = random.Random(f"{self.seed} {case}")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)
        part = rng.choice(PARTS)
        self.damage(part, rng)
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        try:
            model = bigbigan.load(self.folder, parts=(part,), local_files_only=True)
        except (ConfigError, WeightsError):
            return "refused", size
        except ValueError as error:  # as `load` says of parts that a folder has not
            if "has no" not in str(error):
                raise
            return "refused", size
        return self.run(model, part), size

    def damage(self, part: str, rng: random.Random) -> None:
        path, config_path = self.folder / f"{part}.graph.json", self.folder / "config.json"
        config = json.loads(config_path.read_text())
        if rng.random() < 0.15:
            path.write_bytes(mutated(path.read_bytes(), rng))
        else:
            document = json.loads(path.read_text())
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                change(document, rng)
                if not document:
                    break
            path.write_text(json.dumps(document))
        if rng.random() < 0.95:
            config["architecture"][part]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if rng.random() < 0.1:
            change(config["architecture"][part], rng)
        config_path.write_text(json.dumps(config))

    def run(self, model: Any, part: str) -> str:
        import torch

        from bigbigan.onnx import part_inputs

        config = model.part(part).config
        if part == "generator":
            image = model.generate(3, seed=0)
            assert image.shape == (3, config.image_channels, config.resolution, config.resolution)
        else:
            inputs = part_inputs(model, part, 3)
            with torch.no_grad():
                out = model.part(part)(*inputs.values())
            assert all(len(value) == 3 for value in vars(out).values() if value is not None)
        return "loaded and run"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.fuzz_graph", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
            build(Path(work, "good"))
            run_here(Attack(args.seed, Path(work, "good"), Path(work)), *args.child)
        return 0
    start = time.monotonic()
    result = run_children("tests.attacks.fuzz_graph", ["--seed", str(args.seed)], args.count, args.first)
    print(f"seed {args.seed}: {args.count} cases, {len(result.findings)} findings")
    print(result, f"\n{time.monotonic() - start:.0f} s", sep="")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
