"""Feature files: pieces (safetensors, a group of rows each) put together as .npz, .safetensors or .parquet.

Only one piece is in memory at a time. Equal rows and names give equal bytes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

SUFFIXES = (".npz", ".safetensors", ".parquet")
MAX_HEADER_BYTES = 99_000_000  # safetensors reads headers up to 100 MB; a megabyte is for the tensors' entries

# What writes a whole: path, names of rows, width by output, pieces.
Writer = Callable[[Path, list[str], dict[str, int], list[Path]], None]


def feature_writer(output: Path, names: list[str]) -> Writer:
    """What writes `output`, by its suffix. Refuses before any work what would fail at its end.

    Raises:
        ValueError: another suffix, a folder, or more names than a .safetensors header may hold.
        ImportError: parquet without pyarrow.
    """
    suffix = output.suffix.lower()
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file with the suffix {', '.join(SUFFIXES)}")
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


def _rows(pieces: list[Path], name: str) -> Iterator[NDArray[np.float32]]:
    for path in pieces:
        with safe_open(path, framework="np") as file:
            yield file.get_tensor(name)


def _write_npz(path: Path, names: list[str], widths: dict[str, int], pieces: list[Path]) -> None:
    def write(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> None:
        # ZipInfo's own date, 1980, so that equal content gives equal bytes
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.tobytes())

    with zipfile.ZipFile(path, "w") as archive:
        for name, width in widths.items():
            write(name, np.dtype("<f4"), (len(names), width), _rows(pieces, name))
        text = np.dtype(f"<U{max(map(len, names))}")
        write("paths", text, (len(names),), (np.array(names[i : i + 4096], text) for i in range(0, len(names), 4096)))


def _write_safetensors(path: Path, names: list[str], widths: dict[str, int], pieces: list[Path]) -> None:
    header = _safetensors_header(names, widths)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in widths:
            for rows in _rows(pieces, name):
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


def _write_parquet(path: Path, names: list[str], widths: dict[str, int], pieces: list[Path]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [(name, pyarrow.list_(pyarrow.float32(), width)) for name, width in widths.items()]
    schema = pyarrow.schema([("path", pyarrow.string()), *columns])
    done = 0
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for piece in pieces:
            with safe_open(piece, framework="np") as file:
                rows = {name: file.get_tensor(name) for name in widths}
            number = len(next(iter(rows.values())))
            arrays = [
                pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows[name].reshape(-1)), widths[name])
                for name in widths
            ]
            paths = pyarrow.array(names[done : done + number], pyarrow.string())
            writer.write_table(pyarrow.Table.from_arrays([paths, *arrays], schema=schema))
            done += number
