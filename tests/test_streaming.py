"""Streams: each image once an epoch over processes and workers, places to go on from, and Hugging Face names."""

from __future__ import annotations

import functools
import gc
import io
import itertools
import json
import logging
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import AugmentationConfig
from bigbigan.data.batches import Images
from bigbigan.data.opening import open_dataset, open_training_data
from bigbigan.data.streaming import ImageStream, read_ahead

PLAIN = PreprocessConfig(size=8)


def png(value: int) -> bytes:
    """A plain picture: one pixel of it tells which one it is."""
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def make_stream(sizes: tuple[int, ...] = (9, 4, 0, 7, 6), block: int = 4, **options) -> ImageStream:
    """Shards of these sizes; images are numbered through."""
    starts = [0, *itertools.accumulate(sizes)]

    def shard(index: int):
        for value in range(starts[index], starts[index + 1]):
            yield functools.partial(png, value), value % 3

    return ImageStream(shard, len(sizes), name="shards", block=block, **options)


def readers_end() -> bool:
    gc.collect()  # those of tests before
    deadline = time.monotonic() + 10
    while any(thread.name == "image reader" for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def values(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def epochs(stream: ImageStream, world_size: int, number: int = 3) -> list[list[list[int]]]:
    """Image numbers by epoch and process."""
    found: list[list[list[int]]] = [[[] for _ in range(world_size)] for _ in range(number)]
    for rank in range(world_size):
        for image in stream.images(7, rank=rank, world_size=world_size):
            if image.position[0] == number:
                break
            assert isinstance(image.source, bytes)
            found[image.position[0]][rank].append(Image.open(io.BytesIO(image.source)).getpixel((0, 0)))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 7])
def test_every_image_once_an_epoch_over_all_processes(world_size: int):
    stream = make_stream((9, 4, 5, 7, 6))
    found = epochs(stream, world_size)
    for epoch in found:
        assert sorted(itertools.chain(*epoch)) == list(range(31))
        assert all(epoch)
    assert found[0] != found[1] != found[2] and found == epochs(make_stream((9, 4, 5, 7, 6)), world_size)


def test_more_processes_than_shards_are_told_once_and_none_starves(caplog):
    stream = make_stream((9, 8))
    found = epochs(stream, 4, number=2)
    assert len(caplog.messages) == 1 and "2 shards for 4 processes" in caplog.text
    assert all(3 <= len(part) <= 6 for epoch in found for part in epoch)
    assert all(epochs(make_stream((3, 3, 3)), 5, number=1)[0])  # nor with shards of fewer images than processes
    caplog.clear()
    epochs(stream, 2)
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"gives process 3 of 4 no image"):
        next(make_stream((2, 1)).images(0, rank=3, world_size=4))


def test_images_are_shuffled_within_blocks_of_a_shard():
    order = epochs(make_stream((12,), block=4), 1, number=6)
    for (epoch,) in order:
        blocks = [sorted(epoch[start : start + 4]) for start in (0, 4, 8)]
        assert blocks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({tuple(epoch) for (epoch,) in order}) == 6


@pytest.mark.parametrize("rank,world_size", [(0, 1), (1, 2), (3, 7)])
def test_a_stream_goes_on_bit_for_bit_from_any_batch(rank: int, world_size: int):
    augmentation = AugmentationConfig(flip=True, shift=2)

    def batches():
        images = Images(make_stream(), PLAIN, 1, augmentation=augmentation, workers=0, head=5)
        return images.batches(2 * world_size, 7, rank=rank, world_size=world_size)

    size, whole, states = 2 * world_size, [], []
    stream = batches()
    for step in range(20):
        states.append(json.loads(json.dumps(stream.state())))
        whole.append(stream.at(step * size))
    for step in (0, 1, 6, 13, 19):
        with_state, without = batches(), batches()
        with_state.load_state(states[step])
        assert torch.equal(with_state.at(step * size), whole[step])
        assert torch.equal(without.at(step * size), whole[step])  # read again from the start
    assert torch.equal(stream.at(5 * size), whole[5]) and torch.equal(stream.at(6 * size), whole[6])
    with pytest.raises(ValueError, match="whole batches"):
        batches().at(1)
    with pytest.raises(ValueError, match=f"{world_size} processes cannot go on with {world_size + 1}"):
        other = Images(make_stream(), PLAIN, 1, workers=0, head=5).batches(
            world_size + 1, 7, rank=0, world_size=world_size + 1
        )
        other.load_state(states[3])


