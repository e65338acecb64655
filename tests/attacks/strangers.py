"""Strangers' files in every place that the package writes or cleans are there afterwards, byte for byte.

    python -m tests.attacks.strangers

Each case puts files, folders and links that the package did not write where it looks for its own: names close to its
own, in its folders, in place of its outputs. The command is refused with exit code 2 before any work, or does its
work around them; nothing else happens to any of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigbigan import cli
from tests.attacks import concurrent_writers, training_run

DONE, REFUSED = 0, 2
Strangers = dict[str, bytes | None]  # by path: content; None for an empty folder

# Names in a run's folders that are close to the package's own.
IN_A_RUN: Strangers = {
    ".notes.tmp": b"notes",
    ".config.json.tmp": b"{}",
    "notes.txt": b"notes",
    "snapshots/.note.txt.tmp": b"note",
    "snapshots/.note/a.txt": b"note",
    "snapshots/holiday/a.png": b"photo",
    "snapshots/images-best/config.json": b"{}",
    "snapshots/images-0000000003.txt": b"note",
    "snapshots/.images-mine.x.tmp": b"note",
    "snapshots/note.txt": b"note",
    "checkpoints/.partial-notes": b"note",
    "checkpoints/.partial-mine/a.safetensors": b"note",
    "checkpoints/step-mine/manifest.json": b"{}",
    "checkpoints/step-00000001.txt": b"note",
    "checkpoints/old/manifest.json": b"{}",
    "samples/.draft.png.tmp": b"note",
    "samples/holiday.png": b"photo",
    "samples/.samples-mine.png.x.tmp": b"note",
    "data/.draft.tmp": b"draft",
    "empty": None,
}


def plant(folder: Path, strangers: Strangers) -> None:
    for name, content in strangers.items():
        path = folder / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)


def harmed(folder: Path, strangers: Strangers) -> list[str]:
    """What is gone, changed, or no longer a folder."""
    return [
        name
        for name, content in strangers.items()
        if not (folder / name).is_dir()
        if content is None or not (folder / name).is_file() or (folder / name).read_bytes() != content
    ]


@dataclass(frozen=True)
class Case:
    """A command, or several, in a folder with strangers.

    Attributes:
        commands: one after the other.
        codes: that the last may end with.
        prepare: what comes before the strangers.
        links: by name, where a link leads.
    """

    commands: list[list[str]]
    strangers: Strangers
    codes: tuple[int, ...]
    prepare: Callable[[], Any] = lambda: None
    links: tuple[tuple[str, str], ...] = ()


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, mine=np.arange(5))
    return stream.getvalue()


def cases(inputs: Path) -> dict[str, Case]:
    """On the material of `concurrent_writers.prepare`. Paths are relative to a case's own folder."""
    photos, data, tiny = str(inputs / "photos"), str(inputs / "data"), str(inputs / "tiny")
    model = ["--model", tiny, "--threads", "1", "--quiet"]
    encode = ["encode", photos, "-o", "x.npz", "--workers", "0", *model]
    generate = ["generate", "-n", "4", *model, "-o"]
    knn = ["evaluate", "knn", "--data", data, "--k", "1", *model]
    report = ["report", f"{inputs}/record.json", "-o"]
    export = ["export", f"{inputs}/run", "-o"]
    manifest = json.dumps({"format": 2, "encoder": "", "files": "", "outputs": [], "batch size": 32}).encode()

    def train(images: int, *options: str) -> list[str]:
        settings = {"total_images": 16, "checkpoint_images": 4, "snapshot_images": 4}
        minutes = ["--max-minutes", "1e-9"] if images < 16 else []
        return training_run.arguments(Path(photos), Path("run"), "--keep", "1", *minutes, *options, **settings)

    def in_run(strangers: Strangers) -> Strangers:
        return {f"run/{name}": content for name, content in strangers.items()}

    def begun() -> None:
        assert cli.main(train(4)) == DONE

    def killed() -> None:
        """As after a kill, with leftovers of the package's own."""
        begun()
        for name in ("snapshots/.images-0000000004.ab_c1234.tmp", "checkpoints/.partial-step-00000002"):
            Path("run", name).mkdir()
            Path("run", name, "encoder.safetensors").touch()

    def manifest_of(content: bytes) -> Strangers:
        return {"x.npz.partial/manifest.json": content, "x.npz.partial/thesis.txt": b"years", "x.npz.partial/a": None}

    def both(output: str, content: bytes) -> Strangers:
        return {output: content, f"beside-{output}": b"mine"}

    found = {
        "run: a project folder": Case([train(16)], in_run({**IN_A_RUN, "config.json": b'{"train": {}, "data": {}}'}),
                                      (REFUSED,)),
        "run: a folder with one file": Case([train(16)], in_run({"a.txt": b"a"}), (REFUSED,)),
        "run: a lock of others": Case([train(16)], in_run({".lock": b"pid 7"}), (DONE,)),
        "run: a hidden folder": Case([train(16)], in_run({".git/config": b"a"}), (REFUSED,)),
        "run: a file": Case([train(16)], {"run": b"a"}, (REFUSED,)),
        "run: a list as config.json": Case([train(16)], in_run({"config.json": b"[]"}), (REFUSED,)),
        "run: text as config.json": Case([train(16)], in_run({"config.json": b"train: x"}), (REFUSED,)),
        "run: a model folder": Case([train(16)], {
            f"run/{path.name}": path.read_bytes() for path in Path(tiny).iterdir()}, (REFUSED,)),
        "run: strangers in one": Case([train(16), train(16)], in_run(IN_A_RUN), (DONE,), begun),
        "run: strangers and leftovers": Case([train(16)], in_run(IN_A_RUN), (DONE,), killed),
        "run: notes inside a snapshot and a checkpoint": Case([train(16)], in_run({
            "snapshots/images-0000000004/notes.txt": b"good hair",
            "snapshots/images-0000000004/more/notes.txt": b"good hair",
        }), (DONE,), begun),
        "run: export among its own files": Case(
            [[*export, f"{inputs}/run/{place}/mine"] for place in ("samples", "checkpoints", "snapshots")], {},
            (REFUSED,)),
        "encode: a person's manifest": Case([encode], manifest_of(b'{"name": "thesis"}'), (REFUSED,)),
        "encode: a list as manifest": Case([encode], manifest_of(b"[]"), (REFUSED,)),
        "encode: a damaged manifest": Case([encode], manifest_of(b'{"form'), (REFUSED,)),
        "encode: a deep manifest": Case([encode], manifest_of(b"[" * 10**5), (REFUSED,)),
        "encode: a manifest of ours and others' files": Case([encode], manifest_of(manifest), (REFUSED,)),
        "encode: others' pieces": Case([encode], {"x.npz.partial/0/000000.safetensors": b"mine"}, (REFUSED,)),
        "encode: hidden files": Case([encode], {"x.npz.partial/.git/config": b"mine"}, (REFUSED,)),
        "encode: a file for a folder": Case([encode], {"x.npz.partial": b"mine"}, (REFUSED,)),
        "encode: a link for a folder": Case([encode], {"other/manifest.json": manifest, "other/0/a.txt": b"mine"},
                                            (REFUSED,), links=(("x.npz.partial", "other"),)),
        "encode: failures of others": Case([encode], {"x.npz.failures.jsonl": b'{"mine": 1}\n'}, (REFUSED,)),
        "encode: a diary for failures": Case([encode], {"x.npz.failures.jsonl": b"dear diary"}, (REFUSED,)),
        "encode: a link to a diary": Case([encode], {"diary": b"dear diary"}, (REFUSED,),
                                          links=(("x.npz.failures.jsonl", "diary"),)),
        "encode: arrays of others": Case([encode], both("x.npz", array()), (REFUSED,)),
        "encode: text": Case([encode], both("x.npz", b"text"), (REFUSED,)),
        "encode: a link to weights": Case([[*encode[:3], "x.safetensors", *encode[4:]]],
                                          {"w.safetensors": Path(tiny, "encoder.safetensors").read_bytes()},
                                          (REFUSED,), links=(("x.safetensors", "w.safetensors"),)),
        "encode: a lock of others": Case([encode], {".x.npz.bigbigan-lock": b"mine", ".x.npz.lock": b""}, (DONE,)),
        "generate: text": Case([[*generate, "a.png"]], both("a.png", b"text"), (REFUSED,)),
        "generate: a numbered photo": Case([[*generate, "a/"]], {"a/000000.png": png(), "a/b.txt": b"b"}, (REFUSED,)),
        "generate: text under a picture's name": Case([[*generate, "a/", "--overwrite"]],
                                                      {"a/000001.png": b"text"}, (REFUSED,)),
        "generate: other names": Case([[*generate, "a/"], [*generate, "a/", "--overwrite"]], {
            "a/0.png": png(), "a/00000000.png": png(), "a/000000.jpg": png(), "a/cat.png": png(), "a/.lock": b"",
            "a/.000000.png.tmp": b"a", "a/000000.png.bak": b"a", "a/b": None}, (DONE,)),
        "generate: a file for a folder": Case([[*generate, "a/"]], {"a": b"a"}, (REFUSED,)),
        "reconstruct: over its input": Case([["reconstruct", "a.png", "-o", "b.png", *model]], {"a.png": png()},
                                            (REFUSED,), links=(("b.png", "a.png"),)),
        "evaluate: a settings file": Case([[*knn, "--json", "a.json"]], both("a.json", b'{"a": 1}'), (REFUSED,)),
        "evaluate: notes in the cache": Case([[*knn, "--feature-cache", "."]] * 2, {
            "lock": b"mine", "notes.npy": b"mine", "entry.json": b"{}", ".a.tmp": b"a"}, (DONE,)),
        "report: another document": Case([[*report, "a.md"]], both("a.md", b"# Notes\n"), (REFUSED,)),
        "report: a photo where its plot goes": Case([[*report, "a.md"]], {"a-knn-1.png": png()}, (REFUSED,)),
        "report: weights": Case([[*report, "a.safetensors"], [*report, "a.md"]], {
            "w": Path(tiny, "encoder.safetensors").read_bytes()}, (REFUSED,), links=(("a.md", "w"),)),
        "export: a project": Case([[*export, "a"]], {"a/a.py": b"a", "a/config.json": b"{}"}, (REFUSED,)),
        "export: beside it": Case([[*export, "a"]] * 2, {
            ".a.x.tmp/a": b"a", ".a.tmp": b"a", ".a.previous.txt": b"a", ".a.bigbigan-lock": b"mine"}, (DONE,)),
        "export: a person's .previous": Case([[*export, "a"]], {".a.previous/a.txt": b"a"}, (REFUSED,)),
        "convert: its own input": Case([["convert", "a.pth", "-o", "a.pth"]], {
            "a.pth": Path(inputs, "x.pth").read_bytes()}, (REFUSED,)),
        "export-onnx: another network": Case([["export-onnx", "-o", "a", "--parts", "encoder", *model]], {
            "a/encoder.onnx": b"\x08\x0a mine", "a/b.txt": b"b"}, (REFUSED,)),
    }  # fmt: skip
    return found


