"""Generator, discriminator and encoder against their published sizes and a re-computation in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import Weights, close, nchw, nhwc, random_images, random_normal, randomize
from torch import nn

from bigbigan.config import DiscriminatorConfig, EncoderConfig, GeneratorConfig, MLPConfig
from bigbigan.discriminator import Discriminator
from bigbigan.encoder import Encoder
from bigbigan.generator import Generator
from bigbigan.layers import effective_state
from bigbigan.model import BigBiGAN
from bigbigan.presets import PRESETS, get_preset

HEAD = MLPConfig(8, 4)


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(make: Any, config: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return make(config, **options)


# ---- published sizes ----

BIGGAN_128_GENERATOR = 70_433_988  # with an embedding of 1000 classes


def test_generator_has_biggans_parameters_but_for_the_classes() -> None:
    one_row = BIGGAN_128_GENERATOR - 999 * 128
    assert one_row == 70_306_116
    assert parameters(on_meta(Generator, GeneratorConfig(), spectral_norm=True)) == one_row
    # Plain: no shared vector, and for each channel of each gain and offset one bias in place of its 128 weights.
    blocks = [(16, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    channels = sum(96 * (inputs + outputs) * 2 for inputs, outputs in blocks)
    assert parameters(on_meta(Generator, GeneratorConfig())) == one_row - 128 - 127 * channels


def test_image_discriminator_has_biggans_parameters() -> None:
    network = on_meta(Discriminator, DiscriminatorConfig(), spectral_norm=True)
    assert parameters(network.f, network.score_x) == 86_446_370  # BigGAN-128's without the class projection


@pytest.mark.parametrize(
    ("architecture", "depths", "width", "count"),
    [
        ("resnet", (3, 4, 6, 3), 64, 23_500_352),
        ("resnet", (3, 4, 6, 3), 128, 93_891_712),
        ("resnet", (3, 4, 23, 3), 64, 42_492_480),
        ("revnet", (3, 4, 6, 3), 64, 5_408_640),
        ("revnet", (3, 4, 6, 3), 128, 21_505_792),
        ("revnet", (3, 4, 6, 3), 256, 85_765_632),
    ],
)
def test_encoder_trunks_have_the_published_sizes(architecture: Any, depths: Any, width: int, count: int) -> None:
    config = EncoderConfig(architecture=architecture, depths=depths, base_channels=width)
    assert parameters(on_meta(Encoder, config).trunk) == count


def test_mlps_have_the_papers_layers() -> None:
    def linear_layers(module: nn.Module) -> list[tuple[int, int]]:
        layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and "skip" not in name}
        return [(layer.in_features, layer.out_features) for layer in layers.values()]

    discriminator = on_meta(Discriminator, DiscriminatorConfig())
    assert linear_layers(discriminator.h) == [(120, 2048)] + [(2048, 2048)] * 7
    assert linear_layers(discriminator.j) == [(1536 + 2048, 2048)] + [(2048, 2048)] * 7
    assert linear_layers(on_meta(Encoder, EncoderConfig()).head) == [(2048, 4096)] + [(4096, 4096)] * 3


@pytest.mark.parametrize(("name", "features"), [("bigbigan-resnet50", 2048), ("bigbigan-revnet50x4", 8192)])
def test_released_models_give_the_signatures_of_their_modules(name: str, features: int) -> None:
    config = get_preset(name).config
    encoder = on_meta(Encoder, config.encoder).eval()
    out = encoder(torch.empty(2, 3, 256, 256, device="meta"), torch.empty(2, 120, device="meta"))
    assert {key: tuple(out[key].shape) for key in (*out.keys(), "default")} == {
        "default": (2, 120),
        "z_sample": (2, 120),
        "z_mean": (2, 120),
        "z_stdev": (2, 120),
        "avepool_feat": (2, features),
        "bn_crelu_feat": (2, 2 * features),
    }
    assert encoder.num_features == features
    assert encoder.forward_features(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, features, 8, 8)
    generator = on_meta(Generator, config.generator).eval()
    images = generator(torch.empty(2, 120, device="meta"))
    assert images.shape == (2, 3, 128, 128) and generator.upsample(images).shape == (2, 3, 256, 256)
    scores = on_meta(Discriminator, config.discriminator).eval()(images, torch.empty(2, 120, device="meta"))
    assert [score.shape for score in scores.present()] == [(2,)] * 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_network_whose_parts_fit(name: str) -> None:
    config = get_preset(name).config
    model = on_meta(BigBiGAN, config).eval()
    assert model.parts == config.parts and parameters(model) > 0
    z = torch.empty(2, config.z_dim, device="meta")
    images = model.generator(z)
    side, size = config.generator.resolution, config.generator.upsample_size
    assert images.shape == (2, config.image_channels, side, side)
    assert model.generator.upsample(images).shape == (2, config.image_channels, size, size)
    if model.encoder is not None:
        side = config.encoder.resolution
        out = model.encoder(torch.empty(2, config.image_channels, side, side, device="meta"), z)
        assert out.z_sample.shape == z.shape and out.avepool_feat.shape == (2, model.encoder.num_features)
    out = model.discriminator(images, z)
    assert [score.shape for score in out.present()] == [(2,)] * len(config.discriminator.scores)
    assert (out.rotation is not None) == config.discriminator.rotation_head


# ---- generator ----

GENERATORS = {  # resolution: chunks (all different), base channels, block that attention follows at 64 x 64
    32: ((5, 3, 4, 2), 4, None),
    64: ((5, 3, 4, 2, 6), 4, 4),
    128: ((5, 3, 4, 2, 6, 1), 4, 4),
    256: ((5, 3, 4, 2, 6, 1, 7), 2, 4),
}


def generator_pair(resolution: Any, **options: Any) -> tuple[Generator, dict[str, Any]]:
    chunks, width, block = GENERATORS[resolution]
    config = GeneratorConfig(resolution, 3, width, chunks, shared_dim=2, bn_eps=0.01, upsample_size=resolution)
    config = dataclasses.replace(config, **options)
    return Generator(config), {"chunks": chunks, "attention_block": block, "eps": 0.01}


@pytest.mark.parametrize("resolution", GENERATORS)
def test_generator(resolution: int) -> None:
    network, facts = generator_pair(resolution)
    randomize(network).eval()
    with torch.no_grad():
        network.conv.weight.mul_(0.05 if resolution == 256 else 0.2)  # out of tanh's flat ends
    z = random_normal(3 if resolution == 32 else 1, sum(facts["chunks"]))
    weights = Weights(network.state_dict())
    images = network(z)
    close(images, nchw(reference.generator(weights, z.numpy(), **facts)))
    assert images.shape == (len(z), 3, resolution, resolution) and not weights.unused()
    assert 0.05 < images.std() < 0.8  # neither flat nor saturated


@pytest.mark.parametrize("attention", [0, 16])
def test_generator_in_training_takes_batch_statistics(attention: int) -> None:
    network, facts = generator_pair(32, attention_resolution=attention)
    facts["attention_block"] = 2 if attention else None
    z = random_normal(3, 14)
    weights = Weights(randomize(network).state_dict())
    close(network.train()(z), nchw(reference.generator(weights, z.numpy(), **facts, batch_statistics=True)))
    assert {name.rsplit(".", 1)[1] for name in weights.unused()} == {"running_mean", "running_var"}


def test_generator_has_one_image_channel_and_an_exact_range() -> None:
    network, facts = generator_pair(32, image_channels=1)
    randomize(network)
    with torch.no_grad():
        network.conv.bias.fill_(50.0)
    assert torch.equal(network(random_normal(3, sum(facts["chunks"]))), torch.ones(3, 1, 32, 32, dtype=torch.float64))


UPSAMPLED = {  # of the row 0, 1, 3 to 6 places, computed by hand
    "nearest": [0, 0, 1, 1, 3, 3],
    "bilinear": [0, 0.25, 0.75, 1.5, 2.5, 3],  # source = (i + 1/2) / 2 - 1/2, inside [0, 2]
    "bilinear-aligned": [0, 0.4, 0.8, 1.4, 2.2, 3],  # source = i * 2 / 5
    "bilinear-asymmetric": [0, 0.5, 1, 2, 3, 3],  # source = i / 2, inside [0, 2]
}


@pytest.mark.parametrize("mode", UPSAMPLED)
def test_upsampling_by_hand(mode: Any) -> None:
    network = Generator(GeneratorConfig(32, 3, 1, (1,) * 4, upsample_mode=mode, upsample_size=64))
    object.__setattr__(network.config, "upsample_size", 6)  # a configuration cannot ask for a size this small
    row, column = torch.tensor([0.0, 1, 3]).double(), torch.tensor([1.0, 0, 2]).double()
    wide, high = (
        torch.tensor(UPSAMPLED[mode]).double(),
        {
            "nearest": [1, 1, 0, 0, 2, 2],
            "bilinear": [1, 0.75, 0.25, 0.5, 1.5, 2],
            "bilinear-aligned": [1, 0.6, 0.2, 0.4, 1.2, 2],
            "bilinear-asymmetric": [1, 0.5, 0, 1, 2, 2],
        }[mode],
    )
    images = torch.stack([column[:, None] + row, column[:, None] * row])[None]  # not symmetric
    high = torch.tensor(high).double()
    expected = torch.stack([high[:, None] + wide, high[:, None] * wide])[None]
    close(network.upsample(images), expected, 1e-6 if "asym" not in mode else 1e-12)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bilinear-aligned", "bilinear-asymmetric"])
@pytest.mark.parametrize("size", [32, 48, 80])
def test_upsampling_keeps_constants_and_the_range(mode: Any, size: int) -> None:
    network = Generator(GeneratorConfig(32, 3, 1, (1,) * 4, upsample_mode=mode, upsample_size=size))
    images = random_images(2, 3, 32, 32)
    out = network.upsample(images)
    assert out.shape == (2, 3, size, size) and out.abs().max() <= images.abs().max() + 1e-12
    close(network.upsample(torch.full_like(images, 0.3)), torch.full_like(out, 0.3))
    if size == 32:
        close(out, images, 1e-12)


# ---- discriminator ----

DISCRIMINATORS: dict[int, dict[str, Any]] = {  # attention at 64 x 64 follows `attention_block`
    32: {"downsample": "ddss", "attention_block": None},
    64: {"downsample": "dddds", "attention_block": None},
    128: {"downsample": "ddddds", "attention_block": 1},
    256: {"downsample": "dddddds", "attention_block": 2},
}
SIDES = {
    32: [16, 8, 8, 8],
    64: [32, 16, 8, 4, 4],
    128: [64, 32, 16, 8, 4, 4],
    256: [128, 64, 32, 16, 8, 4, 4],
}
CHANNELS = {
    32: [4, 4, 4, 4],
    64: [1, 2, 4, 8, 16],
    128: [1, 2, 4, 8, 16, 16],
    256: [1, 2, 4, 8, 8, 16, 16],
}


def tiny_discriminator(resolution: Any = 32, **options: Any) -> Discriminator:
    config = DiscriminatorConfig(resolution, 3, 2, 5, z_mlp=MLPConfig(6, 4), joint_mlp=MLPConfig(7, 4))
    return randomize(Discriminator(dataclasses.replace(config, **options))).eval()


def check_discriminator(network: Discriminator, n: int = 3, **facts: Any) -> None:
    x, z = random_images(n, 3, *[network.config.resolution] * 2), random_normal(n, 5)
    weights = Weights(network.state_dict())
    out = network(x, z)
    expected = reference.discriminator(weights, nhwc(x), z.numpy(), network.config, **facts)
    assert set(expected) == {f"score_{name}" for name in network.config.scores}
    for name in ("score_x", "score_z", "score_xz"):
        if name in expected:
            close(getattr(out, name), expected[name])
            assert abs(expected[name]).min() > 1e-3
        else:
            assert getattr(out, name) is None
    assert len(out.present()) == len(expected)


@pytest.mark.parametrize("resolution", DISCRIMINATORS)
def test_discriminator(resolution: int) -> None:
    network = tiny_discriminator(resolution)
    check_discriminator(network, 3 if resolution < 128 else 1, **DISCRIMINATORS[resolution])
    shapes = []
    for block in network.f.blocks:
        block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    network(random_images(1, 3, resolution, resolution), random_normal(1, 5))
    assert shapes == [(2 * c, s, s) for c, s in zip(CHANNELS[resolution], SIDES[resolution], strict=True)]
    assert (network.f.attention is not None) == (DISCRIMINATORS[resolution]["attention_block"] is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"first_relu": True},
        {"last_skip": False},
        {"combine": "sum", "z_mlp": MLPConfig(8, 4)},
        {"combine": "product", "z_mlp": MLPConfig(8, 4)},
        {"attention_resolution": 8, "facts": {"attention_block": 2}},
        {"z_mlp": MLPConfig(6, 2, activation="leaky_relu", order="post", projection="never")},
        *({"scores": scores} for scores in [("x",), ("z",), ("xz",), ("x", "z"), ("x", "xz"), ("z", "xz")]),
    ],
    ids=lambda options: " ".join(f"{k}={v}"[:40] for k, v in options.items()),
)
def test_discriminator_options(options: dict[str, Any]) -> None:
    facts = DISCRIMINATORS[32] | options.pop("facts", {})
    check_discriminator(tiny_discriminator(**options), **facts)


def test_an_absent_score_has_no_weights() -> None:
    names = {name.split(".")[0] for name in tiny_discriminator(scores=("x",)).state_dict()}
    assert names == {"f", "score_x"}
    names = {name.split(".")[0] for name in tiny_discriminator(scores=("xz",)).state_dict()}
    assert names == {"f", "h", "j", "score_xz"}


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_rotation_head(spectral_norm: bool) -> None:
    config = DiscriminatorConfig(32, 3, 2, 5, 0, HEAD, HEAD, scores=("x",), rotation_head=True)
    network = randomize(Discriminator(config, spectral_norm=spectral_norm)).eval()
    weight, bias = (network.state_dict()[f"rotation.{name}"].numpy() for name in ("weight", "bias"))
    assert weight.shape == (4, 8) and bias.any()
    assert parameters(network) - parameters(Discriminator(dataclasses.replace(config, rotation_head=False))) == 36
    if spectral_norm:
        layer = network.rotation
        layer.u.copy_(torch.linalg.svd(layer.weight.detach()).U[None, :, 0])
        weight = weight / np.linalg.norm(weight, 2)
    x = random_images(3, 3, 32, 32)
    out = network(x)
    f = network.f(x).detach().numpy()
    close(out.rotation, torch.from_numpy(f @ weight.T + bias))
    assert out.present() == [out.score_x]
    assert torch.equal(network(x, random_normal(3, 5)).rotation, out.rotation)
    assert list(dict(effective_state(network))) == list(Discriminator(config).state_dict())


def test_latents_may_be_left_out_where_no_score_needs_them() -> None:
    x = random_images(3, 3, 32, 32)
    assert tiny_discriminator(scores=("x",))(x, None).score_x.shape == (3,)
    assert tiny_discriminator()(x, random_normal(3, 5)).rotation is None
    for scores in (("z",), ("x", "xz")):
        with pytest.raises(ValueError, match=f"the scores {', '.join(scores)} need latents"):
            tiny_discriminator(scores=scores)(x)


def test_discriminator_in_training_equals_its_inference_form() -> None:
    config = DiscriminatorConfig(32, 3, 2, 5, attention_resolution=8, z_mlp=HEAD, joint_mlp=HEAD)
    training, plain = randomize(Discriminator(config, spectral_norm=True)), Discriminator(config).double().eval()
    plain.load_state_dict(dict(effective_state(training)), strict=True)
    for layer in training.modules():
        if hasattr(layer, "u"):
            layer.u.copy_(torch.linalg.svd(layer.weight.detach().flatten(1)).U[None, :, 0])
    x, z = random_images(3, 3, 32, 32), random_normal(3, 5)
    for a, b in zip(training.train()(x, z).present(), plain(x, z).present(), strict=True):
        close(a, b)


# ---- encoder ----

TRUNKS: dict[str, dict[str, Any]] = {
    "bottleneck": {"depths": (2, 1, 2), "base_channels": 4},
    "basic": {"depths": (2, 1, 2), "base_channels": 4, "block": "basic"},
    "revnet": {"depths": (2, 1, 2), "base_channels": 4, "architecture": "revnet"},
}


def tiny_encoder(trunk: str, **options: Any) -> Encoder:
    config = EncoderConfig(64, z_dim=5, head=HEAD, bn_eps=0.02, feature_norm_eps=0.05, **TRUNKS[trunk])
    return randomize(Encoder(dataclasses.replace(config, **options))).eval()


def check_encoder(network: Encoder, *sides: int, batch_statistics: bool = False) -> None:
    channels = network.config.image_channels
    x, noise = 3 * random_images(3, channels, *sides), random_normal(3, network.config.z_dim, seed=1)
    weights = Weights(network.state_dict())
    out = network.train(batch_statistics)(x, noise)
    expected = reference.encoder(weights, nhwc(x), noise.numpy(), network.config, batch_statistics)
    for name, values in expected.items():
        close(out[name], values)
    assert batch_statistics or not weights.unused()
    assert expected["z_mean"].std(axis=0).min() > 1e-4  # images matter


# 64: every window fits; 40 x 52: SAME and explicit padding differ at each stage, and sides become odd.
@pytest.mark.parametrize("sides", [(64, 64), (40, 52), (48, 33)], ids=lambda sides: f"{sides[0]}x{sides[1]}")
@pytest.mark.parametrize("trunk", TRUNKS)
def test_encoder(trunk: str, sides: tuple[int, int]) -> None:
    check_encoder(tiny_encoder(trunk), *sides)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_encoder_in_training_takes_batch_statistics(trunk: str) -> None:
    check_encoder(tiny_encoder(trunk, head=MLPConfig(8, 4, norm="batch")), 32, 64, batch_statistics=True)


HEADS: dict[str, dict[str, Any]] = {
    "post": {"order": "post"},
    "leaky": {"activation": "leaky_relu"},
    "norm": {"norm": "batch"},
    "always": {"projection": "always"},
    "never": {"projection": "never"},
    "first": {"first_activation": True},
    "no-last": {"last_activation": False},
    "no-bias": {"bias": False},
}
UNSETTLED: dict[str, list[Any]] = {
    "stem_padding": ["same"],
    "strided_padding": ["same"],
    "pool_padding": ["ignore", "same"],
    "shortcut": ["raw"],
    "bn_affine": [False],
    "last_relu": [False],
    "feature_norm_affine": [True],
    "output": ["deterministic", "tanh"],
    "stem": ["small"],
    "head": list(HEADS),
}
RESNET_ONLY = ("strided_padding", "shortcut", "head")


@pytest.mark.parametrize(
    ("trunk", "field", "value"),
    [
        (trunk, field, value)
        for trunk in TRUNKS
        for field, values in UNSETTLED.items()
        for value in values
        if trunk != "revnet" or field not in RESNET_ONLY
    ],
    ids=str,
)
def test_every_unsettled_detail_of_the_encoder(trunk: str, field: str, value: Any) -> None:
    option = dataclasses.replace(HEAD, **HEADS[value]) if field == "head" else value
    check_encoder(tiny_encoder(trunk, **{field: option}), 32, 40)


@pytest.mark.parametrize("sides", [(64, 64), (40, 52), (37, 33)], ids=lambda sides: f"{sides[0]}x{sides[1]}")
def test_tensorflows_padding_all_through(sides: tuple[int, int]) -> None:
    same = {"stem_padding": "same", "strided_padding": "same", "pool_padding": "same"}
    network = tiny_encoder("bottleneck", **same)
    check_encoder(network, *sides)
    explicit = tiny_encoder("bottleneck")
    explicit.load_state_dict(network.state_dict())
    x = random_images(1, 3, *sides)
    assert (network.eval()(x).z_mean - explicit(x).z_mean).abs().max() > 1e-3


@pytest.mark.parametrize("trunk", TRUNKS)
def test_norms_and_linear_layers_have_the_weights_that_the_fields_say(trunk: str) -> None:
    def with_bias(**options: Any) -> set[str]:
        network = tiny_encoder(trunk, head=MLPConfig(8, 4, norm="batch", bias=options.pop("bias", True)), **options)
        owners = {name: type(module).__name__ for name, module in network.named_modules()}
        biased = {name.removesuffix(".bias") for name in network.state_dict() if name.endswith(".bias")}
        return {f"{name.split('.')[0]} {owners[name].removesuffix('ReLU').replace('Batch', '')}" for name in biased}

    usual = {"trunk Norm", "head Norm", "head Linear", "latent Linear"}
    assert with_bias() == usual
    assert with_bias(bn_affine=False) == usual - {"trunk Norm"}
    assert with_bias(feature_norm_affine=True) == usual | {"feature_norm Norm"}
    assert with_bias(bias=False) == usual - {"head Linear"}


def test_grey_encoder() -> None:
    check_encoder(tiny_encoder("basic", image_channels=1, stem="small"), 32, 32)


def test_latent_noise_and_its_absence() -> None:
    network, x = tiny_encoder("basic"), random_images(3, 3, 32, 32)
    state = torch.random.get_rng_state()
    first, second = network(x), network(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.z_mean, second.z_mean) and not torch.equal(first.z_sample, second.z_sample)
    noise = ((first.z_sample - first.z_mean) / first.z_stdev).detach()
    assert 0.3 < noise.std() < 3
    assert torch.equal(network(x, torch.zeros(3, 5).double()).z_sample, first.z_mean)
    fixed = tiny_encoder("basic", output="deterministic")(x)
    assert torch.equal(fixed.z_sample, fixed.z_mean) and not fixed.z_stdev.any()
    bounded = tiny_encoder("basic", output="tanh")
    with torch.no_grad():
        bounded.latent.weight.mul_(1e3)
    assert bounded(x).z_sample.abs().max() == 1


def test_encoder_output_is_read_by_name_and_key() -> None:
    out = tiny_encoder("basic")(random_images(3, 3, 32, 32))
    names = ["z_sample", "z_mean", "z_stdev", "avepool_feat", "bn_crelu_feat"]
    assert list(out.keys()) == names and list(dict(out)) == names and len(out) == 3
    assert all(out[name] is getattr(out, name) for name in names) and out["default"] is out.z_sample
    assert "z_mean" in out and "logits" not in out
    for name in ("logits", "keys", "__class__"):
        with pytest.raises(KeyError, match="z_sample, z_mean"):
            out[name]


def test_gradients_flow_to_every_weight_in_evaluation_mode_too() -> None:
    generator = generator_pair(32, attention_resolution=16)[0]
    encoder, discriminator = tiny_encoder("revnet", feature_norm_affine=True), tiny_discriminator()
    x = randomize(generator).eval()(random_normal(3, 14))
    out = encoder(x)
    scores = discriminator(x, out.z_sample).present()
    (sum(score.sum() for score in scores) + out.bn_crelu_feat.sum()).backward()
    for module in (generator, encoder, discriminator):
        assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
