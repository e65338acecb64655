"""The model inside the package: offline, small, and as good as its card says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import bigbigan
from bigbigan.cli import main
from bigbigan.hub import resolve
from bigbigan.images import asset_images

SOCKETLESS = """
import sys
def refuse(event, args):
    if event.startswith("socket."):
        raise AssertionError(f"{event} {args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise AssertionError(f"{event} {args}")
import torch, bigbigan, numpy, PIL.Image
sys.addaudithook(refuse)
model = bigbigan.load()
print(model.reconstruct(model.generate(2, seed=0)).shape)
"""


def test_load_opens_no_socket_and_writes_nothing(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", SOCKETLESS], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "torch.Size([2, 1, 32, 32])" and not list(tmp_path.iterdir())


def test_weights_fit_the_wheel_and_name_their_origin() -> None:
    folder = resolve()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 12e6
    model = bigbigan.load()
    assert model.parts == ("generator", "encoder", "discriminator")
    assert model.info.name == "bigbigan-fashion-mnist-32" and model.info.license
    assert {"command", "hours"} <= set(model.info.provenance) and "seed" in model.info.provenance["training"]
    preprocess = model.config.preprocess
    assert (preprocess.size, preprocess.pad, preprocess.polarity, preprocess.filter) == (
        28,
        2,
        "light-on-dark",
        "bicubic",
    )


def test_reconstructions_resemble_their_originals() -> None:
    """Nearer, in the encoder's latents and in pixels, to their own original than to the other bundled pictures."""
    model = bigbigan.load()
    x = model.preprocess(asset_images())
    again = model.reconstruct(x)
    for a, b in ((x.flatten(1), again.flatten(1)), (model.encode(x).z_mean, model.encode(again).z_mean)):
        distances = torch.cdist(b, a)
        ranks = (distances < distances.diagonal()[:, None]).sum(1).float()
        assert ranks.mean() < 4, ranks  # chance: 15.5 of 31


def test_samples_have_the_statistics_of_garments() -> None:
    model = bigbigan.load(parts=("generator",))
    samples, real = model.generate(256, seed=1), bigbigan.load(parts=("encoder",)).preprocess(asset_images())
    assert samples.mean().item() == pytest.approx(real.mean().item(), abs=0.15)
    assert samples[:, :, :2].mean() < -0.98 and samples[:, :, :, -2:].mean() < -0.98  # the black padding
    assert samples.flatten(1).std(dim=0).mean() > 0.3  # they differ from each other


def test_colour_photo_is_converted_with_a_warning() -> None:
    model = bigbigan.load(parts=("encoder",))
    photo = Image.new("RGB", (60, 40), (200, 30, 90))
    with pytest.warns(UserWarning, match="grey"):
        assert model.encode(photo).avepool_feat.shape == (1, model.encoder.num_features)


def test_config_is_the_presets() -> None:
    document = json.loads((resolve() / "config.json").read_text())
    assert set(document["files"]) == {"generator", "encoder", "discriminator"}
    assert bigbigan.load().config == bigbigan.presets.PRESETS["bigbigan-fashion-mnist-32"].config


def test_a_folder_of_colour_photos_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 30, 90)).save(tmp_path / f"{i}.png")
    arguments = ["encode", str(tmp_path), "-o", str(tmp_path / "out.npz"), "--batch-size", "1"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("trained on grey images") == 1
