"""Modules written in ways that no known description has, against TensorFlow's own results at three batch sizes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tfhub_builder import forms, variants

import bigbigan
from bigbigan.cli import main
from bigbigan.generator import resize_matrix
from weights_conversion import convert as conversion
from weights_conversion.errors import ConversionError

tf = pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
module = pytest.importorskip("tfhub_builder.module")
splice = pytest.importorskip("tfhub_builder.payloads").splice
edit = pytest.importorskip("tfhub_builder.registry").edit
HANDFUL = ("noise_broadcast", "loop_and_layer_norm", "bfloat16_and_clipped", "partitioned_and_print", "late_strides")
OTHERS = [name for name in forms.FORMS if name not in HANDFUL]


def planar(array: np.ndarray) -> torch.Tensor:
    value = torch.from_numpy(array)
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value


def outputs(model: bigbigan.BigBiGAN, feeds: dict[str, Any], noise: np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
    """What the public interface gives under the module's names, channels last."""
    given = {name: {key: planar(array) for key, array in arrays.items()} for name, arrays in feeds.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    if "generator" in model.parts:
        images = [model.generate(given["generate"]["z"], upsample=large) for large in (False, True)]
        found["generate"] = {"default": images[0].permute(0, 2, 3, 1), "upsampled": images[1].permute(0, 2, 3, 1)}
    if "encoder" in model.parts:
        encoded = model.encode(given["encode"]["x"], noise=torch.from_numpy(noise))
        found["encode"] = {name: encoded[name] for name in tuple(encoded.keys())}
    if "discriminator" in model.parts:
        scores = model.discriminate(given["discriminate"]["x"], given["discriminate"]["z"])
        found["discriminate"] = {f"score_{name}": getattr(scores, f"score_{name}") for name in ("x", "z", "xz")}
    return found


def check(
    folder: Path, spec: Any, model: bigbigan.BigBiGAN, tolerance: float, counts: tuple[int, ...] = (1, 3, 5)
) -> None:
    for count in counts:
        feeds, noise = module.random_feeds(spec, count, seed=count)
        reference = module.run_references(folder, feeds, noise, spec.tags)
        for signature, values in outputs(model, feeds, noise).items():
            for name, value in values.items():
                exact = reference[signature][name]
                assert value.shape == exact.shape, (signature, name)
                error = np.abs(value.numpy() - exact).max() / np.abs(exact).max()
                assert error < tolerance, (count, signature, name, error)


def convert_and_check(name: str, folder: Path) -> None:
    form = forms.FORMS[name]
    module.build_module(folder / "module", form.spec, seed=3)
    model = bigbigan.load(conversion.convert(folder / "module", folder / "out", report=lambda text: None))
    assert model.parts == ("generator", "encoder", "discriminator")
    provenance = model.info.provenance
    graphs = "".join(part[0] for part, found in provenance["forms"].items() if found == "graph")
    assert graphs == form.graphs, provenance["why_graph"]
    check(folder / "module", form.spec, model, form.tolerance)


@pytest.mark.parametrize("name", HANDFUL)
def test_forms(name: str, tmp_path: Path) -> None:
    convert_and_check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_form(name: str, tmp_path: Path) -> None:
    convert_and_check(name, tmp_path)


GRAPHS = [name for name in variants.VARIANTS if not name.startswith("no_spectral_norm")]  # these differ by rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_every_variant_as_a_graph(name: str, tmp_path: Path) -> None:
    spec = variants.VARIANTS[name]
    module.build_module(tmp_path / "module", spec, seed=3)
    report: list[str] = []
    made = conversion.convert(tmp_path / "module", tmp_path / "out", form="graph", report=report.append)
    model = bigbigan.load(made)
    assert set(model.info.provenance["forms"].values()) == {"graph"}
    check(tmp_path / "module", spec, model, 2e-5, counts=(1,))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("corners", ["", "-aligned", "-asymmetric"])
@pytest.mark.parametrize("sizes", [(5, 10), (7, 12), (128, 256)])
def test_ways_of_resizing_are_tensorflows(mode: str, corners: str, sizes: tuple[int, int]) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (1, sizes[0], sizes[0], 3)).astype(np.float32)
    resize = tf.raw_ops.ResizeBicubic if mode == "bicubic" else tf.raw_ops.ResizeBilinear
    options = {"align_corners": corners == "-aligned", "half_pixel_centers": not corners}
    wanted = resize(images=image, size=[sizes[1]] * 2, **options).numpy()
    matrix = resize_matrix(*sizes, mode + corners).float()
    found = matrix @ planar(image) @ matrix.t()
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), wanted, atol=2e-6)