def attack(name: str, case: Case, work: Path) -> None:
    """An assertion fails if the promise is broken."""
    work.mkdir()
    said, code = io.StringIO(), -1
    with _chdir(work), contextlib.redirect_stderr(said):
        case.prepare()
        plant(work, case.strangers)
        for link, target in case.links:
            (work / link).symlink_to(target)
        linked = {link: os.readlink(work / link) for link, _ in case.links}
        before = {path.relative_to(work) for path in work.rglob("*")}
        for command in case.commands:
            with contextlib.redirect_stdout(io.StringIO()):
                code = cli.main(command)
            assert code in case.codes, f"{name}: exit code {code}: {said.getvalue()[-600:]}"
            assert not harmed(work, case.strangers), f"{name}: {harmed(work, case.strangers)}"
            assert linked == {link: os.readlink(work / link) for link, _ in case.links}, name
    if code == REFUSED:  # before any work, and in one line
        after = {path.relative_to(work) for path in work.rglob("*")}
        assert after == before, f"{name}: {sorted(map(str, after ^ before))}"
        assert len(said.getvalue().splitlines()) >= 1, name


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:  # as contextlib.chdir of Python 3.11
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def sweep(work: Path, every: int = 1) -> dict[str, Any]:
    os.environ["BIGBIGAN_HOME"] = str(work / "home")
    training_run.plant({})
    found = cases(concurrent_writers.prepare(work / "inputs"))
    chosen = list(found.items())[::every]
    for number, (name, case) in enumerate(chosen):
        attack(name, case, work / f"{number}")
    return {"cases": len(chosen), "strangers": sum(len(case.strangers) for _, case in chosen)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each N-th case only")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        counts = sweep(Path(work).resolve(), options.every)
    print(json.dumps({**counts, "seconds": round(time.monotonic() - start)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
