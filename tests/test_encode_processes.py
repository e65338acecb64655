"""Feature files do not depend on how many processes read images, or encode them."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_features import make_images, read

from bigbigan import BigBiGAN, create_model
from bigbigan.cli import main
from bigbigan.evaluation import encoding
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.evaluation.features import OUTPUTS


@pytest.fixture(scope="module")
def model() -> BigBiGAN:
    return create_model("bigbigan-tiny", parts=("encoder",), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_workers_change_nothing(tmp_path: Path, model: BigBiGAN, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    paths = make_images(tmp_path / "in", 50)
    paths[20].write_bytes(b"bad")
    files = find_images([tmp_path / "in"])
    for workers in (0, 3):
        report = encode_files(model, files, tmp_path / f"{workers}.npz", workers=workers)
        assert (report.done, [name for name, _ in report.failed]) == (49, ["0020.png"])
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()
    expected = model.encode([path for path in paths if path != paths[20]], seed=0)
    assert np.array_equal(read(tmp_path / "0.npz")[1]["z_sample"], expected.z_sample.float().numpy())


def test_a_killed_worker_is_an_error_that_loses_nothing(
    tmp_path: Path, model: BigBiGAN, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "in", 40)
    model.save(tmp_path / "model")
    command = ["encode", f"{tmp_path}/in", "--model", f"{tmp_path}/model", "-o", f"{tmp_path}/out.npz"]
    command += ["--batch-size", "4", "--threads", "1"]
    inner = encoding._read

    def killed(*arguments: Any) -> Any:
        if arguments[-1].name == "0035.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)

    monkeypatch.setattr(encoding, "PIECE_ROWS", 8)
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "_read", killed)
        assert main([*command, "--workers", "1"]) == 2
    assert "DataLoader worker" in capsys.readouterr().err
    assert main(command) == 0
    assert "resuming from" in capsys.readouterr().err
    assert len(read(tmp_path / "out.npz")[0]) == 40


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_share_the_work(tmp_path: Path, model: BigBiGAN, processes: int) -> None:
    make_images(tmp_path / "in", 23)
    for index in (0, 11, 22):
        (tmp_path / f"in/{index:04d}.png").write_bytes(b"bad")
    model.save(tmp_path / "model")
    encode = ["encode", "in", "--model", "model", "--batch-size", "4", "--threads", "1", "--workers", "0", "-o"]
    package = str(Path(encoding.__file__).parents[2])
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": package}, "stderr": subprocess.PIPE}
    alone = subprocess.run([sys.executable, "-m", "bigbigan", *encode, "alone.npz"], **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    shared = subprocess.run([*torchrun, "-m", "bigbigan", *encode, "shared.npz"], **options)
    assert alone.returncode == 1, alone.stderr
    assert shared.stderr.count(b"20 of 23 images in shared.npz") == 1, shared.stderr
    (names, one), (others, many) = read(tmp_path / "alone.npz"), read(tmp_path / "shared.npz")
    assert names == others and len(names) == 20
    for name in OUTPUTS:
        assert np.abs(many[name] - one[name]).max() <= 1e-6 * np.abs(one[name]).max()
    failures = [(tmp_path / f"{name}.npz.failures.jsonl").read_bytes() for name in ("alone", "shared")]
    assert failures[0] == failures[1]
    assert not (tmp_path / "shared.npz.partial").exists()
