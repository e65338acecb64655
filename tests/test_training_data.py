"""Training data: what is read, and that a batch depends on its sample number alone."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import NUM_DRAWS, AugmentationConfig, augment, uniform
from bigbigan.data.batches import Batches
from bigbigan.data.opening import open_dataset
from bigbigan.schema import ConfigError, from_dict, to_dict

EVERYTHING = AugmentationConfig(crop_scale=(0.2, 1.0), flip=True, shift=2)
PLAIN = PreprocessConfig(size=8)


def picture(index: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (size, size), np.uint8)


def png(index: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(index)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, images: list, labels: list, names: tuple[str, ...] = ()) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    table = pyarrow.table({"image": rows, "label": pyarrow.array(labels, pyarrow.int64())})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=4)
    return path


def write_images(folder: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(index))
    return folder


def expected(*indices: int) -> np.ndarray:
    return np.stack([picture(index) for index in indices])[:, None]


# ---- sources


def test_parquet_file(tmp_path: Path):
    path = write_parquet(
        tmp_path / "x.parquet", [png(i) for i in range(11)], [i % 3 for i in range(11)], ("a", "b", "c")
    )
    data = open_dataset(path)
    assert len(data) == 11 and data.labels.tolist() == [i % 3 for i in range(11)]
    assert data.labels.dtype == torch.int64 and data.class_names == ("a", "b", "c")
    assert data.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    images = data.decode_all(PLAIN, 1)
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), expected(*range(11)))
    assert np.array_equal(data.uint8(7, PLAIN, 1), picture(7)[None])
    assert np.array_equal(data.uint8(7, PLAIN, 3), np.repeat(picture(7)[None], 3, 0))


def test_parquet_folders_and_shards(tmp_path: Path):
    write_parquet(tmp_path / "a" / "train.parquet", [png(0), png(1)], [0, 1])
    write_parquet(tmp_path / "a" / "test.parquet", [png(2)], [5])
    assert len(open_dataset(tmp_path / "a")) == 2
    test = open_dataset(tmp_path / "a", split="test")
    assert test.labels.tolist() == [5] and test.class_names == ("0", "1", "2", "3", "4", "5")
    with pytest.raises(ValueError, match="neither val.parquet nor val-"):
        open_dataset(tmp_path / "a", split="val")

    shards = tmp_path / "b"
    for shard in range(3):
        write_parquet(
            shards / f"train-{shard:05d}-of-00003.parquet", [png(2 * shard), png(2 * shard + 1)], [shard, None]
        )
    data = open_dataset(shards)
    assert data.labels.tolist() == [0, -1, 1, -1, 2, -1]
    assert np.array_equal(data.decode_all(PLAIN, 1).numpy(), expected(*range(6)))
    (shards / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="2 of 3 train"):
        open_dataset(shards)


def test_parquet_errors_say_what_was_looked_for(tmp_path: Path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [png(0)], [0])
    with pytest.raises(ValueError, match="no column img; its columns are image, label"):
        open_dataset(path, column="img")
    with pytest.raises(ValueError, match=r"no column klass.*as in .*x\.parquet\?label=$"):
        open_dataset(path, label_column="klass")
    assert open_dataset(path, label_column=None).labels.tolist() == [-1]
    with pytest.raises(ValueError, match="images as int64"):
        open_dataset(path, column="label")
    with pytest.raises(ValueError, match="labels as struct"):
        open_dataset(path, label_column="image")
    high = write_parquet(tmp_path / "high.parquet", [png(0)], [10**9])
    with pytest.raises(ValueError, match=r"high\.parquet has a label 1000000000; number classes from 0"):
        open_dataset(high)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"x\.parquet is no readable parquet"):
        open_dataset(path)
    with pytest.raises(ValueError, match="absent is neither"):
        open_dataset(tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"bigbigan\[train\]"):
        open_dataset(path)


def test_a_column_of_plain_bytes(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"jpg": [png(3), png(4)]}), tmp_path / "x.parquet")
    data = open_dataset(tmp_path / "x.parquet", column="jpg", label_column=None)
    assert np.array_equal(data.decode_all(PLAIN, 1).numpy(), expected(3, 4))


def test_options_behind_a_path_come_before_arguments(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, images = tmp_path / "train.parquet", [png(3), b"no image"] * 2
    parquet.write_table(pyarrow.table({"img": images, "image": [png(5)] * 4, "fine": [7, 8, 9, 6]}), path)
    options = "?column=img&label=fine&max_bad_fraction=0.5"
    for where in (path, tmp_path):
        data = open_dataset(f"{where}{options}", split="train[:3]", label_column=None, max_bad_fraction=0)
        assert np.array_equal(data.decode_all(PLAIN, 1).numpy(), expected(3, 3, 3))
        assert data.labels.tolist() == [7, 9, 9]  # an unreadable image takes the label of its replacement, too
    assert open_dataset(f"{path}?column=img&label=").labels.tolist() == [-1] * 4
    named = ("", "?column=img", "?column=img&label=")
    assert len({open_dataset(f"{path}{options}", label_column="fine").digest for options in named}) == 3
    odd = tmp_path / "odd?label=fine"
    odd.mkdir()
    assert open_dataset(write_images(odd, ["a/1.png"])).labels.tolist() == [0]  # a folder of that very name
    folder = write_images(tmp_path / "pictures", ["a/1.png"])
    assert open_dataset(f"{folder}?label=&max_bad_fraction=1e-3").labels.tolist() == [-1]
    with pytest.raises(ValueError, match=r"pictures holds image files, which have no columns: .* only label= fits"):
        open_dataset(f"{folder}?label=fine")
    for bad, message in (("?colum=img", "no option 'colum=img', or has it twice; options are column, label, max_bad"),
                         ("?label", "no option 'label'"),
                         ("?label=a&label=b", "no option 'label=b', or has it twice"),
                         ("?max_bad_fraction=2", "max_bad_fraction is '2'; give a number from 0 to 1")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            open_dataset(f"{path}{bad}")


def test_image_folder(tmp_path: Path):
    folder = write_images(tmp_path, ["dog/1.png", "cat/deep/2.png", "cat/1.png", "loose.png"])
    data = open_dataset(folder)
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 0, 1, -1]
    assert np.array_equal(data.decode_all(PLAIN, 1).numpy(), expected(2, 1, 0, 3))
    assert open_dataset(folder).digest == data.digest
    (folder / "dog" / "1.png").rename(folder / "dog" / "0.png")
    assert open_dataset(folder).digest != data.digest
    with pytest.raises(ValueError, match="no 'test' split"):  # never the training images under another name
        open_dataset(folder, split="test")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"no train\.parquet.*void: no pictures"):
        open_dataset(tmp_path / "void")


def test_image_folder_of_splits(tmp_path: Path):
    folder = write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "test/b/1.png"])
    assert open_dataset(folder).class_names == ("a", "b") and len(open_dataset(folder)) == 2
    assert np.array_equal(open_dataset(folder, split="test").decode_all(PLAIN, 1).numpy(), expected(2))


def test_fashion_mnist_is_what_pillow_decodes_padded_with_black(shared_data: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    data = open_dataset(shared_data / "fashion_mnist", split="test")
    assert len(data) == 10_000 and data.class_names[9] == "Ankle boot"
    rows = parquet.ParquetFile(shared_data / "fashion_mnist" / "test.parquet").read_row_group(0).to_pylist()[:50]
    config = PreprocessConfig(size=28, pad=2, polarity="light-on-dark")
    for index, row in enumerate(rows):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert np.array_equal(data.uint8(index, config, 1)[0], np.pad(pixels, 2))
        assert data.labels[index] == row["label"]


def test_too_many_images_for_memory_are_refused(tmp_path: Path):
    data = open_dataset(write_images(tmp_path, ["1.png", "2.png"]))
    assert data.decode_all(PLAIN, 1, max_bytes=128).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="2 images of 8 pixels"):
        data.decode_all(PLAIN, 1, max_bytes=127)


# ---- unreadable images


def damaged(tmp_path: Path) -> Path:
    images = [png(i) for i in range(30)]
    images[3] = images[3][:-30]
    images[4] = None
    images[29] = b"not an image"
    return write_parquet(tmp_path / "x.parquet", images, list(range(30)))


def test_unreadable_images_are_named_once_and_replaced_by_the_next(tmp_path: Path, caplog):
    path = damaged(tmp_path)
    data = open_dataset(path, max_bad_fraction=0.1)
    images = data.decode_all(PLAIN, 1)
    order = [5 if i in (3, 4) else i % 29 for i in range(30)]  # 29 wraps around to 0
    assert np.array_equal(images.numpy(), expected(*order))
    assert data.labels.tolist() == order
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    for text in (
        "3 unreadable",
        "x.parquet row 3:",
        "x.parquet row 4: the row has no image bytes",
        "x.parquet row 29:",
    ):
        assert text in caplog.text

    one_by_one = open_dataset(path, max_bad_fraction=0.1)
    for index in (29, 3, 4, 3, 10):  # in any order, the same
        assert np.array_equal(one_by_one.uint8(index, PLAIN, 1)[None], expected(order[index]))
        assert one_by_one.labels[index] == order[index]
    assert len(caplog.records) == 3  # 3 and 4 together


def test_more_unreadable_images_than_allowed_stop_the_run(tmp_path: Path):
    with pytest.raises(ValueError, match="3 of 30 images cannot be read, more than 9.00%.*row 3.*row 4.*row 29"):
        open_dataset(damaged(tmp_path), max_bad_fraction=0.09).decode_all(PLAIN, 1)
    with pytest.raises(ValueError, match="1 of 30"):
        open_dataset(damaged(tmp_path)).uint8(3, PLAIN, 1)
    broken = write_parquet(tmp_path / "y.parquet", [b"bad"] * 20, [0] * 20)
    with pytest.raises(ValueError, match="20 of 20") as caught:
        open_dataset(broken).decode_all(PLAIN, 1)
    assert "row 4" in str(caught.value) and "row 5" not in str(caught.value)
    with pytest.raises(ValueError, match="none of the 20"):
        open_dataset(broken, max_bad_fraction=1).uint8(7, PLAIN, 1)


# ---- order of samples


def some_images(n: int = 10, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, 1, size, size), np.uint8))


def test_every_epoch_holds_every_image_once_in_another_order():
    batches = Batches(some_images(10), 4, seed=3)
    stream = torch.cat([batches.indices(k) for k in range(0, 80, 4)]).reshape(8, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 8
    assert not torch.equal(Batches(some_images(10), 10, seed=4).indices(0), stream[0])
    larger_than_the_set = Batches(some_images(10), 25, seed=3).indices(10)
    assert torch.equal(larger_than_the_set, stream.flatten()[10:35])


def test_orders_are_unbiased():
    batches = Batches(some_images(5), 5, seed=0)
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), batches.indices(5 * epoch).numpy()] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_any_sample_number_can_be_resumed_at():
    images = some_images(10)
    stream = Batches(images, 1, seed=3, augmentation=EVERYTHING)
    one_by_one = torch.cat([stream.at(k) for k in range(40)])
    for k in (0, 33, 7, 9, 10, 26):  # multiples of the batch or not, forwards and backwards
        fresh = Batches(images, 6, seed=3, augmentation=EVERYTHING)
        assert torch.equal(fresh.at(k), one_by_one[k : k + 6])
        assert torch.equal(fresh.at(k), fresh.at(k))
    assert not torch.equal(
        one_by_one, torch.cat([Batches(images, 1, 4, augmentation=EVERYTHING).at(k) for k in range(40)])
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_slices_of_all_processes_make_up_the_batch(world_size: int):
    images = some_images(10)
    options = {"seed": 3, "augmentation": EVERYTHING}
    whole = Batches(images, 12, **options)
    parts = [Batches(images, 12, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for k in (0, 12, 24):
        assert torch.equal(torch.cat([part.at(k) for part in parts]), whole.at(k))
        assert torch.equal(torch.cat([part.indices(k) for part in parts]), whole.indices(k))


def test_without_augmentation_pixels_are_exact():
    images = some_images(10)
    batches = Batches(images, 10, seed=0)
    assert torch.equal(batches.at(5), images[batches.indices(5)].float() / 127.5 - 1)
    assert batches.at(0).min() >= -1 and batches.at(0).max() <= 1


def test_an_image_is_augmented_anew_in_every_epoch():
    batches = Batches(some_images(1), 20, seed=0, augmentation=EVERYTHING)
    assert len(batches.at(0).unique(dim=0)) == 20


def test_wrong_arguments_are_refused():
    for images in (some_images().float(), some_images()[0], some_images()[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            Batches(images, 2, 0)
    with pytest.raises(ValueError, match="batch of 6 does not split evenly over 4"):
        Batches(some_images(), 6, 0, world_size=4)
    with pytest.raises(ValueError, match="rank 2"):
        Batches(some_images(), 6, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="negative"):
        Batches(some_images(), 6, 0).at(-1)


# ---- random numbers


def splitmix64(state: int) -> int:
    """First output for a seed, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def chain(*words: int) -> int:
    state = 0
    for word in words:
        state = splitmix64(state ^ word % 2**64)
    return state


