"""The model folder (`config.json`, one safetensors file per part, `README.md`): read strictly, written whole or not.

It knows configurations and state dicts, but no network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bigbigan.config import (
    MAX_CONFIG_BYTES,
    PARTS,
    BigBiGANConfig,
    GraphConfig,
    ModelInfo,
    ordered_parts,
)
from bigbigan.exchange import previous_of, put
from bigbigan.files import TEMPORARY, OutputError, atomic_write, hold
from bigbigan.integrity import (
    DTYPES,
    SHA256,
    Header,
    WeightsError,
    check_finite,
    impostor,
    read_header,
    read_tensors,
    strict_json,
    verify_file,
)
from bigbigan.modelcard import flatten, model_card
from bigbigan.outputs import lock_beside
from bigbigan.schema import ConfigError, from_dict, to_dict

logger = logging.getLogger(__name__)

CONFIG_NAME, CARD_NAME = "config.json", "README.md"
FORMAT = "bigbigan-model/1"
MAX_GRAPH_BYTES = 8 << 20  # a full-size network takes a twentieth
State = Mapping[str, Tensor]  # of one part
Shapes = Mapping[str, tuple[int, ...]]
# Regular expression of what a model folder holds, also while it is written.
FOLDER_FILES = rf"\.?(config\.json|README\.md|({'|'.join(PARTS)})\.safetensors)({TEMPORARY})?"


@dataclass(frozen=True)
class FileEntry:
    """A weight file's digest (64 hex digits) and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.sha256) or not 0 < self.size < 1 << 50:
            raise ConfigError(f"FileEntry has sha256 {self.sha256[:80]!r} and size {self.size}")


@dataclass(frozen=True)
class FolderConfig:
    """What `config.json` says."""

    info: ModelInfo
    config: BigBiGANConfig
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class _Document:
    format: str
    name: str
    license: str
    source: str
    provenance: dict[str, Any]
    architecture: BigBiGANConfig
    files: dict[str, Any]


def weight_file(part: str) -> str:
    """File name of a part."""
    return f"{part}.safetensors"


def graph_file(part: str) -> str:
    """File name of the operations of a part in graph form."""
    return f"{part}.graph.json"


def read_graph_file(folder: Path, part: str, config: GraphConfig) -> bytes:
    """The operations of a part in graph form, as `config.json` names them by digest.

    Raises:
        ConfigError: the file is missing, too large, or another one.
    """
    path = folder / graph_file(part)
    if not path.is_file():
        raise ConfigError(f"{path} is missing, though {CONFIG_NAME} names a network in graph form; copy or download it")
    with path.open("rb") as file:
        data = file.read(MAX_GRAPH_BYTES + 1)
    if advice := impostor(data):
        raise ConfigError(f"{path} {advice}")
    if len(data) > MAX_GRAPH_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_GRAPH_BYTES} bytes")
    if hashlib.sha256(data).hexdigest() != config.sha256:
        raise ConfigError(
            f"{path} is not the file that {CONFIG_NAME} names: it is damaged, or belongs to another model"
        )
    return data


def graph_parts(config: BigBiGANConfig, parts: Iterable[str]) -> list[str]:
    """Those that are in graph form."""
    return [part for part in parts if isinstance(getattr(config, part), GraphConfig)]


def read_config(path: str | os.PathLike[str]) -> FolderConfig:
    """What a model folder (or its `config.json`) holds.

    Raises:
        FileNotFoundError: if there is no such folder.
        ConfigError: if it is no model folder, or its `config.json` is not valid.
    """
    path = Path(path)
    if path.name != CONFIG_NAME:
        if not path.is_dir():
            raise missing_folder(path)
        path = path / CONFIG_NAME
    if not path.is_file():
        found = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        models = [str(entry) for entry in found if (entry / CONFIG_NAME).is_file()]
        hint = f"; name one of the folders in it: {', '.join(models[:3])}" if models else ""
        names = ", ".join(entry.name for entry in found[:8])
        raise ConfigError(
            f"{path.parent} is no model folder: it has no {CONFIG_NAME} (it has: {names or 'nothing'}){hint}"
        )
    with path.open("rb") as file:
        return _parse_config(file.read(MAX_CONFIG_BYTES + 1), str(path))


def missing_folder(path: Path) -> FileNotFoundError:
    """The error for a folder that does not exist."""
    interrupted = previous_of(path)
    hint = f"; a save was interrupted: rename {interrupted} to {path.name}" if interrupted.is_dir() else ""
    return FileNotFoundError(f"there is no folder {path}{hint}")


def _describes_run(document: Any) -> bool:
    """Whether it is the `config.json` of a run, as older versions wrote it: without a format."""
    return isinstance(document, dict) and {"train", "data"} <= set(document) and "architecture" not in document


