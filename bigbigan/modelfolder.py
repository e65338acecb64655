"""The model folder (`config.json`, a safetensors file a part, `README.md`): read strictly, written whole or not."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbigan.config import (
    MAX_CONFIG_BYTES,
    PARTS,
    BigBiGANConfig,
    GraphConfig,
    ModelInfo,
    ordered_parts,
    select_parts,
)
from bigbigan.files import atomic_write, sync
from bigbigan.fuse import fuse as fuse_part
from bigbigan.graph import Graph, GraphNetwork, read_graph
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
from bigbigan.model import PART_CLASSES, BigBiGAN
from bigbigan.modelcard import flatten, model_card
from bigbigan.schema import ConfigError, from_dict, to_dict

__all__ = ["FileEntry", "FolderConfig", "WeightsError", "load_folder", "model_card", "read_config", "save_folder"]

logger = logging.getLogger(__name__)

CONFIG_NAME, CARD_NAME = "config.json", "README.md"
FORMAT = "bigbigan-model/1"


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


def part_files(part: str, config: BigBiGANConfig) -> tuple[str, ...]:
    """File names of a part."""
    graph = isinstance(getattr(config, part), GraphConfig)
    return (weight_file(part), graph_file(part)) if graph else (weight_file(part),)


def read_graphs(folder: Path, parts: Iterable[str], config: BigBiGANConfig) -> dict[str, Graph]:
    """The graphs of those parts that are in graph form; see `bigbigan.graph.read_graph`."""
    described = {part: getattr(config, part) for part in parts}
    return {
        part: read_graph(folder / graph_file(part), own)
        for part, own in described.items()
        if isinstance(own, GraphConfig)
    }


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
        found = sorted(entry.name for entry in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise ConfigError(
            f"{path.parent} is no model folder: it has no {CONFIG_NAME} (it has: {', '.join(found) or 'nothing'})"
        )
    with path.open("rb") as file:
        return _parse_config(file.read(MAX_CONFIG_BYTES + 1), str(path))


def missing_folder(path: Path) -> FileNotFoundError:
    """The error for a folder that does not exist."""
    interrupted = _previous(path)
    hint = f"; a save was interrupted: rename {interrupted} to {path.name}" if interrupted.is_dir() else ""
    return FileNotFoundError(f"there is no folder {path}{hint}")


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


def load_folder(
    folder: str | os.PathLike[str],
    *,
    parts: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    remember: bool = True,
    fuse: bool = False,
) -> BigBiGAN:
    """The model in a folder, in eval mode; with `fuse`, in the form of `BigBiGAN.fuse`.

    Every load compares the files' headers with the architecture before it allocates anything; `verify` checks digests
    and finite values as well, once a file (`remember=False`: each time, without a record in `integrity.cache_dir()`).
    Weights are memory-mapped and keep the files' dtype unless `dtype` is given.

    Raises:
        FileNotFoundError, ConfigError: as `read_config`.
        WeightsError: if a weight file is missing, damaged, or not one for this architecture.
        ValueError: for a part that the folder does not have, or a dtype that is not a floating one.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; models run in a floating dtype such as torch.float16")
    folder = Path(folder)
    described = read_config(folder)
    wanted = select_parts(parts, described.files, folder)
    graphs = read_graphs(folder, wanted, described.config)
    with torch.device("meta"):
        model = BigBiGAN(described.config, wanted, described.info, graphs)
    for part in wanted:
        _check_file(folder, part, getattr(model, part), described.config)
    if verify:
        for part in wanted:
            verify_part(folder, part, described.files[part], remember=remember)
    for part in wanted:
        network, path = getattr(model, part), folder / weight_file(part)
        # Fusing replaces weights one by one: those of a mapped file would all stay in memory until the last.
        state = read_tensors(path) if fuse else load_file(path)
        network.load_state_dict(state, strict=True, assign=True)
        del state
        network.to(device=device, dtype=dtype)
        if dtype == torch.float16:  # its range ends at 65504
            for name, tensor in network.state_dict().items():
                check_finite(tensor, f"{name} as float16 (use torch.bfloat16)", path)
        if fuse:
            fuse_part(network.eval())
    return model.eval()


def verify_part(folder: Path, part: str, entry: FileEntry, *, remember: bool = True) -> None:
    """Digest, size and finite values of a part's file.

    Raises:
        WeightsError: if one of them is wrong.
    """
    verify_file(folder / weight_file(part), entry.size, entry.sha256, remember=remember)


