"""Fused networks against their plain forms, in numbers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import home, make_images, pixels  # noqa: F401 (home: a fixture for every test here)
from fused_models import (
    HEAD,
    TOLERANCE,
    assert_equal,
    inputs,
    make,
    narrow,
    outputs,
)
from reference import randomize
from safetensors.torch import load_file

from bigbigan import Encoder, create_model, load
from bigbigan.config import BigBiGANConfig, EncoderConfig
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.fused import fuse
from bigbigan.fused import swap as fuse_module
from bigbigan.fused.leaves import UpsampleConvolution
from bigbigan.layers import ConditionalNormReLU, Layers, NormReLU, UpsampleConv2d
from bigbigan.presets import PRESETS, get_preset


def distinct_parts(change: Callable[[BigBiGANConfig], BigBiGANConfig]) -> Iterator[Any]:
    """Every network that a preset has, once, under the name of the first that has it."""
    seen: set[Any] = set()
    for name, preset in PRESETS.items():
        config = change(preset.config)
        for part in config.parts:
            if getattr(config, part) not in seen:
                seen.add(getattr(config, part))
                yield pytest.param(config, part, id=f"{name}-{part}")


@pytest.mark.parametrize(("config", "part"), list(distinct_parts(narrow)))
def test_every_preset_gives_the_same(config: BigBiGANConfig, part: str) -> None:
    model = make(config, parts=(part,))
    before = outputs(model, 2)
    assert_equal(outputs(model.fuse(), 2), before)


@pytest.mark.parametrize(("config", "part"), list(distinct_parts(narrow)))
def test_no_plain_leaf_remains(config: BigBiGANConfig, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_module, "PACKED_LINEAR", 1)
    model = make(config, parts=(part,)).fuse()
    plain = {*fuse_module.LEAVES, *fuse_module.LINEAR, NormReLU, ConditionalNormReLU}
    assert not [name for name, module in model.named_modules() if type(module) in plain]


def test_autocast_leaves_a_fused_model_alone() -> None:
    model = create_model("bigbigan-tiny").fuse()
    before = outputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(outputs(model), before, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "part"), list(distinct_parts(lambda config: config)))
def test_every_preset_of_full_size_gives_the_same(config: BigBiGANConfig, part: str) -> None:
    model = make(config, parts=(part,))
    before = {batch: outputs(model, batch) for batch in (1, 2)}
    model.fuse()
    for batch, expected in before.items():
        assert_equal(outputs(model, batch), expected)


ENCODERS = {
    "SAME": {"stem_padding": "same", "strided_padding": "same", "pool_padding": "same"},
    "raw": {"shortcut": "raw", "last_relu": False, "bn_affine": False, "pool_padding": "ignore"},
    "odd side": {"resolution": 70},
    "basic": {"block": "basic", "stem": "small", "resolution": 32},
    "revnet": {"architecture": "revnet"},
    "revnet, odd side": {"architecture": "revnet", "resolution": 70, "stem_padding": "same", "bn_affine": False},
    "revnet, small stem": {"architecture": "revnet", "stem": "small", "resolution": 16},
}


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
def test_in_float64_nothing_but_the_last_digits_differ(options: dict[str, Any]) -> None:
    config: Any = {"resolution": 64, "depths": (2, 1, 2), "base_channels": 6, "z_dim": 5, "head": HEAD, **options}
    encoder = randomize(Encoder(EncoderConfig(**config))).eval()
    x, z = inputs(encoder.config, 3, torch.float64)
    with torch.no_grad():
        before = dataclasses.asdict(encoder(x, z))
        after = dataclasses.asdict(fuse(encoder)(x, z))
    assert_equal(after, before, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 1 << 20])
def test_both_ways_to_upsample(
    channels: int, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_module, "MANY_CHANNELS", channels)
    config = dataclasses.replace(get_preset("bigbigan-resnet50").config, encoder=None, discriminator=None)
    model = make(narrow(config), dtype)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    after = outputs(model.fuse())
    assert_equal(after, before, TOLERANCE if dtype == torch.float32 else 1e-12)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_nine_products_by_hand() -> None:
    plain = UpsampleConv2d(Layers(), 1, 1).double().eval()
    with torch.no_grad():
        plain.conv.weight.copy_(torch.arange(1.0, 10.0).view(1, 1, 3, 3))
        plain.conv.bias.fill_(100)  # type: ignore[union-attr]
        out = UpsampleConvolution(plain)(torch.tensor([[[[1.0, 10.0]]]]).double())
    # Upsampled: 1 1 10 10, twice. Row 0 sees kernel rows 4 5 6 and 7 8 9, row 1 sees 1 2 3 and 4 5 6.
    row0 = [100 + 13 + 15, 100 + 11 + 13 + 150, 100 + 11 + 130 + 150, 100 + 110 + 130]
    row1 = [100 + 7 + 9, 100 + 5 + 7 + 90, 100 + 5 + 70 + 90, 100 + 50 + 70]
    assert out[0, 0].tolist() == [row0, row1]


@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.parametrize("name", ["bigbigan-tiny", "bigbigan-low-res-g-64"])
def test_pieces_of_a_batch_change_nothing(name: str, piece: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(narrow(get_preset(name).config))
    before = {batch: outputs(model, batch) for batch in (1, 8)}
    monkeypatch.setattr(fuse_module, "PIECE_BYTES", 1)
    model.fuse()
    for module in model.modules():
        if isinstance(module, fuse_module.InPieces):
            assert module.piece == 1
            module.piece = piece
    for batch, expected in before.items():
        assert_equal(outputs(model, batch), expected)


def test_a_folder_is_encoded_by_a_fused_model(kernels: str, tmp_path: Path) -> None:
    model = load(parts=("encoder",))
    files = find_images(make_images(tmp_path / "pictures", 10))
    for name in ("plain", "fused"):
        encode_files(model, files, tmp_path / f"{name}.safetensors", batch_size=7, workers=0)
        model.fuse()
    expected = load_file(tmp_path / "plain.safetensors")
    assert len(expected["z_sample"]) == len(files)
    assert_equal(load_file(tmp_path / "fused.safetensors"), expected)


def test_inputs_stay_as_they_are(kernels: str) -> None:
    model = make(narrow(get_preset("bigbigan-revnet50").config)).fuse()
    for part in model.parts:
        x, z = inputs(getattr(model, part).config, 2, torch.float32)
        for form in (torch.contiguous_format, torch.channels_last):
            given = (z,) if part == "generator" else (x.contiguous(memory_format=form), z)
            kept = copy.deepcopy(given)
            getattr(model, part)(*given)
            assert all(map(torch.equal, given, kept))


def test_images_are_contiguous_and_repeat() -> None:
    model = make(narrow(get_preset("bigbigan-base").config)).fuse()
    z = model.sample_latents(2, seed=0)
    assert model.generate(z).is_contiguous()
    assert torch.equal(model.generate(z), model.generate(z))


def test_half_precision_stays_near() -> None:
    model = make(narrow(get_preset("bigbigan-base").config), torch.bfloat16)
    before = outputs(model)
    assert_equal(outputs(model.fuse()), before, 0.1)
