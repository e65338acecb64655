"""Training that starts from a model folder: at step 0 the networks compute exactly what the model does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigbigan import create_model, load
from bigbigan.cli import main
from bigbigan.layers import SpectralNorm, effective_state
from bigbigan.model import BigBiGAN
from bigbigan.presets import PRESETS
from bigbigan.schema import ConfigError
from bigbigan.training.config import TrainConfig
from bigbigan.training.export import inference_model
from bigbigan.training.finetuning import _left_vector, load_model
from bigbigan.training.step import TrainingState


def normalized(model: BigBiGAN, scale: float = 1.0) -> BigBiGAN:
    """The model with spectral norm `scale` in generator and discriminator, and norms that do something."""
    draws = torch.Generator().manual_seed(1)
    for network in (model.generator, model.discriminator):
        form = type(network)(network.config, spectral_norm=True)
        for name, layer in form.named_modules():
            if isinstance(layer, SpectralNorm):
                weight = network.get_submodule(name).weight  # not orthogonal, as trained ones are not
                weight.data.normal_(generator=draws)
                share = 0.7 if network.config.__dict__.get("shared_dim") and ("gain" in name or "offset" in name) else 1
                most = scale if len(weight) > 1 else min(scale, 1)  # the estimate for one row is exact
                weight.data *= share * most / torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
                if (bias := network.get_submodule(name).bias) is not None:
                    bias.data.normal_(0, 0.1, generator=draws)
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 2.0, generator=draws) if name.endswith("var") else buffer.normal_(generator=draws)
    return model


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("shared_dim", [0, 16])
@pytest.mark.parametrize("scale", [1.0, 1.01])  # 1.01: divided by an estimate below the exact value
def test_step_0_computes_the_model(shared_dim: int, scale: float) -> None:
    config = PRESETS["bigbigan-tiny"].config
    assert config.generator
    config = replace(config, generator=replace(config.generator, shared_dim=shared_dim))
    model = normalized(create_model(config, seed=3), scale)
    state = TrainingState(TrainConfig("tiny", config, total_images=8, batch_size=4))
    assert load_model(state, model) == []
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(5, config.z_dim, generator=draws)
    x = torch.rand(5, 3, config.encoder.resolution, config.encoder.resolution, generator=draws) * 2 - 1
    for networks in (state.networks, {**state.networks, **{name: ema.module for name, ema in state.ema.items()}}):
        g, e, d = (networks[name].eval() for name in ("generator", "encoder", "discriminator"))
        with torch.no_grad():
            assert difference(g(z), model.generator(z)) < 1e-5
            assert difference(e(x).avepool_feat, model.encoder(x).avepool_feat) < 1e-5
            mine, theirs = d(g(z), z), model.discriminator(model.generator(z), z)
            for score in ("score_x", "score_z", "score_xz"):
                assert difference(getattr(mine, score), getattr(theirs, score)) < 1e-5


def test_the_shared_form_gives_the_weights_back() -> None:
    config = PRESETS["bigbigan-tiny"].config
    assert config.generator
    config = replace(config, generator=replace(config.generator, shared_dim=16))
    model = normalized(create_model(config, seed=3))
    state = TrainingState(TrainConfig("tiny", config, total_images=8, batch_size=4))
    load_model(state, model)
    for name, value in effective_state(state.generator):
        assert torch.allclose(value, model.generator.state_dict()[name], atol=2e-6), name


def test_what_does_not_fit_is_refused() -> None:
    config = PRESETS["bigbigan-tiny"].config
    state = TrainingState(TrainConfig("tiny", config, total_images=8, batch_size=4))
    with pytest.raises(ConfigError, match=r"generator of .*has spectral norm 0\.9000"):
        load_model(state, normalized(create_model(config), 0.9))
    other = replace(config, encoder=replace(config.encoder, base_channels=12))
    with pytest.raises(ConfigError, match=r"encoder of .* is .*base_channels=12.*, of the run .*base_channels="):
        load_model(state, normalized(create_model(other)))
    partial = normalized(create_model(config))
    partial.discriminator = None
    assert load_model(state, partial) == ["discriminator"]


def test_the_embedded_model_is_fine_tuned_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{i}.png")
    run = tmp_path / "run"
    short = {"total_images": 4, "batch_size": 4, "standing_passes": 1, "probe_images": 0, "lr_g": 1e-9, "lr_d": 1e-9}
    command = ["train", "bigbigan-mnist-32", "--data", str(photos), "--run", str(run), "--quiet", "--device", "cpu"]
    command += [f"--set={key}={value}" for key, value in short.items()]
    assert main([*command, "--init", "bigbigan-fashion-mnist-32"]) == 0
    capsys.readouterr()
    trained, embedded = load(run / "snapshots" / "images-0000000004"), load()
    for part in ("generator", "encoder", "discriminator"):
        before = dict(getattr(embedded, part).named_parameters())
        for name, parameter in getattr(trained, part).named_parameters():
            assert torch.allclose(parameter, before[name], atol=1e-5), (part, name)
    assert json.loads((run / "config.json").read_text())["init"]["name"] == "bigbigan-fashion-mnist-32"
    assert main([*command, "--init", str(run / "snapshots" / "images-0000000004")]) == 2
    assert "init.generator was" in capsys.readouterr().err


def test_a_snapshot_of_step_0_is_the_model() -> None:
    model = load()
    config = TrainConfig("again", model.config, total_images=4, batch_size=4, standing_passes=1)
    state = TrainingState(config)
    load_model(state, model)
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    for name, parameter in inference_model(state, images).named_parameters():
        assert torch.allclose(parameter, dict(model.named_parameters())[name], atol=2e-6), name


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (24_576, 20)])
@pytest.mark.parametrize("norm", [1.0, 1.02])
def test_a_step_from_u_estimates_spectral_norm_one(shape: tuple[int, int], norm: float) -> None:
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 5, generator=draws, dtype=torch.float64))[0] for n in shape)
    weight = left @ torch.diag(torch.tensor([norm, 0.9, 0.6, 0.3, 0.1], dtype=torch.float64)) @ right.t()
    u = _left_vector(weight, "layer")
    v = torch.nn.functional.normalize(u @ weight, dim=1)
    assert u.shape == (1, shape[0]) and u.norm().item() == pytest.approx(1)
    assert (weight @ v.t()).norm().item() == pytest.approx(1, abs=1e-6)