def _check_file(folder: Path, part: str, network: nn.Module, config: BigBiGANConfig) -> None:
    path = folder / weight_file(part)
    if not path.exists():
        present = [other for other in PARTS if (folder / weight_file(other)).exists()]
        raise WeightsError(
            f"{path} is missing, though {CONFIG_NAME} lists it; the folder has {', '.join(present) or 'no weights'}: "
            "copy or download it, or load other parts"
        )
    header = read_header(path)
    if difference := _difference(header.shapes, _shapes(network)):
        raise WeightsError(f"{path} does not fit the architecture. {difference}. {_cause(header, part, config)}")
    if len(header.dtypes) != 1:
        raise WeightsError(f"{path} mixes dtypes: {_names(header.dtypes)}")


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
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
    try:
        own = dict(flatten(strict_json(header.metadata.get("config", "{}").encode())))
    except ValueError:
        own = {}
    ours = dict(flatten(to_dict(getattr(config, part))))
    if own and (differing := [key for key in ours if own.get(key) != ours[key]]):
        facts = [f"{key} {str(own.get(key))[:80]}, {CONFIG_NAME} says {ours[key]}" for key in differing[:3]]
        return f"The file was written with {'; '.join(facts)}"
    if any(name.endswith(".u") for name in header.shapes):
        return "The file is a training form with spectral norm; export the run to get its inference form"
    first = {name.partition(".")[0] for name in header.shapes}
    if first in ({"module"}, {part}, {"_orig_mod"}):
        return f"The names have a prefix {first.pop()!r}, as a wrapper adds it; strip it"
    return f"{CONFIG_NAME} or the file comes from another model"


def save_folder(model: BigBiGAN, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
    """Writes a model folder with the parts that the model has; `card` is the text of README.md.

    The folder is built beside its final place and put there at the end, so that an error leaves an earlier model as
    it was. The same model gives the same bytes.

    Raises:
        WeightsError: if weights are not finite, of mixed or unsupported dtype, or not in the plain inference form.
        ConfigError: if the model's description does not fit into `config.json`.
        FileExistsError: if the folder holds anything but a model folder.
    """
    folder = Path(folder).resolve()
    states = {part: _plain_state(model, part) for part in model.parts}
    _recover(folder)
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".tmp", dir=folder.parent))
    try:
        files = {part: _write_weights(staging, part, state, model) for part, state in states.items()}
        text = _config_text(model, files)
        for part in model.parts:
            if isinstance(network := getattr(model, part), GraphNetwork):
                with atomic_write(staging / graph_file(part)) as temporary:
                    temporary.write_bytes(network.graph.text())
        for name, content in ((CARD_NAME, model_card(model) if card is None else card), (CONFIG_NAME, text)):
            with atomic_write(staging / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")
        _put(staging, folder)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def _plain_state(model: BigBiGAN, part: str) -> dict[str, Tensor]:
    network, config = getattr(model, part), getattr(model.config, part)
    state = network.state_dict()
    if isinstance(network, GraphNetwork):
        network.check(config)
        wanted = {f"constants.{name}": shape for name, shape in network.graph.constants.items()}
    else:
        with torch.device("meta"):
            wanted = _shapes(PART_CLASSES[type(config)](config))
    if difference := _difference({name: tuple(tensor.shape) for name, tensor in state.items()}, wanted):
        raise WeightsError(f"the {part} is not in its plain inference form. {difference}")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise WeightsError(f"the {part} has weights of {_names(dtypes)}; cast it to one of {_names(DTYPES.values())}")
    for name, tensor in state.items():
        check_finite(tensor, name, part)
    return {name: state[name] for name in sorted(state)}


def _write_weights(folder: Path, part: str, state: dict[str, Tensor], model: BigBiGAN) -> FileEntry:
    """Writes safetensors by hand: the library's writer shuffles metadata, so that no two runs give the same bytes."""
    config = json.dumps(to_dict(getattr(model.config, part)))
    info = {"name": model.info.name, "license": model.info.license, "source": model.info.source}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "part": part, "config": config, **info}}
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


def _config_text(model: BigBiGAN, files: dict[str, FileEntry]) -> str:
    document = {"format": FORMAT, **asdict(model.info), "architecture": to_dict(model.config)}
    document["files"] = {part: asdict(entry) for part, entry in files.items()}
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _parse_config(text.encode("utf-8"), CONFIG_NAME)  # what is written can be read
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the model's description cannot be saved: {error}") from error
    return text


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


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
    """Undoes or completes the exchange of a save that was killed in the middle of `_put`."""
    previous = _previous(folder)
    if previous.exists():
        _check_replaceable(previous)
        if folder.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, folder)


def _put(staging: Path, folder: Path) -> None:
    """Renames `staging` to `folder`. What was there keeps the name `.NAME.previous` between the two renames."""
    if folder.exists():
        shutil.copymode(folder, staging)
    else:
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp makes 0700; a user expects the usual mode
    sync(staging)
    previous = _previous(folder)
    replaced = folder.exists()
    if replaced:
        os.rename(folder, previous)
    try:
        os.rename(staging, folder)
        sync(folder.parent)
    except BaseException:  # an interrupt too must not leave the old model aside
        if folder.exists():
            os.rename(folder, staging)
        if replaced:
            os.rename(previous, folder)
        raise
    if replaced:
        try:
            shutil.rmtree(previous)
        except OSError as error:  # the save itself is done; the next one tries again
            logger.warning("%s could not be removed: %s", previous, error)
