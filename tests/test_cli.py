"""The command line: pictures, features, models; messages, exit codes and kills of real processes."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cells, home, make_images, one_thread, pixels, run  # noqa: F401 (fixtures for every test here)

from bigbigan import BigBiGAN, create_model, hub, load
from bigbigan.cli import build_parser, main
from bigbigan.commands.verbs import ABOUT
from bigbigan.images import asset_images, to_uint8
from bigbigan.presets import PRESETS, close_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder: 32 pixels, RGB, random weights."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    create_model("bigbigan-tiny", seed=7).save(path)
    return str(path)


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield path, parser
    for action in inner:
        for name, child in action.choices.items():
            yield from leaves(child, (*path, name))


@pytest.mark.parametrize(
    ("path", "parser"), [pytest.param(*leaf, id=" ".join(leaf[0])) for leaf in leaves(build_parser())]
)
def test_every_help_suffices(path: tuple[str, ...], parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*path, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"Example: bigbigan {' '.join(path)}" in text
    assert "Exit codes: 0 done" in text or "Exit codes: 0 all done" in text
    assert max(map(len, text.splitlines())) <= 110
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert not unexplained


def test_the_help_needs_no_torch() -> None:
    # The package's own __init__ offers the whole API; what is measured here is the command's share.
    code = (
        "import sys, types; package = types.ModuleType('bigbigan'); package.__path__ = [sys.argv[1]];"
        "sys.modules['bigbigan'] = package; from bigbigan.cli import main\n"
        "for command in (['--help'], ['evaluate', '--help']):\n"
        "    try: main(command)\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)"
    )
    package = str(Path(__file__).parents[1] / "bigbigan")
    shown = subprocess.run([sys.executable, "-c", code, package], check=True, capture_output=True, text=True).stdout
    for name, about in ABOUT.items():
        assert re.search(rf"^ +{name}\s+{re.escape(about)}$", shown, re.MULTILINE), name


def test_generate(tmp_path: Path, folder: str) -> None:
    assert (
        main(["generate", folder, "-n", "5", "-o", str(tmp_path / "grid.png"), "--columns", "3", "--scale", "1"]) == 0
    )
    expected = to_uint8(load(folder, fuse=True).generate(5, seed=0))
    found = cells(tmp_path / "grid.png", 3, 32)
    assert np.array_equal(found[:5], expected)
    assert (found[5] == 255).all()

    assert main(["generate", "--model", folder, "-n", "34", "-o", f"{tmp_path}/single/", "--seed", "0"]) == 0
    names = sorted(path.name for path in (tmp_path / "single").glob("*.png"))
    assert names == [f"{index:06d}.png" for index in range(34)]
    for index, image in enumerate(to_uint8(load(folder, fuse=True).generate(34, seed=0))):
        assert abs(pixels(tmp_path / f"single/{index:06d}.png").astype(int) - image).max() <= 1
        assert index >= 5 or abs(image.astype(int) - expected[index]).max() <= 1  # a larger number adds images
    options = ["--truncation", "0.5", "--truncation-mode", "scale", "--upsample", "--seed", "3", "--columns", "1"]
    assert main(["generate", folder, "-n", "2", "-o", str(tmp_path / "up.png"), *options]) == 0
    upsampled = load(folder, fuse=True).generate(2, seed=3, truncation=0.5, truncation_mode="scale", upsample=True)
    assert np.array_equal(cells(tmp_path / "up.png", 1, 64), to_uint8(upsampled))


def test_reconstruct_shows_originals_above_reconstructions(tmp_path: Path, folder: str) -> None:
    files = make_images(tmp_path / "in", 5)
    inputs = [str(files[4]), str(tmp_path / "in")]  # a file, then a folder: 6 images
    output = tmp_path / "grid.png"
    assert main(["reconstruct", *inputs, "-o", str(output), "--model", folder, "--columns", "4", "--scale", "1"]) == 0
    found = cells(output, 4, 32).reshape(2, 2, 4, 32, 32, 3)  # pairs of rows; above and below; columns
    order = [files[4], *files]
    again = to_uint8(load(folder, fuse=True).reconstruct(order))
    for index, file in enumerate(order):
        assert np.array_equal(found[index // 4, 0, index % 4], pixels(file))
        assert np.array_equal(found[index // 4, 1, index % 4], again[index])
    assert (found[1, :, 2:] == 255).all()

    options = ["--use-sample", "--seed", "4", "--upsample", "--invert", "--scale", "1"]
    assert main(["reconstruct", str(files[0]), "-o", str(output), "--model", folder, *options]) == 0
    above, below = cells(output, 1, 64)
    assert np.array_equal(above[::2, ::2], 255 - pixels(files[0]))
    expected = load(folder, fuse=True).reconstruct(files[0], use_sample=True, seed=4, upsample=True, invert=True)
    assert np.array_equal(below, to_uint8(expected)[0])


def test_pictures_that_would_be_too_large_are_refused_before_anything_is_drawn(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(asset_images()[0])
    monkeypatch.setattr("bigbigan.model.BigBiGAN.generate", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr("bigbigan.model.BigBiGAN.reconstruct", lambda *_, **__: pytest.fail("drawn"))
    for command in (
        ["generate", "--scale", "3000", "-o", str(tmp_path / "a.png")],
        ["generate", "--scale", "100000", "-o", f"{tmp_path}/single/"],
        ["generate", "-n", "10000000", "-o", str(tmp_path / "a.png")],
        ["reconstruct", image, "--scale", "100000", "-o", str(tmp_path / "a.png")],
        ["interpolate", image, image, "--steps", "10000000", "-o", str(tmp_path / "a.png")],
    ):
        assert main([*command, "--model", folder]) == 2
        message = capsys.readouterr().err
        assert "it may have 250,000,000 pixels at most: take fewer images or a smaller scale" in message
    assert not any(tmp_path.glob("*.png")) and not any(tmp_path.glob("single/*"))


def test_interpolate(tmp_path: Path, folder: str) -> None:
    a, b = map(str, make_images(tmp_path / "in", 2))
    model, output = load(folder, fuse=True), tmp_path / "strip.png"
    z = model.encode([a, b]).z_mean
    for option, middle in (([], (z[0] + z[1]) / 2), (["--spherical"], None)):
        assert (
            main(["interpolate", a, b, "-o", str(output), "--model", folder, "--steps", "3", "--scale", "1", *option])
            == 0
        )
        found = cells(output, 5, 32).astype(int)
        assert np.array_equal(found[0], pixels(Path(a)))
        assert np.array_equal(found[4], pixels(Path(b)))
        if middle is None:  # half the arc: the bisector, whose length is that of the sum over 2 cos(angle / 2)
            cosine = torch.cosine_similarity(z[0], z[1], dim=0)
            middle = (z[0] + z[1]) / (2 * ((1 + cosine) / 2).sqrt())
        drawn = to_uint8(model.generate(torch.stack([z[0], middle, z[1]]))).astype(int)
        assert abs(found[1:4] - drawn).max() <= 1


def test_encode_reports_in_its_exit_code(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, output = make_images(tmp_path / "in", 6), tmp_path / "out.npz"
    options = [
        "-o",
        str(output),
        "--model",
        folder,
        "--outputs",
        "z_sample,avepool_feat",
        "--seed",
        "2",
        "--crop",
        "none",
    ]
    assert main(["encode", str(tmp_path / "in"), *options]) == 0
    expected = load(folder, fuse=True).encode(files, seed=2, crop="none")
    with np.load(output) as arrays:
        assert sorted(arrays) == ["avepool_feat", "paths", "z_sample"]
        assert np.array_equal(arrays["z_sample"], expected.z_sample.numpy())
        assert arrays["paths"].tolist() == [path.name for path in files]
    assert "6 of 6 images" in capsys.readouterr().err

    (tmp_path / "in" / "bad\n.png").write_bytes(b"no picture")
    assert main(["encode", str(tmp_path / "in"), *options]) == 1
    err = capsys.readouterr().err
    assert "skipped bad\\n.png: not readable as PNG" in err
    assert "6 of 7 images" in err
    assert main(["encode", str(tmp_path / "in" / "bad\n.png"), *options, "--quiet"]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["encode", str(tmp_path / "in"), "-o", str(tmp_path / "out.csv"), "--model", folder]) == 2
    assert main(["encode", str(tmp_path / "nowhere"), *options]) == 2


def test_encode_killed_goes_on_with_the_rest(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "in", 1000, side=8)
    (tmp_path / "in" / "0100.png").write_bytes(b"bad")
    output, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    command = ["encode", str(tmp_path / "in"), "--model", folder, "--outputs", "avepool_feat,z_sample", "-o"]
    assert main([*command, str(whole)]) == 1
    process = run(*command, output)
    piece = tmp_path / "out.npz.partial" / "0" / "000000.safetensors"
    while not piece.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    finished = len(list(piece.parent.glob("[0-9]*.safetensors")))
    assert 1 <= finished < 4

    rows, encode = [], BigBiGAN.encode
    monkeypatch.setattr(
        BigBiGAN, "encode", lambda self, x, **options: (rows.append(len(x)), encode(self, x, **options))[1]
    )
    assert main([*command, str(output)]) == 1
    assert sum(rows) == 999 - 256 * finished
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in", "out.npz", "out.npz.failures.jsonl", "whole.npz", "whole.npz.failures.jsonl"
    ]  # fmt: skip


def test_errors_are_one_line(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (picture,) = make_images(tmp_path / "in", 1)
    before = picture.read_bytes()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out = str(tmp_path / "out.png")
    cases = [
        (["generate", "no-such-model", "-o", out], "no preset 'no-such-model'"),
        (["generate", str(tmp_path / "gone"), "-o", out], "there is no folder"),
        (["generate", str(tmp_path), "-o", out], "is no model folder"),
        (["generate", "bigbigan-resnet50", "-o", out], "no repository is registered for it. "),
        (["generate", folder, "--model", folder, "-o", out], "give one of them"),
        (["generate", folder, "-o", str(tmp_path / "out.gif")], "cannot write '.gif'"),
        (["generate", folder, "-o", out, "--truncation", "0"], "truncation is 0.0"),
        (["generate", folder, "-o", out, "--seed", "-1"], "seed is -1"),
        (["generate", folder, "-o", out, "--device", "tpu"], "choose auto, cpu, cuda or mps"),
        (["generate", folder, "-o", out, "--revision", "main"], "has no revisions"),
        (["reconstruct", "-o", out, "--model", folder], "name the images to reconstruct"),
        (["reconstruct", str(tmp_path / "bad.png"), "-o", out, "--model", folder], "bad.png: not readable"),
        (["reconstruct", str(tmp_path / "in"), "-o", str(picture), "--model", folder], "is an input"),
        (["encode", str(picture), "-o", str(tmp_path / "a.npz"), "--model", folder, "--outputs", "z"], "no output 'z'"),
        (["info", "no-such-model"], "no preset"),
        (["train", "bigbigan-cifar-10", "--dry-run"], "did you mean bigbigan-cifar10-32"),
        (["train", "nonsense", "--dry-run"], "no recipe 'nonsense'; `bigbigan recipes` lists them"),
        (["train", "bigbigan-fashion-mnist-32"], "needs --data and --run"),
        (["export", str(tmp_path), "-o", str(tmp_path / "x")], "is no run folder"),
        (["evaluate", "linear", "--data", str(tmp_path / "in"), "--model", folder, "--quiet"], "have no label"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"bigbigan {arguments[0]}: ")
        assert message in lines[0], lines[0]
    assert picture.read_bytes() == before
    for arguments in ([], ["generate"], ["generate", "-o", out, "-n", "0"], ["paint"], ["list", "--colour"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "in"]


@pytest.mark.parametrize(
    ("name", "first", "never"),
    [
        ("cifar10-64", "bigbigan-cifar10-32", "uniform-pz"),
        ("cifar10", "bigbigan-cifar10-32", "uniform-pz"),
        ("bigbigan-cifar-10", "bigbigan-cifar10-32", "resnet101"),
        ("mnist", "bigbigan-mnist-32", "uniform"),
        ("fashion_mnist", "bigbigan-fashion-mnist-32", "small-g"),
        ("resnet50", "bigbigan-resnet50", "uniform-pz"),
        ("bigbigan-resnet5", "bigbigan-resnet50", "no-e"),
        ("revnet50x4", "bigbigan-revnet50x4", "mnist"),
        ("RevNet-50x4", "bigbigan-revnet50x4", "mnist"),
        ("ssgan-mnist", "ssgan-fashion-mnist-32", "small-g"),
        ("no-such-model", "", "bigbigan-"),
        ("stylegan", "", "ssgan"),
    ],
)
def test_close_names_are_those_that_share_what_tells(name: str, first: str, never: str) -> None:
    found = close_names(name, PRESETS)
    assert first in found if first else not found
    assert not any(never in other for other in found)


def test_messages_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for document in ({"train": {}, "data": {}}, {"format": "bigbigan-run/1", "train": {}, "data": {}}):
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(document))
        for command in (["info", str(run)], ["generate", str(run), "-o", str(tmp_path / "x.png")]):
            assert main(command) == 2
            assert f"{run} is a run folder of `bigbigan train`, not a model folder: export it first, as by bigbigan " \
                   f"export {run} -o my-model" in capsys.readouterr().err  # fmt: skip
    (run / "snapshots" / "images-1").mkdir(parents=True)
    (run / "snapshots" / "images-1" / "config.json").write_text("{}")
    assert main(["info", str(run / "snapshots")]) == 2
    assert f"name one of the folders in it: {run / 'snapshots' / 'images-1'}" in capsys.readouterr().err
    assert main(["info", "org/name@"]) == 2
    assert "org/name@ names no revision behind the @" in capsys.readouterr().err
    for command in (["encode", "x", "-o", "x.npz"], ["train", "bigbigan-mnist-32"], ["evaluate", "knn", "--data", "x"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--workers", "-3"])
        assert stop.value.code == 2 and "argument --workers: -3 is not" in capsys.readouterr().err
    assert main(["info", "fashion-mnist"]) == 2
    assert "?." not in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_dry_run_says_that_the_device_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "bigbigan-mnist-32", "--dry-run", "--device", "cuda"]) == 0
    assert "finds no cuda device here; there the run would not start" in capsys.readouterr().err
    assert main(["train", "bigbigan-mnist-32", "--dry-run", "--device", "tpu"]) == 0
    assert "choose auto, cpu, cuda or mps" in capsys.readouterr().err


def test_lines_of_a_message_become_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("it cannot be had:\n  one: no route\n  two: refused.\nBy hand: do this\n\nor that.")

    monkeypatch.setattr("bigbigan.commands.models._list", broken)
    assert main(["list"]) == 2
    line = "it cannot be had: one: no route. two: refused. By hand: do this. or that"
    assert capsys.readouterr().err == f"bigbigan list: {line}\n"


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("bigbigan.factory.load", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["generate", "-o", str(tmp_path / "out.png")])


def test_a_closed_stdout_is_quiet() -> None:
    process = run("recipes", "bigbigan-fashion-mnist-32")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (141, "")


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub, "has_weights", lambda name: name == "bigbigan-cifar10-32", raising=False)
    assert main(["list", "bigbigan_*[t0]-32", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == ["bigbigan-fashion-mnist-32", "bigbigan-mnist-32", "bigbigan-cifar10-32"]
    entry = found["bigbigan-cifar10-32"]
    model = create_model("bigbigan-cifar10-32")
    for part in model.parts:
        assert entry["parameters"][part] == sum(p.numel() for p in getattr(model, part).parameters())
    assert (entry["generator_resolution"], entry["encoder_resolution"], entry["weights"]) == (32, 32, "hub")
    assert found["bigbigan-mnist-32"]["weights"] is None
    assert main(["list", "*no-e*"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "NAME"
    assert [row.split()[:3] for row in rows] == [["bigbigan-no-e", "128", "-"]]


def test_info(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", folder, "--json"]) == 0
    found, written = json.loads(capsys.readouterr().out), json.loads((Path(folder) / "config.json").read_text())
    for key in ("name", "license", "source", "provenance", "files", "architecture"):
        assert found[key] == written[key], key
    assert main(["info", folder]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert lines["files.encoder.sha256"] == written["files"]["encoder"]["sha256"]
    assert lines["architecture.encoder.depths"] == "[1, 1, 1, 1]"
    assert main(["info", "bigbigan-revnet50x4", "--json"]) == 0  # no weights here
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] is None
    assert "no repository is registered" in found["how_to_get_weights"]
    assert found["architecture"]["encoder"]["base_channels"] == 256


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from bigbigan._version import __version__

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"bigbigan {__version__}\n"