def test_workers_and_jobs_change_nothing_and_each_image_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """15 Parquet files, of which a shuffled `IterableDataset` counts fewer; 2 processes, 2 workers."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(60)]
    data = datasets.Dataset.from_list(rows, features=features)
    for shard in range(15):
        data.shard(15, shard).to_parquet(tmp_path / f"{shard:02d}.parquet")
    spec = f"hf:parquet?data_files={tmp_path / '*.parquet'}&streaming=1"
    stream = open_training_data(spec)
    assert isinstance(stream, ImageStream) and stream.num_shards == 15 and stream.class_names == ("x", "y")
    with pytest.raises(ValueError, match="has no index"):
        open_dataset(spec)
    seen: Counter[int] = Counter()
    for rank in range(2):
        found = {}
        for workers in (0, 2):
            monkeypatch.setattr("bigbigan.data.batches.JOB_IMAGES", 3 if workers else 256)
            batches = Images(stream, PLAIN, 1, workers=workers, head=4).batches(8, 7, rank=rank, world_size=2)
            found[workers] = [values(batches.at(k)) for k in range(0, 56, 8)]
            batches.close()
            assert readers_end()
        assert found[0] == found[2]
        seen.update(itertools.chain(*found[0]))
    # 7 x 4 of the first process's 32 or 28 images, and of the other's
    assert set(seen.values()) == {1} and len(seen) == 56
    complete = epochs(stream, 2, number=2)
    assert [sorted(itertools.chain(*epoch)) for epoch in complete] == [list(range(60))] * 2


def test_crops_of_a_stream_are_drawn_by_sample_number():
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(noise, "PNG")
    stream = ImageStream(lambda index: [(noise.getvalue, 0)] * 5, 1, name="shards")
    augmentation = AugmentationConfig(crop_scale=(0.2, 0.5), original=True)

    def batches(size: int, **options):
        return Images(stream, PLAIN, 1, augmentation=augmentation, workers=0, head=1).batches(size, 7, **options)

    whole = batches(4)
    crops = torch.cat([whole.at(k) for k in (0, 4, 8)])
    assert len(crops.unique(dim=0)) == 12
    parts = [batches(4, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([part.at(k) for k in (0, 4, 8) for part in parts]), crops)


def test_the_head_of_a_stream_has_indices_and_labels():
    images = Images(make_stream(class_names=("a", "b", "c")), PLAIN, 1, head=10, workers=0)
    assert len(images) == 10 and images.decoded is not None
    numbers = images[torch.arange(10)][:, 0, 0, 0]
    assert len(set(numbers.tolist())) == 10 and torch.equal(numbers.long() % 3, images.labels)
    assert len(Images(make_stream(), PLAIN, 1, head=100, workers=0)) == 26  # no more than an epoch
    with pytest.raises(TypeError, match="no index"):
        images.batches(2, 0).indices(0)


def test_unreadable_images_of_a_stream_are_replaced_within_the_batch(caplog):
    def shard(index: int):
        return ((lambda value=value: None if value in (3, 9) else png(value), 0) for value in range(12))

    def batches(fraction: float):
        stream = ImageStream(shard, 1, name="shards", block=1, max_bad_fraction=fraction)
        return Images(stream, PLAIN, 1, workers=0, head=1).batches(4, 0)

    stream = batches(0.001)
    with caplog.at_level(logging.WARNING):
        assert [values(stream.at(k)) for k in (0, 4, 8)] == [[0, 1, 2, 0], [4, 5, 6, 7], [8, 10, 10, 11]]
    assert [f"shard 0 row {row}: the row has no image bytes" in caplog.text for row in (3, 9, 5)] == [True, True, False]
    strict = batches(0.00015)  # of the first 10,000
    strict.at(0)
    strict.at(4)
    with pytest.raises(ValueError, match="2 of 10000 images cannot be read.*row 3.*row 9"):
        strict.at(8)
    none = ImageStream(lambda index: [(lambda: b"", 0)] * 9, 1, name="shards")
    with pytest.raises(ValueError, match="none of 4 images can be read.*shard 0 row"):
        Images(none, PLAIN, 1, workers=0, head=1, in_memory=False).batches(4, 0).at(0)


def test_reading_ahead_hands_on_errors_and_stops_its_thread():
    def items():
        yield 1
        raise OSError("connection lost")

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="connection lost"):
        next(ahead)
    assert list(read_ahead(iter([]), 1)) == []
    endless = read_ahead(itertools.count(), 1)
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()
    assert readers_end()


# ---- Hugging Face names


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Images inside a struct, saved by `datasets`."""
    datasets = pytest.importorskip("datasets")
    features = {"views": {"front": datasets.Image(), "id": datasets.Value("int32")}, "text": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=["x", "y"])
    rows = [
        {"views": {"front": {"bytes": png(i), "path": None}, "id": i}, "text": "t", "label": i % 2} for i in range(7)
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "nested")
    return tmp_path / "nested"


