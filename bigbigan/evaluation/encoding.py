"""Features of any number of image files into one file, in pieces that survive a kill, by one process or several."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bigbigan.collectives import gather
from bigbigan.config import PreprocessConfig
from bigbigan.data.workers import default_workers, run_jobs
from bigbigan.evaluation.feature_files import feature_writer
from bigbigan.evaluation.features import OUTPUTS, BatchEncoder, digest
from bigbigan.evaluation.pieces import (
    WORK_FILES,
    Piece,
    finished_pieces,
    open_work_folder,
    resumable,
    save_piece,
)
from bigbigan.files import atomic_write, file_name, remove_own, sync
from bigbigan.fused import FusedPart
from bigbigan.images import BadImageError, list_images, opened, preprocess
from bigbigan.model import BigBiGAN, indexed_noise
from bigbigan.outputs import FAILURES, FEATURES, check_output, claim
from bigbigan.schema import to_dict

PIECE_ROWS = 256  # what a kill may cost
LARGE = 128  # side of images from which encoding one takes many times as long as reading it
_CHUNK = 8  # images that a worker hands over at a time
_DISTRIBUTION = ("z_mean", "z_stdev")

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


@dataclass(frozen=True)
class StoredImage:
    """A picture in a data set, read when its turn comes.

    Attributes:
        read: its bytes, its file, or None where the row has no picture.
        identity: what tells it from any other.
    """

    read: Callable[[], bytes | Path | None]
    identity: str


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Image files by the names that they get in an output (`bigbigan.files.file_name`), sorted by name.

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
            found |= {file_name(path.relative_to(root)): path for path in list_images(given)}
        elif given.exists():
            found[file_name(given)] = given
        else:
            raise ValueError(f"{given}: no such file or folder")
    return dict(sorted(found.items()))


def encode_files(
    model: BigBiGAN,
    files: Mapping[str, Path | StoredImage],
    output: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = OUTPUTS,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    **options: Any,
) -> EncodeReport:
    """Writes the encoder outputs of pictures to one file, float32, a row for each that can be read.

    Pictures are files, as by `find_images`, or rows of data sets.

    The suffix decides: `.npz` holds one array [N, D] an output and the names as `paths`; `.safetensors` the tensors,
    and the names as a JSON list in the metadata's `paths`; `.parquet` a column `path` and a list column an output.
    Names and reasons of unreadable files go to `{output}.failures.jsonl`. The rest is bit for bit what it would be
    without them: batches and the noise of z_sample count rows. Another `batch_size` or `world_size` changes rounding
    alone, by less than 1e-6 of an output's largest value on a CPU; `workers` change nothing.

    Finished pieces lie in `{output}.partial/` until the output is complete; a call with the same arguments goes on
    behind them. Memory does not grow with the number of images, but for their names.

    Args:
        workers: processes that read and scale images ahead (0: this one); None: by this process's share of the cores,
            and two fewer where a large encoder runs on these itself.
        rank, world_size: this process of those that share the work. With several, `torch.distributed` must be
            initialised and all must see one folder; rank 0 writes the output, and all return the same.
        options: of `bigbigan.images.preprocess`: crop, invert, background, max_pixels.

    Raises:
        ValueError: an output that encoders do not have.
        OutputError: `output` must not be written (`bigbigan.outputs.claim`), or another process is writing it.
        FileExistsError: `{output}.partial` is not of an earlier call.
        OSError: the disk is full, or does not let itself be written; finished pieces stay, and no half file is left
            under the final name.
        ImportError: parquet without pyarrow.
    """
    output = Path(output)
    if output.is_symlink():
        output = Path(os.path.realpath(output))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            paths = [path for path in files.values() if isinstance(path, Path)]
            stack.enter_context(claim(output, FEATURES, paths))
            check_output(_beside(output, "failures.jsonl"), FAILURES, paths)
        names, work = list(files), _beside(output, "partial")
        write = feature_writer(output, names)
        wanted = BatchEncoder(model, outputs, batch_size, seed).widths
        # Which row an image will be, and so its noise, is known when all of those before it are read.
        stored = dict.fromkeys(name for name in (*wanted, *_DISTRIBUTION) if name != "z_sample")
        encode = BatchEncoder(model, [*stored] if "z_sample" in wanted else [*wanted], batch_size, seed)
        manifest = {
            "format": 2,
            "encoder": digest(encode.network),
            "files": _listing_digest(files),
            "outputs": list(wanted),
            "batch size": batch_size,
            "processes": world_size,
            "preprocessing": to_dict(model.config.preprocess) | json.loads(json.dumps(options)),
            "device": model.device.type,
            "fused": isinstance(encode.network, FusedPart),
        }
        if rank == 0:
            open_work_folder(work, manifest)
        _wait(world_size)
        bounds = [i * len(names) // world_size for i in range(world_size + 1)]  # of the shards
        own = work / f"{rank}"
        own.mkdir(exist_ok=True)
        pieces = finished_pieces(own)
        start = pieces[-1].stop if pieces else bounds[rank]
        if pieces:
            progressed = start - bounds[rank], bounds[rank + 1] - bounds[rank]
            logger.info("resuming from %s: %d of %d images are done", own, *progressed)
        _check_room(work, (2 * len(names) - sum(piece.rows for piece in pieces)) * 4 * sum(encode.widths.values()))
        kept = sum(piece.rows for piece in pieces)
        resumed = kept if world_size == 1 else sum(gather(kept, _collective_device()))
        read = partial(_read, model.config.preprocess, model.config.image_channels, options)
        todo = list(files.values())[start : bounds[rank + 1]]
        images: Iterable[Read] = _read_ahead(read, todo, _workers(workers, len(todo), model), 2 * batch_size)
        shown = progress and rank == 0
        images = tqdm(images, total=bounds[rank + 1] - bounds[rank], initial=start - bounds[rank], unit="img",
                      disable=None if shown else True)  # fmt: skip
        with resumable(work):
            for stop, failed, rows in _encode_pieces(encode, images, start):
                pieces.append(save_piece(own, len(pieces), stop, failed, rows))

        _wait(world_size)
        pieces = []
        for i in range(world_size):
            share = finished_pieces(work / f"{i}")
            if (share[-1].stop if share else bounds[i]) != bounds[i + 1]:
                raise OSError(f"a piece in {work} was damaged after it was written: run the same command again")
            pieces += share
        reasons = dict(entry for piece in pieces for entry in piece.failed)
        good = [name for index, name in enumerate(names) if index not in reasons]
        report = EncodeReport(len(good), [(names[index], reason) for index, reason in sorted(reasons.items())], resumed)
        _wait(world_size)  # all have read the pieces
        if rank == 0:
            with resumable(work):
                _write_failures(_beside(output, "failures.jsonl"), report.failed)
                if good:
                    whole = work / "whole"  # not beside the output, where a kill would leave it
                    write(whole, good, wanted, partial(_rows, pieces, model.dtype, seed))
                    sync(whole)
                    check_output(output, FEATURES)  # once more: hours may have passed
                    os.replace(whole, output)
                    sync(output.parent)
            remove_own(work, WORK_FILES)
        _wait(world_size)
        return report


def _collective_device() -> torch.device:
    """Where the process group's tensors lie: NCCL takes those of a GPU alone."""
    cuda = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _beside(output: Path, end: str) -> Path:
    return output.with_name(f"{output.name}.{end}")


