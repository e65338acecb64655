"""Puts extra operations into a SavedModel's graph, without loading it."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

v1 = tf.compat.v1
Change = Callable[[saved_model_pb2.SavedModel], None]
TAPPED = "hostile_tapped"


def _graft(meta: meta_graph_pb2.MetaGraphDef, graph: tf.Graph, source: str) -> None:
    """Adds the graph's nodes; its placeholder stands for the tensor `source`."""
    definition = graph.as_graph_def()
    names = {TAPPED: source.removesuffix(":0"), f"{TAPPED}:0": source, f"^{TAPPED}": f"^{source.split(':')[0]}"}
    for node in definition.node:
        if node.name != TAPPED:
            added = meta.graph_def.node.add()
            added.CopyFrom(node)
            added.input[:] = [names.get(name, name) for name in node.input]
    known = {function.signature.name for function in meta.graph_def.library.function}
    meta.graph_def.library.function.extend(f for f in definition.library.function if f.signature.name not in known)


def splice(signature: str | None, key: str, build: Callable[[tf.Tensor], tf.Tensor]) -> Change:
    """build(output) in place of the output `key` of a signature; without a signature, build(value) in place of the
    value of the variable `key`, wherever it is read."""

    def change(saved: saved_model_pb2.SavedModel) -> None:
        meta = saved.meta_graphs[0]
        if signature is None:
            reads = [n for n in meta.graph_def.node if n.op == "ReadVariableOp" and n.input[0] == key]
            tapped = reads[-1].name
        else:
            tapped = meta.signature_def[signature].outputs[key].name
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, name=TAPPED)
            with v1.name_scope("hostile"):
                tf.constant("x", name="asset")
                result = build(x)
        if signature is None:
            for node in meta.graph_def.node:
                node.input[:] = [result.op.name if name == tapped else name for name in node.input]
        else:
            meta.signature_def[signature].outputs[key].name = result.name
        _graft(meta, graph, tapped if ":" in tapped else f"{tapped}:0")

    return change


def add_on_control_edge(signature: str, key: str, build: Callable[[], tf.Operation]) -> Change:
    def guarded(x: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([build()]):
            return tf.identity(x)

    return splice(signature, key, guarded)


def add_init_op(place: str, build: Callable[[], tf.Operation]) -> Change:
    """The operation as what TensorFlow runs when it loads the module; `place` is one of its three ways to say so."""

    def change(saved: saved_model_pb2.SavedModel) -> None:
        meta = saved.meta_graphs[0]
        with tf.Graph().as_default() as graph, v1.name_scope("hostile"), tf.control_dependencies([build()]):
            init = tf.no_op(name="init")
        _graft(meta, graph, "")
        if place == "init_signature":
            info = meta_graph_pb2.TensorInfo(name=init.name)
            meta.signature_def["__saved_model_init_op"].outputs["__saved_model_init_op"].CopyFrom(info)
        else:
            collection = "saved_model_main_op" if place == "main_op" else "legacy_init_op"
            meta.collection_def[collection].node_list.value.append(init.name)

    return change
