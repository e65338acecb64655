"""Modules that are incomplete, damaged, of wrong numbers, or no plain files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from .payloads import add_init_op, splice
from .registry import copy, edit, edit_bytes, edit_variables, hostile, marker, secret

DATA, INDEX = "variables/variables.data-00000-of-00001", "variables/variables.index"
CONV = "GenEncWrapper/Generator/GBlock/conv0/w"


def flip(data: bytearray, at: float) -> bytearray:
    data[int(len(data) * at)] ^= 0x10
    return data


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


@hostile("not_run")
def checkpoint_folder(good: Path, path: Path) -> Path:
    """A folder named as the bundle, in which a text file names another bundle, outside."""
    outside = edit_variables(
        good, path.parent / f"{path.name}_outside", lambda values: values.update({k: -v for k, v in values.items()})
    )
    copy(good, path)
    (path / "variables/variables").mkdir()
    elsewhere = outside / "variables/variables"
    (path / "variables/variables/checkpoint").write_text(f'model_checkpoint_path: "{elsewhere}"\n')
    return path


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
