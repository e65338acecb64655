"""Conversion of TF-Hub modules, against TensorFlow's own results on modules written by `tfhub_builder`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tarfile
from collections.abc import Callable
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

tf = pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
v1 = tf.compat.v1
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
    converted = conversion.convert(folder / "module", folder / "out", form="port", report=lambda text: None)
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
def test_modules_outside_the_family_are_right(name: str, tfhub: SimpleNamespace, tmp_path: Path) -> None:
    spec = variants.OUTSIDE[name]
    tfhub.module.build_module(tmp_path / "module", spec)
    check_outputs(tfhub, spec, tmp_path / "module", conversion.convert(tmp_path / "module", tmp_path / "out"))


def test_batch_norms_keep_their_statistics(good: Path, tmp_path: Path) -> None:
    """Not only the product of mean, variance, gain and offset: training can go on from the model."""
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


def nested_functions(x: Any) -> Any:
    """A function called by its name in another, of which the second output is used, by its name."""
    from tensorflow.python.framework.function import Defun

    @Defun(tf.float32, func_name="inner")
    def inner(y: Any) -> Any:
        return y + 1.0, y * 3.0

    @Defun(tf.float32, func_name="outer")
    def outer(y: Any) -> Any:
        return inner(y)[1]

    return outer(x)


def custom_gradient(x: Any) -> Any:
    return tf.custom_gradient(lambda y: (y * 2.0, lambda dy: dy))(x)


def branch_of_constants(x: Any) -> Any:
    scale, _ = v1.cond(v1.equal(1, 2), lambda: (tf.constant(2.0), x), lambda: (tf.constant(5.0), x + 1))
    return x * scale


def nested_branches(x: Any) -> Any:
    false = v1.placeholder_with_default(False, [])
    return v1.cond(false, lambda: v1.cond(false, lambda: x * 2.0, lambda: x * 3.0), lambda: x * 4.0)


def discarded(x: Any) -> Any:
    """Values behind a constant condition that a converter could not evaluate."""
    return v1.cond(v1.placeholder_with_default(False, []), lambda: tf.cumsum(x), lambda: x - 1.0)


def discarded_before(x: Any) -> Any:
    sums = tf.cumsum(x)
    return v1.cond(v1.placeholder_with_default(False, []), lambda: sums, lambda: x - 1.0)


def initialized(x: Any) -> Any:
    v = v1.Variable([3.0], use_resource=True, name="v")
    return x * v1.cond(v1.is_variable_initialized(v), v.read_value, lambda: tf.cumsum([1.0]))


def reference_branch(x: Any) -> Any:
    v = v1.Variable([3.0], use_resource=False, name="v")
    return x * v1.cond(v1.placeholder_with_default(True, []), lambda: v + 0.0, lambda: tf.cumsum(v))


def read_after_assignment(x: Any) -> Any:
    v = v1.Variable([3.0], use_resource=True, name="v")
    with tf.control_dependencies([tf.group(v.assign([7.0]))]):
        return x * v.read_value()


def read_after_branches(x: Any) -> Any:
    """Assignments in one branch that is taken and in one that is not."""
    v, w = (v1.Variable([3.0], use_resource=True, name=name) for name in "vw")
    true = v1.placeholder_with_default(True, [])
    for variable, taken in ((v, lambda: v.assign([7.0])), (w, lambda: w.assign([9.0]))):
        condition = true if variable is v else v1.logical_not(true)
        branch = v1.cond(condition, lambda taken=taken: v1.group(taken()), v1.no_op)
        with tf.control_dependencies([branch]):
            x = x * variable.read_value()
    return x


def value_of_assignment(x: Any) -> Any:
    return x * v1.assign(v1.Variable([3.0], use_resource=False, name="v"), [7.0])


def counted_loop(x: Any) -> Any:
    """A loop over constants with another inside, whose bounds come from outside."""
    rounds = v1.placeholder_with_default(3, [])

    def body(i: Any, total: Any) -> tuple[Any, Any]:
        inner = v1.while_loop(lambda k, s: k < i, lambda k, s: (k + 1, s * 2.0), [tf.constant(0), total])
        return i + 1, inner[1] + 1.0

    return x * v1.while_loop(lambda i, _: i < rounds, body, [tf.constant(0), tf.constant(1.0)])[1]


def unrolled_loop(x: Any) -> Any:
    """Data that go through a loop a constant number of times."""
    return v1.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * 0.5 + x), [tf.constant(0), x])[1]


def printed(x: Any) -> Any:
    return v1.Print(x * 2.0, [tf.strings.as_string(x)], "printed")


def float64_noise(x: Any) -> Any:
    """A branch that is not taken may draw what it likes."""
    true = v1.placeholder_with_default(True, [])
    return v1.cond(true, lambda: x + 1.0, lambda: x + tf.cast(v1.random_normal([4], dtype=tf.float64), tf.float32))


@pytest.mark.parametrize(
    "build",
    [
        counted_loop, unrolled_loop, printed, float64_noise, nested_functions, custom_gradient, branch_of_constants,
        nested_branches, discarded, discarded_before, initialized, reference_branch, read_after_assignment,
        read_after_branches, value_of_assignment,
    ],
    ids=lambda build: build.__name__,
)  # fmt: skip
def test_graphs_evaluate_as_in_a_session(build: Callable[[Any], Any]) -> None:
    from weights_conversion.interpret import Interpreter

    given = np.linspace(-1, 1, 4, dtype=np.float32)
    v2 = v1.control_flow_v2_enabled()
    v1.disable_control_flow_v2()
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        try:
            x = v1.placeholder(tf.float32, [4], "x")
            y = build(x)
        finally:
            v1.enable_control_flow_v2() if v2 else None
        session.run(v1.global_variables_initializer())
        expected = session.run(y, {x: given})
        definition = v1.train.export_meta_graph(strip_default_attrs=True).graph_def
    module = SimpleNamespace(
        nodes={node.name: node for node in definition.node},
        functions={f.signature.name: f for f in definition.library.function},
        signatures={"s": SimpleNamespace(inputs={"x": "x:0"}, outputs={"y": y.name})},
        variables=SimpleNamespace(read=lambda node: np.array([3.0], np.float32)),
    )
    got = Interpreter(module, noise=np.zeros).run("s", {"x": given})["y"]
    np.testing.assert_array_equal(np.asarray(got.tensor), expected)
    assert got.record is not None


def test_read_of_a_changed_variable_is_refused() -> None:
    def build(x: Any) -> Any:
        v = v1.Variable([3.0], use_resource=True, name="v")
        with tf.control_dependencies([v.assign_add([7.0])]):
            return x * v.read_value()

    with pytest.raises(ConversionError, match=r"AssignAddVariableOp.*changes a variable before"):
        test_graphs_evaluate_as_in_a_session(build)


def test_refusal_tells_rounding_from_error(good: Path) -> None:
    from weights_conversion import verify
    from weights_conversion.module import Module

    module = Module(good)
    model = conversion.match(module).model
    with torch.no_grad():
        model.encoder.latent.bias[0] += 1e-2
    with pytest.raises(ConversionError, match=r"(?s)encode +z_mean.*rounding.*encode z_mean \d.*e-0[678]"):
        verify.verify(module, model)


def test_other_signatures_are_told_and_left_out(good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(saved: Any) -> None:
        signatures = saved.meta_graphs[0].signature_def
        signatures["invert"].CopyFrom(signatures["generate"])
        signatures["__saved_model_init_op"].outputs["init"].name = "init"

    from tfhub_builder.registry import edit

    bigbigan.load(conversion.convert(edit(good, tmp_path / "module", change), tmp_path / "out"))
    assert "signature 'invert' is not one of BigBiGAN's" in caplog.text and "init" not in caplog.text


def test_variables_of_another_shape_are_named(good: Path, tmp_path: Path) -> None:
    from tfhub_builder.registry import edit_variables

    name = "GenEncWrapper/Generator/linear/w/ema_0.9999"
    folder = edit_variables(good, tmp_path / "module", lambda values: values.update({name: values[name][:, :-1]}))
    with pytest.raises(ConversionError, match=rf"variable '{name}' is float32\[1, 5\].*\(1, 6\)"):
        conversion.convert(folder, tmp_path / "out")


def hostile_parameters() -> list[str]:
    from tfhub_builder import hostile

    return list(hostile.HOSTILE)


@pytest.mark.parametrize("name", hostile_parameters())
def test_hostile_modules(
    name: str, tfhub: SimpleNamespace, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tfhub.hostile.HOSTILE[name]
    path = made(good)
    output = tmp_path / "out"
    if made.expect == "refuse_port":
        with pytest.raises(ConversionError):
            conversion.convert(path, output, form="port")
        model = bigbigan.load(conversion.convert(path, output))
        assert model.info.provenance["forms"]["generator"] == "graph"
    elif made.expect == "refuse":
        with monkeypatch.context() as patch:  # most of them spoil the generator: the others take time only
            patch.setattr("weights_conversion.match.PARTS", ("generator",))
            with contextlib.suppress(ConversionError):
                conversion.convert(path, output)
        if output.exists():
            shutil.rmtree(output)
            with contextlib.suppress(ConversionError):
                assert len(bigbigan.load(conversion.convert(path, output)).parts) < 3
                shutil.rmtree(output)
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

    def wrong(module: Any, form: str) -> Any:
        matched = real(module, form)
        with torch.no_grad():
            matched.model.discriminator.score_z.bias.add_(1e-2)
        return matched

    monkeypatch.setattr(conversion, "match", wrong)
    with pytest.raises(ConversionError, match="discriminate +score_z"):
        conversion.convert(good, tmp_path / "out", form="port")
    assert not (tmp_path / "out").exists()
    model = bigbigan.load(conversion.convert(good, tmp_path / "out"))
    assert model.info.provenance["forms"] == {"generator": "port", "encoder": "port", "discriminator": "graph"}
    assert "score_z" in model.info.provenance["why_graph"]["discriminator"]


def test_named_model_is_found_by_load(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "_from_kaggle", lambda name: good)
    lines: list[str] = []
    conversion.convert("bigbigan-resnet50", report=lines.append)
    model = bigbigan.load("bigbigan-resnet50")
    assert model.info.name == "bigbigan-resnet50" and "resnet50/1" in model.info.source
    assert any("encoder.resolution: 64 (preset: 256)" in line for line in lines)


def test_archive_fetched_by_hand_takes_a_name(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))
    with tarfile.open(tmp_path / "module.tar.gz", "w:gz") as tar:
        tar.add(good, arcname=".")
    assert main(["convert", str(tmp_path / "module.tar.gz")]) == 2
    assert "say which model it is with --name" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "module.tar.gz"), "--name", "bigbigan_RevNet50x4"]) == 0
    assert bigbigan.load("bigbigan-revnet50x4").info.name == "bigbigan-revnet50x4"


def test_unreachable_module_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(download, "_from_kaggle", offline)
    monkeypatch.setattr(download, "_fetch", offline)
    with pytest.raises(OSError, match=r"(?s)revnet50x4/1.*no route.*tf-hub-format=compressed.*By hand"):
        conversion.convert("bigbigan-revnet50x4", tmp_path / "out")
    assert main(["convert", "bigbigan-revnet50x4", "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be downloaded: kagglehub, " in line and ":. " not in line and "  " not in line
    assert "bigbigan convert ARCHIVE.tar.gz --name bigbigan-revnet50x4" in line  # as the README has it


def test_inspect_shows_signatures_and_layers(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(good), "--inspect"]) == 0
    text = capsys.readouterr().out
    assert "signature encode: x -> avepool_feat" in text and "MaxPool" in text and "Softplus" in text


def test_command_line_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert "lacks saved_model.pb" in first
    assert f"and what bigbigan convert {tmp_path / 'empty'} --inspect prints; it holds no weights" in last
    assert main(["convert", "no-such-model"]) == 2
    assert "nor one of bigbigan-resnet50" in capsys.readouterr().err


def test_signatures_are_those_of_the_card() -> None:
    from weights_conversion.match import SIGNATURES

    for name, signature in documented_signatures(variants.PLAIN).items():
        if name in SIGNATURES:
            assert SIGNATURES[name] == (set(signature.inputs), set(signature.outputs))
