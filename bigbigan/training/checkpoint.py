"""Resumable training state: a folder a step, verified by digest, complete or absent whatever kills the process.

{folder}/step-00001234/{group}.safetensors ...   the tensors of each group, bit for bit
{folder}/step-00001234/manifest.json             format, step, state; size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bigbigan.files import foreign, remove_own, sync

FORMAT = 2
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
PARTIAL = ".partial-"  # prefix of folders being written or removed
CHECKPOINT_NAME = "step-[0-9]{8,}"
_LEFTOVER = rf"\.partial-(old-)?{CHECKPOINT_NAME}"
_FILES = r"manifest\.json|\w+\.safetensors"

Groups = dict[str, dict[str, Tensor]]

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, altered, or of something else than it is loaded into."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: `tensors` by group and name, on the CPU."""

    step: int
    tensors: Groups
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Groups,
    state: dict[str, Any],
    *,
    keep: int = 2,
    protect: Container[int] = (),
) -> Path:
    """Writes the checkpoint of `step`, then removes older ones beyond the newest `keep`, except steps in `protect`.

    An intact checkpoint of that step is left as it is, a corrupt one replaced. Tensors may be views, share storage
    and lie on any device. One process at a time may save to a folder.

    Raises:
        ValueError: a group that is no plain file name, or `state` that JSON would not give back equal.
        OSError: from the disk; the checkpoints that were there still are.
    """
    folder = Path(folder)
    final = folder / _name(step)
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; expected at least 0 and 1")
    if odd := [group for group in tensors if not re.fullmatch(r"\w+", group, re.ASCII)]:
        raise ValueError(f"groups {odd} are no plain file names; use letters, digits and _")
    if json.loads(json.dumps(state, allow_nan=False)) != state:
        raise ValueError(f"JSON changes {state}; use lists for tuples and strings for keys")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if final.exists():
        try:
            return _load(final).path
        except CheckpointError as error:
            logger.warning("replacing a corrupt checkpoint: %s", error)
    partial = folder / f"{PARTIAL}{final.name}"
    try:
        _write(partial, step, tensors, state)
        _load(partial)
        if final.exists() and not _remove(final):
            os.replace(final, final.with_name(f"damaged-{final.name}"))
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the next save tries again; the error at hand matters more
        raise
    sync(folder)
    # Steps above this one are left alone: after a fall-back they are corrupt, and must not count as kept.
    older = sorted(number for number in _steps(folder) if number <= step)
    for number in older[:-keep]:
        if number not in protect:
            _remove(folder / _name(number))
    return final


def load_checkpoint(folder: str | Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint of `step`, or the newest intact one; None where `folder` has none at all.

    A corrupt checkpoint is passed over with a warning that says what is wrong with it.

    Raises:
        CheckpointError: `step` is absent or corrupt, or there are checkpoints and none is intact.
    """
    folder = Path(folder)
    steps = sorted(_steps(folder), reverse=True)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{folder} holds no checkpoint of step {step}; it holds {steps}")
        return _load(folder / _name(step))
    errors = []
    for number in steps:
        try:
            return _load(folder / _name(number))
        except CheckpointError as error:
            logger.warning("passing over a corrupt checkpoint: %s", error)
            errors.append(str(error))
    if errors:
        raise CheckpointError(f"no checkpoint in {folder} is intact: {'; '.join(errors)}")
    return None


def remove_leftovers(folder: Path) -> None:
    """Removes what a process left that was killed while it saved."""
    for leftover in list(folder.glob(f"{PARTIAL}*")):
        if re.fullmatch(_LEFTOVER, leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            remove_own(leftover, _FILES)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint by its name and manifest, however damaged its tensors are."""
    try:
        return re.fullmatch(CHECKPOINT_NAME, path.name) is not None and bool(_read_manifest(path))
    except (CheckpointError, NotADirectoryError):
        return False


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(name[5:]) for name in names if re.fullmatch(CHECKPOINT_NAME, name)]
    return [number for number in numbers if _name(number) in names]


def _remove(checkpoint: Path) -> bool:
    """Whether it was removed: not if it holds anything foreign."""
    if checkpoint.is_symlink() or foreign(checkpoint, _FILES):
        logger.warning("%s is not removed: it holds more than a checkpoint", checkpoint)
        return False
    partial = checkpoint.with_name(f"{PARTIAL}old-{checkpoint.name}")
    os.replace(checkpoint, partial)  # a kill halfway leaves nothing that looks like a checkpoint
    shutil.rmtree(partial)
    return True


