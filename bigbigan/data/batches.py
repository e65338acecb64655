"""Which images make up the batch that starts at a given sample number, and how they are brought there."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbigan.arrays import as_whole
from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import NUM_DRAWS, AugmentationConfig, augment, permutation, uniform
from bigbigan.data.dataset import MAX_BYTES, ImageDataset, UnreadableImages
from bigbigan.data.decoding import Decoded, Decoder, Job
from bigbigan.data.streaming import ImageStream, Position, StreamedImage, read_ahead
from bigbigan.data.workers import default_workers, run_jobs

JOB_IMAGES = 256  # that a worker decodes at a time: two jobs a worker wait in memory, however large the batch


class Images:
    """What a run needs of its data: images by index under evaluation preprocessing, and training batches.

    An `ImageDataset` is decoded once into memory where it fits, or on demand. Of an `ImageStream`, `head` images have
    an index; training batches are drawn from all.

    Args:
        in_memory: None: if the decoded images take at most `max_bytes`, and `augmentation` does not crop originals.
        workers: processes that decode, of this process; None: `default_workers`.

    Raises:
        ValueError: `in_memory`, and they take more than `max_bytes`; or too many of them are unreadable.
    """

    def __init__(
        self,
        data: ImageDataset | ImageStream,
        config: PreprocessConfig,
        channels: int,
        *,
        augmentation: AugmentationConfig | None = None,
        in_memory: bool | None = None,
        max_bytes: int = MAX_BYTES,
        workers: int | None = None,
        head: int = 10_000,
    ) -> None:
        self.config, self.channels = config, channels
        self.augmentation = augmentation or AugmentationConfig()
        self.workers = default_workers() if workers is None else workers
        self.stream = data if isinstance(data, ImageStream) else None
        self.indexed = data.head(head) if isinstance(data, ImageStream) else data
        self.indexed.tell_channels(channels)
        if in_memory is None:
            in_memory = not self.augmentation.original and self.indexed.decoded_bytes(config, channels) <= max_bytes
        self.decoded: Tensor | None = None
        if in_memory:
            self.decoded = self.indexed.decode_all(config, channels, max_bytes=max_bytes, workers=self.workers)

    @property
    def labels(self) -> Tensor:
        return self.indexed.labels

    def __len__(self) -> int:
        return len(self.indexed)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """[B, C, S, S] uint8."""
        if self.decoded is not None:
            return self.decoded[indices]
        return self.indexed.decode(indices, self.config, self.channels, workers=self.workers)

    def batches(self, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Batches:
        """Training batches, with this object's augmentation."""
        kind = StreamBatches if self.stream else Batches
        return kind(self, batch_size, seed, augmentation=self.augmentation, rank=rank, world_size=world_size)


