"""BiGAN's fully connected networks against plain formulas in NumPy, and as a model from folder to card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Weights, close, random_images, random_normal, randomize
from torch import nn

from bigbigan import Encoder, Generator, WeightsError, create_model, load
from bigbigan.config import BigBiGANConfig, MLPDiscriminatorConfig, MLPEncoderConfig, MLPGeneratorConfig
from bigbigan.config import PreprocessConfig as Preprocess
from bigbigan.factory import load_folder
from bigbigan.layers import StandingStatistics, effective_state
from bigbigan.mlp import Linear, MLPDiscriminator, MLPEncoder, MLPGenerator
from bigbigan.modelcard import model_card
from bigbigan.modelfolder import read_config
from bigbigan.onednn import trains_linear

# Epsilons and slopes far from the defaults, so that one in the wrong place shows.
SMALL: dict[str, Any] = {"resolution": 4, "image_channels": 2, "width": 7, "z_dim": 3, "bn_eps": 0.1}
GENERATOR = MLPGeneratorConfig(**SMALL)
ENCODER = MLPEncoderConfig(**SMALL, negative_slope=0.3, feature_norm_eps=0.07)
DISCRIMINATOR = MLPDiscriminatorConfig(**SMALL, negative_slope=0.4)
MODEL = BigBiGANConfig(GENERATOR, ENCODER, DISCRIMINATOR, Preprocess(4))
MODES = [(False, 1), (False, 3), (True, 3), (True, 5)]  # batch statistics or not, size of the batch


def norm(x: np.ndarray, w: Weights, eps: float, batch_statistics: bool) -> np.ndarray:
    if batch_statistics:
        return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + eps)
    return (x - w["running_mean"]) / np.sqrt(w["running_var"] + eps)


def leaky(x: np.ndarray, slope: float) -> np.ndarray:
    return np.where(x > 0, x, slope * x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def unit_interval(x: torch.Tensor) -> np.ndarray:
    return ((x.numpy() + 1) / 2).reshape(len(x), -1)


def check_all_weights_were_read(w: Weights, batch_statistics: bool) -> None:
    assert {name.rpartition(".")[2] for name in w.unused()} == (
        {"running_mean", "running_var"} if batch_statistics else set()
    )
    assert not any("bias" in name for name in w.state)


@pytest.mark.parametrize(("train", "n"), MODES)
def test_generator(train: bool, n: int) -> None:
    network = randomize(MLPGenerator(GENERATOR)).train(train)
    w, z = Weights(network.state_dict()), random_normal(n, 3)
    h = norm(z.numpy() @ w["hidden.linear1.weight"].T, w.at("hidden.norm1"), 0.1, train)
    h = np.maximum(h, 0) @ w["hidden.linear2.weight"].T + z.numpy() @ w["hidden.linear_z.weight"].T
    h = np.maximum(norm(h, w.at("hidden.norm2"), 0.1, train), 0)
    expected = (2 * sigmoid(h @ w["image.weight"].T) - 1).reshape(n, 2, 4, 4)
    images = network(z)
    close(images, torch.from_numpy(expected))
    assert network.upsample(images) is images and GENERATOR.upsample_size == 4
    check_all_weights_were_read(w, train)


@pytest.mark.parametrize(("train", "n"), MODES)
def test_encoder(train: bool, n: int) -> None:
    network = randomize(MLPEncoder(ENCODER)).train(train)
    w, x = Weights(network.state_dict()), random_images(n, 2, 4, 4)
    h = leaky(unit_interval(x) @ w["hidden.linear1.weight"].T, 0.3) @ w["hidden.linear2.weight"].T
    features = leaky(norm(h, w.at("hidden.norm2"), 0.1, train), 0.3)
    h = norm(features, w.at("feature_norm"), 0.07, train)
    out = network(x, random_normal(n, 3))
    close(out.z_mean, torch.from_numpy(2 * sigmoid(features @ w["latent.weight"].T) - 1))
    close(out.avepool_feat, torch.from_numpy(features))
    close(out.bn_crelu_feat, torch.from_numpy(np.concatenate([np.maximum(h, 0), np.maximum(-h, 0)], axis=1)))
    assert torch.equal(out.z_sample, out.z_mean) and not out.z_stdev.any() and network.num_features == 7
    check_all_weights_were_read(w, train)


@pytest.mark.parametrize(("train", "n"), MODES)
def test_discriminator(train: bool, n: int) -> None:
    network = randomize(MLPDiscriminator(DISCRIMINATOR)).train(train)
    w, x, z = Weights(network.state_dict()), random_images(n, 2, 4, 4), random_normal(n, 3)
    h = leaky(unit_interval(x) @ w["hidden.linear1.weight"].T, 0.4)
    h = h @ w["hidden.linear2.weight"].T + z.numpy() @ w["hidden.linear_z.weight"].T
    h = leaky(norm(h, w.at("hidden.norm2"), 0.1, train), 0.4)
    out = network(x, z)
    close(out.score_xz, torch.from_numpy(h @ w["score_xz.weight"].T)[:, 0])
    assert out.score_x is None and out.score_z is None and out.rotation is None and len(out.present()) == 1
    check_all_weights_were_read(w, train)


def test_defaults_are_the_layers_of_bigans_mnist_run() -> None:
    model = create_model("bigan-mnist-mlp")
    weights = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in model.parts}
    assert weights == {
        "generator": 50 * 1024 + 1024 * 1024 + 50 * 1024 + 1024 * 784,
        "encoder": 784 * 1024 + 1024 * 1024 + 1024 * 50,
        "discriminator": 784 * 1024 + 1024 * 1024 + 50 * 1024 + 1024,
    }
    slopes = [getattr(model, name).hidden.negative_slope for name in model.parts]
    norms = [m.eps for name in model.parts for m in getattr(model, name).hidden.modules() if hasattr(m, "running_var")]
    assert slopes == [0.0, 0.2, 0.2] and norms == [1e-8] * 4
    assert model.config.generator.prior == "uniform" and model.sample_latents(500, seed=0).abs().max() <= 1
    assert model.config.preprocess == Preprocess(28, polarity="light-on-dark")


@pytest.mark.parametrize(
    ("network", "config"),
    [(MLPGenerator, GENERATOR), (MLPEncoder, ENCODER), (MLPDiscriminator, DISCRIMINATOR)],
    ids=["G", "E", "D"],
)
def test_training_form_is_the_inference_form(network: type[nn.Module], config: Any) -> None:
    training = randomize(network(config, spectral_norm=True))
    state = dict(effective_state(training))
    assert training.state_dict().keys() == state.keys()
    plain = network(config).double()
    plain.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), training.parameters(), strict=True))


def test_standing_statistics_give_evaluation_the_numbers_of_training() -> None:
    network = randomize(MLPEncoder(ENCODER))
    x = random_images(5, 2, 4, 4)
    with StandingStatistics(network) as statistics:
        statistics(x)
    close(network.eval()(x).z_mean, network.train()(x).z_mean)
    close(network.eval()(x).bn_crelu_feat, network.train()(x).bn_crelu_feat)


def test_gradients_reach_every_weight() -> None:
    networks = [randomize(n) for n in (MLPGenerator(GENERATOR), MLPEncoder(ENCODER), MLPDiscriminator(DISCRIMINATOR))]
    generator, encoder, discriminator = networks
    x = generator(random_normal(5, 3))
    discriminator(x, encoder(x).z_sample).score_xz.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n in networks for p in n.parameters())


@pytest.mark.parametrize("n", [1, 5])
def test_linear_layers_are_trained_by_kernels_that_give_the_same(n: int) -> None:
    layer = randomize(Linear(4, 3)).float()
    x = random_normal(n, 4).float().requires_grad_()
    out = layer(x)
    assert (out.grad_fn.name() == "_TrainedLinearBackward") == trains_linear()
    weights = random_normal(n, 3).float()
    found = torch.autograd.grad((out * weights).sum(), (x, layer.weight))
    close(out, nn.functional.linear(x, layer.weight), 1e-6)
    close(found[0], weights @ layer.weight, 1e-6)
    close(found[1], weights.t() @ x, 1e-6)


def test_linear_layers_are_plain_where_kernels_do_not_apply() -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(layer.double()(x.double()), nn.functional.linear(x.double(), layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    assert layer(x.expand(2, 5, 4)).shape == (2, 5, 3)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x.double())
    with torch.no_grad():
        assert layer(x).grad_fn is None
    jacobian = torch.func.jacrev(layer.eval())(x[0])
    assert torch.allclose(jacobian, layer.weight)


def test_initial_weights_of_its_authors() -> None:
    model = create_model("bigan-mnist-mlp", seed=1, initializer="normal")
    score = model.discriminator.score_xz.weight
    weights = torch.cat([p.flatten() for n in model.parts for p in getattr(model, n).parameters() if p is not score])
    assert score.abs().max() == 0 and weights.std().item() == pytest.approx(0.02, rel=1e-2)
    with pytest.raises(ValueError, match="no initializer 'orthognal'; there is orthogonal, normal"):
        create_model("bigan-mnist-mlp", initializer="orthognal")  # type: ignore[arg-type]


# ---- as a model ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_model(MODEL, seed=3).save(tmp_path / "bigan")
    return tmp_path / "bigan"


def test_folder_round_trip(folder: Path) -> None:
    model, again = create_model(MODEL, seed=3), load(folder)
    assert read_config(folder).config == again.config == MODEL
    x = random_images(3, 2, 4, 4).float()
    assert torch.equal(again.generate(3, seed=1, upsample=True), model.generate(3, seed=1))
    out = again.encode(x, batch_size=2)
    close(out.z_mean, model.encode(x).z_mean, 1e-6)
    close(again.reconstruct(x), again.generate(out.z_mean), 1e-5)
    assert again.discriminate(x, out.z_mean).score_xz.shape == (3,)
    assert isinstance(load_folder(folder, parts=("encoder",)).encoder, MLPEncoder)


def test_another_models_weights_are_refused(folder: Path) -> None:
    wide = dataclasses.replace(GENERATOR, width=8)
    create_model(dataclasses.replace(MODEL, generator=wide)).save(folder.with_name("wide"))
    (folder.with_name("wide") / "generator.safetensors").replace(folder / "generator.safetensors")
    with pytest.raises(WeightsError, match=r"written with width 8, config\.json says 7"):
        load(folder)


def test_each_kind_of_network_loads_its_own_kind(folder: Path) -> None:
    assert isinstance(MLPGenerator.from_pretrained(folder), MLPGenerator)
    assert isinstance(MLPEncoder.from_pretrained(folder), MLPEncoder)
    with pytest.raises(ValueError, match=r"is of class MLPGenerator: call MLPGenerator\.from_pretrained"):
        Generator.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"encoder of this model is of class Encoder: call Encoder\.from_pretrained"):
        MLPEncoder.from_pretrained()
    assert isinstance(Encoder.from_pretrained(), Encoder)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bigan-mnist-mlp", "BiGAN (generator, encoder, discriminator)"),
        ("bigan-fashion-mnist-32", "BiGAN (generator, encoder, discriminator)"),
        ("biggan-fashion-mnist-32", "BigGAN (generator, discriminator)"),
        ("ssgan-fashion-mnist-32", "SS-GAN (generator, discriminator)"),
        ("bigbigan-mnist-32", "BigBiGAN (generator, encoder, discriminator)"),
    ],
)
def test_card_names_the_method(name: str, method: str) -> None:
    model = create_model(name)
    card = model_card(model.config, model.info, model.plain_states())
    assert f"\n{method} for the Python package" in card and f"\n# {name}\n" in card


def test_architecture_field_decides_which_networks_a_file_means(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    assert document["architecture"]["generator"]["architecture"] == "mlp"
    document["architecture"]["encoder"]["architecture"] = "transformer"
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="encoder.architecture is 'transformer'; expected 'resnet', 'revnet', 'mlp'"):
        load(folder)
