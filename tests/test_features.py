"""Features of tensors and of files: equal to `encode`, untouched by bad files, kills, formats and batch sizes."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from bigbigan import BigBiGAN, create_model
from bigbigan.evaluation import TensorImages, compute_features, encoding, model_features
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.evaluation.features import OUTPUTS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> BigBiGAN:
    return create_model("bigbigan-tiny", parts=("encoder",), seed=3)


def make_images(folder: Path, number: int, prefix: str = "") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(number)
    paths = [folder / f"{prefix}{index:04d}.png" for index in range(number)]
    for path in paths:
        width, height = draws.integers(20, 50, 2)
        Image.fromarray(draws.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return paths


def read(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """A feature file by the format's own library."""
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        return arrays.pop("paths").tolist(), arrays
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["paths"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    from pyarrow import parquet

    table = parquet.read_table(path)
    columns = {name: np.array(table[name].to_pylist(), np.float32) for name in table.column_names if name != "path"}
    return table["path"].to_pylist(), columns


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_a_file_holds_what_encode_gives(tmp_path: Path, model: BigBiGAN, suffix: str) -> None:
    paths = make_images(tmp_path / "in", 37)
    output = tmp_path / f"out{suffix}"
    report = encode_files(model, find_images([tmp_path / "in"]), output, batch_size=8, seed=5)
    names, arrays = read(output)
    expected = model.encode(paths, seed=5, batch_size=8)
    assert names == [path.name for path in paths]
    assert set(arrays) == set(OUTPUTS)
    for name in OUTPUTS:
        assert arrays[name].dtype == np.float32
        assert np.array_equal(arrays[name], expected[name].numpy()), name
    assert (report.done, report.failed, report.resumed) == (37, [], 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", output.name]  # nothing else stays


def test_features_of_images_in_memory_equal_encode(model: BigBiGAN) -> None:
    images = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = TensorImages(images, batch_size=5)
    found = compute_features(model_features(model, ["z_sample", "avepool_feat"], batch_size=5, seed=2), source)
    expected = model.encode(images.float() / 127.5 - 1, seed=2, batch_size=5)
    assert list(found) == ["z_sample", "avepool_feat"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match="uint8"):
        TensorImages(images.float())
    with pytest.raises(ValueError, match="avgpool_feat.*avepool_feat"):
        model_features(model, ["avgpool_feat"])


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def bad_files(whole: bytes) -> list[tuple[str, bytes]]:
    """Suffix and content of what looks like a picture and is none, given one that is."""
    floats = io.BytesIO()
    Image.new("F", (30, 30)).save(floats, "TIFF")
    return [
        (".png", b""),
        (".png", whole[: len(whole) // 2]),
        (".png", whole[:20]),
        (".jpg", b"<html><body>404</body></html>"),
        (".png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
        (".png", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        (".png", b"8BPS\0\1" + bytes(60)),
        (".png", png_header(60_000, 60_000)),
        (".png", png_header(1, 1)),
        (".jpeg", b"\xff\xd8\xff\xe0" + random.Random(0).randbytes(400)),
        (".gif", b"GIF89a\x10\x00\x10\x00\xf0\x00\x00"),
        (".tiff", floats.getvalue()),
        (".webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8)),
    ]


def test_bad_files_are_reported_and_change_no_other_row(tmp_path: Path, model: BigBiGAN) -> None:
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    make_images(clean, 50)
    shutil.copytree(clean, dirty)
    bad = []
    for index, (suffix, data) in enumerate(bad_files((clean / "0007.png").read_bytes())):
        bad.append(f"{4 * index % 50:04d}a{suffix}")
        (dirty / bad[-1]).write_bytes(data)
    (dirty / "0049z.png").write_bytes(b"")
    bad.append("0049z.png")
    for suffix in (".npz", ".parquet"):
        one, other = tmp_path / f"clean{suffix}", tmp_path / f"dirty{suffix}"
        assert encode_files(model, find_images([clean]), one, batch_size=8).failed == []
        report = encode_files(model, find_images([dirty]), other, batch_size=8)
        assert one.read_bytes() == other.read_bytes()
        assert (report.done, [name for name, _ in report.failed]) == (50, sorted(bad))
        lines = [json.loads(line) for line in (tmp_path / f"dirty{suffix}.failures.jsonl").read_text().splitlines()]
        assert [(line["path"], line["reason"]) for line in lines] == report.failed
        assert all(line["reason"] for line in lines)
        assert not (tmp_path / f"clean{suffix}.failures.jsonl").exists()
    for name in bad:
        (dirty / name).unlink()
    encode_files(model, find_images([dirty]), tmp_path / "dirty.npz", batch_size=8)
    assert not (tmp_path / "dirty.npz.failures.jsonl").exists()  # an old report would accuse files that are gone


@pytest.mark.slow
def test_ten_kills_of_a_dirty_folder(tmp_path: Path, model: BigBiGAN) -> None:
    draws, folder = random.Random(0), tmp_path / "in"
    kinds = bad_files(make_images(folder, 900)[0].read_bytes())
    for index in range(100):
        suffix, data = kinds[index % len(kinds)]
        (folder / f"{draws.randrange(900):04d}-{index}{suffix}").write_bytes(data)
    model.save(tmp_path / "model")
    command = [sys.executable, "-m", "bigbigan", "encode", "in", "--model", "model", "--threads", "1", "-o"]
    package = str(Path(encoding.__file__).parents[2])
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": package}, "stderr": subprocess.PIPE}
    assert subprocess.run([*command, "whole.npz"], **options).returncode == 1
    kills = 0
    while kills < 10:
        process = subprocess.Popen([*command, "out.npz"], **options)
        while not (tmp_path / "out.npz.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draws.random() * 1.5)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "out.npz").exists():  # it was faster
            assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
            (tmp_path / "out.npz").unlink()
    assert subprocess.run([*command, "out.npz"], **options).returncode == 1
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    rows = (tmp_path / "out.npz.failures.jsonl").read_text().splitlines()
    assert len(rows) == 100
    assert rows == (tmp_path / "whole.npz.failures.jsonl").read_text().splitlines()
    assert not (tmp_path / "out.npz.partial").exists()


def test_nothing_readable_leaves_no_output(tmp_path: Path, model: BigBiGAN) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    report = encode_files(model, find_images([tmp_path / "a.png"]), tmp_path / "out.npz")
    assert (report.done, len(report.failed)) == (0, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "out.npz.failures.jsonl"]


def test_rows_do_not_depend_on_the_batch_size(tmp_path: Path, model: BigBiGAN) -> None:
    make_images(tmp_path / "in", 20)
    rows = []
    for size in (1, 7, 32):
        encode_files(model, find_images([tmp_path / "in"]), tmp_path / "out.npz", batch_size=size, seed=1)
        rows.append(read(tmp_path / "out.npz")[1])
    for other in rows[1:]:
        for name in OUTPUTS:
            np.testing.assert_allclose(other[name], rows[0][name], rtol=1e-5, atol=1e-5)


class Interrupter:
    """`model.encode`, counting rows and failing before batch `at`."""

    def __init__(self, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.rows, self.calls, self.at, self.encode = 0, 0, at, model.encode
        monkeypatch.setattr(model, "encode", self)

    def __call__(self, x: torch.Tensor, **options: object) -> object:
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.calls += 1
        self.rows += len(x)
        return self.encode(x, **options)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_an_interrupted_call_goes_on(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(encoding, "PIECE_ROWS", 10)  # with batches of 4: pieces of 12 rows
    make_images(tmp_path / "in", 40)
    for index in (0, 5, 12, 13, 39):
        (tmp_path / f"in/{index:04d}.png").write_bytes(b"bad")
    files, output = find_images([tmp_path / "in"]), tmp_path / f"out{suffix}"
    expected = encode_files(model, files, output, batch_size=4)
    whole, failures = output.read_bytes(), (tmp_path / f"{output.name}.failures.jsonl").read_bytes()
    for at in (1, 5, 8):
        output.unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Interrupter(model, patch, at)
            encode_files(model, files, output, batch_size=4)
        assert not output.exists()
        with monkeypatch.context() as patch:
            counter = Interrupter(model, patch, -1)
            report = encode_files(model, files, output, batch_size=4)
        assert report.resumed == at // 3 * 12
        assert counter.rows == 35 - report.resumed
        assert report.failed == expected.failed
        assert output.read_bytes() == whole
        assert (tmp_path / f"{output.name}.failures.jsonl").read_bytes() == failures
        assert not (tmp_path / f"{output.name}.partial").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_a_full_disk_at_the_end_costs_nothing(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    make_images(tmp_path / "in", 10)
    files, output = find_images([tmp_path / "in"]), tmp_path / f"out{suffix}"
    encode_files(model, files, output, seed=1)
    before = output.read_bytes()

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(encoding, "sync", fail)
        encode_files(model, files, output, seed=2)
    assert output.read_bytes() == before  # the old output, whole
    assert encode_files(model, files, output, seed=2).resumed == 10
    assert output.read_bytes() != before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", output.name]


def interrupted(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Path], dict[str, Path], Path]:
    """Twelve images, by path and by name, and the output of a call that ended when eight were done."""
    monkeypatch.setattr(encoding, "PIECE_ROWS", 4)
    paths = make_images(tmp_path / "in", 12)
    files, output = find_images([tmp_path / "in"]), tmp_path / "out.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupter(model, patch, 2)
        encode_files(model, files, output, batch_size=4)
    return paths, files, output


@pytest.mark.parametrize("change", ["file", "outputs", "weights", "option"])
def test_what_belongs_to_another_call_is_not_taken_over(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    paths, files, output = interrupted(tmp_path, model, monkeypatch)
    options: dict[str, object] = {"crop": "none"} if change == "option" else {}
    if change == "outputs":
        options["outputs"] = ["z_mean"]
    if change == "weights":
        model = create_model("bigbigan-tiny", parts=("encoder",), seed=4)
    if change == "file":
        paths[0].write_bytes(paths[1].read_bytes())
    with caplog.at_level(logging.WARNING, "bigbigan"):
        assert encode_files(model, files, output, batch_size=4, **options).resumed == 0  # type: ignore[arg-type]
    assert "starting afresh" in caplog.text
    if change != "outputs":
        expected = model.encode(paths, batch_size=4, **{"seed": 0, **options})  # type: ignore[arg-type]
        assert np.array_equal(read(output)[1]["z_sample"], expected.z_sample.numpy())


def test_another_seed_keeps_finished_work(tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, files, output = interrupted(tmp_path, model, monkeypatch)
    assert encode_files(model, files, output, batch_size=4, seed=9).resumed == 8
    assert np.array_equal(read(output)[1]["z_sample"], model.encode(paths, batch_size=4, seed=9).z_sample.numpy())


def test_inputs_and_strange_folders_are_safe(tmp_path: Path, model: BigBiGAN) -> None:
    (picture,) = make_images(tmp_path, 1)
    disguised = tmp_path / "picture.npz"
    shutil.copy(picture, disguised)
    before = disguised.read_bytes()
    with pytest.raises(ValueError, match="is an input"):
        encode_files(model, find_images([disguised]), disguised)
    (tmp_path / "link.npz").symlink_to(disguised)
    with pytest.raises(ValueError, match="is an input"):
        encode_files(model, find_images([disguised]), tmp_path / "link.npz")
    assert disguised.read_bytes() == before
    (tmp_path / "out.npz.partial").mkdir()
    (tmp_path / "out.npz.partial" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="move it away"):
        encode_files(model, find_images([picture]), tmp_path / "out.npz")
    assert (tmp_path / "out.npz.partial" / "thesis.txt").read_text() == "dear"


def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "in", 3)
    files = find_images([tmp_path / "in"])
    monkeypatch.setattr(model, "encode", None)  # work would fail
    (tmp_path / "folder.npz").mkdir()
    for name, message in (
        ("a.csv", "cannot write '.csv'; use .npz"),
        ("a", "no suffix"),
        ("folder.npz", "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_files(model, files, tmp_path / name)
    with pytest.raises(ValueError, match="batch_size is 0"):
        encode_files(model, files, tmp_path / "a.npz", batch_size=0)
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"pip install 'bigbigan\[eval\]'"):
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        encode_files(model, files, tmp_path / "a.parquet")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="make room"):
        patch.setattr(encoding.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        encode_files(model, files, tmp_path / "a.npz")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="header cannot hold 3 names"):
        patch.setattr("bigbigan.evaluation.feature_files.MAX_HEADER_BYTES", 50)
        encode_files(model, files, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.npz").exists()


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_images(tmp_path / "in", 20)
    files = find_images([tmp_path / "in"])
    encode_files(model, files, tmp_path / "plenty.npz", batch_size=16)
    encode = model.encode

    def scarce(x: torch.Tensor, *, batch_size: int, **options: object) -> object:
        if min(batch_size, len(x)) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(x, batch_size=batch_size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "encode", scarce)
    assert encode_files(model, files, tmp_path / "scarce.npz", batch_size=16).done == 20
    assert caplog.text.count("out of memory") == 2  # 16 -> 8 -> 4
    (_, plenty), (_, few) = read(tmp_path / "plenty.npz"), read(tmp_path / "scarce.npz")
    for name in OUTPUTS:
        np.testing.assert_allclose(few[name], plenty[name], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(model, "encode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        encode_files(model, files, tmp_path / "bug.npz")


def test_awkward_names(tmp_path: Path, model: BigBiGAN) -> None:
    folder = tmp_path / "in"
    (source,) = make_images(tmp_path, 1)
    names = ["-a.png", "a.png", "a.PNG", "a/b.png", "new\nline.png", "päth.png", "zz 雪.webp", "a.jpg", "日/a.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    odd = os.fsencode(folder) + b"/\xff.png"
    with open(odd, "wb") as file:
        file.write(source.read_bytes())
    (folder / "a" / "loop").symlink_to(folder)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    expected = sorted([*names, "\\xff.png"])
    for suffix in (".npz", ".safetensors", ".parquet"):
        encode_files(model, find_images([folder]), tmp_path / f"out{suffix}", outputs=["z_mean"])
        found, arrays = read(tmp_path / f"out{suffix}")
        assert found == expected
        assert len(arrays["z_mean"]) == len(names) + 1


def test_find_images_names_several_inputs_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "b", 2)
    make_images(tmp_path / "a", 1)
    monkeypatch.chdir(tmp_path)
    found = find_images(["b", "a", "./b/0001.png"])
    assert list(found.items()) == [(name, Path(name)) for name in ("a/0000.png", "b/0000.png", "b/0001.png")]
    assert list(find_images(["b"])) == ["0000.png", "0001.png"]
    for inputs, message in (
        ([], "no images given"),
        (["nowhere"], "nowhere: no such file"),
        ([tmp_path / "c"], "c: no such"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images(inputs)
