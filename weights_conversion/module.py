"""A TF-Hub module folder, read as data: graph, signatures and variables. Nothing is loaded as a program."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.errors import ConversionError, DamagedModule, tensorflow
from weights_conversion.index import check_index

GRAPH = "saved_model.pb"
BUNDLE = "variables/variables"
MAX_GRAPH_BYTES = 1 << 30
MAX_BUNDLE_BYTES = 16 << 30
FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Signature:
    """Names of the graph's tensors by the names of a signature's inputs and outputs, as far as they are float32."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    shapes: dict[str, tuple[int | None, ...]]  # of inputs of known rank; None where a size is unknown
    others: tuple[str, ...] = ()  # inputs and outputs of other types


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
            name: _signature(definition)
            for name, definition in sorted(graph.signature_def.items())
            if not name.startswith("__saved_model_")  # operations to run on loading, which nothing here does
        }
        self.variables = Variables(folder / BUNDLE, _restored_names(self.nodes), self.nodes)
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


def _signature(definition: Any) -> Signature:
    float32 = tensorflow().float32.as_datatype_enum
    sides: list[dict[str, str]] = []
    shapes, others = {}, []
    for side in (definition.inputs, definition.outputs):
        plain = {k: i for k, i in side.items() if i.WhichOneof("encoding") == "name" and i.dtype == float32}
        others += sorted(set(side) - set(plain))
        sides.append({key: plain[key].name for key in sorted(plain)})
        if len(sides) == 1:
            known = {key: info.tensor_shape for key, info in plain.items() if not info.tensor_shape.unknown_rank}
            shapes = {key: tuple(None if d.size < 0 else d.size for d in shape.dim) for key, shape in known.items()}
    return Signature(sides[0], sides[1], shapes, tuple(others))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Restored:
    """Where a variable's value is in the bundle: a key, and the slice of what it holds; "" is all of it."""

    key: str
    slice: str = ""


def _restored_names(nodes: dict[str, Any]) -> dict[str, Restored]:
    """By variable node, from the graph's own saver: Assign(variable, RestoreV2(…, tensor_names, shape_and_slices))."""
    keys: dict[str, Restored] = {}

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
        names, slices = (source(restore, i)[0] for i in (1, 2))
        if names is None or names.op != "Const":
            continue
        try:
            listed = [names, *([] if slices is None or slices.op != "Const" else [slices])]
            found = [_strings(constant)[int(port or 0)].decode("utf-8", "replace") for constant in listed]
        except (IndexError, ValueError) as error:
            raise ConversionError(f"node {restore.name!r} (RestoreV2) is malformed: {error}"[:300]) from error
        key = Restored(*found)
        variable = node.input[0].partition(":")[0]
        if keys.setdefault(variable, key) != key:
            raise ConversionError(f"variable {variable!r} is restored from both {keys[variable].key!r} and {key.key!r}")
    return keys


def _strings(node: Any) -> list[bytes]:
    """Values of a constant of strings; equal ones at its end are stored once."""
    tensor = node.attr["value"].tensor
    values = list(tensor.string_val)
    missing = math.prod(d.size for d in tensor.tensor_shape.dim) - len(values)
    return values + values[-1:] * min(max(missing, 0), 1 << 20)


def _sliced(array: np.ndarray, text: str, name: str) -> np.ndarray:
    """A part as the saver writes it: the sizes of all, then a start and a length, or "-" for all, by axis."""
    *sizes, spans = text.split(" ")
    try:
        axes = [
            (0, size) if span == "-" else tuple(map(int, span.split(",")))
            for span, size in zip(spans.split(":"), array.shape, strict=True)
        ]
        fits = all(low >= 0 <= n and low + n <= size for (low, n), size in zip(axes, array.shape, strict=True))
        if not fits or tuple(map(int, sizes)) != array.shape:
            raise ValueError(f"they do not fit {list(array.shape)}")
    except ValueError as error:
        raise DamagedModule(f"variable {name!r} has slices that cannot be read, {text[:80]!r}: {error}") from error
    return array[tuple(slice(low, low + n) for low, n in axes)]


class Variables:
    """Values of a variables bundle; its checksums are verified as they are read."""

    def __init__(self, prefix: Path, restored: dict[str, Restored], nodes: dict[str, Any]):
        self.prefix, self.restored, self._nodes = prefix, restored, nodes
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
        shape, dtype = tf.TensorShape(node.attr["shape"].shape), tf.dtypes.as_dtype(node.attr["dtype"].type)
        default = shared if shared in self.keys else node.name
        where = self.restored.get(node.name) or self._partition(default) or Restored(default)
        key = where.key
        if key not in self.keys:
            similar = sorted(name for name in self.keys if name.endswith("/" + key.rpartition("/")[2]))[:3]
            raise DamagedModule(
                f"variable {key!r} (node {node.name!r}) is not in {self.prefix}.index, which has {len(self.keys)} "
                f"variables{', such as ' + ', '.join(similar) if similar else ''}"
            )
        self.used.add(key)
        value = self._tensor(key)
        if where.slice:
            value = _sliced(value, where.slice, key)
        if not shape.is_compatible_with(value.shape) or dtype.base_dtype.as_numpy_dtype != value.dtype:
            raise DamagedModule(
                f"variable {key!r} is {value.dtype}{list(value.shape)} in {self.prefix}.index, but node {node.name!r} "
                f"is {dtype.base_dtype.name}{shape}: the variables belong to another module"
            )
        if value.dtype.name in FLOATS and not np.isfinite(value.astype(np.float32)).all():
            raise DamagedModule(f"variable {key!r} holds values that are not finite")
        return value

    def _partition(self, name: str) -> Restored | None:
        """A partitioned variable's part, where no saver says so: "w/part_1" lies in "w" behind "w/part_0"."""
        whole, found, number = name.rpartition("/part_")
        if name in self.keys or not found or not number.isdecimal() or whole not in self.keys:
            return None
        full = tuple(self._reader.get_variable_to_shape_map()[whole])
        parts: list[tuple[int, ...]] = []
        while (node := self._nodes.get(f"{whole}/part_{len(parts)}")) is not None:
            parts.append(tuple(d.size for d in node.attr["shape"].shape.dim))
        axes = [axis for axis, size in enumerate(full) if any(part[axis : axis + 1] != (size,) for part in parts)]
        if int(number) >= len(parts) or len(axes) > 1 or not full:
            return None
        axis = axes[0] if axes else 0
        low, size = sum(part[axis] for part in parts[: int(number)]), parts[int(number)][axis]
        spans = ":".join(f"{low},{size}" if i == axis else "-" for i in range(len(full)))
        return Restored(whole, " ".join([*map(str, full), spans]))

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
            raise DamagedModule(f"variable {key!r} cannot be read from {self.prefix}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