def _write(folder: Path, step: int, tensors: Groups, state: dict[str, Any]) -> None:
    folder.mkdir()
    files = {}
    for group, members in tensors.items():
        # clones, since safetensors refuses shared storage and strides
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in members.items()
        }
        data = safetensors.torch.save(plain)
        files[group + SUFFIX] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_file(folder / (group + SUFFIX), data)
    _write_file(folder / MANIFEST, _seal({"format": FORMAT, "step": step, "state": state, "files": files}))
    sync(folder)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _seal(content: dict[str, Any]) -> bytes:
    """The manifest's one spelling, with its own digest last."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def _load(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint; CheckpointError names the first thing wrong."""
    manifest = _read_manifest(path)
    present = {entry.name for entry in path.iterdir()}
    expected = {MANIFEST, *manifest["files"]}
    if present != expected:
        missing, extra = sorted(expected - present), sorted(present - expected)
        raise CheckpointError(f"{path} lacks {missing} and holds unexpected {extra}")
    tensors = {}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path / name} is not what was saved: its size or sha256 differs from {MANIFEST}")
        try:
            tensors[name.removesuffix(SUFFIX)] = safetensors.torch.load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{path / name} is no safetensors file: {error}") from error
    return Checkpoint(manifest["step"], tensors, manifest["state"], path)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        manifest = json.loads(data)
        manifest.pop("sha256")
        intact = _seal(manifest) == data
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no manifest: {error!r}") from error
    if not intact:
        raise CheckpointError(f"{file} is not what was saved: its sha256 differs")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {manifest.get('format')}; this version reads {FORMAT}")
    if _name(manifest["step"]) != path.name.removeprefix(PARTIAL):
        raise CheckpointError(f"{file} is of step {manifest['step']}")
    return manifest


def optimizer_tensors(optimizer: torch.optim.Adam | torch.optim.AdamW) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adam's moments and steps as tensors named "{parameter index}.{key}", its hyperparameters as JSON-able data.

    The tensors are the optimizer's own, not copies.
    """
    saved = optimizer.state_dict()
    tensors = {f"{index}.{key}": value for index, entry in saved["state"].items() for key, value in entry.items()}
    groups = json.loads(json.dumps(saved["param_groups"]))  # tuples to lists
    return tensors, {"param_groups": groups, "initialized": sorted(saved["state"])}


def load_optimizer(
    optimizer: torch.optim.Adam | torch.optim.AdamW, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Restores, bit for bit, what `optimizer_tensors` gave; `tensors` are copied.

    Raises:
        CheckpointError: names what is missing, unexpected or of another shape or dtype; nothing is loaded then.
    """
    own = optimizer.state_dict()["param_groups"]
    layout, saved_layout = ([group["params"] for group in groups] for groups in (own, state["param_groups"]))
    if layout != saved_layout:
        sizes, saved_sizes = ([len(params) for params in groups] for groups in (layout, saved_layout))
        raise CheckpointError(f"the optimizer has groups of {sizes} parameters, the checkpoint of {saved_sizes}")
    groups = []
    for current, saved in zip(own, state["param_groups"], strict=True):
        if unexpected := sorted(set(saved) - set(current)):
            raise CheckpointError(f"the checkpoint has hyperparameters that the optimizer has not: {unexpected}")
        # a hyperparameter that a later torch introduced keeps its default; JSON made lists of tuples
        groups.append({**current, **saved, "betas": tuple(saved["betas"])})
    parameters = [
        (parameter, group["amsgrad"])
        for live, group in zip(optimizer.param_groups, groups, strict=True)
        for parameter in live["params"]
    ]
    expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for index in state["initialized"]:
        parameter, amsgrad = parameters[index]
        for key in ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad:
            expected[f"{index}.{key}"] = (parameter.shape, parameter.dtype)
        expected[f"{index}.step"] = (torch.Size(), torch.float32)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        wrong = [
            f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in sorted(found.keys() | expected)
            if found.get(name) != expected.get(name)
        ]
        raise CheckpointError(f"{len(wrong)} optimizer tensors do not fit: {'; '.join(wrong[:5])}")
    entries: dict[int, dict[str, Tensor]] = {index: {} for index in state["initialized"]}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        parameter = parameters[int(number)][0]
        # The parameter's memory layout too: fused Adam walks all of them in storage order.
        like = torch.empty_like(parameter) if tensor.dim() else tensor
        entries[int(number)][key] = torch.empty_like(like, dtype=tensor.dtype, device="cpu").copy_(tensor)
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
