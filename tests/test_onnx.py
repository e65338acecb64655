"""Parts as torch.export programs and ONNX files, run by ONNX Runtime as a user would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.config import BigBiGANConfig, PreprocessConfig
from bigbigan.model import BigBiGAN
from bigbigan.onnx import export_onnx, export_program, part_inputs
from bigbigan.presets import PRESETS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def tiny(model: str | BigBiGANConfig = "bigbigan-tiny") -> BigBiGAN:
    made, draws = create_model(model, seed=2), torch.Generator().manual_seed(0)
    for key, buffer in made.named_buffers():
        buffer.uniform_(0.5, 2.0, generator=draws) if key.endswith("var") else buffer.normal_(generator=draws)
    return made


def run(path: Path, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))


def assert_close(found: np.ndarray, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted.numpy()).max() <= 1e-5 * wanted.abs().max().item()


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_files_compute_what_the_model_does_at_any_batch_size(
    tmp_path_factory: pytest.TempPathFactory, number: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "onnx"
    model = tiny()
    if not folder.exists():
        assert [report.part for report in export_onnx(model, folder)] == ["generator", "encoder", "discriminator"]
    images = model.generate(number, seed=1)
    assert_close(run(folder / "generator.onnx", z=model.sample_latents(number, seed=1))["images"], images)
    noise = torch.randn(number, model.config.z_dim, generator=torch.Generator().manual_seed(5))
    features, found = model.encode(images, noise=noise), run(folder / "encoder.onnx", x=images, noise=noise)
    assert list(found) == list(features.keys())
    for name in found:
        assert_close(found[name], features[name])
    assert np.abs(found["z_sample"] - found["z_mean"]).max() > 0.01
    scores = run(folder / "discriminator.onnx", x=images, z=noise)
    for name, score in scores.items():
        assert_close(score, getattr(model.discriminate(images, noise), name))
    assert list(scores) == ["score_x", "score_z", "score_xz"]


def test_a_deterministic_encoder_takes_no_noise(tmp_path: Path) -> None:
    (report,) = export_onnx(tiny("bigan-mnist-mlp"), tmp_path, parts=("encoder",))
    assert (report.inputs, report.outputs["bn_crelu_feat"]) == ({"x": ["N", 1, 28, 28]}, ["N", 2048])
    assert list(report.outputs) == ["z_sample", "z_mean", "z_stdev", "avepool_feat", "bn_crelu_feat"]


def test_zeros_around_the_stem_count(tmp_path: Path) -> None:
    """As they do not where ONNX Runtime merges their padding into the max-pool."""
    config = PRESETS["bigbigan-resnet50"].config
    encoder = replace(config.encoder, base_channels=4, resolution=64)
    alone = replace(config, encoder=encoder, generator=None, discriminator=None, preprocess=PreprocessConfig(64))
    model = tiny(alone)
    model.encoder.trunk.stem[0].conv.weight.data.sub_(1.0)  # the stem's outputs are negative, so zeros win
    export_onnx(model, tmp_path)
    x, noise = torch.ones(2, 3, 64, 64), torch.zeros(2, config.z_dim)
    found = run(tmp_path / "encoder.onnx", x=x, noise=noise)
    assert_close(found["avepool_feat"], model.encode(x, noise=noise).avepool_feat)


@pytest.mark.parametrize("part", ["generator", "encoder", "discriminator"])
def test_programs_take_any_batch_size(part: str) -> None:
    model = tiny()
    program = export_program(model, part).module()
    for number in (1, 5):
        inputs = part_inputs(model, part, number)
        out = model.part(part)(*inputs.values())
        wanted = (
            [out]
            if part == "generator"
            else [getattr(out, name) for name in vars(out) if getattr(out, name) is not None]
        )
        for found, tensor in zip(program(*inputs.values()), wanted, strict=True):
            assert torch.allclose(found, tensor, atol=1e-6)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    export_onnx(model, tmp_path, parts=["generator"])
    before = (tmp_path / "generator.onnx").read_bytes()
    monkeypatch.setattr("bigbigan.onnx._difference", lambda *_: 2e-4)
    with pytest.raises(ValueError, match=r"generator in ONNX Runtime differs from the model by 2\.0e-04"):
        export_onnx(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["generator.onnx"]
    assert (tmp_path / "generator.onnx").read_bytes() == before


def test_export_onnx_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    assert main(["export-onnx", "-o", str(tmp_path), "--parts", "encoder"]) == 0
    captured = capsys.readouterr()
    assert "noise[N,16]" in captured.out and "avepool_feat[N,256]" in captured.out and not captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "encoder.onnx").metadata_props}
    assert json.loads(properties["preprocess"])["size"] == 28 and properties["model"] == "bigbigan-fashion-mnist-32"
    images = load().generate(2, seed=0)
    noise = torch.zeros(2, 16)
    assert_close(run(tmp_path / "encoder.onnx", x=images, noise=noise)["z_sample"], load().encode(images).z_mean)
    assert main(["export-onnx", "-o", str(tmp_path), "--parts", "decoder"]) == 2
    assert "unknown part 'decoder'" in capsys.readouterr().err


def test_compile_reaches_every_network() -> None:
    model = tiny()
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    before = model.generate(2, seed=0)
    model.compile(backend=backend)
    assert torch.equal(model.generate(2, seed=0), before) and len(seen) == 1
    model.encode(before, seed=0)
    assert len(seen) == 2