def _wait(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()


def _rows(pieces: Sequence[Piece], dtype: torch.dtype, seed: int, name: str) -> Iterator[NDArray[np.float32]]:
    """An output, piece by piece; z_sample from mean and deviation and each row's own noise, as the encoder does it."""
    row = 0
    for piece in pieces:
        with safe_open(piece.path, framework="pt") as file:
            if name == "z_sample":
                mean, stdev = (file.get_tensor(part).to(dtype) for part in _DISTRIBUTION)
                noise = indexed_noise(seed, row, (len(mean), mean.shape[1])) if len(mean) else torch.empty_like(mean)
                yield (mean + noise.to(dtype) * stdev).float().numpy()
            else:
                yield file.get_tensor(name).numpy()
        row += piece.rows


Read = Tensor | str  # [1, C, S, S], or why there is none


def _read(config: PreprocessConfig, channels: int, options: dict[str, Any], source: Path | bytes | None) -> Read:
    if source is None:
        return "the row has no picture"
    try:
        return preprocess(opened(source) if isinstance(source, bytes) else source, config, channels, **options)
    except BadImageError as error:
        return error.reason


def _workers(workers: int | None, files: int, model: BigBiGAN) -> int:
    wanted = default_workers() if workers is None else workers
    if workers is None and model.device.type == "cpu" and model.config.preprocess.resolution >= LARGE:
        wanted = max(0, wanted - 2)  # its encoder takes all cores: what is taken from one of them, all wait for
    return min(wanted, files // (2 * _CHUNK))  # starting one takes as long as reading a few images


def _read_ahead(
    read: Callable[[Any], Read], images: Sequence[Path | StoredImage], workers: int, ahead: int
) -> Iterator[Read]:
    """`read` of each picture, in order, about `ahead` of them waiting to be taken; rows are fetched in this process."""
    chunks = (
        [image.read() if isinstance(image, StoredImage) else image for image in images[start : start + _CHUNK]]
        for start in range(0, len(images), _CHUNK)
    )
    ahead = max(2, -(-ahead // (_CHUNK * max(workers, 1))))
    return itertools.chain.from_iterable(run_jobs(partial(_read_all, read), chunks, workers, ahead=ahead))


def _read_all(read: Callable[[Any], Read], sources: Sequence[Any]) -> list[Read]:
    return list(map(read, sources))


def _encode_pieces(
    encode: BatchEncoder, images: Iterable[Read], start: int
) -> Iterator[tuple[int, list[tuple[int, str]], dict[str, Tensor]]]:
    """Yields (files done so far, failures, rows) whenever PIECE_ROWS or a few more rows are done, and at the end.

    A piece ends where a batch ends, so that a resumed run forms the same batches.
    """
    size = encode.batch_size
    batch: list[Tensor] = []
    batches: list[dict[str, Tensor]] = []
    failed: list[tuple[int, str]] = []

    def flush() -> None:
        if batch:
            batches.append(encode(torch.cat(batch), 0))
            batch.clear()

    def rows() -> dict[str, Tensor]:
        empty = {name: torch.empty(0, width) for name, width in encode.widths.items()}
        return {name: torch.cat([empty[name], *(rows[name] for rows in batches)]) for name in encode.widths}

    stop = start
    for stop, image in enumerate(images, start + 1):
        if isinstance(image, str):
            failed.append((stop - 1, image))
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


def _write_failures(path: Path, failed: list[tuple[str, str]]) -> None:
    if not failed:
        if path.exists() and FAILURES.is_one(path):  # of an earlier call
            path.unlink()
        return
    lines = (json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in failed)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _listing_digest(files: Mapping[str, Path | StoredImage]) -> str:
    """sha256 over names, sizes and times."""
    sha256 = hashlib.sha256()
    for name, path in files.items():
        if isinstance(path, StoredImage):
            sha256.update(json.dumps([name, path.identity]).encode())
            continue
        try:
            status = path.stat()
        except OSError:  # reading it will tell why
            sha256.update(json.dumps([name]).encode())
            continue
        sha256.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return sha256.hexdigest()


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OSError(
            f"{work.parent} has {free / 2**30:.1f} GiB free, and up to {needed / 2**30:.1f} are needed: "
            "make room, or name fewer outputs"
        )
