"""Labelled images of one split, encoded as they came, each reachable by its index."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bigbigan.config import PreprocessConfig
from bigbigan.data.decoding import Decoded, Decoder, Job, Source, in_colour
from bigbigan.data.labels import Naming
from bigbigan.data.workers import run_jobs

MAX_BYTES = 8 << 30  # of encoded files, and of decoded images, held in memory
LOOKED_AT = 32  # images whose header tells whether a set is in colour
CHUNK = 64  # images that one worker decodes at a time, outside training

logger = logging.getLogger(__name__)


class UnreadableImages:
    """Counts and names the unreadable images of a run, and stops it when they are too many."""

    def __init__(self, max_fraction: float) -> None:
        self.reasons: dict[int, str] = {}
        self._max_fraction = max_fraction

    def add(self, new: dict[int, str], total: int) -> None:
        """Warns of images not met before.

        Raises:
            ValueError: more than `max_fraction` of `total` images are unreadable.
        """
        new = {index: reason for index, reason in new.items() if index not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self._max_fraction * total:
            first = "; ".join(self.reasons[index] for index in sorted(self.reasons)[:5])
            raise ValueError(
                f"{len(self.reasons)} of {total} images cannot be read, more than {self._max_fraction:.2%}: "
                f"{first}. Repair or remove them, or raise max_bad_fraction, an option of the path"
            )
        if new:
            names = "; ".join(new[index] for index in sorted(new))
            logger.warning("%d unreadable images replaced by the next readable ones: %s", len(new), names)


class ImageDataset:
    """Labelled images of one split, encoded as they came, each reachable by its index.

    Attributes:
        labels: [N] int64; -1 where there is no label.
        class_names: name of each label.
        digest: sha256 of what the dataset holds (see `open_training_data`), for telling at resume that data changed.
        naming: what the labels mean in another split (`Naming`).
        root: the folder that image files are named by; None: rows without names.
        stored_paths: reads the paths that Parquet keeps beside its images; None where it has none, or some twice.
        bad: index and reason of every unreadable image met so far. Each is replaced, with its label, by the next
            readable one, so the same files always give the same samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Tensor,
        class_names: tuple[str, ...],
        digest: str,
        *,
        name: Callable[[int], str],
        naming: Naming = "numbers",
        root: Path | None = None,
        stored_paths: Callable[[], list[str] | None] = lambda: None,
        max_bad_fraction: float = 0.001,
    ) -> None:
        self.labels, self.class_names, self.digest, self.root = labels, class_names, digest, root
        self.naming, self.stored_paths = naming, stored_paths
        self.sources, self.max_bad = sources, max_bad_fraction * len(sources)
        self._unreadable, self.name = UnreadableImages(max_bad_fraction), name
        self._told = set[int]()

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def bad(self) -> dict[int, str]:
        return self._unreadable.reasons

    def tell_channels(self, channels: int) -> None:
        """Says once if pictures in colour become grey, or all are grey where colour is taken; a few are looked at."""
        if channels in self._told or os.environ.get("RANK", "0") != "0":
            return
        self._told.add(channels)
        looked = in_colour(self.sources, np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int).tolist())
        if channels == 1 and any(looked):
            logger.warning(
                "%d of %d images looked at are in colour, and the networks take grey images: colour is converted to "
                "grey. Recipes and models for colour have image_channels 3, such as bigbigan-cifar10-32",
                *(sum(looked), len(looked)),
            )
        elif channels == 3 and looked and not any(looked):
            logger.info("the images are grey, and the networks take colour: grey is repeated in three channels")

    def decoder(self, config: PreprocessConfig, channels: int, **options: Any) -> Decoder:
        self.tell_channels(channels)
        return Decoder(self.sources, config, channels, self.max_bad, bad=dict(self.bad), **options)

    def accept(self, decoded: Decoded) -> Tensor:
        """The images of a job, once its unreadable ones are counted and the labels of replaced ones set.

        Raises:
            ValueError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        self._unreadable.add({i: f"{self.name(i)}: {reason}" for i, reason in decoded.bad.items()}, len(self))
        if (decoded.used < 0).any():
            raise ValueError(f"none of the {len(self)} images can be read, such as {next(iter(self.bad.values()))}")
        self.labels[decoded.job.indices] = self.labels[decoded.used]
        return decoded.images

    def subset(self, part: slice) -> ImageDataset:
        """The images of a slice, renumbered from 0."""
        if max(part.start or 0, part.stop or 0) > len(self):
            raise ValueError(f"{part.start or 0}:{part.stop or ''} was asked for, and there are {len(self)} images")
        numbers = range(*part.indices(len(self)))
        if not numbers or numbers.step != 1:
            asked = f"[{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}]"
            raise ValueError(f"{asked} leaves no images of {len(self)}, or is no plain range")
        return self._select(numbers, f"{numbers[0]}:{numbers[-1] + 1}")

    def select(self, indices: Tensor) -> ImageDataset:
        """These images [n] in this order, renumbered from 0."""
        numbers = indices.cpu().numpy()
        return self._select(numbers, hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest())

    def _select(self, numbers: range | np.ndarray, what: str) -> ImageDataset:
        name, stored_paths, told = self.name, self.stored_paths, self._told

        def paths() -> list[str] | None:
            found = stored_paths()
            return None if found is None else [found[int(number)] for number in numbers]

        part = ImageDataset(
            _Part(self.sources, numbers),
            self.labels[torch.as_tensor(np.asarray(numbers))],
            self.class_names,
            hashlib.sha256(f"{self.digest}[{what}]".encode()).hexdigest(),
            name=lambda index: name(int(numbers[index])),
            naming=self.naming,
            root=self.root,
            stored_paths=paths,
            max_bad_fraction=self.max_bad / len(self),
        )
        part._told = told
        return part

    def uint8(self, index: int, config: PreprocessConfig, channels: int) -> np.ndarray:
        """One image [C, S, S] under evaluation preprocessing; an unreadable one is replaced with a warning.

        Raises:
            ValueError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        return self.decode([index], config, channels)[0].numpy()

    def decode(
        self, indices: Iterable[int] | Tensor, config: PreprocessConfig, channels: int, *, workers: int = 0
    ) -> Tensor:
        """Images [B, C, S, S] uint8 under evaluation preprocessing, as `uint8` gives them one by one."""
        wanted = np.fromiter(map(int, indices), np.int64)
        images = torch.empty((len(wanted), channels, config.resolution, config.resolution), dtype=torch.uint8)
        jobs = [Job(wanted[start : start + CHUNK]) for start in range(0, len(wanted), CHUNK)]
        results = run_jobs(
            self.decoder(config, channels), jobs, min(workers, len(jobs) // 16)
        )  # starting one takes a while
        # `disable=None`: only on a terminal
        for number, decoded in enumerate(
            tqdm(results, "decoding", len(jobs), disable=None if len(jobs) > 99 else True)
        ):
            images[number * CHUNK :][: len(decoded.images)] = self.accept(decoded)
        return images

    def batches(
        self, config: PreprocessConfig, channels: int, *, size: int, start: int = 0, workers: int = 0
    ) -> Iterator[Tensor]:
        """Images [size, C, S, S] uint8, of the last batch the rest, in order from `start` on, as `uint8` gives them."""
        stops = range(start + size, len(self) + size, size)
        jobs = (Job(np.arange(stop - size, min(stop, len(self)))) for stop in stops)
        for decoded in run_jobs(self.decoder(config, channels), jobs, min(workers, len(stops) // 2)):
            yield self.accept(decoded)

    def decode_all(
        self, config: PreprocessConfig, channels: int, *, max_bytes: int = MAX_BYTES, workers: int = 0
    ) -> Tensor:
        """All images, [N, C, S, S] uint8, as `uint8` gives them one by one.

        Raises:
            ValueError: they take more than `max_bytes`, or more than `max_bad_fraction` of them are unreadable.
        """
        self.check_decoded_bytes(config, channels, max_bytes)
        return self.decode(range(len(self)), config, channels, workers=workers)

    def check_decoded_bytes(self, config: PreprocessConfig, channels: int, max_bytes: int = MAX_BYTES) -> None:
        """
        Raises:
            ValueError: all images, decoded, take more.
        """
        size = self.decoded_bytes(config, channels)
        if size > max_bytes:
            raise ValueError(
                f"{len(self)} images of {config.resolution} pixels take {size / 2**30:.1f} GiB decoded, "
                f"more than {max_bytes / 2**30:.1f}; decode them on demand, at a lower resolution, or fewer"
            )

    def decoded_bytes(self, config: PreprocessConfig, channels: int) -> int:
        return math.prod((len(self), channels, config.resolution, config.resolution))


class _Part(Sequence[Source]):
    """Some of the sources, read when asked for."""

    def __init__(self, sources: Sequence[Source], numbers: range | np.ndarray) -> None:
        self.sources, self.numbers = sources, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[int(self.numbers[index])]
