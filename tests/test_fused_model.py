"""Fused models in use: what they save, what they refuse, the command line, memory."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import home, make_images, pixels  # noqa: F401 (home: a fixture for every test here)
from fused_models import (
    assert_equal,
    inputs,
    make,
    narrow,
    outputs,
)
from safetensors.torch import load_file
from torch import Tensor

from bigbigan import BigBiGAN, Generator, create_model, load
from bigbigan.cli import main
from bigbigan.config import GeneratorConfig
from bigbigan.fused import fuse
from bigbigan.fused import swap as fuse_module
from bigbigan.fused.kernels import packs
from bigbigan.layers import UpsampleConv2d
from bigbigan.onnx import export_program
from bigbigan.presets import get_preset


@pytest.mark.parametrize("name", ["bigbigan-tiny", "bigbigan-revnet50x4", "bigan-mnist-mlp"])
def test_a_fused_model_saves_the_plain_bytes(name: str, kernels: str, tmp_path: Path) -> None:
    model = make(narrow(get_preset(name).config))
    model.save(tmp_path / "plain")
    model.fuse().save(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 5
    for file in names:
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


def test_load_fuses(tmp_path: Path) -> None:
    create_model("bigbigan-tiny", seed=3).save(tmp_path / "tiny")
    plain, fused = load(tmp_path / "tiny"), load(tmp_path / "tiny", fuse=True)
    assert (fused.device, fused.dtype, fused.parts) == (plain.device, plain.dtype, plain.parts)
    assert_equal(outputs(fused), outputs(plain))
    assert fused.fuse() is fused
    generator = Generator.from_pretrained(tmp_path / "tiny", fuse=True)
    assert isinstance(generator, Generator) and not isinstance(generator.blocks[0].conv1, UpsampleConv2d)
    half = load(tmp_path / "tiny", fuse=True, dtype=torch.float64)
    assert half.dtype == torch.float64 and half.generate(1, seed=0).dtype == torch.float64


def test_a_copy_lives_on_its_own() -> None:
    model = make(narrow(get_preset("bigbigan-tiny").config)).fuse()
    before, twin = outputs(model), copy.deepcopy(model)
    del model
    assert_equal(outputs(twin), before, 0)


def hooked(model: BigBiGAN) -> BigBiGAN:
    model.part("generator").conv.register_forward_hook(lambda *_: None)
    return model


REFUSALS: dict[str, tuple[Callable[[BigBiGAN], object], str]] = {
    "training": (lambda m: m.train(), "a fused generator does not train: take the plain form"),
    "weights": (lambda m: m.load_state_dict(m.state_dict()), "takes no weights: load them into the plain form"),
    "weights of a part": (lambda m: m.part("encoder").load_state_dict({}), "a fused encoder takes no weights"),
    "dtype": (lambda m: m.double(), "stays torch.float32 on cpu"),
    "device": (lambda m: m.to("meta"), "stays torch.float32 on cpu: load it as it is to be"),
    "compiling": (lambda m: m.compile(), "a fused generator is not compiled or exported: take the plain form"),
    "exporting": (
        lambda m: export_program(m, "encoder"),
        "a fused encoder is not compiled or exported|Observed",
    ),  # torch 2.6
    "pickling": (lambda m: pickle.dumps(m.part("encoder")), "a fused encoder is not pickled: load it in each process"),
    "another dtype": (lambda m: m.part("generator")(torch.zeros(1, 8).double()), "and its input torch.float64: conv"),
    "hooks": (lambda m: hooked(m).generate(1), "overwrites what forward hooks inside it would see"),
    "features' gradients": (
        lambda m: m.part("encoder").forward_features(torch.zeros(1, 3, 32, 32, requires_grad=True)),
        "a fused encoder gives no gradients",
    ),
    "gradients": (
        lambda m: m.part("generator")(torch.zeros(1, m.config.z_dim, requires_grad=True)),
        "a fused generator gives no gradients",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_fused_model_refuses(call: Callable[[BigBiGAN], object], message: str) -> None:
    model = create_model("bigbigan-tiny").fuse()
    with pytest.raises(RuntimeError, match=message):
        call(model)
    model.part("generator").conv._forward_hooks.clear()
    before = outputs(create_model("bigbigan-tiny"))
    assert_equal(outputs(model.to("cpu").float().eval()), before)  # what changes nothing is no error


def test_outputs_carry_no_gradient() -> None:
    model = create_model("bigbigan-tiny").fuse()
    z = torch.zeros(1, model.config.z_dim)
    assert not model.part("generator")(z).requires_grad
    with torch.no_grad():
        assert torch.isfinite(model.part("generator")(z.requires_grad_())).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_broken_inputs_give_what_the_plain_form_gives(kernels: str, value: float) -> None:
    plain, fused = create_model("bigbigan-tiny"), create_model("bigbigan-tiny").fuse()
    x, z = inputs(plain.part("encoder").config, 3, torch.float32)
    x[1, 0, 3, 3] = z[1, 2] = value
    for part, given in (("generator", (z,)), ("encoder", (x, z)), ("discriminator", (x, z))):
        results = [getattr(model, part)(*given) for model in (plain, fused)]
        named = [{"": r} if isinstance(r, Tensor) else dataclasses.asdict(r) for r in results]
        for name, expected in named[0].items():
            if expected is not None:
                broken = [~rows.reshape(3, -1).isfinite().all(1) for rows in (expected, named[1][name])]
                assert broken[0].tolist() == broken[1].tolist() == [False, True, False], (part, name)


@torch.no_grad()
def test_calls_as_of_the_plain_form() -> None:
    plain, fused = create_model("bigbigan-tiny"), create_model("bigbigan-tiny").fuse()
    x, z = inputs(plain.part("encoder").config, 2, torch.float32)
    for model in (plain, fused):
        assert model.part("generator")(z=z[:0]).shape == (0, 3, 32, 32)
        assert model.part("encoder")(x[:0], noise=z[:0]).avepool_feat.shape[0] == 0
        assert model.part("discriminator")(x=x[:0], z=z[:0]).score_xz.shape == (0,)
    features = fused.part("encoder").forward_features(x)
    assert features.is_contiguous()
    assert_equal({"": features}, {"": plain.part("encoder").forward_features(x)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.part("encoder")(x.bfloat16(), z.bfloat16()).z_mean.dtype == torch.float32
    with torch.device("meta"):
        loaded = load(fuse=True)
    assert_equal(outputs(loaded), outputs(load()))


def test_what_cannot_be_fused(tmp_path: Path) -> None:
    model = create_model("bigbigan-tiny")
    with pytest.raises(RuntimeError, match="a BigBiGAN is not fused by itself"):
        fuse(model)
    model.part("encoder").train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        model.fuse()
    model.eval().generate(1)
    model.part("encoder").compile()
    with pytest.raises(RuntimeError, match="a compiled network is not fused"):
        model.fuse()
    assert not isinstance(model.generator, fuse_module.FusedPart)


@pytest.mark.parametrize("answer", [False, TypeError("unexpected arguments")])
def test_kernels_that_changed_are_not_used(
    answer: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def agree() -> bool:
        if isinstance(answer, Exception):
            raise answer
        return False

    monkeypatch.setattr("bigbigan.fused.kernels._packed_kernels_agree", agree)
    packs.cache_clear()
    try:
        model = load()
        before = outputs(model)
        assert_equal(outputs(model.fuse()), before)
    finally:
        packs.cache_clear()
    assert "weights are not packed: torch" in caplog.text or platform.machine().lower() not in ("x86_64", "amd64")


def test_the_training_form_is_not_fused() -> None:
    config = get_preset("bigbigan-tiny").config.generator
    assert isinstance(config, GeneratorConfig)
    with pytest.raises(RuntimeError, match="inference form"):
        fuse(Generator(config, spectral_norm=True).eval())


def test_a_training_model_is_not_fused() -> None:
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        create_model("bigbigan-tiny").train().fuse()


# ---- command line and memory ----


def test_the_command_line_fuses_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[type] = []
    monkeypatch.setattr("bigbigan.factory.fuse_part", lambda network: calls.append(type(network)) or fuse(network))
    verbs = {
        "generate": ["-n", "4", "--scale", "1"],
        "reconstruct": ["--scale", "1"],
    }
    for verb, options in verbs.items():
        for flags in ([], ["--no-fuse"]):
            calls.clear()
            assert main([verb, *options, *flags, "-o", str(tmp_path / f"{verb}{len(flags)}.png"), "--quiet"]) == 0
            assert bool(calls) == (not flags), verb
        fused, plain = (pixels(tmp_path / f"{verb}{n}.png").astype(int) for n in (0, 1))
        assert abs(fused - plain).max() <= 1
    picture = str(tmp_path / "generate0.png")
    for flags in ([], ["--no-fuse"]):
        target = str(tmp_path / f"features{len(flags)}.safetensors")
        assert main(["encode", picture, "-o", target, *flags, "--quiet"]) == 0
    fused, plain = (load_file(tmp_path / f"features{n}.safetensors") for n in (0, 1))
    assert_equal({k: v for k, v in fused.items() if v.is_floating_point()}, plain)


MEMORY = """
import sys, torch, bigbigan
from pathlib import Path
def resident(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
folder, part, form = sys.argv[1:]
torch.set_num_threads(1)
bigbigan.create_model("bigbigan-tiny").fuse().generate(1, seed=0)  # what any first use takes
before = resident("VmRSS")
model = bigbigan.load(folder, parts=(part,), fuse=form == "fused")
if form == "plain":
    for tensor in model.state_dict().values():
        tensor.sum()  # reads what is only mapped
print((resident("VmHWM") - before) * 1024 / (Path(folder) / f"{part}.safetensors").stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["bigbigan-resnet50", "bigbigan-revnet50x4"])
def test_loading_takes_little_more_memory_than_the_weights(name: str, tmp_path: Path) -> None:
    create_model(name, parts=("generator", "encoder")).save(tmp_path / "model")
    for part in ("generator", "encoder"):
        for form, limit in (("plain", 1.15), ("fused", 1.6)):
            command = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), part, form]
            grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name}, {part}, {form}: at most {grown:.2f} of the weights")
            assert grown < limit, (part, form)
