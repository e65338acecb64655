"""Images that come in a fixed order from shards, for sets that do not fit on the disk."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from bigbigan.arrays import as_whole
from bigbigan.data.augment import permutation
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.decoding import Source

BLOCK = 1024  # images shuffled among each other

logger = logging.getLogger(__name__)

Row = tuple[Callable[[], Source], int]  # what reads the image, and its label
Position = tuple[int, int, int]  # epoch, place in this epoch's order of shards, images taken from that shard
T = TypeVar("T")


class StreamedImage(NamedTuple):
    source: Source
    label: int
    name: str
    position: Position  # of the next image


class ImageStream:
    """Labelled images that are read shard by shard.

    The order of an epoch has two levels, both a hash of (seed, epoch): the shards, and the images within each block
    of `block` consecutive ones of a shard. So images that lie far apart in a shard never meet in a batch: shards
    should hold their images in random order, as published training sets mostly do.

    With n processes, process r takes shards r, r + n, … of the epoch's order; where there are fewer shards than
    processes, each reads all shards and keeps every n-th image. Either way an epoch of all processes together holds
    each image once. Every process goes on to its next epoch by itself, so none waits for one with more images.

    Attributes:
        num_images: of one epoch, where the source says so.
        digest: sha256 over the number of shards and the first images.
    """

    def __init__(
        self,
        shard: Callable[[int], Iterable[Row]],
        num_shards: int,
        *,
        name: str,
        class_names: tuple[str, ...] = (),
        num_images: int | None = None,
        max_bad_fraction: float = 0.001,
        block: int = BLOCK,
    ) -> None:
        self.num_shards, self.name, self.class_names, self.num_images = num_shards, name, class_names, num_images
        self.max_bad_fraction = max_bad_fraction
        self._shard, self._block = shard, block
        digest = hashlib.sha256(str(num_shards).encode())
        for read, label in itertools.islice(shard(0), 16):
            source = read()
            digest.update(f"{label} ".encode() + (source if isinstance(source, bytes) else str(source).encode()))
        self.digest = digest.hexdigest()

    def images(
        self, seed: int, *, rank: int = 0, world_size: int = 1, position: Position = (0, 0, 0)
    ) -> Iterator[StreamedImage]:
        """Endless, from `position` on; what lies before it in its shard is read and dropped.

        Raises:
            ValueError: a whole epoch gives this process no image.
        """
        every_nth = self.num_shards < world_size
        if every_nth and rank == 0:
            logger.warning(
                "%s has %d shards for %d processes: each process reads all and keeps every %d-th image",
                *(self.name, self.num_shards, world_size, world_size),
            )
        seed = as_whole(seed, "seed")
        start, first, taken = position
        for epoch in itertools.count(start):
            order = permutation(self.num_shards, seed, epoch)
            mine = order if every_nth else order[rank::world_size]
            empty = (first, taken) == (0, 0)
            for place in range(first, len(mine)):
                shard = int(mine[place])
                rows: Iterable[tuple[int, Row]] = enumerate(self._shard(shard))
                if every_nth:
                    rows = itertools.islice(rows, (rank - place) % world_size, None, world_size)
                for count, (row, (read, label)) in enumerate(self._shuffled(rows, seed, epoch, shard), 1):
                    empty = False
                    if count > taken:
                        yield StreamedImage(
                            read(), label, f"{self.name} shard {shard} row {row}", (epoch, place, count)
                        )
                taken = 0
            if empty:
                raise ValueError(f"{self.name} gives process {rank} of {world_size} no image; use fewer processes")
            first = 0

    def _shuffled(self, rows: Iterable[T], seed: int, epoch: int, shard: int) -> Iterator[T]:
        rows = iter(rows)
        for number in itertools.count():
            block = list(itertools.islice(rows, self._block))
            if not block:
                return
            yield from (block[i] for i in permutation(len(block), seed, epoch, shard, number))

    def head(self, n: int) -> ImageDataset:
        """The first n images of one fixed shuffled epoch (or all, if there are fewer), held encoded in memory."""
        taken = list(itertools.takewhile(lambda image: image.position[0] == 0, itertools.islice(self.images(0), n)))
        names = {index: image.name for index, image in enumerate(taken)}
        return ImageDataset(
            [image.source for image in taken],
            torch.tensor([image.label for image in taken], dtype=torch.int64),
            self.class_names,
            self.digest,
            name=names.__getitem__,
            max_bad_fraction=self.max_bad_fraction,
        )


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, produced by a thread that is up to `depth` ahead, so that the network is not waited for."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[Any, Exception | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:  # raised again where the items are used
            put((None, error))

    def end() -> None:
        stop.set()
        thread.join(10)

    thread = threading.Thread(target=run, name="image reader", daemon=True)
    thread.start()
    atexit.register(end)  # the interpreter must not go down around a thread that is inside a library
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        atexit.unregister(end)
