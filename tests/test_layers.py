"""Layers against formulas in NumPy: spectral norm, batch norms, fused resampling, attention, residual MLP."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import Weights, close, nchw, nhwc, random_normal, randomize
from torch import nn

from bigbigan.config import DiscriminatorConfig, EncoderConfig, GeneratorConfig, MLPConfig
from bigbigan.discriminator import Discriminator
from bigbigan.encoder import Encoder
from bigbigan.generator import Generator
from bigbigan.layers import (
    BatchNorm,
    ConditionalNormReLU,
    DownsampleConv2d,
    Layers,
    NormReLU,
    ResidualMLP,
    SelfAttention,
    SpectralNormConv2d,
    SpectralNormLinear,
    StandingStatistics,
    UpsampleConv2d,
    advance_spectral_norm,
    effective_state,
    initialize,
)

TRAINING, PLAIN = Layers(spectral_norm=True), Layers()


def tiny_generator(spectral_norm: bool, shared_dim: int = 3) -> Generator:
    config = GeneratorConfig(32, 3, 4, (5, 3, 4, 2), shared_dim=shared_dim, attention_resolution=16, upsample_size=32)
    return Generator(config, spectral_norm=spectral_norm)


def biggan_iteration(layer: nn.Module) -> tuple[float, np.ndarray, np.ndarray]:
    """sigma, u and v of one power iteration, as BigGAN has it: one stored u, eps 1e-4 under each norm."""
    matrix = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
    v = layer.u.numpy() @ matrix
    v = v / max(np.linalg.norm(v), 1e-4)
    u = v @ matrix.T
    u = u / max(np.linalg.norm(u), 1e-4)
    return float((u @ matrix @ v.T).item()), u, v


def spectral_layers() -> list[nn.Module]:
    layers = [SpectralNormConv2d(3, 5, 3, 1, 1), SpectralNormLinear(7, 4), SpectralNormLinear(2, 1, bias=False)]
    return [randomize(layer, seed) for seed, layer in enumerate(layers)]


# ---- spectral norm ----


@pytest.mark.parametrize("layer", spectral_layers(), ids=["conv", "linear", "one-output"])
def test_spectral_norm_divides_by_one_power_iteration(layer: nn.Module) -> None:
    sigma, u, _ = biggan_iteration(layer)
    estimate, next_u = layer.power_iteration()
    close(estimate, sigma)
    close(next_u, u)
    x = random_normal(3, 3, 5, 4) if layer.weight.ndim == 4 else random_normal(3, layer.in_features)
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    plain = nn.functional.conv2d(x, layer.weight, padding=1) if x.ndim == 4 else x @ layer.weight.t()
    close(layer(x), (plain / sigma + bias).detach(), 1e-9)


def test_power_iteration_bounds_the_norm_of_tiny_vectors_by_eps() -> None:
    layer = SpectralNormLinear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1e-5, 1e-6], dtype=torch.float64)))
        layer.u.copy_(torch.tensor([[1.0, 0.0]]))
    # v = 1e-5 / 1e-4 = 0.1; W v = 1e-6; u = 1e-6 / 1e-4 = 0.01; sigma = u W v = 1e-8.
    close(layer.power_iteration()[0], 1e-8, 1e-15)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_forward_pass_changes_no_state(mode: bool) -> None:
    generator = randomize(tiny_generator(True)).train(mode)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator(random_normal(3, 14)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


def test_advance_stores_exactly_one_iteration_in_every_layer() -> None:
    generator = randomize(tiny_generator(True))
    layers = [m for m in generator.modules() if isinstance(m, SpectralNormConv2d | SpectralNormLinear)]
    assert len(layers) == 1 + 3 * (4 + 3) + 4 + 1  # seed; gains, offsets and convolutions; attention; output
    for _ in range(2):
        expected = [biggan_iteration(layer)[1] for layer in layers]
        weights = [layer.weight.clone() for layer in layers]
        advance_spectral_norm(generator)
        for layer, u, weight in zip(layers, expected, weights, strict=True):
            close(layer.u, u)
            assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("layer", spectral_layers(), ids=["conv", "linear", "one-output"])
def test_gradient_takes_u_and_v_as_constants(layer: nn.Module) -> None:
    upstream = random_normal(*layer.weight.shape, seed=9)
    layer.zero_grad()
    (layer.normalized_weight() * upstream).sum().backward()
    sigma, u, v = biggan_iteration(layer)
    normalized = layer.weight.detach().numpy() / sigma
    grad = (upstream.numpy() - (upstream.numpy() * normalized).sum() * (u.T @ v).reshape(normalized.shape)) / sigma
    close(layer.weight.grad, grad)


@pytest.mark.parametrize("layer", spectral_layers(), ids=["conv", "linear", "one-output"])
def test_effective_weight_has_spectral_norm_one_and_is_where_iterations_lead(layer: nn.Module) -> None:
    effective = layer.effective_weight()
    close(torch.linalg.svdvals(effective.flatten(1))[0], torch.tensor(1.0, dtype=torch.float64))
    for _ in range(400):
        advance_spectral_norm(layer)
    close(layer.normalized_weight(), effective)


# ---- resampling fused with a convolution ----


@pytest.mark.parametrize("factory", [PLAIN, TRAINING], ids=["plain", "spectral-norm"])
@pytest.mark.parametrize("leaf", [UpsampleConv2d, DownsampleConv2d])
def test_resampling_convolutions_train_as_they_evaluate(leaf: Any, factory: Layers) -> None:
    layer = randomize(leaf(factory, 3, 5))
    x = random_normal(3, 3, 6, 4).requires_grad_()
    results = []
    for mode in (True, False):
        out = layer.train(mode)(x)
        (out * random_normal(*out.shape, seed=5)).sum().backward()
        results.append([out.detach(), x.grad, layer.conv.weight.grad, layer.conv.bias.grad])
        x.grad = layer.conv.weight.grad = layer.conv.bias.grad = None
    for train, evaluation in zip(*results, strict=True):
        close(train, evaluation, 1e-12)


def test_resampling_convolutions_against_nearest_repeats_and_block_means() -> None:
    x = random_normal(3, 3, 6, 4)
    up, down = randomize(UpsampleConv2d(PLAIN, 3, 5)), randomize(DownsampleConv2d(PLAIN, 3, 5))
    repeated = nhwc(x).repeat(2, axis=1).repeat(2, axis=2)
    close(up(x), nchw(reference.conv2d(repeated, Weights(up.state_dict()).at("conv"))))
    convolved = reference.conv2d(nhwc(x), Weights(down.state_dict()).at("conv"))
    close(down(x), nchw(reference.mean_pool(convolved)))


# ---- batch norm ----


def test_batch_norm_trains_on_the_batch_and_evaluates_on_its_statistics() -> None:
    norm = randomize(BatchNorm(4, eps=0.1))
    x = random_normal(3, 4, 5, 2) * 2 + 1
    rows = nhwc(x).reshape(-1, 4)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    batch = (nhwc(x) - rows.mean(0)) / np.sqrt(rows.var(0) + 0.1) * weight + bias  # np.var divides by N
    close(norm.train()(x), nchw(batch))
    stored = (nhwc(x) - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + 0.1) * weight + bias
    close(norm.eval()(x), nchw(stored))


def test_norm_relu_and_one_dimensional_input() -> None:
    norm = randomize(NormReLU(4, eps=0.1, affine=False))
    assert norm.weight is None and norm.bias is None
    x = random_normal(3, 4)
    original = x.clone()
    close(norm.eval()(x), reference.relu(reference.batch_norm(x.numpy(), Weights(norm.state_dict()), 0.1)))
    close(norm.train()(x), reference.relu(reference.batch_norm(x.numpy(), Weights({}), 0.1, True)))
    assert torch.equal(x, original)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared_dim", [0, 2])
def test_conditional_norm_has_gain_one_plus_linear_and_reads_the_chunk_before_the_shared_vector(
    mode: bool, shared_dim: int
) -> None:
    layer = randomize(ConditionalNormReLU(PLAIN, 4, 3, shared_dim, 1e-2)).train(mode)
    x, z, shared = random_normal(3, 4, 2, 5), random_normal(3, 3), random_normal(2, seed=4)
    weights, rows = Weights(layer.state_dict()), np.tile(shared.numpy(), (3, 1))
    condition = np.concatenate([z.numpy(), rows], axis=1) if shared_dim else z.numpy()
    expected = reference.conditional_norm(nhwc(x), condition, weights, 1e-2, mode)
    close(layer(x, z, shared if shared_dim else None), nchw(reference.relu(expected)))
    if mode is False:
        assert not weights.unused()


# ---- standing statistics ----


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = BatchNorm(2, 1e-3)
        self.flat = BatchNorm(2, 1e-3)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(self.first(x)[:, :, 0, 0])


def test_standing_statistics_average_means_and_variances_over_passes() -> None:
    module = TwoNorms().double().eval()
    module.flat.train()
    # One channel is 1, 3 (mean 2, variance 1) and then 0, 6, 6 (mean 4, variance 8); the other its negative.
    passes = [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 6.0, 6.0])]
    with StandingStatistics(module) as statistics:
        assert module.training and module.first.training and module.frozen.training
        for values in passes:
            channel = values.double()[:, None, None, None].expand(-1, 1, 1, 2)
            statistics(torch.cat([channel, -channel], dim=1))
    close(module.first.running_mean, torch.tensor([3.0, -3.0], dtype=torch.float64))
    close(module.first.running_var, torch.tensor([4.5, 4.5], dtype=torch.float64))
    # The 1-D norm sees what the first made of each batch: mean 0 and variance v / (v + 0.001).
    close(module.flat.running_mean, torch.zeros(2, dtype=torch.float64), 1e-7)
    close(module.flat.running_var, torch.full((2,), (1 / 1.001 + 8 / 8.001) / 2, dtype=torch.float64), 1e-7)
    assert not module.training and not module.first.training and not module.frozen.training
    assert module.flat.training  # as it was
    assert module.first.accumulator is None


def test_standing_statistics_keep_the_precision_of_their_input() -> None:
    norm, x = BatchNorm(3, 1e-3).double(), random_normal(5, 3, 4, 4) + 100
    with StandingStatistics(norm) as statistics:
        statistics(x)
    close(norm.running_mean, nhwc(x).reshape(-1, 3).mean(0), 1e-12)
    close(norm.running_var, nhwc(x).reshape(-1, 3).var(0), 1e-12)


def test_standing_statistics_write_nothing_on_an_error_or_without_a_pass() -> None:
    module = randomize(TwoNorms()).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), StandingStatistics(module) as statistics:
        statistics(random_normal(3, 2, 4, 4))
        raise ZeroDivisionError
    with StandingStatistics(module):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(m.training for m in module.modules())
    assert module.first.accumulator is None and module.flat.accumulator is None


def test_standing_statistics_reach_every_norm_of_encoder_and_generator() -> None:
    head = MLPConfig(8, 2, norm="batch")
    encoder = randomize(Encoder(EncoderConfig(32, depths=(1, 1), base_channels=4, z_dim=4, head=head))).eval()
    generator = randomize(tiny_generator(True)).eval()
    for module, batch in ((encoder, random_normal(3, 3, 32, 32)), (generator, random_normal(3, 14))):
        before = {name: t.clone() for name, t in module.named_buffers() if "running" in name}
        with StandingStatistics(module) as statistics:
            statistics(batch)
        after = dict(module.named_buffers())
        assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
        # Over one pass, evaluation on that batch is what training computed on it.
        outputs = [module.train(mode)(batch) for mode in (True, False)]
        if module is encoder:
            assert "feature_norm.running_mean" in before and "head.0.norm2.running_var" in before
            outputs = [out.bn_crelu_feat for out in outputs]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


# ---- attention, residual MLP ----


def test_attention_against_einsum_and_softmax() -> None:
    layer = randomize(SelfAttention(PLAIN, 16))
    x = 2 * random_normal(3, 16, 6, 4)
    weights = Weights(layer.state_dict())
    expected = nchw(reference.attention(nhwc(x), weights))
    close(layer(x), expected)
    assert not weights.unused() and (expected - x).abs().mean() > 0.1
    with torch.no_grad():
        layer.gamma.zero_()
    assert torch.equal(layer(x), x)


MLP_VARIANTS = {
    "activation": ("relu", "leaky_relu"),
    "order": ("pre", "post"),
    "first_activation": (False, True),
    "last_activation": (False, True),
    "projection": ("auto", "always", "never"),
    "norm": ("none", "batch"),
    "bias": (True, False),
}


@pytest.mark.parametrize("inputs", [5, 6], ids=["widths-differ", "widths-agree"])
def test_residual_mlp_with_every_pair_of_its_fields(inputs: int) -> None:
    x = random_normal(3, inputs)
    for values in list(itertools.product(*MLP_VARIANTS.values()))[::7]:  # holds every pair of values
        config = MLPConfig(6, 4, **dict(zip(MLP_VARIANTS, values, strict=True)))
        layer = randomize(ResidualMLP(PLAIN, config, inputs, 0.01))
        weights = Weights(layer.state_dict())
        close(layer.eval()(x), reference.residual_mlp(x.numpy(), weights, config, 0.01))
        assert not weights.unused(), config
        assert layer.state_dict().keys() & {"0.linear1.bias"} == ({"0.linear1.bias"} if config.bias else set())
        close(layer.train()(x), reference.residual_mlp(x.numpy(), weights, config, 0.01, True))


def test_residual_mlp_has_two_layers_a_block() -> None:
    for layers in (2, 4, 8):
        mlp = ResidualMLP(PLAIN, MLPConfig(6, layers, projection="never"), 5)
        assert sum(isinstance(m, nn.Linear) for m in mlp.modules()) == layers


# ---- initialisation ----

MLP = MLPConfig(8, 4, norm="batch")
NETWORKS = {
    "generator": tiny_generator,
    "encoder": lambda sn: Encoder(
        EncoderConfig(32, depths=(1, 1), base_channels=4, z_dim=4, head=MLP), spectral_norm=sn
    ),
    "discriminator": lambda sn: Discriminator(
        DiscriminatorConfig(32, 3, 4, 14, attention_resolution=8, z_mlp=MLP, joint_mlp=MLP),
        spectral_norm=sn,
    ),
}


@pytest.mark.parametrize("spectral_norm", [False, True], ids=["plain", "spectral-norm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_initialize_sets_every_tensor_from_its_generator_alone(name: str, spectral_norm: bool) -> None:
    global_state = torch.random.get_rng_state()
    states = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            network = NETWORKS[name](spectral_norm)
        network.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.fill_(float("nan"))
        initialize(network, torch.Generator().manual_seed(seed))
        states.append(network.state_dict())
    assert all(tensor.isfinite().all() for tensor in states[0].values())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert torch.equal(torch.random.get_rng_state(), global_state)
    for key, tensor in states[0].items():
        if key.endswith("weight") and tensor.ndim > 1:
            matrix = tensor.flatten(1) if len(tensor) <= tensor[0].numel() else tensor.flatten(1).t()
            close(matrix @ matrix.t(), torch.eye(len(matrix)), 1e-5)
        elif key.endswith(("bias", "running_mean", "gamma")):
            assert not tensor.any(), key
        elif key.endswith(("running_var", "weight")):
            assert (tensor == 1).all(), key
        elif key == "shared":
            close(tensor.norm(), torch.tensor(1.0), 1e-5)
        else:
            assert key.endswith(".u"), key


# ---- from the training form to the inference form ----


@pytest.mark.parametrize("shared_dim", [0, 3])
def test_effective_state_is_the_training_form_with_exact_sigma(shared_dim: int) -> None:
    generator = randomize(tiny_generator(True, shared_dim)).eval()
    plain = tiny_generator(False, shared_dim).double().eval()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    plain.load_state_dict(dict(effective_state(generator)), strict=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())
    for layer in generator.modules():
        if isinstance(layer, SpectralNormConv2d | SpectralNormLinear):
            layer.u.copy_(torch.linalg.svd(layer.weight.detach().flatten(1)).U[None, :, 0])  # where iterations lead
    advance_spectral_norm(generator)
    z = random_normal(3, 14)
    for mode in (True, False):
        close(generator.train(mode)(z), plain.train(mode)(z))
    assert generator(z).std() > 0.1  # far from a constant


@pytest.mark.parametrize("name", ["encoder", "discriminator"])
def test_effective_state_of_the_other_networks_fits_the_plain_form(name: str) -> None:
    training, plain = randomize(NETWORKS[name](True)), NETWORKS[name](False).double()
    state = dict(effective_state(training))
    plain.load_state_dict(state, strict=True)
    for key, tensor in state.items():
        if key.endswith("weight") and tensor.ndim > 1:
            close(torch.linalg.matrix_norm(tensor.flatten(1), 2), torch.tensor(1.0, dtype=torch.float64))
        else:
            assert torch.equal(tensor, training.state_dict()[key])


def test_without_spectral_norm_effective_state_is_the_state() -> None:
    generator = randomize(tiny_generator(False))
    state = dict(effective_state(generator))
    assert list(state) and state.keys() == generator.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in generator.state_dict().items())


def test_configs_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLPConfig().width = 3  # type: ignore[misc]