def test_random_numbers_are_splitmix64_on_every_machine_and_version():
    assert splitmix64(1234567) == 6457827717110365317  # the published test vector
    for seed in (0, 7, 2**64 - 1, -5):
        samples = np.array([0, 1, 10**12])
        draws = uniform(seed, samples, 3)
        assert draws.tolist() == [[(chain(seed, 1, n, d) >> 11) / 2**53 for d in range(3)] for n in samples.tolist()]
        order = sorted(range(10), key=lambda index: chain(seed, 0, 2, index))
        assert Batches(some_images(10), 10, seed).indices(20).tolist() == order


def test_random_numbers_are_uniform_and_independent():
    draws = uniform(11, np.arange(40_000), NUM_DRAWS)
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        # neighbouring samples
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 4 / 200
    correlations = np.corrcoef(np.concatenate([draws, uniform(12, np.arange(40_000), NUM_DRAWS)], 1).T)
    assert np.abs(correlations - np.eye(len(correlations))).max() < 4 / 200


# ---- augmentation


def test_flips_are_exact_and_hit_half():
    images = torch.randn(1000, 2, 5, 5)
    flipped = augment(images, uniform(0, np.arange(1000), NUM_DRAWS), AugmentationConfig(flip=True))
    mirrored = (flipped == images.flip(3)).all(dim=(1, 2, 3))
    assert torch.equal(mirrored, ~(flipped == images).all(dim=(1, 2, 3)))
    assert 440 < mirrored.sum() < 560


