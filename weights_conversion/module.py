"""A TF-Hub module folder, read as data: graph, signatures and variables. Nothing is loaded as a program."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError, tensorflow
from weights_conversion.index import check_index

GRAPH = "saved_model.pb"
BUNDLE = "variables/variables"
MAX_GRAPH_BYTES = 1 << 30
MAX_BUNDLE_BYTES = 16 << 30
FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Signature:
    """Names of the graph's tensors by the names of a signature's inputs and outputs."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    shapes: dict[str, tuple[int | None, ...]]  # of inputs; None where unknown


class Module:
    """The inference graph of a module folder.

    Raises:
        ConversionError: the folder is no TF1 module, or holds links, or is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        paths = self._files()
        graph = self._parse(paths[0])
        self.nodes: dict[str, Any] = {}
        for node in graph.graph_def.node:
            if node.name in self.nodes:
                raise ConversionError(f"{folder / GRAPH} has two nodes named {node.name!r}")
            self.nodes[node.name] = node
        self.functions = {f.signature.name: f for f in graph.graph_def.library.function}
        self.signatures = {
            name: _signature(name, definition)
            for name, definition in sorted(graph.signature_def.items())
            if not name.startswith("__saved_model_")  # operations to run on loading, which nothing here does
        }
        self.variables = Variables(folder / BUNDLE, _restored_names(self.nodes))
        self.sha256 = {str(path.relative_to(folder)): _digest(path) for path in paths}

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ConversionError(f"{self.folder} is no folder")
        parent = self.folder / "variables"
        data = sorted(path for path in parent.glob("variables.data-*-of-*")) if not parent.is_symlink() else []
        paths = [self.folder / GRAPH, self.folder / f"{BUNDLE}.index", *data]
        for path in paths:
            if not path.is_file():
                raise ConversionError(
                    f"{self.folder} is no TF-Hub module of TensorFlow 1: it lacks {path.relative_to(self.folder)}"
                )
            if any(part.is_symlink() for part in (path, parent)):
                raise ConversionError(f"{path} is a link; copy the module's own files into one folder")
        if not data:
            raise ConversionError(f"{parent} has no variables.data-… file: the module is incomplete")
        if (size := sum(path.stat().st_size for path in paths)) > MAX_BUNDLE_BYTES:
            raise ConversionError(f"{self.folder} has {size} bytes, more than any BigBiGAN module")
        return paths

    def _parse(self, path: Path) -> Any:
        """The MetaGraph without tags, which is the inference graph of a TF1 hub module; or the only one."""
        tensorflow()
        from google.protobuf.message import DecodeError
        from tensorflow.core.protobuf import saved_model_pb2

        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise ConversionError(f"{path} has more than {MAX_GRAPH_BYTES} bytes; a module's graph is far smaller")
        model = saved_model_pb2.SavedModel()
        try:
            model.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ConversionError(f"{path} is no saved model: {error}; download the module anew") from error
        graphs = list(model.meta_graphs)
        untagged = graphs if len(graphs) == 1 else [graph for graph in graphs if not graph.meta_info_def.tags]
        if len(untagged) != 1:
            tags = [sorted(graph.meta_info_def.tags) for graph in graphs]
            raise ConversionError(f"{path} should have one graph without tags, as TF1 hub modules do; it has {tags}")
        return untagged[0]


def _signature(name: str, definition: Any) -> Signature:
    tf = tensorflow()
    for side in (definition.inputs, definition.outputs):
        for key, info in side.items():
            if info.WhichOneof("encoding") != "name" or info.dtype != tf.float32.as_datatype_enum:
                raise ConversionError(f"signature {name!r}: {key!r} is no float32 tensor")
    for key, info in definition.inputs.items():
        if info.tensor_shape.unknown_rank:
            raise ConversionError(f"signature {name!r}: input {key!r} has no known shape")
    shapes = {
        key: tuple(None if d.size < 0 else d.size for d in info.tensor_shape.dim)
        for key, info in definition.inputs.items()
    }
    inputs, outputs = ({k: side[k].name for k in sorted(side)} for side in (definition.inputs, definition.outputs))
    return Signature(inputs, outputs, shapes)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _restored_names(nodes: dict[str, Any]) -> dict[str, str]:
    """Checkpoint keys by variable node, from the graph's own saver: Assign(variable, RestoreV2(…, tensor_names, …))."""
    keys: dict[str, str] = {}

    def source(node: Any, index: int) -> tuple[Any, str]:
        """The node and output behind an input, past one Identity."""
        name, _, port = node.input[index].partition(":") if len(node.input) > index else ("", "", "")
        found = nodes.get(name)
        past = found is not None and found.op == "Identity" and node.op != "Identity"
        return source(found, 0) if past else (found, port)

    for node in nodes.values():
        if node.op not in ("Assign", "AssignVariableOp") or len(node.input) < 2:
            continue
        restore, port = source(node, 1)
        if restore is None or restore.op != "RestoreV2":
            continue
        names, _ = source(restore, 1)
        if names is None or names.op != "Const":
            continue
        try:
            key = names.attr["value"].tensor.string_val[int(port or 0)].decode("utf-8", "replace")
        except (IndexError, ValueError) as error:
            raise ConversionError(f"node {restore.name!r} (RestoreV2) is malformed: {error}"[:300]) from error
        variable = node.input[0].partition(":")[0]
        if keys.setdefault(variable, key) != key:
            raise ConversionError(f"variable {variable!r} is restored from both {keys[variable]!r} and {key!r}")
    return keys