def test_nested_and_unlabelled_columns(nested: Path):
    data = open_dataset(f"hf:{nested}?column=views.front")
    assert data.decode_all(PLAIN, 1)[:, 0, 0, 0].tolist() == list(range(7))
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and data.class_names == ("x", "y")
    assert open_dataset(f"hf:{nested}?column=views.front&label=").labels.tolist() == [-1] * 7
    assert open_dataset(f"hf:{nested}?column=views.front&label=views.id").labels.tolist() == list(range(7))
    stream = open_training_data(f"hf:{nested}?column=views.front&label=views.id&streaming=1")
    found = [(image.label, image.source) for image in itertools.islice(stream.images(0), 7)]
    assert sorted(found) == [(i, png(i)) for i in range(7)]


def test_streams_follow_the_paths_of_image_folders_and_archives(tmp_path: Path):
    pytest.importorskip("datasets")
    folder = tmp_path / "images" / "train"
    for index in range(4):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "ab"[index % 2] / f"{index}.png").write_bytes(png(index))
    stream = open_training_data(f"hf:imagefolder?data_dir={tmp_path / 'images'}&streaming=1")
    batches = Images(stream, PLAIN, 1, workers=0, head=4).batches(4, 0)
    assert sorted(values(batches.at(0))) == [0, 1, 2, 3] and stream.class_names == ("a", "b")

    import shutil

    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "images" / "train")
    zipped = open_training_data(f"hf:imagefolder?data_files={archive}&streaming=1&label=")
    assert sorted(values(Images(zipped, PLAIN, 1, workers=0, head=4).batches(4, 0).at(0))) == [0, 1, 2, 3]


def test_errors_of_names(nested: Path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for spec, message in (
        ("hf:", "hf: names no dataset; give hf:NAME"),
        (
            f"hf:{nested}?colum=x",
            "no option 'colum=x', or has it twice; options are column, label, max_bad_fraction, block",
        ),
        (f"hf:{nested}", r"no column image; its columns are views, text, label: name .*\?column=views.front$"),
        (f"hf:{nested}?column=views.back", "no column views.back"),
        (f"hf:{nested}?streaming", "no option 'streaming'"),
        (f"hf:{nested}?column=views.front&streaming=1&block=many", "block is 'many'; give a number of images"),
        (f"hf:{nested}?column=text", "images as string"),
        (f"hf:{nested}?column=text.a", "no column text.a"),
        (f"hf:{nested}?column=views.front&label=views", r"labels as struct.*&label=$"),
        (f"hf:{nested}?column=views.front&label=text&streaming=1", "a stream cannot number texts"),
        (f"hf:parquet?data_files={nested}/absent.parquet", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message):
            open_training_data(spec)

    def gated(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(ValueError, match=r"gated.*Accept its terms on https://huggingface\.co/datasets/org/name, then"):
        open_training_data("hf:org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"bigbigan\[train\]"):
        open_training_data("hf:org/name")
