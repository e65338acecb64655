"""Modules with operations that a converter must not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from .payloads import add_init_op, add_on_control_edge, splice
from .registry import HOSTILE, Hostile, edit, hostile, marker, secret

# ---- operations on the data path


@hostile()
def unknown_operation(good: Path, path: Path) -> Path:
    return edit(good, path, splice("generate", "default", lambda x: tf.cumsum(x, 1)))


@hostile()
def unregistered_operation(good: Path, path: Path) -> Path:
    def change(saved: saved_model_pb2.SavedModel) -> None:
        splice("generate", "default", tf.math.erf)(saved)
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


@hostile("not_run")
def cyclic_restore(good: Path, path: Path) -> Path:
    """What a variable is restored from depends on itself."""

    def change(saved: saved_model_pb2.SavedModel) -> None:
        nodes = saved.meta_graphs[0].graph_def.node
        variable = next(node.name for node in nodes if node.op == "VarHandleOp")
        nodes.add(name="first", op="Identity", input=["second"])
        nodes.add(name="second", op="Identity", input=["first"])
        nodes.add(name="restore", op="AssignVariableOp", input=[variable, "first"])

    return edit(good, path, change)


@hostile("refuse_port")
def doubled_sums(good: Path, path: Path) -> Path:
    """Two to the power of 60 terms, if sums are cut term by term."""

    def double(x: tf.Tensor) -> tf.Tensor:
        for _ in range(60):
            x = 0.5 * x + 0.5 * x
        return tf.concat([x[..., :1], x[..., 1:]], -1)

    return edit(good, path, splice("generate", "default", double))


@hostile("refuse_port")
def wide_constants(good: Path, path: Path) -> Path:
    """300 to the power of 4 ways from a factor to where it comes from."""

    def multiply(x: tf.Tensor) -> tf.Tensor:
        factor = tf.identity(tf.constant(1.0))
        for _ in range(4):
            factor = tf.add_n([factor] * 300) * tf.constant(1 / 300)
        return x * factor * 1.25

    return edit(good, path, splice("generate", "default", multiply))


@hostile()
def huge_product(good: Path, path: Path) -> Path:
    """4 TB made by a product of two vectors."""

    def product(x: tf.Tensor) -> tf.Tensor:
        row = tf.ones([1, 10**6])
        return x + tf.reduce_sum(tf.matmul(row, row, transpose_a=True))

    return edit(good, path, splice("generate", "default", product))


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

    def fill(x: tf.Tensor) -> tf.Tensor:
        return x + tf.reduce_sum(tf.raw_ops.Fill(dims=[10**6, 10**6], value=0.0))

    return edit(good, path, splice("generate", "default", fill))


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


@hostile("consistent")
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