class Variables:
    """Values of a variables bundle; its checksums are verified as they are read."""

    def __init__(self, prefix: Path, restored: dict[str, str]):
        self.prefix, self.restored = prefix, restored
        self.used: set[str] = set()

    @cached_property
    def _reader(self) -> Any:
        tf = tensorflow()
        check_index(self.prefix)
        try:
            # Not tf.train.load_checkpoint: for a folder of that name it follows a text file to anywhere.
            reader = tf.compat.v1.train.NewCheckpointReader(str(self.prefix))
            shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        except (tf.errors.OpError, RuntimeError, ValueError, IndexError) as error:  # IndexError: out of range
            raise ConversionError(f"{self.prefix}.index cannot be read: {_first_line(error)}") from error
        size = sum(path.stat().st_size for path in self.prefix.parent.glob("variables.data-*"))
        claimed = sum(math.prod(shape) * max(dtypes[name].size, 1) for name, shape in shapes.items())
        if claimed > size:
            raise ConversionError(f"{self.prefix}.index describes {claimed} bytes; the data files hold {size}")
        return reader

    @cached_property
    def keys(self) -> set[str]:
        strings = tensorflow().string
        return {name for name, dtype in self._reader.get_variable_to_dtype_map().items() if dtype != strings}

    def read(self, node: Any) -> np.ndarray:
        """Value of the variable that a node makes.

        Raises:
            ConversionError: it is not in the bundle, or damaged, or of another shape or type than the node's.
        """
        tf = tensorflow()
        shared = node.attr["shared_name"].s.decode("utf-8", "replace")
        key = self.restored.get(node.name, shared if shared in self.keys else node.name)
        if key not in self.keys:
            similar = sorted(name for name in self.keys if name.endswith("/" + key.rpartition("/")[2]))[:3]
            raise ConversionError(
                f"variable {key!r} (node {node.name!r}) is not in {self.prefix}.index, which has {len(self.keys)} "
                f"variables{', such as ' + ', '.join(similar) if similar else ''}"
            )
        self.used.add(key)
        value = self._tensor(key)
        shape, dtype = tf.TensorShape(node.attr["shape"].shape), tf.dtypes.as_dtype(node.attr["dtype"].type)
        if not shape.is_compatible_with(value.shape) or dtype.base_dtype.as_numpy_dtype != value.dtype:
            raise ConversionError(
                f"variable {key!r} is {value.dtype}{list(value.shape)} in {self.prefix}.index, but node {node.name!r} "
                f"is {dtype.base_dtype.name}{shape} (a partitioned variable's slice, or another module's variables?)"
            )
        if value.dtype.name in FLOATS and not np.isfinite(value.astype(np.float32)).all():
            raise ConversionError(f"variable {key!r} holds values that are not finite")
        return value

    def check_unused(self) -> int:
        """Reads the variables that nothing asked for, so that damage anywhere is found; how many they are."""
        unused = self.keys - self.used
        for key in sorted(unused):
            self._tensor(key)
        return len(unused)

    def _tensor(self, key: str) -> np.ndarray:
        tf = tensorflow()
        try:
            return np.asarray(self._reader.get_tensor(key))
        except (tf.errors.OpError, RuntimeError, ValueError, IndexError) as error:
            raise ConversionError(
                f"variable {key!r} cannot be read from {self.prefix}: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
