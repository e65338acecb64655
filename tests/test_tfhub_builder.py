"""The TF-Hub modules that the converter is tested on: are they genuine, right, and worth testing on?"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tfhub_builder import ModuleSpec, documented_signatures, spec, variants

ALL = variants.VARIANTS | variants.OUTSIDE


@pytest.fixture(scope="module")
def tfhub() -> SimpleNamespace:
    """TensorFlow and the parts of the builder that need it."""
    pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
    import tensorflow as tf
    from tfhub_builder import hostile, module, numpy_reference

    return SimpleNamespace(tf=tf, hostile=hostile, module=module, numpy=numpy_reference)


@pytest.fixture(scope="module")
def plain(tfhub: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The plain module with TensorFlow's outputs for three images and latents."""
    built = tfhub.module.build_module(tmp_path_factory.mktemp("tfhub") / "plain", variants.PLAIN)
    feeds, noise = tfhub.module.random_feeds(variants.PLAIN, 3)
    outputs = tfhub.module.run_references(built.folder, feeds, noise)
    return SimpleNamespace(folder=built.folder, spec=built.spec, feeds=feeds, noise=noise, outputs=outputs)


def check_outputs(module: ModuleSpec, outputs: dict[str, dict[str, np.ndarray]], count: int) -> None:
    """Names, shapes and ranges are as documented; every output depends on its input."""
    for name, signature in documented_signatures(module).items():
        assert set(outputs[name]) == set(signature.outputs)
        for key, shape in signature.outputs.items():
            value = outputs[name][key]
            assert value.dtype == np.float32 and value.shape == (count, *shape[1:]), (name, key)
            assert np.isfinite(value).all() and np.abs(value).max() < 300, (name, key, np.abs(value).max())
            constant = key == "z_stdev" and module.encoder.output != "stochastic"
            assert constant or np.abs(value[0] - value[1]).max() > 1e-3, (name, key)
    assert all(np.abs(image).max() <= 1 for image in outputs["generate"].values())
    encoded = outputs["encode"]
    assert (encoded["z_stdev"] >= 0).all() and (encoded["bn_crelu_feat"] >= 0).all()
    positive, negative = np.split(encoded["bn_crelu_feat"], 2, 1)
    assert not (positive * negative).any() and positive.any() and negative.any()


def test_specs_need_no_tensorflow() -> None:
    code = "import sys, tfhub_builder, tfhub_builder.variants; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_variants_show_every_value_of_every_choice() -> None:
    def flatten(owner: object) -> Iterator[tuple[str, object]]:
        for field in dataclasses.fields(owner):  # type: ignore[arg-type]
            value = getattr(owner, field.name)
            if dataclasses.is_dataclass(value):
                yield from flatten(value)
            else:
                yield f"{type(owner).__name__}.{field.name}", value

    shown = {pair for module in ALL.values() for pair in flatten(module)}
    networks = (spec.MLPSpec, spec.GeneratorSpec, spec.EncoderSpec, spec.DiscriminatorSpec)
    for cls in (*networks, spec.ModuleSpec, spec.Style):
        for name, hint in typing.get_type_hints(cls).items():
            values = (True, False) if hint is bool else typing.get_args(hint) if "Literal" in str(hint)[:16] else ()
            for value in values:
                assert (f"{cls.__name__}.{name}", value) in shown, f"no variant has {cls.__name__}.{name} = {value!r}"
    assert len(variants.VARIANTS) >= 45 and set(variants.REPRESENTATIVE) <= set(variants.VARIANTS)


def test_plain_module_is_as_documented(tfhub: SimpleNamespace, plain: SimpleNamespace) -> None:
    files = {str(path.relative_to(plain.folder)) for path in plain.folder.rglob("*") if path.is_file()}
    data = {"variables/variables.index", "variables/variables.data-00000-of-00001"}
    assert files == {"saved_model.pb", "tfhub_module.pb", *data}
    check_outputs(plain.spec, plain.outputs, 3)
    encoded = plain.outputs["encode"]
    expected = encoded["z_mean"] + encoded["z_stdev"] * plain.noise
    np.testing.assert_allclose(encoded["z_sample"], expected, rtol=1e-6, atol=1e-6)
    loaded = tfhub.tf.compat.v1.saved_model.load_v2(str(plain.folder), tags=[])  # as tensorflow_hub loads it
    image = loaded.signatures["generate"](tfhub.tf.constant(plain.feeds["generate"]["z"]))["default"]
    np.testing.assert_allclose(image, plain.outputs["generate"]["default"], atol=2e-5)


