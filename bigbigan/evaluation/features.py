"""Features of images: of a tensor at once, or of any number of files into one file, in pieces that survive a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bigbigan.config import EncoderConfig, MLPEncoderConfig, to_dict
from bigbigan.encoder import EncoderOutput
from bigbigan.evaluation.feature_files import feature_writer
from bigbigan.files import atomic_write, sync
from bigbigan.images import BadImageError, list_images, preprocess
from bigbigan.model import BigBiGAN

OUTPUTS = tuple(field.name for field in fields(EncoderOutput))
PIECE_ROWS = 256  # what a kill may cost
PIECE_NAME = "{:06d}.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_files` did.

    Attributes:
        done: rows in the output.
        failed: name and reason of each file that has no row.
        resumed: rows taken over from an earlier call that was interrupted.
    """

    done: int
    failed: list[tuple[str, str]]
    resumed: int


def extract_features(
    model: BigBiGAN,
    images: Tensor,
    outputs: Sequence[str] = OUTPUTS,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The named encoder outputs, [N, D] float32 on the CPU, of images [N, C, S, S] uint8 at the encoder's resolution.

    Raises:
        ValueError: an output that encoders do not have, no images, or of another dtype or shape.
    """
    if images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, C, S, S]")
    encode = BatchEncoder(model, outputs, batch_size, seed)
    features = {name: torch.empty(len(images), width) for name, width in encode.widths.items()}
    bar = tqdm(total=len(images), desc="encoding", unit="img", disable=None if progress else True)
    with bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            for name, rows in encode(batch.float() / 127.5 - 1, start).items():
                features[name][start : start + len(batch)] = rows
            bar.update(len(batch))
    return features


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Image files by the names that they get in an output, sorted by name.

    Names have slashes; in one folder they are relative to it, else they begin with the input as given. Folders are
    searched as by `list_images`; a file named itself may have any suffix.

    Raises:
        ValueError: nothing is given, an input does not exist, or a folder holds no picture.
    """
    if not inputs:
        raise ValueError("no images given; name files or a folder")
    found: dict[str, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            root = given if len(inputs) == 1 else Path()
            found |= {_text(path.relative_to(root)): path for path in list_images(given)}
        elif given.exists():
            found[_text(given)] = given
        else:
            raise ValueError(f"{given}: no such file or folder")
    return dict(sorted(found.items()))


def _text(path: Path) -> str:
    """With bytes that are no UTF-8 spelled out, since no output format could hold them."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def encode_files(
    model: BigBiGAN,
    files: Mapping[str, Path],
    output: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = OUTPUTS,
    batch_size: int = 32,
    seed: int = 0,
    workers: int = 2,
    progress: bool = False,
    **options: Any,
) -> EncodeReport:
    """Writes the encoder outputs of image files (`find_images`) to one file, float32, a row a readable file.

    The suffix decides: `.npz` holds one array [N, D] an output and the names as `paths`; `.safetensors` the tensors,
    and the names as a JSON list in the metadata's `paths`; `.parquet` a column `path` and a list column an output.
    Names and reasons of unreadable files go to `{output}.failures.jsonl`. The rest is bit for bit what it would be
    without them: batches and the noise of z_sample count rows. Another `batch_size` changes rounding alone, by less
    than 1e-6 of an output's largest value on a CPU.

    Finished pieces lie in `{output}.partial/` until the output is complete; a call with the same arguments goes on
    behind them. Memory does not grow with the number of images, but for their names.

    Args:
        workers: threads that read files ahead.
        options: of `bigbigan.images.preprocess`: crop, invert, background, max_pixels.

    Raises:
        ValueError: another suffix, an output that encoders do not have, or `output` is one of `files`.
        OSError: no room on the disk, or no permission; no half file is left under the final name.
        ImportError: parquet without pyarrow.
    """
    output, names = Path(output), list(files)
    work, failures = (output.with_name(output.name + end) for end in (".partial", ".failures.jsonl"))
    write = feature_writer(output, names)
    encode = BatchEncoder(model, outputs, batch_size, seed)
    manifest = {
        "format": 1,
        "encoder": digest(encode.network),
        "files": _listing_digest(files, {output, failures}),
        "outputs": list(encode.widths),
        "batch size": batch_size,
        "seed": seed,
        "preprocessing": to_dict(model.config.preprocess) | json.loads(json.dumps(options)),
        "device": model.device.type,
    }
    _open_work_folder(work, manifest)
    pieces = _finished_pieces(work)
    resumed, start = sum(piece.rows for piece in pieces), pieces[-1].stop if pieces else 0
    if start:
        logger.info("going on from %s: %d of %d images are done", work, start, len(names))
    _check_room(work, (2 * len(names) - resumed) * 4 * sum(encode.widths.values()))
    images = _read_ahead(partial(_read, model, options), list(files.values())[start:], workers, 2 * batch_size)
    images = tqdm(images, total=len(names), initial=start, unit="img", disable=None if progress else True)
    for stop, failed, rows in _encode_pieces(encode, images, start, resumed):
        pieces.append(_save_piece(work, len(pieces), stop, failed, rows))

    reasons = dict(entry for piece in pieces for entry in piece.failed)
    good = [name for index, name in enumerate(names) if index not in reasons]
    report = EncodeReport(len(good), [(names[index], reason) for index, reason in sorted(reasons.items())], resumed)
    _write_failures(failures, report.failed)
    if good:
        whole = work / "whole"  # not beside the output, where a kill would leave it
        write(whole, good, encode.widths, [piece.path for piece in pieces])
        sync(whole)
        os.replace(whole, output)
        sync(output.parent)
    shutil.rmtree(work)
    return report


def digest(network: nn.Module) -> str:
    """sha256 over names, types, shapes and values of the weights, and over the configuration that shapes them."""
    return weights_digest(network, json.dumps(to_dict(network.config)))


def weights_digest(module: nn.Module, description: str) -> str:
    """sha256 over names, types, shapes and values of the weights, and over what else shapes the module."""
    sha256 = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


class BatchEncoder:
    """Encodes batches; where memory runs out, in halves from then on."""

    def __init__(self, model: BigBiGAN, outputs: Sequence[str], batch_size: int, seed: int) -> None:
        if model.encoder is None:
            raise ValueError(f"this model was loaded without its encoder; it has {', '.join(model.parts)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        widths = _widths(model.encoder.config)
        if unknown := [name for name in outputs if name not in widths]:
            raise ValueError(f"no output {unknown[0]!r}; an encoder gives {', '.join(widths)}")
        if not outputs:
            raise ValueError(f"no outputs named; an encoder gives {', '.join(widths)}")
        self.network, self.widths = model.encoder, {name: widths[name] for name in outputs}
        self.batch_size = batch_size
        self._model, self._seed = model, seed

    def __call__(self, x: Tensor, start: int) -> dict[str, Tensor]:
        """Outputs of x [N, C, S, S] in [-1, 1], whose first row counts as `start` for the noise."""
        while True:
            try:
                out = self._model.encode(x, seed=self._seed, start=start, batch_size=self.batch_size)
                return {name: out[name].float().cpu() for name in self.widths}
            except RuntimeError as error:
                size = min(self.batch_size, len(x))
                # torch has no class of its own for the main memory
                exhausted = isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
                if not exhausted or size == 1:
                    raise
                self.batch_size = size // 2
                logger.warning("out of memory with %d images at once: going on with %d", size, size // 2)


def _widths(config: EncoderConfig | MLPEncoderConfig) -> dict[str, int]:
    latents = dict.fromkeys(("z_sample", "z_mean", "z_stdev"), config.z_dim)
    return {**latents, "avepool_feat": config.num_features, "bn_crelu_feat": 2 * config.num_features}


Read = Tensor | BadImageError


def _read(model: BigBiGAN, options: dict[str, Any], path: Path) -> Read:
    try:
        return preprocess(path, model.config.preprocess, model.config.image_channels, **options)
    except BadImageError as error:
        return error


def _read_ahead(read: Callable[[Path], Read], paths: Sequence[Path], workers: int, ahead: int) -> Iterator[Read]:
    """`read` of each file, in order, at most `ahead` of them waiting to be taken."""
    pending: deque[Future[Read]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            pending.append(pool.submit(read, path))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_pieces(
    encode: BatchEncoder, images: Iterable[Read], start: int, row: int
) -> Iterator[tuple[int, list[tuple[int, str]], dict[str, Tensor]]]:
    """Yields (files done so far, failures, rows) whenever PIECE_ROWS or a few more rows are done, and at the end.

    A piece ends where a batch ends, so that a resumed run forms the same batches.
    """
    size = encode.batch_size
    batch: list[Tensor] = []
    batches: list[dict[str, Tensor]] = []
    failed: list[tuple[int, str]] = []

    def flush() -> None:
        nonlocal row
        if batch:
            batches.append(encode(torch.cat(batch), row))
            row += len(batch)
            batch.clear()

    def rows() -> dict[str, Tensor]:
        empty = {name: torch.empty(0, width) for name, width in encode.widths.items()}
        return {name: torch.cat([empty[name], *(rows[name] for rows in batches)]) for name in encode.widths}

    stop = start
    for stop, image in enumerate(images, start + 1):
        if isinstance(image, BadImageError):
            failed.append((stop - 1, image.reason))
            continue
        batch.append(image)
        if len(batch) == size:
            flush()
            if len(batches) * size >= PIECE_ROWS:
                yield stop, failed, rows()
                batches, failed = [], []
    flush()
    if batches or failed:
        yield stop, failed, rows()


@dataclass(frozen=True)
class _Piece:
    path: Path
    rows: int
    stop: int  # files up to this one are done
    failed: list[tuple[int, str]]  # index of the file, reason


def _save_piece(work: Path, number: int, stop: int, failed: list[tuple[int, str]], rows: dict[str, Tensor]) -> _Piece:
    path = work / PIECE_NAME.format(number)
    with atomic_write(path) as temporary:
        save_file(rows, temporary, {"stop": str(stop), "failed": json.dumps(failed)})
    return _Piece(path, len(next(iter(rows.values()))), stop, failed)


def _finished_pieces(work: Path) -> list[_Piece]:
    pieces: list[_Piece] = []
    while (path := work / PIECE_NAME.format(len(pieces))).exists():
        with safe_open(path, framework="np") as file:
            metadata, name = file.metadata(), next(iter(file.keys()))
            failed = [(index, reason) for index, reason in json.loads(metadata["failed"])]
            pieces.append(_Piece(path, file.get_slice(name).get_shape()[0], int(metadata["stop"]), failed))
    return pieces


def _open_work_folder(work: Path, manifest: dict[str, Any]) -> None:
    """Leaves `work` with this manifest, and with pieces only if they belong to it."""
    path = work / "manifest.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found == manifest:
            return
        changed = sorted(key for key in found.keys() | manifest if found.get(key) != manifest.get(key))
        logger.warning("%s is of another call (%s changed): starting afresh", work, ", ".join(changed))
        shutil.rmtree(work)
    elif work.exists() and not all(entry.name.startswith(".") for entry in work.iterdir()):
        raise FileExistsError(f"{work} is needed for unfinished work, and holds other files: move it away")
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(manifest), encoding="utf-8")


def _write_failures(path: Path, failed: list[tuple[str, str]]) -> None:
    if not failed:
        path.unlink(missing_ok=True)  # of an earlier call
        return
    lines = (json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in failed)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _listing_digest(files: Mapping[str, Path], written: set[Path]) -> str:
    """sha256 over names, sizes and times. Refuses files that would be overwritten."""
    taken = {(status.st_dev, status.st_ino) for path in written if path.exists() and (status := path.stat())}
    sha256 = hashlib.sha256()
    for name, path in files.items():
        try:
            status = path.stat()
        except OSError:  # reading it will tell why
            sha256.update(json.dumps([name]).encode())
            continue
        if (status.st_dev, status.st_ino) in taken:
            raise ValueError(f"{path} is an input and would be overwritten; choose another output")
        sha256.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return sha256.hexdigest()


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OSError(
            f"{work.parent} has {free / 2**30:.1f} GiB free, and up to {needed / 2**30:.1f} are needed: "
            "make room, or name fewer outputs"
        )
