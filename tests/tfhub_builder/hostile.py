"""Wrong and malicious modules, made from a good one.

`HOSTILE[name](good)` writes beside the folder `good` (built from `variants.PLAIN`) and returns the hostile folder or
archive. `marker(path)` is the file that an executed payload would create, `secret(path)` one that it would read.

Not here: two variables of one shape swapped in the bundle. Nothing in the file tells it apart from another training run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from .module import save_variables
from .payloads import add_init_op, add_on_control_edge, splice

Expect = Literal["refuse", "not_run", "consistent"]
Maker = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Hostile:
    """A maker of one hostile module.

    expect: "refuse": conversion must stop, naming the cause. "not_run": the payload is off every data path; refusing and
    converting rightly are both sound, running it is not. "consistent": a sound module of unusual numbers.
    """

    name: str
    expect: Expect
    make: Maker

    def __call__(self, good: Path) -> Path:
        path = good.parent / f"hostile_{self.name}"
        secret(path).write_bytes(b"secret01")
        return self.make(good, path)


HOSTILE: dict[str, Hostile] = {}


def hostile(expect: Expect = "refuse") -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        HOSTILE[make.__name__] = Hostile(make.__name__, expect, make)
        return make

    return register


def marker(path: Path) -> Path:
    return path.parent / f"{path.name.split('.')[0]}_marker"


def secret(path: Path) -> Path:
    return path.parent / f"{path.name.split('.')[0]}_secret"


# ---- helpers


def copy(good: Path, path: Path) -> Path:
    return Path(shutil.copytree(good, path, symlinks=True))


def edit(good: Path, path: Path, change: Callable[[saved_model_pb2.SavedModel], None]) -> Path:
    copy(good, path)
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    change(saved)
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    return path


def edit_variables(good: Path, path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    copy(good, path)
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    change(values)
    shutil.rmtree(path / "variables")
    (path / "variables").mkdir()
    save_variables(path, values)
    return path


def edit_bytes(good: Path, path: Path, name: str, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    copy(good, path)
    (path / name).write_bytes(change(bytearray((path / name).read_bytes())))
    return path


def flip(data: bytearray, at: float) -> bytearray:
    data[int(len(data) * at)] ^= 0x10
    return data


DATA, INDEX = "variables/variables.data-00000-of-00001", "variables/variables.index"
CONV = "GenEncWrapper/Generator/GBlock/conv0/w"

# ---- damaged or incomplete


@hostile()
def missing_signature(good: Path, path: Path) -> Path:
    return edit(good, path, lambda saved: saved.meta_graphs[0].signature_def.pop("encode"))


@hostile()
def missing_output(good: Path, path: Path) -> Path:
    return edit(good, path, lambda saved: saved.meta_graphs[0].signature_def["encode"].outputs.pop("z_stdev"))


@hostile()
def output_names_no_tensor(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        saved.meta_graphs[0].signature_def["generate"].outputs["default"].name = "no/such:0"

    return edit(good, path, change)


@hostile()
def two_graphs_of_equal_tags(good: Path, path: Path) -> Path:
    return edit(good, path, lambda saved: saved.meta_graphs.append(saved.meta_graphs[0]))


@hostile()
def garbage_graph(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, "saved_model.pb", lambda data: np.random.default_rng(0).bytes(len(data)))


@hostile()
def empty_graph(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, "saved_model.pb", lambda data: b"")


@hostile()
def truncated_graph(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, "saved_model.pb", lambda data: data[: len(data) // 2])


@hostile()
def truncated_data(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, DATA, lambda data: data[:-64])


@hostile()
def truncated_index(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, INDEX, lambda data: data[: len(data) // 2])


@hostile()
def flipped_data(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, DATA, lambda data: flip(data, 0.5))


@hostile()
def flipped_index(good: Path, path: Path) -> Path:
    return edit_bytes(good, path, INDEX, lambda data: flip(data, 0.4))


@hostile()
def missing_shard(good: Path, path: Path) -> Path:
    copy(good, path)
    (path / DATA).rename(path / "variables/variables.data-00000-of-00002")
    return path


@hostile()
def no_variables(good: Path, path: Path) -> Path:
    shutil.rmtree(copy(good, path) / "variables")
    return path


@hostile()
def missing_variable(good: Path, path: Path) -> Path:
    return edit_variables(good, path, lambda values: values.pop(f"{CONV}/ema_0.9999"))


@hostile()
def swapped_variables(good: Path, path: Path) -> Path:
    """Two variables of different shapes; of equal shapes, see the top of this file."""

    def change(values: dict[str, np.ndarray]) -> None:
        a, b = f"{CONV}/ema_0.9999", "GenEncWrapper/Generator/conv_2d/w/ema_0.9999"
        values[a], values[b] = values[b], values[a]

    return edit_variables(good, path, change)


@hostile()
def transposed_variable(good: Path, path: Path) -> Path:
    """As many numbers as the graph wants, in another shape."""

    def change(values: dict[str, np.ndarray]) -> None:
        name = "GenEncWrapper/Encoder/initial_conv/w/ema_0.9999"
        values[name] = np.ascontiguousarray(values[name].transpose(3, 2, 0, 1))

    return edit_variables(good, path, change)


@hostile()
def integer_variable(good: Path, path: Path) -> Path:
    def change(values: dict[str, np.ndarray]) -> None:
        values[f"{CONV}/ema_0.9999"] = values[f"{CONV}/ema_0.9999"].view(np.int32)

    return edit_variables(good, path, change)


# ---- numbers


@hostile()
def nan_weights(good: Path, path: Path) -> Path:
    return edit_variables(good, path, lambda values: values[f"{CONV}/ema_0.9999"].fill(np.nan))


@hostile()
def one_infinite_weight(good: Path, path: Path) -> Path:
    return edit_variables(good, path, lambda values: values[f"{CONV}/ema_0.9999"].put(7, np.inf))


@hostile()
def zero_counter(good: Path, path: Path) -> Path:
    name = "GenEncWrapper/Encoder/final_norm/accumulation_counter"
    return edit_variables(good, path, lambda values: values.update({name: np.float32(0)}))


@hostile()
def negative_variance(good: Path, path: Path) -> Path:
    name = "GenEncWrapper/Encoder/final_norm/accumulated_var"
    return edit_variables(good, path, lambda values: values.update({name: -values[name]}))


@hostile("consistent")
def one_eps_ten_times(good: Path, path: Path) -> Path:
    """One batch norm of the encoder has ten times the eps of the others: per layer it converts, in general not."""

    def change(saved: saved_model_pb2.SavedModel) -> None:
        nodes = {node.name: node for node in saved.meta_graphs[0].graph_def.node}
        scope = "GenEncWrapper_1/Encoder/stage_1/unit_0/norm_1/"
        (add,) = (n for n in nodes.values() if n.op == "AddV2" and n.name.startswith(scope))
        (eps,) = (nodes[name] for name in add.input if nodes[name].op == "Const")
        value = tf.make_ndarray(eps.attr["value"].tensor) * np.float32(10)
        eps.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.float32))

    return edit(good, path, change)


@hostile()
def wrong_rank_input(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        meta = saved.meta_graphs[0]
        info = meta.signature_def["generate"].inputs["z"]
        (node,) = (node for node in meta.graph_def.node if node.name == info.name.split(":")[0])
        for shape in (info.tensor_shape, node.attr["shape"].shape):
            shape.dim.add(size=1)

    return edit(good, path, change)


# ---- operations on the data path


@hostile()
def unknown_operation(good: Path, path: Path) -> Path:
    return edit(good, path, splice("generate", "default", lambda x: tf.cumsum(x, 1)))


@hostile()
def unregistered_operation(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", tf.erf if hasattr(tf, "erf") else tf.math.erf)(saved)
        for node in saved.meta_graphs[0].graph_def.node:
            node.op = "NoSuchOp" if node.op == "Erf" else node.op

    return edit(good, path, change)


@hostile()
def random_image(good: Path, path: Path) -> Path:
    return edit(good, path, splice("generate", "default", lambda x: x + tf.random.normal(tf.shape(x)) * 1e-3))


@hostile()
def data_dependent_branch(good: Path, path: Path) -> Path:
    def branch(x: tf.Tensor) -> tf.Tensor:
        return tf.compat.v1.cond(tf.reduce_mean(x) > 10.0, lambda: x * 0.5, lambda: x)

    return edit(good, path, splice("generate", "default", branch))


@hostile()
def endless_loop(good: Path, path: Path) -> Path:
    def loop(x: tf.Tensor) -> tf.Tensor:
        return tf.compat.v1.while_loop(lambda y: tf.reduce_max(y) < 1e9, lambda y: y * 1.0, [x])

    return edit(good, path, splice("generate", "default", loop))


@hostile()
def cyclic_graph(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", lambda x: tf.identity(tf.identity(x, "first"), "second"))(saved)
        (node,) = (n for n in saved.meta_graphs[0].graph_def.node if n.name.endswith("first"))
        node.input[0] = node.name.replace("first", "second")

    return edit(good, path, change)


@hostile()
def huge_constant(good: Path, path: Path) -> Path:
    """A constant of 4 TB, declared by its shape alone."""

    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", lambda x: x + tf.reduce_sum(tf.constant(0.0, shape=[2, 2], name="huge")))(saved)
        (node,) = (n for n in saved.meta_graphs[0].graph_def.node if n.name.endswith("huge"))
        for dim in node.attr["value"].tensor.tensor_shape.dim:
            dim.size = 10**6

    return edit(good, path, change)


@hostile()
def huge_fill(good: Path, path: Path) -> Path:
    """4 TB made by constant folding."""
    big = 10**6
    return edit(
        good, path, splice("generate", "default", lambda x: x + tf.reduce_sum(tf.raw_ops.Fill(dims=[big, big], value=0.0)))
    )


def _read_bytes(text: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """x, after something of `text` went into it."""
    return x + 0.0 * tf.cast(tf.strings.length(text), tf.float32)


@hostile()
def read_file(good: Path, path: Path) -> Path:
    name = str(secret(path))
    return edit(good, path, splice("generate", "default", lambda x: _read_bytes(tf.io.read_file(name), x)))


@hostile()
def read_file_folded(good: Path, path: Path) -> Path:
    """A file read among the weights, where constant folding would run it."""
    name, weight = str(secret(path)), "GenEncWrapper/Generator/conv_2d/b/ema_0.9999"
    return edit(good, path, splice(None, weight, lambda x: _read_bytes(tf.io.read_file(name), x)))


@hostile()
def whole_file_reader(good: Path, path: Path) -> Path:
    def read(x: tf.Tensor) -> tf.Tensor:
        queue = tf.raw_ops.FIFOQueueV2(component_types=[tf.string])
        with tf.control_dependencies([tf.raw_ops.QueueEnqueueV2(handle=queue, components=[str(secret(path))])]):
            reader = tf.raw_ops.WholeFileReaderV2()
        return _read_bytes(tf.raw_ops.ReaderReadV2(reader_handle=reader, queue_handle=queue)[1], x)

    return edit(good, path, splice("generate", "default", read))


@hostile()
def matching_files(good: Path, path: Path) -> Path:
    def count(x: tf.Tensor) -> tf.Tensor:
        return x + 0.0 * tf.cast(tf.size(tf.io.matching_files(str(path.parent / "*"))), tf.float32)

    return edit(good, path, splice("generate", "default", count))


@hostile()
def py_func(good: Path, path: Path) -> Path:
    def touch(x: tf.Tensor) -> tf.Tensor:
        return tf.compat.v1.py_func(lambda y: (marker(path).touch(), y)[1], [x], tf.float32)

    return edit(good, path, splice("generate", "default", touch))


@hostile()
def print_identity(good: Path, path: Path) -> Path:
    return edit(good, path, splice("generate", "default", lambda x: tf.compat.v1.Print(x, [x], "printed")))


@hostile()
def restore_from_elsewhere(good: Path, path: Path) -> Path:
    """RestoreV2 on the data path reads another bundle."""

    def restore(x: tf.Tensor) -> tf.Tensor:
        prefix, name = str(good / "variables" / "variables"), "GenEncWrapper/Generator/conv_2d/b"
        return x + 0.0 * tf.raw_ops.RestoreV2(
            prefix=prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[tf.float32]
        )[0]  # fmt: skip

    return edit(good, path, splice("generate", "default", restore))


@hostile("not_run")
def function_writes_file(good: Path, path: Path) -> Path:
    """A function call on the data path, whose body writes on a control edge."""

    def call(x: tf.Tensor) -> tf.Tensor:
        @tf.function(autograph=False)
        def body(y: tf.Tensor) -> tf.Tensor:
            with tf.control_dependencies([tf.io.write_file(str(marker(path)), "x")]):
                return tf.identity(y)

        return body(x)

    return edit(good, path, splice("generate", "default", call))


@hostile()
def recursive_function(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", tf.function(tf.function(tf.tanh, autograph=False), autograph=False))(saved)
        library = saved.meta_graphs[0].graph_def.library.function
        (outer,) = (f for f in library if any("PartitionedCall" in node.op for node in f.node_def))
        for node in outer.node_def:
            if "PartitionedCall" in node.op:
                node.attr["f"].func.name = outer.signature.name

    return edit(good, path, change)


# ---- operations off the data path: on control edges, at initialisation

_WRITERS: dict[str, Callable[[Path], tf.Operation]] = {
    "write_file": lambda path: tf.io.write_file(str(marker(path)), "x"),
    "print_to_file": lambda path: tf.print("x", output_stream=f"file://{marker(path)}"),
    "save": lambda path: tf.raw_ops.SaveV2(
        prefix=str(marker(path)), tensor_names=["x"], shape_and_slices=[""], tensors=[tf.constant(1.0)]
    ),
}


def _register_writers() -> None:
    for name, write in _WRITERS.items():

        def on_control_edge(good: Path, path: Path, write: Callable = write) -> Path:
            return edit(good, path, add_on_control_edge("generate", "default", lambda: write(path)))

        HOSTILE[f"{name}_on_control_edge"] = Hostile(f"{name}_on_control_edge", "not_run", on_control_edge)
        for place in ("main_op", "legacy_init_op", "init_signature"):

            def at_init(good: Path, path: Path, write: Callable = write, place: str = place) -> Path:
                return edit(good, path, add_init_op(place, lambda: write(path)))

            HOSTILE[f"{name}_as_{place}"] = Hostile(f"{name}_as_{place}", "not_run", at_init)


_register_writers()

# ---- files and folders


@hostile()
def only_pbtxt(good: Path, path: Path) -> Path:
    """The text form alone, with a payload."""
    edit(good, path, add_init_op("main_op", lambda: tf.io.write_file(str(marker(path)), "x")))
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (path / "saved_model.pbtxt").write_text(str(saved))
    (path / "saved_model.pb").unlink()
    return path


@hostile("not_run")
def pbtxt_twin(good: Path, path: Path) -> Path:
    """The good binary form, and beside it a text form with a payload."""
    only_pbtxt(good, path)
    shutil.copy(good / "saved_model.pb", path)
    return path


@hostile("not_run")
def asset_outside(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", tf.identity)(saved)
        asset = saved.meta_graphs[0].asset_file_def.add(filename=f"../../{secret(path).name}")
        asset.tensor_info.name = "hostile/asset:0"

    return edit(good, path, change)


@hostile("not_run")
def keras_lambda(good: Path, path: Path) -> Path:
    copy(good, path)
    (path / "keras_metadata.pb").write_bytes(b"\x80\x04cposix\nsystem\n")
    return path


def _link(good: Path, path: Path, name: str) -> Path:
    copy(good, path)
    outside = path.parent / f"{path.name}_outside_{Path(name).name}"
    shutil.move(path / name, outside)
    (path / name).symlink_to(outside)
    return path


@hostile()
def linked_data(good: Path, path: Path) -> Path:
    return _link(good, path, DATA)


@hostile()
def linked_variables(good: Path, path: Path) -> Path:
    return _link(good, path, "variables")


@hostile()
def linked_graph(good: Path, path: Path) -> Path:
    return _link(good, path, "saved_model.pb")


@hostile()
def graph_is_fifo(good: Path, path: Path) -> Path:
    """Opening it for reading would wait for ever."""
    copy(good, path)
    (path / "saved_model.pb").unlink()
    os.mkfifo(path / "saved_model.pb")
    return path


@hostile()
def sparse_graph(good: Path, path: Path) -> Path:
    """saved_model.pb of 64 GB that takes no room on disk."""
    copy(good, path)
    os.truncate(path / "saved_model.pb", 64 * 2**30)
    return path