class Batches:
    """The endless stream of training samples, addressed by sample number.

    Sample k is image k % N of the permutation of epoch k // N, so batches may straddle epochs and every epoch holds
    each image once. Its augmentation is drawn from (seed, k). A batch is thus a function of (seed, k) alone: it is the
    same in memory or decoded on demand, for every number of workers, and over any number of processes together.

    Batches decoded on demand are decoded ahead as long as each `at(k)` goes on where the last one ended; any other k
    starts the workers anew.

    Args:
        images: uint8 [N, C, S, S], or `Images`.
        batch_size: of all processes together.
    """

    def __init__(
        self,
        images: Tensor | Images,
        batch_size: int,
        seed: int,
        *,
        augmentation: AugmentationConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4 or not len(images)):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 [N, C, S, S]")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not split evenly over {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0 to {world_size - 1}")
        self.batch_size = batch_size
        self._seed, self._augmentation = as_whole(seed, "seed"), augmentation or AugmentationConfig()
        if self._augmentation.original and getattr(images, "decoded", images) is not None:
            raise ValueError("crops of the original pictures need Images that are not in memory")
        self._images = images
        self._rank, self._world_size, self._local_size = rank, world_size, batch_size // world_size
        self._num_images = len(images)
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(permutation, len(images), self._seed))
        self._results: Generator[Decoded, None, None] | None = None
        self._next = 0  # where `_results` goes on

    def at(self, k: int, device: str | torch.device = "cpu") -> Tensor:
        """This process's slice [batch_size / world_size, C, S, S], in [-1, 1], of the batch starting at sample k.

        Raises:
            ValueError: too many images are unreadable.
            ChildProcessError: a worker died.
        """
        samples = self._samples(k)
        images = self._uint8(k).to(device).float() / 127.5 - 1
        if self._augmentation.original:
            return images
        return augment(images, uniform(self._seed, samples, NUM_DRAWS), self._augmentation)

    def indices(self, k: int) -> Tensor:
        """The images behind `at(k)` as [batch_size / world_size] int64 indices, for labels."""
        epochs, positions = np.divmod(self._samples(k), self._num_images)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self._permutation(int(epoch))[positions[epochs == epoch]]
        return torch.from_numpy(indices)

    def close(self) -> None:
        """Ends the workers; the next `at` starts them again."""
        if self._results is not None:
            self._results.close()
        self._results = None

    def state(self) -> dict[str, Any]:
        """What `load_state` takes besides the sample number to go on there: nothing, or a stream's place as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def _samples(self, k: int) -> np.ndarray:
        if k < 0:
            raise ValueError(f"sample number {k} is negative")
        return k + self._rank * self._local_size + np.arange(self._local_size)

    def _uint8(self, k: int) -> Tensor:
        if isinstance(self._images, Tensor):
            return self._images[self.indices(k)]
        if self._images.decoded is not None:
            return self._images.decoded[self.indices(k)]
        decoder = self._images.indexed.decoder(
            self._images.config, self._images.channels, augmentation=self._augmentation, seed=self._seed
        )
        return torch.cat(
            [self._images.indexed.accept(part) for part in self._decoded(k, decoder, self._images.workers)]
        )

    def _decoded(self, k: int, decoder: Decoder, workers: int) -> list[Decoded]:
        """A batch, in its jobs."""
        if self._results is None or k != self._next:
            self.close()
            self._results = run_jobs(decoder, self._jobs(k), workers)
        try:
            parts = [next(self._results) for _ in range(0, self._local_size, JOB_IMAGES)]
        except Exception:  # whatever it is, the workers end
            self.close()
            raise
        self._next = k + self.batch_size
        return parts

    def _jobs(self, k: int) -> Iterable[Job]:
        for first in itertools.count(k, self.batch_size):
            indices, samples = self.indices(first).numpy(), self._samples(first)
            for start in range(0, len(samples), JOB_IMAGES):
                yield Job(indices[start : start + JOB_IMAGES], samples[start : start + JOB_IMAGES])


class StreamBatches(Batches):
    """Batches of an `ImageStream`, whose order depends on the number of processes but not on that of workers.

    Going on at sample k takes the `state` saved there, and then reads again at most one shard. Without it, or going
    back, all of this process's samples before k are read (not decoded) from the start.
    """

    def __init__(self, images: Images, *args: Any, **options: Any) -> None:
        assert images.stream is not None
        super().__init__(images, *args, **options)
        self._stream, self._workers = images.stream, images.workers
        self._decoder = Decoder((), images.config, images.channels, float("inf"), self._augmentation, self._seed)
        self._position: Position = (0, 0, 0)  # of sample number `_next`
        self._unreadable, self._seen = UnreadableImages(self._stream.max_bad_fraction), 0

    def indices(self, k: int) -> Tensor:
        raise TypeError("the images of a stream have no index")

    def state(self) -> dict[str, Any]:
        return {"sample": self._next, "position": list(self._position), "world_size": self._world_size}

    def load_state(self, state: dict[str, Any]) -> None:
        """Of this very process.

        Raises:
            ValueError: it was saved with another number of processes.
        """
        if state["world_size"] != self._world_size:
            raise ValueError(f"a stream read by {state['world_size']} processes cannot go on with {self._world_size}")
        epoch, place, taken = state["position"]
        self.close()
        self._next, self._position = state["sample"], (epoch, place, taken)

    def _uint8(self, k: int) -> Tensor:
        parts = self._decoded(k, self._decoder, self._workers)
        for part in parts:
            first, self._seen, self._position = self._seen, self._seen + len(part.used), part.job.position
            bad = {first + index: f"{part.job.names[index]}: {reason}" for index, reason in part.bad.items()}
            self._unreadable.add(bad, max(self._seen, 10_000))  # or one image would be too many for an early batch
            if (part.used < 0).any():
                raise ValueError(f"none of {len(part.used)} images can be read: {'; '.join(list(bad.values())[:5])}")
        return torch.cat([part.images for part in parts])

    def _jobs(self, k: int) -> Iterable[Job]:
        start, position = (self._next, self._position) if k >= self._next else (0, (0, 0, 0))
        if (k - start) % self.batch_size:
            raise ValueError(f"a stream goes on at whole batches of {self.batch_size} after {start}, not at {k}")
        images = self._stream.images(self._seed, rank=self._rank, world_size=self._world_size, position=position)
        images = itertools.islice(images, (k - start) // self.batch_size * self._local_size, None)
        # a generator's body starts with its first item: after the workers, which must not inherit the thread
        return read_ahead(_stream_jobs(images, self._samples(k), self.batch_size), depth=2)


def _stream_jobs(images: Iterator[StreamedImage], samples: np.ndarray, batch_size: int) -> Iterator[Job]:
    # Not a method: the thread that runs it would keep the batches, and so itself, alive.
    while True:
        for start in range(0, len(samples), JOB_IMAGES):
            numbers = samples[start : start + JOB_IMAGES]
            taken = list(itertools.islice(images, len(numbers)))
            sources, names = [image.source for image in taken], [image.name for image in taken]
            yield Job(np.arange(len(taken)), numbers, sources, names, taken[-1].position)
        samples = samples + batch_size