def _parse_config(data: bytes, where: str) -> FolderConfig:
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_CONFIG_BYTES} bytes")
    if advice := impostor(data):
        raise ConfigError(f"{where} {advice}")
    try:
        document = strict_json(data)
    except ValueError as error:
        raise ConfigError(f"{where} is no valid JSON: {error}"[:500]) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        kind = FORMAT.partition("/")[0]
        if isinstance(version, str) and version.startswith(f"{kind}/"):
            raise ConfigError(f"{where} has format {version[:80]!r}; this version reads {FORMAT!r}: upgrade bigbigan")
        if (isinstance(version, str) and version.startswith("bigbigan-run/")) or _describes_run(document):
            raise ConfigError(
                f"{Path(where).parent} is a run folder of `bigbigan train`, not a model folder: export it first, as by "
                f"bigbigan export {Path(where).parent} -o my-model"
            )
        raise ConfigError(f"{where} is not of a bigbigan model: its format is {str(version)[:80]!r}, not {FORMAT!r}")
    try:
        parsed = from_dict(_Document, document, CONFIG_NAME)
        config = parsed.architecture
        if unknown := sorted(set(parsed.files) - set(config.parts)):
            raise ConfigError(f"files names {', '.join(unknown)[:200]}, which the architecture lacks")
        if not parsed.files:
            raise ConfigError("files is empty")
        parts = ordered_parts(parsed.files)
        files = {part: from_dict(FileEntry, parsed.files[part], f"files.{part}") for part in parts}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return FolderConfig(ModelInfo(parsed.name, parsed.license, parsed.source, parsed.provenance), config, files)


def verify_part(folder: Path, part: str, entry: FileEntry, *, remember: bool = True) -> None:
    """Digest, size and finite values of a part's file.

    Raises:
        WeightsError: if one of them is wrong.
    """
    verify_file(folder / weight_file(part), entry.size, entry.sha256, remember=remember)


def check_part(folder: Path, part: str, shapes: Shapes, config: BigBiGANConfig) -> None:
    """Compares the header of a part's file with the names and shapes that its network has, and with its configuration.

    Raises:
        WeightsError: the file is missing, damaged, or not one for this architecture.
    """
    path = folder / weight_file(part)
    if not path.exists():
        present = [other for other in PARTS if (folder / weight_file(other)).exists()]
        raise WeightsError(
            f"{path} is missing, though {CONFIG_NAME} lists it; the folder has {', '.join(present) or 'no weights'}: "
            "copy or download it, or load other parts"
        )
    header = read_header(path)
    if difference := difference_of(header.shapes, shapes):
        raise WeightsError(f"{path} does not fit the architecture. {difference}. {_cause(header, part, config)}")
    if len(header.dtypes) != 1:
        raise WeightsError(f"{path} mixes dtypes: {_names(header.dtypes)}")
    if changes := _changes(header, part, config):
        raise WeightsError(f"{path} was saved with {changes}. Restore {CONFIG_NAME}, or save the model again")


def read_state(folder: Path, part: str, *, mmap: bool = True) -> State:
    """The tensors of a part's file, which `check_part` has checked: memory-mapped, or copied into memory."""
    path = folder / weight_file(part)
    return load_file(path) if mmap else read_tensors(path)


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def difference_of(found: Shapes, wanted: Shapes) -> str:
    """How two sets of keys and shapes differ, with the first five of each kind; empty if they do not."""
    misshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name[:100] for name in found if name not in wanted],
        "of another shape": [f"{name} {found[name]} instead of {wanted[name]}"[:200] for name in misshaped],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    )


def _cause(header: Header, part: str, config: BigBiGANConfig) -> str:
    """The likely reason why a file does not fit; the file's own metadata knows best."""
    named = header.metadata.get("part", part)
    if named != part:
        return f"The file holds a model's {named[:40]}"
    if changes := _changes(header, part, config):
        return f"The file was written with {changes}"
    if any(name.endswith(".u") for name in header.shapes):
        return "The file is a training form with spectral norm; export the run to get its inference form"
    first = {name.partition(".")[0] for name in header.shapes}
    if first in ({"module"}, {part}, {"_orig_mod"}):
        return f"The names have a prefix {first.pop()!r}, as a wrapper adds it; strip it"
    return f"{CONFIG_NAME} or the file comes from another model"


def _changes(header: Header, part: str, config: BigBiGANConfig) -> str:
    """How the configuration differs from that in the file's own metadata, the first three fields; empty if it does not.

    `config.json` has no digest, and many fields change what a network computes but not its weights' shapes.
    """
    facts = []
    for key, ours in (("config", getattr(config, part)), ("preprocess", config.preprocess)):
        try:
            saved = strict_json(header.metadata.get(key, "").encode())
        except ValueError:
            continue  # files of other programs have no such metadata
        if isinstance(saved, dict):
            # Fields that came later have the defaults that were computed with before.
            own, now = dict(flatten(_defaults(type(ours)))) | dict(flatten(saved)), dict(flatten(to_dict(ours)))
            differing = [name for name in {**now, **own} if own.get(name) != now.get(name)]
            facts += [f"{name} {own.get(name, 'unset')[:80]}, {CONFIG_NAME} says {now.get(name)}" for name in differing]
    return "; ".join(facts[:3])


