"""Feature files: written from pieces (safetensors, a group of rows each) as .npz, .safetensors or .parquet, and read.

Of what is written, only one piece is in memory at a time. Equal rows and names give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bigbigan.evaluation.rows import Rows, StoredRows, check_finite

SUFFIXES = (".npz", ".safetensors", ".parquet")
MAX_HEADER_BYTES = 99_000_000  # safetensors reads headers up to 100 MB; a megabyte is for the tensors' entries

Pieces = Callable[[str], Iterator[NDArray[np.float32]]]  # the rows of an output, piece by piece
# What writes a whole: path, names of rows, width by output, rows.
Writer = Callable[[Path, list[str], dict[str, int], Pieces], None]


def feature_writer(output: Path, names: list[str]) -> Writer:
    """What writes `output`, by its suffix. Refuses before any work what would fail at its end.

    Raises:
        ValueError: another suffix, or more names than a .safetensors header may hold.
        ImportError: parquet without pyarrow.
    """
    suffix = output.suffix.lower()
    if suffix == ".npz":
        return _write_npz
    if suffix == ".safetensors":
        if len(_safetensors_header(names, {})) > MAX_HEADER_BYTES:
            raise ValueError(f"{output}: a .safetensors header cannot hold {len(names)} names; use .npz or .parquet")
        return _write_safetensors
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError("writing .parquet needs pyarrow: pip install 'bigbigan[eval]'") from error
        return _write_parquet
    raise ValueError(f"{output}: cannot write {suffix or 'no suffix'!r}; use {', '.join(SUFFIXES)}")


def _write_npz(path: Path, names: list[str], widths: dict[str, int], pieces: Pieces) -> None:
    def write(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> None:
        # ZipInfo's own date, 1980, so that equal content gives equal bytes
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.tobytes())

    with zipfile.ZipFile(path, "w") as archive:
        for name, width in widths.items():
            write(name, np.dtype("<f4"), (len(names), width), pieces(name))
        text = np.dtype(f"<U{max(map(len, names))}")
        write("paths", text, (len(names),), (np.array(names[i : i + 4096], text) for i in range(0, len(names), 4096)))


def _write_safetensors(path: Path, names: list[str], widths: dict[str, int], pieces: Pieces) -> None:
    header = _safetensors_header(names, widths)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in widths:
            for rows in pieces(name):
                file.write(rows.tobytes())


def _safetensors_header(names: list[str], widths: dict[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"paths": json.dumps(names)}}
    offset = 0
    for name, width in widths.items():
        end = offset + 4 * width * len(names)
        header[name] = {"dtype": "F32", "shape": [len(names), width], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _write_parquet(path: Path, names: list[str], widths: dict[str, int], pieces: Pieces) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [(name, pyarrow.list_(pyarrow.float32(), width)) for name, width in widths.items()]
    schema = pyarrow.schema([("path", pyarrow.string()), *columns])
    done = 0
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for chunks in zip(*map(pieces, widths), strict=True):
            number = len(chunks[0])
            arrays = [
                pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), width)
                for rows, width in zip(chunks, widths.values(), strict=True)
            ]
            paths = pyarrow.array(names[done : done + number], pyarrow.string())
            writer.write_table(pyarrow.Table.from_arrays([paths, *arrays], schema=schema))
            done += number


def read_features(path: str | Path, *, rows: int | None = None, prefer: Sequence[str] = ()) -> dict[str, Rows]:
    """Features [N, D] by name, from what `encode` wrote or from any file of such arrays.

    .safetensors and .npy stay on the disk until they are indexed; .npz and .parquet are read whole. Texts and
    labels (one integer a row) are left out.

    Args:
        rows: how many there must be.
        prefer: read these alone, if the file holds any of them.

    Raises:
        ValueError: another suffix, no such file, no features in it, another number of rows, NaN or infinity.
        ImportError: parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path}: cannot read features from {path.suffix or 'no suffix'!r}; use {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `bigbigan encode` writes one")
    try:
        arrays = _READERS[path.suffix.lower()](path, prefer)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{path} is no readable feature file: {error}") from error
    features: dict[str, Rows] = {}
    for name, array in arrays.items():
        if array.ndim == 1 and array.dtype.kind in "iu":
            continue  # labels
        if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.shape[1]:
            raise ValueError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}; expected numbers [N, D], or leave it out"
            )
        if rows is not None and len(array) != rows:
            raise ValueError(
                f"{path}: {name} has {len(array)} rows for {rows} images; give one row an image, in their order"
            )
        stored = StoredRows(array)
        features[name] = stored if isinstance(array, np.memmap) else stored[:]
        check_finite(features[name], f"{path}: {name}")
    if not features:
        raise ValueError(f"{path} holds no features")
    return features


