"""Two processes write one output: one file comes out, whole, and what one of them alone would have written.

    python -m tests.attacks.concurrent_writers --pairs 200

Every command that writes runs twice at once, with settings that give two different results, a moment apart. One of
them is refused with one sentence and exit code 2, or both succeed one after the other. Whenever the output is there
under its final name, it is whole (it is read again and again meanwhile); in the end it is the result of a process that
succeeded; and nothing else is left beside it. Of a feature cache, which is shared, both processes have all rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401 (for the fork server: it takes a second)
import torch
from PIL import Image

from bigbigan import cli, create_model
from bigbigan.evaluation.feature_files import read_features
from bigbigan.evaluation.report import read_record
from bigbigan.factory import load_folder
from tests.attacks import training_run
from tests.attacks.training_run import ROOT, make_data

GAP = 0.3  # seconds, at most, from the start of one process to that of the other
REFUSED = "another process"


@dataclass(frozen=True)
class Writer:
    """A command in two variants.

    Attributes:
        output: what it writes, relative to the folder that it runs in.
        read: fails unless a file, or the folder, is whole.
        exact: whether equal commands give equal bytes.
        both: whether the second process waits and succeeds too.
    """

    output: str
    commands: tuple[list[str], list[str]]
    read: Callable[[Path], Any]
    exact: bool = True
    both: bool = False
    beside: tuple[str, ...] = ()
    done: int = 0  # exit code


def _picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        _picture(path)


def _json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _document(path: Path) -> None:
    assert path.read_text(encoding="utf-8").endswith("\n")


def _onnx(folder: Path) -> None:
    import onnx

    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path))


def _statistics(path: Path) -> None:
    with np.load(path) as file:
        assert len(file["mean"]) and file["covariance"].ndim == 2


def _run(folder: Path) -> None:
    if (folder / "config.json").exists():
        _json(folder / "config.json")
    for snapshot in folder.glob("snapshots/images-*"):
        load_folder(snapshot, verify=True, remember=False)


def writers(inputs: Path) -> dict[str, Writer]:
    """Of the commands, all that write, on the material that `prepare` made."""
    tiny, photos, data = str(inputs / "tiny"), str(inputs / "photos"), str(inputs / "data")
    model, quiet = ["--model", tiny, "--threads", "1"], ["--quiet"]

    def seeds(*command: str) -> tuple[list[str], list[str]]:
        return [*command, "--seed", "0"], [*command, "--seed", "1"]

    near = ("evaluate", "retrieval", f"{photos}/00.png", "--data", data, "-o", "a.png", *model, *quiet, "--k")
    retrieval = [*near, "2"], [*near, "3"]
    found = {
        "generate": Writer("a.png", seeds("generate", "-o", "a.png", *model), _picture),
        "generate folder": Writer("a", seeds("generate", "-n", "40", "-o", "a/", *model), _pictures),
        "reconstruct": Writer("a.webp", seeds("reconstruct", photos, "-o", "a.webp", "--use-sample", *model), _picture),
        "interpolate": Writer(
            "a.jpg",
            tuple(["interpolate", f"{photos}/00.png", f"{photos}/0{i}.png", "-o", "a.jpg", *model] for i in (1, 2)),  # type: ignore[arg-type]
            _picture,
        ),
        "knn": Writer(
            "a.json", seeds("evaluate", "knn", "--data", data, "--k", "1", "--json", "a.json", *model), _json, False
        ),
        "reconstruction": Writer(
            "a.png",
            seeds("evaluate", "reconstruction", "--data", data, "--epochs", "1", "--grid", "a.png", *model, *quiet),
            _picture,
        ),
        "retrieval": Writer("a.png", retrieval, _picture),
        "statistics": Writer(
            "a.npz",
            seeds(
                *("evaluate", "generation", "--data", data, "-n", "20", "--score-splits", "1", "--kid-subsets", "0"),
                *("--network", f"model:{tiny}", "--save-statistics", "a.npz", *model, *quiet),
            ),
            _statistics,
        ),
        "report": Writer(
            "a.md",
            tuple(["report", f"{inputs}/record.json", "-o", "a.md", "--title", title] for title in "xy"),  # type: ignore[arg-type]
            _document,
            beside=("a-knn-1.png",),
        ),
        "export": Writer(
            "model",
            tuple(["export", f"{inputs}/run", "-o", "model", "--name", name] for name in "xy"),  # type: ignore[arg-type]
            lambda path: load_folder(path, remember=False),
        ),
        "export-onnx": Writer("onnx", (["export-onnx", "-o", "onnx", "--parts", "encoder", *model],) * 2, _onnx),
        "convert": Writer(
            "model",
            tuple(["convert", f"{inputs}/{name}.pth", "-o", "model"] for name in "xy"),  # type: ignore[arg-type]
            lambda path: load_folder(path, remember=False),
        ),
        "feature cache": Writer(
            "cache",
            (["evaluate", "knn", "--data", data, "--k", "1", "--feature-cache", "cache", *model, *quiet],) * 2,
            lambda path: [np.load(file) for file in path.glob("*/*.npy")],
            both=True,
        ),
        "train": Writer(
            "run",
            (training_run.arguments(Path(photos), Path("run"), total_images=8, snapshot_images=8),) * 2,
            _run,
            False,
        ),
    }
    for suffix in (".npz", ".safetensors", ".parquet"):
        for workers, source in (("0", photos), ("2", str(inputs / "dirty"))):
            command = ("encode", source, "-o", f"a{suffix}", "--workers", workers, "--batch-size", "4", *model)
            beside = ("a" + suffix + ".failures.jsonl",) if source != photos else ()
            variants, done = seeds(*command), len(beside)  # 1 where a file is damaged
            found[f"encode {suffix} {workers}"] = Writer(
                f"a{suffix}", variants, read_features, beside=beside, done=done
            )
    return found


def prepare(inputs: Path) -> Path:
    """Pictures, some of them damaged, labelled data, models, a run, a record and third-party checkpoints."""
    from tests.test_biggan_pth import checkpoint

    make_data(inputs / "photos")
    make_data(inputs / "dirty")
    for i in range(16, 40):
        (inputs / "dirty" / f"{i}.png").write_bytes((inputs / "dirty" / f"{i % 16:02}.png").read_bytes())
    (inputs / "dirty" / "07.png").write_bytes(b"damaged")
    for split in ("train", "test"):
        for number, name in enumerate(("dark", "bright")):
            make_data(inputs / "data" / split / name, seed=2 * number + (split == "test"))
    create_model("bigbigan-tiny", seed=0).save(inputs / "tiny")
    train = training_run.arguments(inputs / "photos", inputs / "run", total_images=8, snapshot_images=8)
    assert _call(train, inputs, inputs / "log") == 0, (inputs / "log").read_text()
    knn = ["evaluate", "knn", "--data", str(inputs / "data"), "--k", "1", "--model", str(inputs / "tiny")]
    assert _call([*knn, "--json", str(inputs / "record.json")], inputs, inputs / "log") == 0
    read_record(inputs / "record.json")
    for seed, name in enumerate("xy"):
        torch.save(checkpoint(seed), inputs / f"{name}.pth")
    return inputs


def _child(command: list[str], folder: Path, log: Path, delay: float) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(folder)
    training_run.plant({})
    time.sleep(delay)
    sys.exit(cli.main(command))


_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([training_run.__name__, __name__])


def _start(command: list[str], folder: Path, log: Path, delay: float = 0.0) -> Any:
    child = _context.Process(target=_child, args=(command, folder, log, delay))
    child.start()
    return child


def _call(command: list[str], folder: Path, log: Path) -> int:
    child = _start(command, folder, log)
    child.join()
    return int(child.exitcode or 0)


def digest(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(file.name.encode() + file.read_bytes())
    return sha256.hexdigest()


def attack(writer: Writer, work: Path, wanted: list[str], moments: random.Random) -> str:
    """One pair; returns what became of it. An assertion fails if the promise is broken."""
    work.mkdir()
    output, logs = work / writer.output, [work.with_name(f"{work.name}-{i}.log") for i in (0, 1)]
    delays = [0.0, moments.uniform(0, GAP)]
    children = [_start(*job) for job in zip(writer.commands, [work] * 2, logs, delays, strict=True)]
    reads = 0
    while any(child.is_alive() for child in children):
        if output.is_file():  # a folder's files are renamed one after the other
            writer.read(output)
            reads += 1
        time.sleep(0.005)
    codes = tuple(0 if child.exitcode == writer.done else child.exitcode for child in children)
    said = [log.read_text() for log in logs]
    assert codes in ((0, 0), (0, 2), (2, 0)), (codes, said)
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text, text
        assert code == 0 or [line for line in text.splitlines() if REFUSED in line] == text.splitlines()[-1:], text
    assert not writer.both or codes == (0, 0), (codes, said)
    assert sorted(path.name for path in work.iterdir()) == sorted([writer.output, *writer.beside])
    assert not [path for path in output.rglob(".*")], list(output.rglob(".*"))
    writer.read(output)
    if writer.exact:
        possible = [digest for digest, code in zip(wanted, codes, strict=True) if code == 0]
        assert digest(output) in possible, (codes, said)
    return "both succeeded" if codes == (0, 0) else "one was refused"


def sweep(work: Path, pairs: int, seed: int = 0, names: list[str] | None = None) -> dict[str, Any]:
    moments, counts = random.Random(seed), Counter[str]()
    os.environ["BIGBIGAN_HOME"] = str(work / "home")
    chosen = {name: w for name, w in writers(prepare(work / "inputs")).items() if not names or name in names}
    alone: dict[str, list[str]] = {}
    for name, writer in chosen.items():
        alone[name] = []
        for i, command in enumerate(writer.commands):
            folder = work / f"alone-{name}-{i}".replace(" ", "-")
            folder.mkdir()
            assert _call(command, folder, work / "log") == writer.done, (name, (work / "log").read_text())
            alone[name].append(digest(folder / writer.output))
    for pair in range(pairs):
        name = list(chosen)[pair % len(chosen)]
        try:
            counts[attack(chosen[name], work / f"pair-{pair}", alone[name], moments)] += 1
        except Exception as error:
            raise AssertionError(f"pair {pair}, {name}: {error}") from error
    return {"pairs": pairs, "writers": len(chosen), **counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writers", nargs="+", help="only these, such as 'encode .npz 0'")
    options = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        counts = sweep(Path(work).resolve(), options.pairs, options.seed, options.writers)
    print(json.dumps({**counts, "seconds": round(time.monotonic() - start)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
