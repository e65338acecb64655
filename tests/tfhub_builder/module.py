"""A module folder from a spec, and TensorFlow's own results for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.saved_model.loader_impl import SavedModelLoader

from .discriminator import discriminator
from .encoder import encoder
from .generator import generator, upsampled
from .layers import Part, Tensor, Writer, v1
from .spec import ModuleSpec, documented_signatures
from .variables import Variables

MODULE_DEF = b"\x08\x03"  # ModuleDef { format: FORMAT_V3 }


@dataclass(frozen=True)
class BuiltModule:
    """A module on disk; `variables` has every stored variable's shape by name."""

    folder: Path
    spec: ModuleSpec
    variables: dict[str, tuple[int, ...]]


def build_module(folder: str | Path, spec: ModuleSpec, seed: int = 0) -> BuiltModule:
    """Writes `saved_model.pb`, `tfhub_module.pb` and `variables/` (and `assets/` if the style has them)."""
    folder = Path(folder)
    (folder / "variables").mkdir(parents=True)
    variables = Variables(spec.style, seed)
    variables.partitioned = "partitioned" in spec.departures
    saved = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    saved.meta_graphs.append(write_meta_graph(spec, variables, folder))
    if spec.style.train_graph:
        trained = Variables(spec.style, seed)
        saved.meta_graphs.append(write_meta_graph(spec, trained, folder, training=True))
        variables.values = {**trained.values, **variables.values}
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
    (folder / "tfhub_module.pb").write_bytes(MODULE_DEF)
    save_variables(folder, variables.values, variables.slices)
    return BuiltModule(folder, spec, {name: value.shape for name, value in sorted(variables.values.items())})


def save_variables(
    folder: Path, values: Mapping[str, np.ndarray], slices: Mapping[str, list[str]] | None = None
) -> None:
    """The bundle `variables/variables.{index,data-00000-of-00001}`, as TensorFlow's Saver writes it."""
    rows = []
    for name in sorted(values):
        value = values[name]
        for text in (slices or {}).get(name, [""]):
            spans = [span for span in text.split(" ")[-1].split(":") if text]
            bounds = [None if span == "-" else tuple(map(int, span.split(","))) for span in spans]
            part = value[tuple(slice(None) if b is None else slice(b[0], b[0] + b[1]) for b in bounds)]
            rows.append((name, text, np.ascontiguousarray(part).reshape(part.shape)))
    names, texts, tensors = map(list, zip(*rows, strict=True))
    prefix = str(folder / "variables" / "variables")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=texts, tensors=tensors)


def write_meta_graph(
    spec: ModuleSpec, variables: Variables, folder: Path, training: bool = False
) -> tf.compat.v1.MetaGraphDef:
    """One MetaGraph with the four signatures."""
    with tf.Graph().as_default() as graph:
        control_flow = tf.compat.v1.control_flow_v2_enabled()
        v1.disable_control_flow_v2() if spec.style.branch == "switch" else v1.enable_control_flow_v2()
        try:
            signatures = write_signatures(spec, variables, training)
        finally:
            v1.enable_control_flow_v2() if control_flow else v1.disable_control_flow_v2()
        if spec.style.dead_code:
            write_dead_code(signatures)
            variables.values["global_step"] = np.int64(500_000)
        if spec.style.assets:
            write_asset(folder)
        meta = v1.train.export_meta_graph(graph=graph, clear_devices=True, strip_default_attrs=spec.style.stripped)
        meta.meta_info_def.tags.extend(["train"] if training else spec.tags)
        for name, (inputs, outputs) in signatures.items():
            meta.signature_def[name].CopyFrom(v1.saved_model.build_signature_def(*(
                {key: v1.saved_model.build_tensor_info(value) for key, value in tensors.items()}
                for tensors in (inputs, outputs)
            )))  # fmt: skip
        return meta


Tensors = dict[str, Tensor]


def write_signatures(spec: ModuleSpec, variables: Variables, training: bool) -> dict[str, tuple[Tensors, Tensors]]:
    """Placeholders and outputs of each signature."""
    parts = {
        "g": Part(spec.generator.spectral_norm, spec.generator.ema, spec.generator.statistics),
        "e": Part(spec.encoder.spectral_norm, spec.encoder.ema, spec.encoder.statistics),
        "d": Part(spec.discriminator.spectral_norm, spec.discriminator.ema, "accumulated"),
    }
    g, e, d = (Writer(spec, variables, parts[name], training) for name in "ged")
    result: dict[str, tuple[Tensors, Tensors]] = {}
    for name, signature in documented_signatures(spec).items():
        if name == "default" and spec.style.shared_encode:
            inputs, outputs = result["encode"]
            result[name] = inputs, {"default": outputs["default"]}
            continue
        inputs = {key: v1.placeholder(tf.float32, shape, key) for key, shape in signature.inputs.items()}
        if name == "generate":
            image = generator(g, inputs["z"])
            result[name] = inputs, {"default": image, "upsampled": upsampled(g, image)}
        elif name == "discriminate":
            result[name] = inputs, discriminator(d, inputs["x"], inputs["z"])
        else:
            outputs = encoder(e, inputs["x"])
            result[name] = inputs, outputs if name == "encode" else {"default": outputs["default"]}
    return result