# ---- one network's fault is not the others'


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return module.build_module(tmp_path_factory.mktemp("module") / "plain", variants.PLAIN).folder


def test_a_network_that_cannot_be_had_costs_no_other(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edit(good, tmp_path / "module", splice("generate", "default", lambda x: tf.cumsum(x, 1)))
    assert main(["convert", str(path), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "the generator is left out" in said and "Cumsum" in said and "Please report this message" in said
    model = bigbigan.load(tmp_path / "out")
    assert model.parts == ("encoder", "discriminator") and "Cumsum" in model.info.provenance["left_out"]["generator"]
    check(good, variants.PLAIN, model, 2e-5, counts=(2,))
    with pytest.raises(ConversionError, match="Cumsum"):
        conversion.convert(path, tmp_path / "port", form="port")
    assert not (tmp_path / "port").exists()


def test_signatures_that_lack_or_add_something(good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(saved: Any) -> None:
        signatures = saved.meta_graphs[0].signature_def
        del signatures["discriminate"].outputs["score_z"]
        del signatures["generate"].outputs["upsampled"]
        del signatures["encode"].outputs["default"]
        signatures["encode"].outputs["labels"].CopyFrom(signatures["encode"].outputs["z_mean"])
        signatures["encode"].outputs["labels"].dtype = tf.int64.as_datatype_enum
        signatures["words"].inputs["text"].CopyFrom(signatures["generate"].inputs["z"])
        signatures["words"].inputs["text"].dtype = tf.string.as_datatype_enum
        signatures["default"].CopyFrom(signatures["generate"])

    with caplog.at_level(logging.WARNING):
        made = conversion.convert(edit(good, tmp_path / "module", change), tmp_path / "out")
    model = bigbigan.load(made)
    assert model.info.provenance["forms"] == {"generator": "port", "encoder": "port", "discriminator": "graph"}
    assert model.config.discriminator.scores == ("x", "xz") and model.config.generator.upsample_size == 32
    for text in (
        "no output 'score_z'",
        "'labels', which a BigBiGAN does not have",
        "'words' is not one",
        "'default' is not an",
    ):
        assert text in caplog.text, text
    x, z = torch.rand(2, 3, 32, 32), torch.randn(2, 20)
    assert model.discriminate(x, z).score_z is None and model.discriminate(x, z).score_xz.shape == (2,)


def test_a_missing_signature_costs_its_own_network(good: Path, tmp_path: Path) -> None:
    def change(saved: Any) -> None:
        signatures = saved.meta_graphs[0].signature_def
        del signatures["encode"].outputs["avepool_feat"]
        del signatures["discriminate"]

    model = bigbigan.load(conversion.convert(edit(good, tmp_path / "module", change), tmp_path / "out"))
    assert model.parts == ("generator",)
    left_out = model.info.provenance["left_out"]
    assert "avepool_feat" in left_out["encoder"] and "no signature 'discriminate'" in left_out["discriminator"]


def test_channels_first(good: Path, tmp_path: Path) -> None:
    """TensorFlow does not run this on CPUs: the module with channels last holds the same function."""
    module.build_module(tmp_path / "module", replace(variants.PLAIN, departures=("channels_first",)))
    made = conversion.convert(tmp_path / "module", tmp_path / "out", report=lambda text: None)
    model = bigbigan.load(made)
    assert set(model.info.provenance["forms"].values()) == {"graph"}
    check(good, variants.PLAIN, model, 2e-5, counts=(2,))
    steps = [step.op for step in model.encoder.graph.operations]
    assert "permute" not in steps, "channels come first in torch as well"


def test_inspection_shows_a_graph_that_is_not_the_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.build_module(tmp_path / "module", forms.FORMS["clipped"].spec)
    assert main(["convert", str(tmp_path / "module"), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "not the port's layers" in text and "Minimum" in text and "Softplus" in text


def test_noise_is_drawn_from_the_modules_distribution(tmp_path: Path) -> None:
    form = forms.FORMS["truncated_normal"]
    module.build_module(tmp_path / "module", form.spec)
    made = conversion.convert(tmp_path / "module", tmp_path / "out", report=lambda text: None)
    model = bigbigan.load(made, parts=("encoder",))
    out = model.encode(torch.rand(1, 3, 64, 64).expand(200, -1, -1, -1), seed=0)
    drawn = (out.z_sample - out.z_mean) / out.z_stdev
    assert drawn.abs().max() <= 2.001 and 0.85 < drawn.std() < 0.91  # 0.880 for a normal cut at two deviations