def test_shifts_move_by_whole_pixels_onto_black():
    images = torch.rand(200, 1, 6, 6) - 0.5
    draws = uniform(0, np.arange(200), NUM_DRAWS)
    shifted = augment(images, draws, AugmentationConfig(shift=2))
    seen = set()
    for image, result in zip(images[:, 0].numpy(), shifted[:, 0].numpy(), strict=True):
        matches = []
        for right in range(-2, 3):
            for down in range(-2, 3):
                canvas = np.full((10, 10), -1.0, np.float32)
                canvas[2 + down : 8 + down, 2 + right : 8 + right] = image
                if np.allclose(canvas[2:8, 2:8], result, atol=1e-5):
                    matches.append((right, down))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25


def resized_crop(image: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Bilinear, pixel centres at halves, rim repeated; one pixel at a time."""
    size = len(image)
    result = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            x = min(max(left + (column + 0.5) * width / size - 0.5, 0), size - 1)
            y = min(max(top + (row + 0.5) * height / size - 0.5, 0), size - 1)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            upper = image[y0, x0] * (x0 + 1 - x) + image[y0, x1] * (x - x0)
            lower = image[y1, x0] * (x0 + 1 - x) + image[y1, x1] * (x - x0)
            result[row, column] = upper * (y0 + 1 - y) + lower * (y - y0)
    return result


def test_crop_flip_and_shift_against_a_computation_by_hand():
    size = 8
    image = np.random.default_rng(0).uniform(-1, 1, (size, size))
    # area 1/4 of the image, aspect 1, so 4 x 4 pixels of a free range of 4 x 4: a quarter and three quarters of it
    config = AugmentationConfig(crop_scale=(0.25, 0.75), aspect=(0.5, 2.0), flip=True, shift=1)
    draws = np.array([[0.0, 0.5, 0.25, 0.75, 0.9, 0.5, 0.5]])  # no flip, no shift
    crop = resized_crop(image, 1, 3, 4, 4)
    batch = torch.from_numpy(image).float()[None, None]
    assert np.allclose(augment(batch, draws, config)[0, 0].numpy(), crop, atol=1e-5)
    draws[0, 4:] = [0.1, 0.99, 0.0]  # flipped, then one to the right and one up
    moved = np.full((size, size), -1.0)
    moved[:-1, 1:] = crop[:, ::-1][1:, :-1]
    assert np.allclose(augment(batch, draws, config)[0, 0].numpy(), moved, atol=1e-5)
    # aspect 2 at half the area is the image's full width: 8 x 4 from the top, whatever "left" says
    wide = augment(batch, np.array([[0.5, 1 - 1e-12, 0.7, 0.0, 0.9, 0.5, 0.5]]), config)[0, 0]
    assert np.allclose(wide.numpy(), resized_crop(image, 0, 0, 8, 4), atol=1e-5)


def test_crops_lie_in_the_image_with_the_areas_and_aspects_asked_for():
    size = 32
    centres = (torch.arange(size).float() + 0.5) / size
    ramps = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])  # x and y as pixel values
    config = AugmentationConfig(crop_scale=(0.2, 0.5), aspect=(3 / 4, 4 / 3))  # sqrt(0.5 * 4 / 3) < 1: none is cut
    crops = augment(ramps.expand(4000, 2, size, size), uniform(0, np.arange(4000), NUM_DRAWS), config).double().numpy()
    middle = slice(8, 24)  # away from the rim, where the ramp is clamped
    x, y = crops[:, 0, 0, middle], crops[:, 1, middle, 0]
    width, height = (x[:, -1] - x[:, 0]) * size / 15, (y[:, -1] - y[:, 0]) * size / 15
    left, top = x.mean(1) - width / 2, y.mean(1) - height / 2
    assert min(left.min(), top.min()) > -1e-4 and max((left + width).max(), (top + height).max()) < 1 + 1e-4
    assert stats.kstest(width * height, "uniform", args=(0.2, 0.3)).pvalue > 1e-3
    span = np.log(4 / 3)
    assert stats.kstest(np.log(width / height), "uniform", args=(-span, 2 * span)).pvalue > 1e-3
    assert stats.kstest(left / (1 - width), "uniform").pvalue > 1e-3
    assert stats.kstest(top / (1 - height), "uniform").pvalue > 1e-3


def test_augmentation_config_is_checked_and_survives_json():
    assert from_dict(AugmentationConfig, to_dict(EVERYTHING)) == EVERYTHING
    for wrong in ({"crop_scale": (0.5, 0.1)}, {"crop_scale": (0.0, 1.0)}, {"aspect": (1.0,)}, {"shift": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AugmentationConfig(**wrong)


def test_a_range_of_a_split(tmp_path: Path) -> None:
    for i in range(6):
        folder = tmp_path / "abc"[i // 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(folder / f"{i}.png")
    config = PreprocessConfig(4)
    whole, first, rest = (open_dataset(tmp_path, split=split) for split in ("train", "train[:4]", "train[4:]"))
    values = [data.decode_all(config, 1)[:, 0, 0, 0].tolist() for data in (whole, first, rest)]
    assert values == [[0, 10, 20, 30, 40, 50], [0, 10, 20, 30], [40, 50]]
    assert first.labels.tolist() == [0, 0, 1, 1] and rest.labels.tolist() == [2, 2]
    assert first.class_names == whole.class_names and len({d.digest for d in (whole, first, rest)}) == 3
    with pytest.raises(ValueError, match="leaves no images of 6"):
        open_dataset(tmp_path, split="train[6:]")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_read_all_images_in_order_from_anywhere(tmp_path: Path, workers: int) -> None:
    """As decoded at once, also where images are unreadable, whose labels are set as they come by."""
    data, whole = (open_dataset(damaged(tmp_path), max_bad_fraction=0.5) for _ in range(2))
    images = whole.decode_all(PLAIN, 1)
    pieces = list(data.batches(PLAIN, 1, size=3, workers=workers))
    assert [len(piece) for piece in pieces] == [3] * (len(data) // 3) + ([len(data) % 3] if len(data) % 3 else [])
    assert torch.equal(torch.cat(pieces), images)
    assert torch.equal(data.labels, whole.labels) and data.bad.keys() == whole.bad.keys()
    assert torch.equal(torch.cat(list(data.batches(PLAIN, 1, size=2, start=5, workers=workers))), images[5:])
    assert list(data.batches(PLAIN, 1, size=4, start=len(data))) == []


def test_a_choice_of_images(tmp_path: Path) -> None:
    data = open_dataset(write_parquet(tmp_path / "x.parquet", [png(i) for i in range(11)], list(range(11))))
    part = data.select(torch.tensor([7, 2, 9])).select(torch.tensor([2, 0]))
    assert part.labels.tolist() == [9, 7] and part.class_names == data.class_names
    assert np.array_equal(part.decode_all(PLAIN, 1).numpy(), expected(9, 7))
    assert "row 9" in part.name(0) and "row 3" in data.subset(slice(3, 5)).name(0)
    digests = {
        data.digest,
        part.digest,
        data.select(torch.tensor([9, 7])).digest,
        data.select(torch.tensor([7])).digest,
    }
    assert len(digests) == 4
    part.labels[0] = 5
    assert data.labels[9] == 9


def test_a_range_beyond_the_images_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [png(i) for i in range(4)], [0] * 4)
    assert len(open_dataset(tmp_path, split="x[1:4]")) == 3 and path.exists()
    for split in ("x[:5]", "x[5:]"):
        with pytest.raises(ValueError, match="was asked for, and there are 4 images"):
            open_dataset(tmp_path, split=split)
