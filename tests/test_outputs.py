"""What commands write: by one process at a time, never over an input, and only over an earlier output of its kind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import home, make_classes, make_images, one_thread  # noqa: F401 (fixtures)
from PIL import Image

from bigbigan import create_model
from bigbigan.cli import main
from bigbigan.evaluation.feature_files import feature_names, read_features
from bigbigan.images import save_image
from bigbigan.presets import PRESETS
from bigbigan.schema import to_dict

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    create_model("bigbigan-tiny", seed=0).save(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four pictures in `in/`, and the working folder."""
    make_images(tmp_path / "in", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one sentence of a command that ends with 2."""
    capsys.readouterr()
    assert main([*command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attack(script: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.attacks.{script}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Attacks in small


def test_two_processes_write_one_output() -> None:
    names = ("encode .npz 0", "encode .parquet 2", "encode .safetensors 0", "knn", "export", "train")
    counts = attack("concurrent_writers", "--pairs", "6", "--writers", *names)
    assert counts["writers"] == 6 and counts["one was refused"] > 0


def test_strangers_files_stay() -> None:
    assert attack("strangers")["strangers"] > 100


@pytest.mark.slow
def test_two_processes_write_one_output_at_length() -> None:
    assert attack("concurrent_writers", "--pairs", "200")["pairs"] == 200


# The lock


def test_a_thread_waits_or_is_refused_and_the_lock_goes(tmp_path: Path) -> None:
    from bigbigan.files import OutputError, hold

    lock, order = tmp_path / "new" / ".lock", list[str]()
    busy, inside, leave = OutputError("taken"), threading.Event(), threading.Event()

    def first() -> None:
        with hold(lock, busy):
            inside.set()
            leave.wait()
            order.append("first")

    def second() -> None:
        with hold(lock, busy, wait=True), hold(lock, busy):  # nested in its own thread
            order.append("second")

    threads = [threading.Thread(target=target) for target in (first, second)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    with pytest.raises(OutputError, match="taken"), hold(lock, busy):
        pass
    assert lock.exists()
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]
    assert not lock.parent.exists()  # neither the lock stays, nor the folder that was made for it


def test_a_process_is_refused_at_once_and_its_lock_ends_with_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, time\nfrom bigbigan.outputs import PICTURE, claim\n"
        "with claim(sys.argv[1], PICTURE):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, "a.png"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            line = refused(capsys, "reconstruct", "-o", "./in/../a.png")
            assert line == (
                "bigbigan reconstruct: another process is writing ./in/../a.png; wait for it, or choose another output"
            )
        finally:
            process.kill()
    assert main(["reconstruct", "-o", "a.png"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["a.png", "in"]


# Over what an output may be written


def test_commands_run_again_over_their_own_outputs(here: Path, tiny: str) -> None:
    data = str(make_classes(here / "data", {"train": 6, "test": 4}))
    model = ["--model", tiny, "--quiet"]
    score = ["--network", f"model:{tiny}", "-n", "8", "--kid-subsets", "0", "--score-splits", "1"]
    commands = [
        *(["encode", "in", "-o", f"a{suffix}", *model] for suffix in (".npz", ".safetensors", ".parquet")),
        ["evaluate", "knn", "--data", data, "--k", "1", "--json", "a.json", *model],
        ["evaluate", "generation", "--data", data, *score, "--save-statistics", "s.npz", *model],
        ["evaluate", "generation", "--data", data, *score, "--save-statistics", "s.safetensors", *model],
        ["evaluate", "retrieval", "in", "--data", data, "--k", "1", "-o", "r.png", *model],
        ["report", "a.json", "-o", "a.md"],
        ["interpolate", "in/0000.png", "in/0001.png", "-o", "i.webp", *model],
        ["reconstruct", "in", "-o", "r.jpg", *model],
        ["export-onnx", "-o", "onnx", "--parts", "encoder", *model],
    ]
    for command in commands:
        for _ in range(2):
            assert main(command) == 0, command
    files = [name for name in contents(here) if not name.startswith(("in/", "data/"))]
    assert sorted(files) == sorted([
        "a.npz", "a.safetensors", "a.parquet", "a.json", "s.npz", "s.safetensors", "r.png", "a.md", "a-knn-1.png",
        "i.webp", "r.jpg", "onnx/encoder.onnx",
    ])  # fmt: skip
    (here / "a.json").write_bytes(b"")  # an empty file is nobody's, as `mktemp` makes them
    assert main(commands[3]) == 0 and json.loads((here / "a.json").read_text())["protocol"]["name"] == "knn"


def test_each_kind_keeps_off_the_others(here: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(make_classes(here / "data", {"train": 6, "test": 4}))
    model = ["--model", tiny, "--quiet"]
    assert main(["encode", "in", "-o", "f.npz", *model]) == 0
    assert main(["evaluate", "knn", "--data", data, "--k", "1", "--json", "r.json", *model]) == 0
    shutil.copy(Path(tiny, "encoder.safetensors"), here / "w.safetensors")
    shutil.copy(here / "r.json", here / "record.txt")
    np.savez(here / "mine.npz", paths=1, mean=2)  # close to both kinds, and written by neither command
    (here / "notes.md").write_text("# Notes\n\nRecords:\n")
    (here / "settings.json").write_text('{"protocol": 1}')
    os.mkfifo(here / "pipe.json")
    before = contents(here)
    knn = ["evaluate", "knn", "--data", data, "--k", "1", *model]
    statistics = ["evaluate", "generation", "--data", data, "--network", f"model:{tiny}", *model, "--save-statistics"]
    cases = [
        (["report", "record.txt", "-o", "record.txt"], "record.txt exists and is not a document"),
        (["report", "r.json", "-o", "w.safetensors"], "cannot write '.safetensors'; use .md"),
        (["report", "r.json", "-o", "notes.md"], "notes.md exists and is not a document of `bigbigan report`"),
        (["encode", "in", "-o", "w.safetensors", *model], "w.safetensors exists and is not a feature file"),
        ([*statistics, "f.npz"], "f.npz exists and is not a file of `--save-statistics`"),
        ([*statistics, "mine.npz"], "mine.npz exists and is not a file of `--save-statistics`"),
        ([*knn, "--json", "settings.json"], "settings.json exists and is not a record of `bigbigan evaluate`"),
        ([*knn, "--json", "f.npz"], "f.npz exists and is not a record"),
        ([*knn, "--json", "pipe.json"], "pipe.json is not a regular file"),
        ([*knn, "--json", os.devnull], f"{os.devnull} is not a regular file"),
    ]
    for command, message in cases:
        assert message in refused(capsys, *command), command
    assert contents(here) == before
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []


def test_pictures_are_not_drawn_over_those_that_are_read(
    here: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_classes(here / "data", {"train": 6, "test": 4})
    picture, model = data / "test/dark/0.png", ["--model", tiny, "--quiet"]
    os.link(picture, here / "hard.png")
    (here / "soft.png").symlink_to(picture)
    before = contents(here)
    for output in (str(picture), "hard.png", "soft.png"):
        evaluate = ["evaluate", "reconstruction", "--data", str(data), "--grid", output, *model]
        assert "is an input" in refused(capsys, *evaluate)
        assert "is an input" in refused(
            capsys, "evaluate", "retrieval", "--data", str(data), "--k", "1", "-o", output, *model
        )
        assert "is an input" in refused(capsys, "reconstruct", str(picture.parent), "-o", output, *model)
        assert "is an input" in refused(capsys, "interpolate", str(picture), "in/0000.png", "-o", output, *model)
    both = ["evaluate", "reconstruction", "--data", str(data), "--grid", "a.png", "--json", "./a.png", *model]
    assert "a.png is named for two outputs" in refused(capsys, *both)
    assert contents(here) == before


def test_a_link_is_followed(here: Path, tiny: str) -> None:
    (here / "disk").mkdir()
    for name in ("a.npz", "a.png"):
        (here / name).symlink_to(here / "disk" / name)
    for _ in range(2):
        assert main(["encode", "in", "-o", "a.npz", "--model", tiny]) == 0
        assert main(["reconstruct", "in", "-o", "a.png", "--model", tiny]) == 0
    assert (here / "a.npz").is_symlink() and (here / "a.png").is_symlink()
    assert sorted(path.name for path in (here / "disk").iterdir()) == ["a.npz", "a.png"]
    assert len(read_features(here / "a.npz")["z_mean"]) == 4


def test_names_as_long_as_file_systems_allow(here: Path, tiny: str) -> None:
    name = "雪" * 82 + ".png"  # 250 bytes
    for _ in range(2):
        assert main(["reconstruct", "in", "-o", name, "--model", tiny]) == 0
    save_image(Image.open(name), here / name)
    assert sorted(path.name for path in here.iterdir()) == ["in", name]


def test_a_folder_of_pictures_holds_those_of_one_call(
    here: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in (here / "a").glob("*.png"))

    draw = ["generate", "--model", tiny, "-o", "a/"]
    assert main([*draw, "-n", "40"]) == 0
    (here / "a" / "cat.png").write_bytes((here / "in/0000.png").read_bytes())
    before = contents(here)
    line = refused(capsys, *draw, "-n", "4", "--seed", "1")
    assert "a holds 40 pictures of an earlier call (000000.png, …)" in line and "--overwrite" in line
    assert contents(here) == before
    assert "seed is -1" in refused(capsys, *draw, "--overwrite", "--seed", "-1")
    assert contents(here) == before
    assert main([*draw, "-n", "4", "--seed", "1", "--overwrite"]) == 0
    assert names() == ["000000.png", "000001.png", "000002.png", "000003.png", "cat.png"]
    assert contents(here)["a/cat.png"] == before["a/cat.png"]
    assert contents(here)["a/000000.png"] != before["a/000000.png"]


def test_a_report_says_which_plots_it_no_longer_shows(
    here: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(make_classes(here / "data", {"train": 6, "test": 4}))
    for metric in ("l2", "cosine"):
        knn = ["evaluate", "knn", "--data", data, "--k", "1", "--metric", metric, "--model", tiny]
        assert main([*knn, "--json", f"{metric}.json"]) == 0
    assert main(["report", "l2.json", "cosine.json", "-o", "a.md"]) == 0
    assert main(["report", "l2.json", "-o", "a.md"]) == 0
    assert "no longer in a.md, and left where they are: a-knn-2.png" in capsys.readouterr().err
    assert (here / "a-knn-2.png").exists()


# Names of files


def test_no_two_files_have_one_name(here: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bigbigan.files import path_named

    folder, source = here / "odd", (here / "in/0000.png").read_bytes()
    folder.mkdir()
    names = [b"\xff.png", b"\\xff.png", b"\\x5cxff.png", b"\\\xff.png", b"\\\\xff.png", b"a\\b.png", "é.png".encode()]
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(source)
    for suffix in (".npz", ".safetensors", ".parquet"):
        assert main(["encode", "odd", "-o", f"a{suffix}", "--model", tiny, "--outputs", "z_mean"]) == 0
        found = feature_names(here / f"a{suffix}")
        assert sorted(os.fsencode(path_named(name)) for name in found) == sorted(names)
        assert {"\\xff.png", "a\\b.png", "é.png"} <= set(found)
    # Whoever reads the file finds the pictures again, and their names in the record.
    search = ["evaluate", "retrieval", "--data", "odd", "--feature-file", "a.npz", "--feature", "z_mean", "--k", "1"]
    assert main([*search, "--model", tiny, "-o", "a.png"]) == 0
    query = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    capsys.readouterr()
    assert main([*search[:2], query, *search[2:], "--model", tiny, "--json", "a.json", "--keep-query"]) == 0
    (row,) = json.loads((here / "a.json").read_text())["results"]
    assert row["neighbours"][0]["query"].endswith("odd/\\xff.png")


# What cannot be written, and workers that cannot start


def limited(kind: int, limit: int, *command: str) -> subprocess.CompletedProcess[str]:
    def limit_child() -> None:
        resource.setrlimit(kind, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "bigbigan", *command],
        preexec_fn=limit_child, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_a_piece_that_cannot_be_written_ends_with_2_and_is_made_up_for(here: Path, tiny: str) -> None:
    command = ["encode", "in", "-o", "a.npz", "--model", tiny, "--workers", "0", "--quiet"]
    done = limited(resource.RLIMIT_FSIZE, 1000, *command)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "bigbigan encode: a.npz.partial/0/000000.safetensors: File too large. Finished work is kept in a.npz.partial: "
        "make room, then run the same command again\n"
    )
    assert main(command) == 0 and len(read_features(here / "a.npz")["z_mean"]) == 4
    assert not (here / "a.npz.partial").exists()


def test_a_damaged_piece_is_computed_again(here: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbigan.evaluation import encoding

    command = ["encode", "in", "-o", "a.npz", "--model", tiny, "--workers", "0", "--batch-size", "1"]
    assert main(command) == 0
    whole = (here / "a.npz").read_bytes()
    monkeypatch.setattr(encoding, "PIECE_ROWS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "sync", lambda path: os.open("/absent/folder", os.O_RDONLY))
        assert main(command) == 2
    piece = here / "a.npz.partial/0/000001.safetensors"
    piece.write_bytes(piece.read_bytes()[:20])
    assert main(command) == 0 and (here / "a.npz").read_bytes() == whole


def test_a_record_that_cannot_be_written_is_printed(here: Path, tiny: str) -> None:
    data = str(make_classes(here / "data", {"train": 6, "test": 4}))
    command = ["evaluate", "knn", "--data", data, "--k", "1", "--model", tiny, "--json", "a.json", "--quiet"]
    done = limited(resource.RLIMIT_FSIZE, 100, *command)
    assert done.returncode == 2 and done.stderr.endswith("bigbigan evaluate: a.json: File too large\n"), done.stderr
    assert json.loads(done.stdout[done.stdout.index("\n{") :])["protocol"]["name"] == "knn"


@pytest.mark.parametrize("files", [12, 20, 45])
def test_workers_that_find_too_few_descriptors_are_an_error(here: Path, tiny: str, files: int) -> None:
    make_images(here / "many", 120)
    command = ["encode", "many", "-o", "a.npz", "--model", tiny, "--workers", "2", "--quiet"]
    done = limited(resource.RLIMIT_NOFILE, files, *command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "open files" in done.stderr.splitlines()[-1] and "fewer workers" in done.stderr.splitlines()[-1]
    assert main([*command[:-3], "--workers", "0"]) == 0


# Run folders


def settings(**fields: Any) -> list[str]:
    values = {
        "model": to_dict(PRESETS["bigbigan-tiny"].config), "name": "tiny", "batch_size": 2, "standing_passes": 1,
        "probe_images": 0, "total_images": 4, "checkpoint_images": 2, "snapshot_images": 4, **fields,
    }  # fmt: skip
    return [f"--set={key}={json.dumps(value)}" for key, value in values.items()]


def test_a_run_is_marked_and_older_ones_are_known(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "bigbigan-fashion-mnist-32", "--data", "in", "--run", "run", "--device", "cpu", *settings()]
    (here / "run").mkdir()  # empty
    assert main([*train, "--max-minutes", "1e-9"]) == 0
    config = here / "run/config.json"
    document = json.loads(config.read_text())
    assert document.pop("format") == "bigbigan-run/1"
    config.write_text(json.dumps(document, indent=2) + "\n")  # as older versions wrote it
    assert main(train) == 0
    assert "resuming from run/checkpoints/step-00000001" in capsys.readouterr().err
    assert json.loads(config.read_text())["format"] == "bigbigan-run/1"
    assert main(["export", "run", "-o", "model"]) == 0
    for name in ("snapshots/images-notes", "snapshots/images-0000000009.txt"):
        (here / "run" / name).write_text("note")
    assert main(["export", "run", "-o", "model"]) == 0
    model = contents(here / "model")
    assert "model is not a training run and holds README.md" in refused_last(capsys, [*train[:5], "model", *train[6:]])
    assert contents(here / "model") == model


def refused_last(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_strangers_in_a_run_are_named_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "bigbigan-fashion-mnist-32", "--data", "in", "--run", "run", "--device", "cpu"]
    assert main([*train, *settings(), "--max-minutes", "1e-9"]) == 0
    for name in ("snapshots/note.txt", "samples/holiday.png", "checkpoints/old.zip"):
        (here / "run" / name).write_bytes(b"mine")
    capsys.readouterr()
    assert main([*train, *settings()]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "did not write" in line]
    assert line.endswith("leaves it alone: checkpoints/old.zip, samples/holiday.png, snapshots/note.txt")
