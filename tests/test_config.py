"""Configurations go to JSON and back, refuse what is malformed or contradictory, and hold the paper's models."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from bigbigan.config import (
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
    MLPDiscriminatorConfig,
    MLPEncoderConfig,
    MLPGeneratorConfig,
    ModelInfo,
    PreprocessConfig,
)
from bigbigan.presets import PRESETS, get_preset
from bigbigan.schema import ConfigError, from_dict, to_dict

BASE = PRESETS["bigbigan-base"].config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    config = PRESETS[name].config
    restored = from_dict(BigBiGANConfig, json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert restored == config and hash(restored) == hash(config)
    assert PRESETS[name].name == name and PRESETS[name].description and PRESETS[name].origin


def test_an_absent_part_survives_json() -> None:
    config = dataclasses.replace(BASE, generator=None, discriminator=None)
    assert to_dict(config)["generator"] is None
    assert from_dict(BigBiGANConfig, to_dict(config)) == config
    assert config.parts == ("encoder",) and config.z_dim == 120 and config.image_channels == 3


def test_model_info_keeps_its_facts() -> None:
    info = ModelInfo("a", "mit", "here", {"fid": {"value": 1.5}, "list": [1, None, "x"]})
    assert from_dict(ModelInfo, json.loads(json.dumps(to_dict(info)))) == info


# ---- closed schema ----


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values, objects and lists among them."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


DATA = to_dict(BASE)
PLACES = list(places(DATA))
ABSENT_ALLOWED = [("generator",), ("encoder",), ("discriminator",)]


def refused(data: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(BigBiGANConfig, data)


def test_every_field_is_required() -> None:
    for path in PLACES:
        if isinstance(path[-1], str):
            data = copy.deepcopy(DATA)
            del at(data, path[:-1])[path[-1]]
            refused(data, f"lacks fields: {path[-1]}$")


def test_unknown_fields_are_refused_wherever_they_are() -> None:
    for path in [(), *PLACES]:
        if isinstance(at(DATA, path), dict):
            data = copy.deepcopy(DATA)
            at(data, path)["surprise"] = 1
            refused(data, "unknown fields: surprise$")


def test_every_value_of_another_type_is_refused_by_name() -> None:
    for path in PLACES:
        value = at(DATA, path)
        wrong: list[Any] = [None, {}, [], [[]], "?", True, float("nan"), float("inf"), -1, 10**400, {"x": 1}, ["?"]]
        if type(value) is float:
            wrong.append("1.0")
        if type(value) is int:
            wrong += [float(value), str(value), [value]]
        if type(value) is bool:
            wrong += [int(value), str(value)]
        if type(value) is str:
            wrong += [value.upper(), value + " ", [value]]
        if isinstance(value, list):
            wrong += [value * 2, value[0], {str(i): v for i, v in enumerate(value)}]
        for new in wrong:
            if type(new) is type(value) and isinstance(new, bool):
                continue
            if new is None and path in ABSENT_ALLOWED:
                continue
            data = copy.deepcopy(DATA)
            at(data, path[:-1])[path[-1]] = new
            with pytest.raises(ConfigError) as caught:
                from_dict(BigBiGANConfig, data)
            name = next(key for key in reversed(path) if isinstance(key, str))
            assert name in str(caught.value) or isinstance(value, dict), (path, new)
            assert len(str(caught.value)) < 1000, (path, new)


def test_an_integer_will_do_for_a_float_but_nothing_else() -> None:
    data = to_dict(EncoderConfig())
    data["bn_eps"] = 1
    with pytest.raises(ConfigError, match=r"bn_eps is 1\.0, outside 1e-12 to 0\.1"):
        from_dict(EncoderConfig, data)


MLP_DATA = to_dict(
    BigBiGANConfig(MLPGeneratorConfig(), MLPEncoderConfig(), MLPDiscriminatorConfig(), PreprocessConfig(28))
)


@pytest.mark.parametrize("part", ["generator", "encoder", "discriminator"])
def test_unions_are_as_closed_as_their_members(part: str) -> None:
    for field in MLP_DATA[part]:
        data = copy.deepcopy(MLP_DATA)
        del data[part][field]
        # Without the architecture the data are read as those of a convolutional part.
        refused(data, f"{part} has unknown fields: .*width" if field == "architecture" else f"lacks fields: {field}$")
    for name, value in (("surprise", 1), ("base_channels", 4), ("output", "tanh"), ("scores", ["xz"])):
        refused({**MLP_DATA, part: {**MLP_DATA[part], name: value}}, f"{part} has unknown fields: {name}$")
    for value in (True, 1, None, {}, ["mlp"], "MLP", "mlp "):
        refused(
            {**MLP_DATA, part: {**MLP_DATA[part], "architecture": value}}, rf"{part}\.architecture is .*'mlp', 'graph'$"
        )
    refused({**DATA, part: {**DATA[part], "architecture": "mlp"}}, f"{part} has unknown fields")


def test_parts_of_both_kinds_go_together_if_their_sizes_agree() -> None:
    encoder = EncoderConfig(28, 1, z_dim=50, output="tanh")
    config = BigBiGANConfig(MLPGeneratorConfig(), encoder, MLPDiscriminatorConfig(), PreprocessConfig(28))
    assert from_dict(BigBiGANConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="z_dim differs between parts.*'MLPGeneratorConfig': 50.*: 120"):
        dataclasses.replace(config, encoder=dataclasses.replace(encoder, z_dim=120))
    with pytest.raises(ConfigError, match="uniform prior"):
        dataclasses.replace(config, encoder=dataclasses.replace(encoder, output="stochastic"))


@pytest.mark.parametrize("data", [None, [], "generator", 3, True])
def test_only_objects_are_configurations(data: Any) -> None:
    refused(data, "not an object")


RANGES: list[tuple[type, str, Any, Any]] = [  # lowest and highest that are allowed
    (MLPConfig, "width", 1, 65536),
    (MLPConfig, "layers", 2, 64),
    (GeneratorConfig, "image_channels", 1, 4),
    (GeneratorConfig, "base_channels", 1, 1024),
    (GeneratorConfig, "shared_dim", 0, 4096),
    (GeneratorConfig, "bn_eps", 1e-12, 0.1),
    (GeneratorConfig, "upsample_size", 128, 4096),
    (EncoderConfig, "resolution", 16, 1024),
    (EncoderConfig, "image_channels", 1, 4),
    (EncoderConfig, "base_channels", 1, 4096),
    (EncoderConfig, "z_dim", 1, 4096),
    (EncoderConfig, "bn_eps", 1e-12, 0.1),
    (EncoderConfig, "feature_norm_eps", 1e-12, 0.1),
    (DiscriminatorConfig, "base_channels", 1, 1024),
    (DiscriminatorConfig, "z_dim", 1, 4096),
    (MLPGeneratorConfig, "resolution", 2, 256),
    (MLPGeneratorConfig, "width", 1, 4096),
    (MLPGeneratorConfig, "bn_eps", 1e-12, 0.1),
    (MLPEncoderConfig, "image_channels", 1, 4),
    (MLPEncoderConfig, "feature_norm_eps", 1e-12, 0.1),
    (MLPEncoderConfig, "negative_slope", 0, 1),
    (MLPDiscriminatorConfig, "z_dim", 1, 4096),
    (PreprocessConfig, "size", 2, 4096),
    (PreprocessConfig, "pad", 0, 256),
]


@pytest.mark.parametrize(("cls", "field", "low", "high"), RANGES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_ranges(cls: Any, field: str, low: Any, high: Any) -> None:
    for value in (low, high):
        assert getattr(cls(**{field: value}), field) == value
    below, above = (low / 2, high * 2) if isinstance(low, float) else (low - 1, high + 1)
    for value in (below, above, float("nan")):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{field}"):
            cls(**{field: value})


SMALL = DiscriminatorConfig(32, base_channels=4, z_mlp=MLPConfig(24))

CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "odd layers": (lambda: MLPConfig(layers=3), "two layers each"),
    "chunks for another resolution": (lambda: GeneratorConfig(64), "64 pixels take 5"),
    "an empty chunk": (lambda: GeneratorConfig(32, z_chunks=(1, 0, 1, 1)), "z_chunks.*of 1 to 4096"),
    "upsampled smaller than drawn": (lambda: GeneratorConfig(upsample_size=64), "upsample_size"),
    "no stages": (lambda: EncoderConfig(depths=()), "depths"),
    "an empty stage": (lambda: EncoderConfig(depths=(3, 0)), "depths"),
    "a basic revnet": (lambda: EncoderConfig(architecture="revnet", block="basic"), "bottleneck"),
    "an odd revnet": (lambda: EncoderConfig(architecture="revnet", base_channels=3), "even"),
    "no scores": (lambda: DiscriminatorConfig(scores=()), "one or more of x, z, xz"),
    "a score twice": (lambda: DiscriminatorConfig(scores=("x", "x")), "each once"),
    "a sum of widths 16 and 24": (lambda: dataclasses.replace(SMALL, combine="sum"), "16 and 24"),
    "nothing": (lambda: BigBiGANConfig(None, None, None), "at least one"),
    "latents of two sizes": (
        lambda: BigBiGANConfig(BASE.generator, None, DiscriminatorConfig(z_dim=60)),
        "z_dim differs between parts.*GeneratorConfig.*120.*DiscriminatorConfig.*60",
    ),
    "grey and colour": (
        lambda: BigBiGANConfig(dataclasses.replace(BASE.generator, image_channels=1), BASE.encoder, None),
        "image_channels differs",
    ),
    "two image sizes": (
        lambda: BigBiGANConfig(BASE.generator, None, DiscriminatorConfig(64)),
        "draws 128 pixels, the discriminator reads 64",
    ),
    "preprocessing for another encoder": (
        lambda: dataclasses.replace(BASE, preprocess=PreprocessConfig(120, pad=3)),
        "gives 126 pixels, the encoder reads 128",
    ),
    "an encoder that is no multiple": (
        lambda: dataclasses.replace(BASE, encoder=EncoderConfig(192), preprocess=PreprocessConfig(192)),
        "192 is no multiple of 128",
    ),
    "uniform latents from a normal encoder": (
        lambda: dataclasses.replace(BASE, generator=dataclasses.replace(BASE.generator, prior="uniform")),
        "uniform prior",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name: str) -> None:
    make, match = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=match):
        make()


def test_preprocessing_must_fit_a_discriminator_without_an_encoder() -> None:
    for size in (64, 200):  # mean-pooling leads from neither to 128 pixels
        with pytest.raises(ConfigError, match=f"{size}"):
            BigBiGANConfig(None, None, DiscriminatorConfig(128), PreprocessConfig(size))
    assert BigBiGANConfig(None, None, DiscriminatorConfig(128), PreprocessConfig(256)).parts == ("discriminator",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneratorConfig(100),
        lambda: DiscriminatorConfig(100),
        lambda: GeneratorConfig(upsample_mode="lanczos"),
        lambda: EncoderConfig(output="determinstic"),
        lambda: EncoderConfig(stem_padding="SAME"),
        lambda: MLPConfig(order="Pre"),
        lambda: DiscriminatorConfig(combine="add"),
        lambda: MLPGeneratorConfig(prior="gaussian"),
        lambda: MLPEncoderConfig(architecture="resnet"),
    ],
    ids=["G", "F", "upsample_mode", "output", "stem_padding", "order", "combine", "prior", "architecture"],
)
def test_a_choice_that_does_not_exist_is_refused_in_python_too(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# ---- the paper's models ----

R50, R101 = ("resnet", (3, 4, 6, 3)), ("resnet", (3, 4, 23, 3))
REV = ("revnet", (3, 4, 6, 3))
ALL = ("x", "z", "xz")
# Table 1: encoder (kind, depths), its width factor and resolution; G's and F's resolution; G's base channels; scores.
TABLE_1: dict[str, Any] = {
    "bigbigan-base": (R50, 1, 128, 128, 96, ALL),
    "bigbigan-deterministic-e": (R50, 1, 128, 128, 96, ALL),
    "bigbigan-uniform-pz": (R50, 1, 128, 128, 96, ALL),
    "bigbigan-x-unary-only": (R50, 1, 128, 128, 96, ("x", "xz")),
    "bigbigan-z-unary-only": (R50, 1, 128, 128, 96, ("z", "xz")),
    "bigbigan-no-unaries": (R50, 1, 128, 128, 96, ("xz",)),
    "bigbigan-small-g-32": (R50, 1, 128, 128, 32, ALL),
    "bigbigan-small-g-64": (R50, 1, 128, 128, 64, ALL),
    "bigbigan-no-e": (None, None, None, 128, 96, ("x",)),
    "bigbigan-high-res-e-256": (R50, 1, 256, 128, 96, ALL),
    "bigbigan-low-res-g-64": (R50, 1, 256, 64, 96, ALL),
    "bigbigan-high-res-g-256": (R50, 1, 256, 256, 96, ALL),
    "bigbigan-resnet101": (R101, 1, 256, 128, 96, ALL),
    "bigbigan-resnet50x2": (R50, 2, 256, 128, 96, ALL),
    "bigbigan-revnet50": (REV, 1, 256, 128, 96, ALL),
    "bigbigan-revnet50x2": (REV, 2, 256, 128, 96, ALL),
    "bigbigan-revnet50x4-base-lr": (REV, 4, 256, 128, 96, ALL),
    "bigbigan-resnet50": (R50, 1, 256, 128, 96, ALL),
    "bigbigan-revnet50x4": (REV, 4, 256, 128, 96, ALL),
}
OUTPUTS = {"bigbigan-deterministic-e": ("normal", "deterministic"), "bigbigan-uniform-pz": ("uniform", "tanh")}


def test_all_rows_of_table_1_are_there_and_no_more() -> None:
    assert {name for name, preset in PRESETS.items() if preset.description.startswith("Table 1")} == set(TABLE_1)


@pytest.mark.parametrize("name", TABLE_1)
def test_row_of_table_1(name: str) -> None:
    trunk, factor, encoder_side, side, width, scores = TABLE_1[name]
    config = get_preset(name).config
    g, e, d = config.generator, config.encoder, config.discriminator
    assert (g.resolution, d.resolution, g.base_channels, d.base_channels) == (side, side, width, 96)
    assert g.z_dim == d.z_dim == 120 and g.shared_dim == 128 and g.attention_resolution == 64
    assert d.attention_resolution == 64 and d.scores == scores and d.combine == "concat"
    assert d.z_mlp == d.joint_mlp == MLPConfig(2048, 8)
    prior, output = OUTPUTS.get(name, ("normal", "stochastic"))
    assert g.prior == prior
    if trunk is None:
        assert e is None
        return
    assert ((e.architecture, e.depths), e.resolution, e.output) == (trunk, encoder_side, output)
    assert (e.base_channels, e.block, e.stem, e.num_features) == (64 * factor, "bottleneck", "imagenet", 2048 * factor)
    assert e.z_dim == 120 and e.head == MLPConfig(4096, 4) and not e.spectral_norm
    assert config.preprocess.resolution == g.upsample_size == encoder_side


def test_presets_of_one_architecture_are_written_once() -> None:
    assert get_preset("bigbigan-resnet50").config == get_preset("bigbigan-high-res-e-256").config
    assert get_preset("bigbigan-revnet50x4").config == get_preset("bigbigan-revnet50x4-base-lr").config


@pytest.mark.parametrize(("name", "channels"), [("fashion-mnist", 1), ("mnist", 1), ("cifar10", 3)])
def test_small_presets_draw_32_pixels(name: str, channels: int) -> None:
    config = get_preset(f"bigbigan-{name}-32").config
    assert config.generator.resolution == config.encoder.resolution == config.discriminator.resolution == 32
    assert config.image_channels == channels and config.encoder.stem == "small" and config.encoder.block == "basic"
    assert (config.preprocess.size, config.preprocess.pad) == ((28, 2) if channels == 1 else (32, 0))


def test_presets_of_other_methods_differ_in_what_the_method_says() -> None:
    small = get_preset("bigbigan-fashion-mnist-32").config
    for name in ("bigan-mnist-32", "bigan-fashion-mnist-32"):
        config = get_preset(name).config
        assert (config.generator.prior, config.encoder.output) == ("uniform", "tanh")
        assert config.discriminator == dataclasses.replace(small.discriminator, scores=("xz",))
    for scale, full in (("fashion-mnist-32", small), ("imagenet-128", BASE)):
        gan, rotation = (get_preset(f"{method}-{scale}").config for method in ("biggan", "ssgan"))
        assert gan.parts == rotation.parts == ("generator", "discriminator")
        assert gan.generator == rotation.generator == full.generator
        assert gan.discriminator == dataclasses.replace(full.discriminator, scores=("x",))
        assert rotation.discriminator == dataclasses.replace(gan.discriminator, rotation_head=True)


def test_preset_names_are_forgiving_and_misses_get_a_hint() -> None:
    assert get_preset("BigBiGAN_RevNet50x4") is PRESETS["bigbigan-revnet50x4"]
    with pytest.raises(ValueError, match=r"no preset 'bigbigan-resnet5'; did you mean bigbigan-resnet50"):
        get_preset("bigbigan-resnet5")
    with pytest.raises(ValueError, match="bigbigan list"):
        get_preset("zzz")
