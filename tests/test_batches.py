"""Batches decoded on demand: the same for every source, number of workers and of processes; and what goes wrong."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import AugmentationConfig
from bigbigan.data.batches import Batches, Images
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.opening import open_dataset

N = 13
PLAIN = PreprocessConfig(size=8)
RESNET = AugmentationConfig(crop_scale=(0.08, 1.0), flip=True, original=True)


def png(value: int, size: int = 8) -> bytes:
    """A plain picture: one pixel of it tells which one it is."""
    stream = io.BytesIO()
    Image.new("L", (size, size), value).save(stream, "PNG")
    return stream.getvalue()


def photos(folder: Path, n: int = N) -> Path:
    """Not plain, not square: a crop shows in the pixels."""
    folder.mkdir(parents=True)
    for index in range(n):
        noise = np.random.default_rng(index).integers(0, 256, (20 + index, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03d}.png")
    return folder


def rows(n: int = N) -> list[dict]:
    return [{"image": {"bytes": png(i), "path": None}, "label": i % 3} for i in range(n)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(path: Path) -> str:
    for index in range(N):
        (path / str(index % 3)).mkdir(parents=True, exist_ok=True)
        (path / str(index % 3) / f"{index:03d}.png").write_bytes(png(index))
    return str(path)


def open_kind(kind: str, path: Path) -> ImageDataset:
    """The same images from every kind of source; `folder` sorts by class."""
    if "folder" in kind:
        folder = write_folder(path / "folder")
        return open_dataset(folder if kind == "folder" else f"hf:imagefolder?data_dir={folder}")
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    data = datasets.Dataset.from_list(rows(), features=datasets.Features(features))
    if kind == "saved":
        data.save_to_disk(path / "saved")
        return open_dataset(f"hf:{path / 'saved'}")
    for shard in range(3):
        data.shard(3, shard).to_parquet(path / f"train-0000{shard}-of-00003.parquet", batch_size=2)
    if kind == "hf parquet":
        return open_dataset(f"hf:parquet?data_files={path / '*.parquet'}")
    return open_dataset(path, max_bytes=100 if kind == "mapped parquet" else 10**6)


KINDS = ["folder", "parquet", "mapped parquet", "hf parquet", "hf imagefolder", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_each_image_once_an_epoch_and_the_same_on_demand(kind: str, tmp_path: Path, cache):
    data = open_kind(kind, tmp_path)
    assert len(data) == N and len(data.class_names) == 3
    order = sorted(range(N), key=lambda i: i % 3) if "folder" in kind else range(N)
    assert data.labels.tolist() == [i % 3 for i in order]
    assert data.uint8(5, PLAIN, 1)[0, 0, 0] == order[5]
    augmentation = AugmentationConfig(flip=True, shift=1)
    held = Images(data, PLAIN, 1, augmentation=augmentation, workers=0)
    asked = Images(data, PLAIN, 1, augmentation=augmentation, workers=0, in_memory=False)
    assert held.decoded is not None and asked.decoded is None
    assert torch.equal(held[torch.tensor([3, 0])], asked[torch.tensor([3, 0])])
    assert torch.equal(held.batches(4, 1).at(8), asked.batches(4, 1).at(8))
    for world_size in (1, 2, 4):
        parts = [
            Images(data, PLAIN, 1, workers=0, in_memory=False).batches(4, 1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        whole = torch.cat([torch.cat([part.at(k) for part in parts]) for k in range(0, 52, 4)])
        seen = ((whole[:, 0, 4, 4] + 1) * 127.5).round().long().reshape(4, N)
        assert (seen.sort().values == torch.arange(N)).all()
        expected = torch.cat([held.batches(4, 1).indices(k) for k in range(0, 52, 4)]).reshape(4, N)
        assert torch.equal(seen, torch.tensor(order)[expected])


def test_the_digest_tells_data_apart_wherever_it_lies(tmp_path: Path, cache):
    datasets = pytest.importorskip("datasets")
    digests = []
    for number, value in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        data = datasets.Dataset.from_list([*rows(5), {"image": {"bytes": png(value), "path": None}, "label": 0}])
        data.save_to_disk(folder)
        data.to_parquet(folder / "train.parquet")
        large = open_dataset(folder, max_bytes=10)
        digests.append((open_dataset(f"hf:{folder}").digest, open_dataset(folder).digest, large.digest))
    assert digests[0] == digests[1]
    assert digests[0][:2] != digests[2][:2]  # the footer has sizes, not contents
    assert not set(digests[0]) & set(digests[2][:2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_crops_are_the_same_for_any_workers_and_processes_and_from_any_sample_on(tmp_path: Path):
    data = open_dataset(photos(tmp_path / "photos"))
    here = Images(data, PreprocessConfig(size=16), 3, augmentation=RESNET, workers=0)
    assert here.decoded is None
    one_by_one = torch.cat([here.batches(1, 5).at(k) for k in range(28)])
    assert len(one_by_one.unique(dim=0)) == 28  # no crop twice
    assert torch.equal(here.batches(4, 5).at(17), one_by_one[17:21])
    for world_size in (2, 4):
        parts = [here.batches(4, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.at(k) for k in (0, 4) for part in parts]), one_by_one[:8])

    state = torch.get_rng_state()
    for workers in (1, 3):
        batches = Images(data, PreprocessConfig(size=16), 3, augmentation=RESNET, workers=workers).batches(4, 5)
        for k in (0, 4, 8, 12) if workers == 3 else (13, 17, 21, 3):  # the last jumps back
            assert torch.equal(batches.at(k), one_by_one[k : k + 4])
        assert len(multiprocessing.active_children()) == workers
        batches.close()
        assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_batch_is_decoded_in_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    data = open_dataset(photos(tmp_path / "photos"))

    def seen() -> torch.Tensor:
        images = Images(data, PreprocessConfig(size=16), 3, augmentation=RESNET, workers=workers)
        batches = images.batches(10, 5)
        found = torch.cat([batches.at(k) for k in (0, 10, 30, 40, 10)])
        batches.close()
        return found

    whole = seen()
    monkeypatch.setattr("bigbigan.data.batches.JOB_IMAGES", 4)
    assert torch.equal(seen(), whole)


def damage(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:60])


def test_unreadable_images_are_counted_and_replaced_alike_in_workers(tmp_path: Path, caplog):
    folder = photos(tmp_path / "photos", 30)
    damage(folder, 4, 5, 29)
    streams = []
    for workers in (0, 2):
        caplog.clear()
        data = open_dataset(folder, max_bad_fraction=0.1)
        data.labels[:] = torch.arange(30)
        with caplog.at_level(logging.WARNING):
            batches = Images(data, PLAIN, 3, augmentation=RESNET, workers=workers).batches(6, 0)
            streams.append(torch.cat([batches.at(k) for k in range(0, 60, 6)]))
            batches.close()
        assert sorted(data.bad) == [4, 5, 29] and data.labels[[4, 5, 29]].tolist() == [6, 6, 0]
        named = [message for message in caplog.messages if "unreadable" in message]
        assert [sum(f"{n:03d}.png:" in message for message in named) for n in (4, 5, 29)] == [1, 1, 1]
    assert torch.equal(*streams)

    strict = Images(open_dataset(folder, max_bad_fraction=0.05), PLAIN, 3, augmentation=RESNET, workers=0)
    batches = strict.batches(30, 0)
    for _ in range(2):  # it stays an error
        with pytest.raises(ValueError, match=r"3 of 30 images cannot be read, more than 5.00%.*004\.png.*005.*029"):
            batches.at(0)


def test_a_killed_worker_ends_the_run_and_a_signal_to_the_group_does_not(tmp_path: Path):
    data = open_dataset(photos(tmp_path / "photos"))
    batches = Images(data, PLAIN, 3, in_memory=False, workers=1).batches(2, 0)
    batches.at(0)
    (worker,) = multiprocessing.active_children()
    for number in ("-INT", "-TERM"):  # as from a shell, not from the parent
        subprocess.run(["kill", number, str(worker.pid)], check=True)
    for k in range(2, 40, 2):
        batches.at(k)
    assert worker.is_alive()
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"DataLoader worker (\(pid|died)"):
        os.kill(worker.pid, signal.SIGKILL)  # from here on the error may come at any line
        for k in range(40, 400, 2):
            batches.at(k)
            time.sleep(0.05)
    assert time.monotonic() - start < 30
    batches.close()
    assert torch.equal(batches.at(0), Images(data, PLAIN, 3, workers=0).batches(2, 0).at(0))
    (worker,) = multiprocessing.active_children()
    worker.terminate()  # as Python does at exit, and then waits for it
    worker.join(20)
    assert worker.exitcode is not None
    batches.close()


def test_too_large_for_memory_goes_on_demand_and_can_be_forced(tmp_path: Path):
    data = open_dataset(photos(tmp_path / "photos"))
    assert Images(data, PLAIN, 3, max_bytes=N * 192, workers=0).decoded is not None
    assert Images(data, PLAIN, 3, max_bytes=N * 192 - 1, workers=0).decoded is None
    with pytest.raises(ValueError, match="13 images of 8 pixels take"):
        Images(data, PLAIN, 3, max_bytes=100, workers=0, in_memory=True)
    with pytest.raises(ValueError, match="not in memory"):
        Images(data, PLAIN, 3, augmentation=RESNET, workers=0, in_memory=True).batches(2, 0)
    with pytest.raises(ValueError, match="not in memory"):
        Batches(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2, 0, augmentation=RESNET)