def test_numpy_agrees(tfhub: SimpleNamespace, plain: SimpleNamespace) -> None:
    reader = tfhub.tf.train.load_checkpoint(str(plain.folder / "variables" / "variables"))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    bundle = tfhub.numpy.Bundle(values, plain.spec.spectral_norm_eps)
    ours = {
        "generate": tfhub.numpy.generate(bundle, plain.spec, plain.feeds["generate"]["z"]),
        "encode": tfhub.numpy.encode(bundle, plain.spec, plain.feeds["encode"]["x"], plain.noise),
    }
    for name, outputs in ours.items():
        for key, value in outputs.items():
            np.testing.assert_allclose(value, plain.outputs[name][key], rtol=1e-4, atol=1e-4, err_msg=f"{name}.{key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_variant_runs(tfhub: SimpleNamespace, plain: SimpleNamespace, tmp_path: Path, name: str) -> None:
    module = ALL[name]
    built = tfhub.module.build_module(tmp_path / name, module)
    feeds, noise = tfhub.module.random_feeds(module, 3)
    outputs = tfhub.module.run_references(built.folder, feeds, noise, module.tags)
    check_outputs(module, outputs, 3)
    if dataclasses.replace(module, style=plain.spec.style, tags=()) == plain.spec:  # another way of writing the same
        for signature, values in outputs.items():
            for key, value in values.items():
                np.testing.assert_allclose(value, plain.outputs[signature][key], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_every_variable_matters_as_it_should(tfhub: SimpleNamespace, plain: SimpleNamespace) -> None:
    """Changing a variable changes an output, unless it is the trained twin of a moving average."""
    tf, feeds = tfhub.tf, {}
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        meta = v1.saved_model.loader.load(session, [], str(plain.folder))
        fetches = {}
        for name in ("generate", "encode", "discriminate"):
            definition = meta.signature_def[name]
            fetches[name] = [graph.get_tensor_by_name(info.name) for info in definition.outputs.values()]
            feeds |= {definition.inputs[key].name: value[:1] for key, value in plain.feeds[name].items()}
        (noise,) = tfhub.module.noise_tensors(graph, fetches["encode"])
        feeds[noise] = plain.noise[:1]
        before = {name: session.run(tensors, feeds) for name, tensors in fetches.items()}
        variables = {variable.op.name: variable for variable in v1.global_variables()}
        for name, variable in variables.items():
            reader = {"Ge": "generate", "En": "encode"}.get(name.removeprefix("GenEncWrapper/")[:2], "discriminate")
            value = session.run(variable)
            changed = value + np.random.default_rng(0).uniform(0.1, 0.5, value.shape) * (1 + np.abs(value))
            variable.load(changed.astype(np.float32), session)
            after = session.run(fetches[reader], feeds)
            moved = max(np.abs(a - b).max() for a, b in zip(after, before[reader], strict=True))
            variable.load(value, session)
            dead = f"{name}/ema_0.9999" in variables
            assert moved == 0 if dead else moved > 1e-5, f"{name} moves the outputs by {moved}"


LIVE = {  # hostile module -> what TensorFlow would do with it
    "write_file_as_main_op": "load",
    "print_to_file_as_legacy_init_op": "load",
    "save_as_init_signature": "load",
    "write_file_on_control_edge": "run",
    "save_on_control_edge": "run",
    "function_writes_file": "run",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_payload_is_live(tfhub: SimpleNamespace, plain: SimpleNamespace, name: str) -> None:
    path = tfhub.hostile.HOSTILE[name](plain.folder)
    mark, v1 = tfhub.hostile.marker(path), tfhub.tf.compat.v1
    with tfhub.tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        meta = v1.saved_model.loader.load(session, [], str(path))
        if LIVE[name] == "run":
            assert not _written(mark)
            definition = meta.signature_def["generate"]
            session.run(definition.outputs["default"].name, {definition.inputs["z"].name: np.zeros((1, 20))})
    assert _written(mark)


def _written(mark: Path) -> bool:
    return any(mark.parent.glob(f"{mark.name}*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("read_file", "whole_file_reader", "matching_files", "print_identity", "random_image"))
def test_operation_on_data_path_runs(tfhub: SimpleNamespace, plain: SimpleNamespace, name: str) -> None:
    """These modules work: a converter that refuses them does so for what they contain, not because they are broken."""
    path = tfhub.hostile.HOSTILE[name](plain.folder)
    image = tfhub.module.run_reference(path, "generate", plain.feeds["generate"])["default"]
    np.testing.assert_allclose(image, plain.outputs["generate"]["default"], atol=1e-2)


@pytest.mark.slow
def test_every_hostile_module_is_made(tfhub: SimpleNamespace, plain: SimpleNamespace, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.symlink_to(plain.folder)
    assert len(tfhub.hostile.HOSTILE) >= 22
    for make in tfhub.hostile.HOSTILE.values():
        path = make(good)
        assert path.exists() and not _written(tfhub.hostile.marker(path)), make.name


def _count(variables: dict[str, tuple[int, ...]], keep: Callable[[str], bool]) -> int:
    skipped = ("ema_0.9999", "u0", "accumulated_mean", "accumulated_var", "accumulation_counter")
    return sum(int(np.prod(s)) for n, s in variables.items() if keep(n) and n.rsplit("/", 1)[1] not in skipped)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trunk"), [("resnet50", 23_500_352), ("revnet50x4", 85_765_632)])
def test_full_size_has_published_parameter_counts(
    tfhub: SimpleNamespace, tmp_path: Path, name: str, trunk: int
) -> None:
    variables = tfhub.module.Variables(variants.FULL_SIZE[name].style, 0, shapes_only=True)
    tfhub.module.write_meta_graph(variants.FULL_SIZE[name], variables, tmp_path)
    shapes = {key: value.shape for key, value in variables.values.items()}
    encoder = "GenEncWrapper/Encoder/"
    assert _count(shapes, lambda n: n.startswith("GenEncWrapper/Generator/")) == 70_306_116
    assert _count(shapes, lambda n: n.startswith(encoder) and "/head/" not in n and "/latent/" not in n) == trunk
    assert _count(shapes, lambda n: n.startswith("Discriminator/F/")) == 86_444_833