def feature_names(path: str | Path) -> list[str] | None:
    """The names of a feature file's rows, as `encode` writes them (`paths`, or a Parquet column `path`); None without.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(path)
    suffix, found = path.suffix.lower(), None
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = archive["paths"].tolist() if "paths" in archive.files else None
        elif suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            found = json.loads(metadata["paths"]) if "paths" in metadata else None
        elif suffix == ".parquet":
            from pyarrow import parquet

            if "path" in parquet.read_schema(path).names:
                found = parquet.read_table(path, columns=["path"])["path"].to_pylist()
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:  # Arrow's errors are these, too
        raise ValueError(f"{path} does not name its rows: {error}") from error
    if found is not None and not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} has paths that are no text; `bigbigan encode` writes one name a row")
    return found


def _chosen(names: Sequence[str], prefer: Sequence[str]) -> list[str]:
    return [name for name in names if name in prefer] or list(names)


def _read_npy(path: Path, prefer: Sequence[str]) -> dict[str, Any]:
    return {"features": np.load(path, mmap_mode="r")}


def _read_npz(path: Path, prefer: Sequence[str]) -> dict[str, Any]:
    with np.load(path) as archive:
        return {name: array for name in _chosen(archive.files, prefer) if (array := archive[name]).dtype.kind != "U"}


def _read_safetensors(path: Path, prefer: Sequence[str]) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:  # checks header, types and offsets
        names = _chosen(list(file.keys()), prefer)
    with open(path, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    found = {}
    for name in names:
        kind, shape, offset = header[name]["dtype"], header[name]["shape"], header[name]["data_offsets"][0]
        if kind[0] in "IU" and len(shape) == 1:
            continue  # labels
        if kind not in types:
            raise ValueError(f"{name} is {kind}; expected one of {', '.join(types)}")
        found[name] = np.memmap(path, types[kind], "r", start + offset, tuple(shape))
    return found


def _read_parquet(path: Path, prefer: Sequence[str]) -> dict[str, Any]:
    try:
        import pyarrow.compute
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'bigbigan[eval]'") from error
    try:
        table = parquet.read_table(path, columns=_chosen(parquet.read_schema(path).names, prefer))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            continue
        if pyarrow.types.is_integer(column.type):
            continue  # labels
        kinds = pyarrow.types.is_fixed_size_list, pyarrow.types.is_list, pyarrow.types.is_large_list
        if not any(is_kind(column.type) for is_kind in kinds):
            raise ValueError(
                f"column {name} is {column.type}; expected lists of numbers; leave labels out, they come from --data"
            )
        lengths = pyarrow.compute.list_value_length(column).unique().to_pylist()
        if len(lengths) > 1 or None in lengths:
            raise ValueError(f"lists of column {name} have {lengths[:5]} values; give each row as many")
        found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return found


_READERS: dict[str, Callable[[Path, Sequence[str]], dict[str, Any]]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}


def file_digest(*paths: str | Path) -> str:
    """sha256 of the files' bytes, end to end."""
    sha256 = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                sha256.update(piece)
    return sha256.hexdigest()