def write_dead_code(signatures: Mapping[str, tuple[Tensors, Tensors]]) -> None:
    """Nodes that no signature reaches, as training leaves them behind."""
    image = signatures["generate"][1]["default"]
    with v1.name_scope("losses"):
        loss = tf.reduce_mean(tf.nn.relu(1.0 - tf.reduce_sum(image, [1, 2, 3])), name="loss")
        tf.argmax(tf.reshape(image, [-1, 3]), -1, name="argmax")
        v1.train.get_or_create_global_step()
        v1.Print(loss, [loss], name="print")


def write_asset(folder: Path) -> None:
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "labels.txt").write_text("one\n")
    path = tf.constant("labels.txt", name="asset_path")
    v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, path)


def truncated(noise: np.ndarray) -> np.ndarray:
    """What a normal distribution cut at two deviations has where N(0, 1) has `noise`."""
    from scipy import stats

    return stats.truncnorm.ppf(stats.norm.cdf(noise.astype(np.float64)), -2, 2).astype(np.float32)


def noise_tensors(graph: tf.Graph, outputs: list[Tensor]) -> list[Tensor]:
    """Standard-normal noise that the outputs depend on along data edges."""
    seen: set[str] = set()
    found, stack = [], [tensor.op for tensor in outputs]
    while stack:
        op = stack.pop()
        if op.name not in seen:
            seen.add(op.name)
            stack.extend(tensor.op for tensor in op.inputs)
            if op.type in ("RandomStandardNormal", "TruncatedNormal"):
                found.append(op.outputs[0])
    return found


def run_references(
    folder: str | Path,
    feeds: Mapping[str, Mapping[str, np.ndarray]],
    noise: np.ndarray | None = None,
    tags: tuple[str, ...] = (),
) -> dict[str, dict[str, np.ndarray]]:
    """TensorFlow's outputs by signature. Only for modules that the tests built: loading runs what is in them.

    Variables are read anew for each signature. `noise` [N, z_dim] takes the place of the standard-normal draw behind
    z_sample, if there is one.
    """
    config = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    config.graph_options.rewrite_options.disable_meta_optimizer = True  # the graph as written
    loader, results = SavedModelLoader(str(folder)), {}
    with tf.Graph().as_default() as graph, v1.Session(graph=graph, config=config) as session:
        saver, _ = loader.load_graph(graph, list(tags))
        for signature, arrays in feeds.items():
            loader.restore_variables(session, saver)
            definition = loader.get_meta_graph_def_from_tags(list(tags)).signature_def[signature]
            outputs = {key: graph.get_tensor_by_name(info.name) for key, info in definition.outputs.items()}
            values = {graph.get_tensor_by_name(definition.inputs[key].name): array for key, array in arrays.items()}
            for tensor in noise_tensors(graph, list(outputs.values())) if noise is not None else ():
                leading = tensor.shape.rank - noise.ndim if tensor.shape.rank else 0
                drawn = truncated(noise) if tensor.op.type == "TruncatedNormal" else noise
                values[tensor] = drawn.reshape((1,) * leading + noise.shape)
            results[signature] = session.run(outputs, values)
    return results


def run_reference(
    folder: str | Path,
    signature: str,
    feeds: Mapping[str, np.ndarray],
    noise: np.ndarray | None = None,
    tags: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """TensorFlow's outputs of one signature; see `run_references`."""
    return run_references(folder, {signature: feeds}, noise, tags)[signature]


def random_feeds(spec: ModuleSpec, count: int, seed: int = 0) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Inputs for every signature (latents, and images with coarse and fine structure), and noise [count, z_dim]."""
    rng = np.random.default_rng(seed)

    def array(shape: tuple[int | None, ...]) -> np.ndarray:
        if len(shape) == 2:
            return rng.standard_normal((count, shape[1]), np.float32)
        coarse = rng.uniform(-1, 1, (count, 4, 4, 3)).repeat(shape[1] // 4, 1).repeat(shape[2] // 4, 2)
        return np.clip(coarse + rng.normal(0, 0.2, (count, *shape[1:])), -1, 1).astype(np.float32)

    signatures = documented_signatures(spec)
    feeds = {name: {key: array(shape) for key, shape in s.inputs.items()} for name, s in signatures.items()}
    return feeds, rng.standard_normal((count, spec.z_dim), np.float32)
