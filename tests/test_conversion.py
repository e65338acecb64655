"""Conversion of TF-Hub modules, against TensorFlow's own results on modules written by `tfhub_builder`."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tfhub_builder import ModuleSpec, documented_signatures, variants

import bigbigan
from bigbigan.cli import main
from weights_conversion import convert as conversion
from weights_conversion import download
from weights_conversion.errors import ConversionError

pytest.importorskip("tensorflow")
TOLERANCE = 2e-5  # of the largest value of an output
# Activations grow without spectral norm; the port in float32 and in float64 differ by as much (4e-5).
LOOSE = {"no_spectral_norm": 1e-4, "no_spectral_norm_no_ema": 1e-4}
OTHERS = [name for name in variants.VARIANTS if name not in variants.REPRESENTATIVE]


@pytest.fixture(scope="module")
def tfhub() -> SimpleNamespace:
    from tfhub_builder import hostile, module

    return SimpleNamespace(hostile=hostile, module=module)


@pytest.fixture(scope="module")
def good(tfhub: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module") / "plain"
    return tfhub.module.build_module(folder, variants.PLAIN).folder


def port(model: bigbigan.BigBiGAN, signature: str, given: dict[str, np.ndarray], noise: np.ndarray) -> dict[str, Any]:
    """The public interface's outputs under the module's names, channels last."""
    tensors = {
        k: torch.from_numpy(v).permute(0, 3, 1, 2) if v.ndim == 4 else torch.from_numpy(v) for k, v in given.items()
    }
    if signature == "generate":
        small, large = (model.generate(tensors["z"], upsample=up) for up in (False, True))
        return {"default": small.permute(0, 2, 3, 1), "upsampled": large.permute(0, 2, 3, 1)}
    if signature == "discriminate":
        out = model.discriminate(tensors["x"], tensors["z"])
        return {f"score_{name}": getattr(out, f"score_{name}") for name in ("x", "z", "xz")}
    encoded = model.encode(tensors["x"], noise=torch.from_numpy(noise))
    return {name: encoded[name] for name in ("default", *encoded.keys())}


def check_outputs(
    tfhub: SimpleNamespace, spec: ModuleSpec, folder: Path, converted: Path, tolerance: float = TOLERANCE
) -> None:
    model = bigbigan.load(converted)
    feeds, noise = tfhub.module.random_feeds(spec, 2, seed=77)
    reference = tfhub.module.run_references(folder, feeds, noise, spec.tags)
    default = model.info.provenance["encode_default_output"]
    assert default == spec.encoder.default_output or spec.encoder.output != "stochastic"
    for signature, outputs in reference.items():
        ported = port(model, signature, feeds[signature], noise)
        if signature in ("encode", "default"):
            ported["default"] = ported[default]
        for name, wanted in outputs.items():
            got = ported[name].numpy()
            assert got.shape == wanted.shape, (signature, name)
            error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12)
            assert error < tolerance, (signature, name, error)


def check_config(spec: ModuleSpec, config: bigbigan.config.BigBiGANConfig) -> None:
    """What the specification says is what was found; the fields have the same names but for a few."""
    g, e, d = config.generator, config.encoder, config.discriminator
    for found, asked, renamed in (
        (
            g,
            spec.generator,
            {"upsample_mode": "upsampled", "upsample_size": "upsampled_size", "shared_dim": "class_dim"},
        ),
        (e, spec.encoder, {"shortcut": "" if spec.encoder.architecture == "revnet" else "shortcut"}),
        (d, spec.discriminator, {"combine": "", "z_mlp": "", "joint_mlp": ""}),
    ):
        for field in dataclasses.fields(found):
            name = renamed.get(field.name, field.name)
            if field.name in ("head", "spectral_norm") or not name or not hasattr(asked, name):
                continue
            if spec.encoder.architecture == "revnet" and name == "strided_padding":
                continue
            assert getattr(found, field.name) == getattr(asked, name), field.name
    for found, asked in ((e.head, spec.encoder.head), (d.z_mlp, spec.discriminator.z_mlp)):
        for name in ("width", "layers", "activation", "order", "norm"):
            assert getattr(found, name) == getattr(asked, name), name
    assert d.combine == spec.discriminator.combine.split("_")[0]


def convert_and_check(tfhub: SimpleNamespace, name: str, folder: Path) -> None:
    spec = variants.VARIANTS[name]
    tfhub.module.build_module(folder / "module", spec, seed=3)
    converted = conversion.convert(folder / "module", folder / "out", report=lambda text: None)
    check_outputs(tfhub, spec, folder / "module", converted, LOOSE.get(name, TOLERANCE))
    check_config(spec, bigbigan.load(converted).config)


@pytest.mark.parametrize("name", variants.REPRESENTATIVE)
def test_representative_modules(name: str, tfhub: SimpleNamespace, tmp_path: Path) -> None:
    convert_and_check(tfhub, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_module(name: str, tfhub: SimpleNamespace, tmp_path: Path) -> None:
    convert_and_check(tfhub, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.OUTSIDE)
def test_modules_outside_the_family_are_refused_or_right(name: str, tfhub: SimpleNamespace, tmp_path: Path) -> None:
    spec = variants.OUTSIDE[name]
    tfhub.module.build_module(tmp_path / "module", spec)
    try:
        converted = conversion.convert(tmp_path / "module", tmp_path / "out")
    except ConversionError:
        assert not (tmp_path / "out").exists()
    else:
        check_outputs(tfhub, spec, tmp_path / "module", converted)


def test_batch_norms_keep_their_statistics(good: Path, tmp_path: Path) -> None:
    """Not only the product of mean, variance, gain and offset: training can go on from the model."""
    import tensorflow as tf

    model = bigbigan.load(conversion.convert(good, tmp_path / "out"))
    reader = tf.train.load_checkpoint(str(good / "variables" / "variables"))

    def stored(name: str, ending: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(reader.get_tensor(f"{name}/{ending}"))).float()

    found = 0
    norms = {name: m for name, m in model.named_modules() if isinstance(m, bigbigan.layers.BatchNorm)}
    for name in (
        key.rpartition("/")[0] for key in reader.get_variable_to_shape_map() if key.endswith("accumulated_var")
    ):
        var = stored(name, "accumulated_var") / stored(name, "accumulation_counter")
        equal = [
            m
            for m in norms.values()
            if m.running_var.shape == var.shape and torch.allclose(m.running_var, var, rtol=1e-4)
        ]
        assert len(equal) == 1, name
        if "Encoder" in name:
            mean = stored(name, "accumulated_mean") / stored(name, "accumulation_counter")
            torch.testing.assert_close(equal[0].running_mean, mean, rtol=1e-4, atol=1e-5)
        found += 1
    assert found == len(norms) > 10


def hostile_parameters() -> list[str]:
    from tfhub_builder import hostile

    return list(hostile.HOSTILE)


@pytest.mark.parametrize("name", hostile_parameters())
def test_hostile_modules(name: str, tfhub: SimpleNamespace, good: Path, tmp_path: Path) -> None:
    made = tfhub.hostile.HOSTILE[name]
    path = made(good)
    output = tmp_path / "out"
    if made.expect == "refuse":
        with pytest.raises(ConversionError):
            conversion.convert(path, output)
        assert not output.exists()
    else:
        try:
            converted = conversion.convert(path, output)
        except ConversionError:
            assert made.expect == "not_run" and not output.exists()
        else:
            check_outputs(
                tfhub, variants.PLAIN, path if path.is_dir() and made.expect == "consistent" else good, converted
            )
    assert not tfhub.hostile.marker(path).exists()
    assert [entry.name for entry in tmp_path.iterdir()] in ([], ["out"])


def test_archive_gives_the_same_weights(good: Path, tmp_path: Path) -> None:
    archive = tmp_path / "module.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(good, arcname=".")
    outputs = [conversion.convert(source, tmp_path / name) for source, name in ((good, "a"), (archive, "b"))]
    for part in ("generator", "encoder", "discriminator"):
        first, second = (load_file(output / f"{part}.safetensors") for output in outputs)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    infos = [bigbigan.load(o).info for o in outputs]
    assert infos[0].provenance["sha256"] == infos[1].provenance["sha256"]
    assert infos[0].license.startswith("unknown")


def test_a_port_that_differs_is_refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = conversion.match

    def wrong(module: Any) -> Any:
        matched = real(module)
        with torch.no_grad():
            matched.model.discriminator.score_z.bias.add_(1e-2)
        return matched

    monkeypatch.setattr(conversion, "match", wrong)
    with pytest.raises(ConversionError, match="discriminate +score_z"):
        conversion.convert(good, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_named_model_is_found_by_load(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "_from_kaggle", lambda name: good)
    lines: list[str] = []
    conversion.convert("bigbigan-resnet50", report=lines.append)
    model = bigbigan.load("bigbigan-resnet50")
    assert model.info.name == "bigbigan-resnet50" and "resnet50/1" in model.info.source
    assert any("encoder.resolution: 64 (preset: 256)" in line for line in lines)


def test_unreachable_module_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(download, "_from_kaggle", offline)
    monkeypatch.setattr(download, "_fetch", offline)
    with pytest.raises(OSError, match=r"(?s)revnet50x4/1.*no route.*tf-hub-format=compressed.*By hand"):
        conversion.convert("bigbigan-revnet50x4", tmp_path / "out")


def test_inspect_shows_signatures_and_layers(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(good), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "signature encode: x -> avepool_feat" in text and "MaxPool" in text and "Softplus" in text


def test_command_line_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 1
    assert "lacks saved_model.pb" in capsys.readouterr().err
    assert main(["convert", "no-such-model"]) == 2
    assert "nor one of bigbigan-resnet50" in capsys.readouterr().err


def test_signatures_are_those_of_the_card() -> None:
    from weights_conversion.match import SIGNATURES

    for name, signature in documented_signatures(variants.PLAIN).items():
        if name in SIGNATURES:
            assert SIGNATURES[name] == (set(signature.inputs), set(signature.outputs))