def _defaults(cls: type) -> dict[str, Any]:
    """Of a configuration's fields, as JSON-able data."""
    values = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    return {name: to_dict(value) if is_dataclass(value) else value for name, value in values.items()}


@contextmanager
def claim_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps the place of a model folder for this process, from the start of the work to the end of the save.

    Raises:
        FileExistsError: the folder holds anything but a model folder.
        OutputError: another process is writing it.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    with hold(lock_beside(folder), OutputError(f"another process is writing {folder}; wait, or name another folder")):
        yield


def save_folder(
    folder: str | os.PathLike[str],
    config: BigBiGANConfig,
    info: ModelInfo,
    states: Mapping[str, State],
    *,
    graphs: Mapping[str, bytes] | None = None,
    card: str | None = None,
) -> None:
    """Writes a model folder with the plain inference weights of some or all parts.

    `graphs` has the files of those parts that are in graph form; `card` is the text of README.md.

    The folder is built beside its final place and put there at the end, so that an error leaves an earlier model as
    it was. The same model gives the same bytes.

    Raises:
        WeightsError: if weights are not finite, or of mixed or unsupported dtype.
        ConfigError: if the model's description does not fit into `config.json`.
        FileExistsError: if the folder holds anything but a model folder.
        OutputError: if another process is writing it.
    """
    folder = Path(folder).resolve()
    with claim_folder(folder):
        for part, state in states.items():
            _check_state(part, state)
        text = model_card(config, info, states) if card is None else card
        _save(folder, config, info, states, graphs or {}, text)


def _save(
    folder: Path,
    config: BigBiGANConfig,
    info: ModelInfo,
    states: Mapping[str, State],
    graphs: Mapping[str, bytes],
    card: str,
) -> None:
    _recover(folder)
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".tmp", dir=folder.parent))
    try:
        files = {part: _write_weights(staging, part, state, config, info) for part, state in states.items()}
        for part, graph in graphs.items():
            with atomic_write(staging / graph_file(part)) as temporary:
                temporary.write_bytes(graph)
        for name, content in ((CARD_NAME, card), (CONFIG_NAME, _config_text(config, info, files))):
            with atomic_write(staging / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")
        put(staging, folder)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def _check_state(part: str, state: State) -> None:
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise WeightsError(f"the {part} has weights of {_names(dtypes)}; cast it to one of {_names(DTYPES.values())}")
    for name, tensor in state.items():
        check_finite(tensor, name, part)


def _write_weights(folder: Path, part: str, state: State, config: BigBiGANConfig, info: ModelInfo) -> FileEntry:
    """Writes safetensors by hand: the library's writer shuffles metadata, so that no two runs give the same bytes."""
    described = {"config": getattr(config, part), "preprocess": config.preprocess}
    metadata = {"format": "pt", "part": part, **{key: json.dumps(to_dict(value)) for key, value in described.items()}}
    metadata |= {"name": info.name, "license": info.license, "source": info.source}
    header: dict[str, Any] = {"__metadata__": metadata}
    state = {name: state[name] for name in sorted(state)}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    offset = 0
    for name, tensor in state.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    digest, size = hashlib.sha256(), 8 + len(text) + offset
    with atomic_write(folder / weight_file(part)) as temporary, temporary.open("wb") as file:
        chunks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *map(_bytes, state.values())]
        for data in chunks:
            digest.update(data)
            file.write(data)
    return FileEntry(digest.hexdigest(), size)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _config_text(config: BigBiGANConfig, info: ModelInfo, files: dict[str, FileEntry]) -> str:
    document = {"format": FORMAT, **asdict(info), "architecture": to_dict(config)}
    document["files"] = {part: asdict(entry) for part, entry in files.items()}
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _parse_config(text.encode("utf-8"), CONFIG_NAME)  # what is written can be read
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the model's description cannot be saved: {error}") from error
    return text


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    names = {entry.name for entry in folder.iterdir()}
    if others := sorted(names - {CONFIG_NAME, CARD_NAME, *map(weight_file, PARTS), *map(graph_file, PARTS)}):
        raise FileExistsError(f"{folder} holds {', '.join(others[:5])} besides a model; name another folder")
    if names:
        try:
            read_config(folder)
        except ConfigError as error:
            raise FileExistsError(f"{folder} is no readable model folder, so it is not replaced: {error}") from error


def _recover(folder: Path) -> None:
    """Undoes or completes the exchange of a save that was killed in the middle of `put`."""
    previous = previous_of(folder)
    if previous.exists():
        _check_replaceable(previous)
        if folder.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, folder)
