"""From pictures of any kind to what a model takes, against hand-computed values and plain NumPy arithmetic."""

from __future__ import annotations

import functools
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import ORIENTATION, config, noise, over, pixels, values
from PIL import Image

from bigbigan import create_model
from bigbigan.evaluation import Classifier, reconstruction_report
from bigbigan.images import BadImageError, _warn_of_unit_range, preprocess, read_image


@pytest.mark.parametrize(
    ("shape", "size", "crop", "rows", "columns"),
    [
        ((7, 10), 7, "center", slice(0, 7), slice(2, 9)),  # 3 columns too many: 2 go on the left
        ((10, 7), 7, "center", slice(2, 9), slice(0, 7)),
        ((8, 20), 8, "center", slice(0, 8), slice(6, 14)),
        ((64, 70), 32, "resnet", slice(16, 48), slice(19, 51)),  # side 64 * 32 / 64
        ((300, 288), 256, "resnet", slice(22, 278), slice(16, 272)),  # side 288 * 256 / 288
        ((160, 163), 128, "resnet", slice(16, 144), slice(18, 146)),  # side 160 * 128 / 160
    ],
)
def test_crop_takes_exactly_these_pixels(
    shape: tuple[int, int], size: int, crop: Any, rows: slice, columns: slice
) -> None:
    picture = noise(*shape, 3)
    expected = picture[rows, columns][None]
    assert np.array_equal(pixels(preprocess(picture, config(size, crop=crop), 3)), expected)
    assert np.array_equal(pixels(preprocess(picture, config(size), 3, crop=crop)), expected)


@pytest.mark.parametrize("crop", ["center", "resnet"])
@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos", "box", "nearest"])
def test_scaling_sees_the_crop_only(crop: Any, name: Any) -> None:
    picture = noise(500, 410, 3)
    side, top, left = (410, 45, 0) if crop == "center" else (136, 182, 137)  # 410 * 16 // 48 = 136
    cut = Image.fromarray(picture[top : top + side, left : left + side].copy())
    expected = values(cut.resize((16, 16), Image.Resampling[name.upper()]))[None]
    assert np.array_equal(pixels(preprocess(picture, config(16, crop=crop, filter=name), 3)), expected)


def test_squash_averages_by_hand() -> None:
    picture = np.array([[10, 20, 100, 200], [30, 40, 50, 50]], np.uint8)
    result = preprocess(picture, config(2, crop="none", filter="box"), 1)
    assert pixels(result)[0, ..., 0].tolist() == [[15, 150], [35, 50]]


def test_right_size_passes_bit_exact_whatever_the_crop() -> None:
    picture = noise(28, 28, 1)
    for crop in ("center", "resnet", "none"):
        result = preprocess(picture, config(28, 2, crop=crop), 1)
        assert result.dtype == torch.float32 and result.shape == (1, 1, 32, 32)
        assert torch.equal(result[0, 0, 2:30, 2:30], torch.tensor(picture[..., 0]).float() / 127.5 - 1)
        border = result.clone()
        border[..., 2:30, 2:30] = -1
        assert (border == -1).all()


def test_padded_size_is_scaled_like_any_other() -> None:
    picture = noise(32, 32)
    expected = values(Image.fromarray(picture).resize((28, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels(preprocess(picture, config(28, 2), 1))[0, 2:30, 2:30, 0], expected)


def test_ends_of_the_range_are_exact() -> None:
    result = preprocess(np.array([[0, 255], [51, 204]], np.uint8), config(2), 1)
    assert torch.equal(result[0, 0], torch.tensor([[-1.0, 1.0], [51 / 127.5 - 1, 204 / 127.5 - 1]]))


def test_invert_leaves_the_border_black() -> None:
    picture = noise(28, 28)
    result = pixels(preprocess(picture, config(28, 2), 1, invert=True))[0, ..., 0]
    assert np.array_equal(result[2:30, 2:30], 255 - picture.astype(int)) and result[:2].max() == 0


def test_grey_is_repeated_for_a_colour_model() -> None:
    picture = noise(6, 6)
    assert np.array_equal(pixels(preprocess(picture, config(6), 3))[0], picture[..., None].repeat(3, 2))


def test_colour_for_a_grey_model_is_luma_with_one_warning() -> None:
    pictures = noise(3, 6, 6, 3)
    luma = np.round(pictures @ np.array([299, 587, 114]) / 1000)
    with pytest.warns(UserWarning) as caught:
        result = preprocess(pictures, config(6), 1)
    assert len(caught) == 1 and "grey" in str(caught[0].message) and "invert" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert np.abs(pixels(result)[..., 0] - luma).max() <= 1
    with pytest.warns(UserWarning):
        scaled = preprocess(pictures[0], config(4), 1)
    assert torch.equal(scaled, preprocess(Image.fromarray(pictures[0]).convert("L"), config(4), 1))
    with pytest.warns(UserWarning, match="invert=True"):
        preprocess(pictures, config(6, polarity="light-on-dark"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess(pictures, config(6), 3)
        preprocess(pictures[..., :1], config(6, polarity="light-on-dark"), 1)


def test_background_follows_the_polarity() -> None:
    clear = Image.new("LA", (4, 4), (99, 0))
    for polarity, invert, expected in [
        ("natural", False, 255),
        ("light-on-dark", False, 0),
        ("light-on-dark", True, 0),  # dark strokes on nothing: white behind them, then inverted
    ]:
        result = preprocess(clear, config(4, polarity=polarity), 1, invert=invert)
        assert (pixels(result) == expected).all()
    assert (pixels(preprocess(clear, config(4), 1, background=(40, 40, 40))) == 40).all()
    with pytest.raises(ValueError, match=r"background is \(0, 0, 256\)"):
        preprocess(clear, config(4), 1, background=(0, 0, 256))


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    picture = noise(9, 9, 3)
    Image.fromarray(picture).save(tmp_path / "a.png")
    tensor = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    expected = torch.from_numpy(picture.transpose(2, 0, 1) / 127.5 - 1).float()[None]
    sources: list[Any] = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(picture), picture, tensor]
    sources += [picture[None], tensor[None], expected, expected[0], picture[::-1][::-1]]
    for source in sources:
        assert torch.allclose(preprocess(source, config(9), 3), expected, atol=1e-6)
    single = [source for source in sources if getattr(source, "ndim", 3) == 3]
    assert torch.allclose(preprocess(single, config(9), 3), expected.expand(len(single), -1, -1, -1), atol=1e-6)
    assert preprocess(tuple(single[:2]), config(9), 3).shape == (2, 3, 9, 9)


def test_array_layouts() -> None:
    grey, rgba = noise(5, 6, 6, 1), noise(5, 6, 6, 4)
    assert np.array_equal(pixels(preprocess(grey, config(6), 1)), grey)
    assert np.array_equal(pixels(preprocess(torch.from_numpy(grey.transpose(0, 3, 1, 2).copy()), config(6), 1)), grey)
    wide = rgba.astype(int)
    assert np.array_equal(pixels(preprocess(rgba, config(6), 3)), over(wide[..., :3], wide[..., 3:]))
    assert np.array_equal(values(read_image(torch.from_numpy(grey[0, ..., 0]))), grey[0, ..., 0])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((6, 6, 3)), "float64 values; give uint8"),
        (np.zeros((6, 6), np.float32), "float32 values; give uint8"),
        (np.zeros((6, 6), np.int64), "int64 values; give uint8"),
        (np.zeros((6, 6), bool), "bool values; give uint8"),
        (torch.zeros(3, 6, 6, dtype=torch.int64), "torch.int64 values; give uint8"),
        (np.zeros((9, 6, 6), np.uint8), r"shape \[9, 6, 6\]; .*grey \[N, H, W\] with an axis"),
        (np.zeros((3, 6, 6), np.uint8), r"shape \[3, 6, 6\]"),
        (np.zeros((9, 3, 6, 6), np.uint8), r"shape \[9, 3, 6, 6\]"),
        (np.zeros((6, 6, 2), np.uint8), r"shape \[6, 6, 2\]"),
        (torch.zeros(6, 6, 3, dtype=torch.uint8), r"shape \[6, 6, 3\]"),
        (np.zeros(6, np.uint8), r"shape \[6\]"),
        (np.zeros((0, 6), np.uint8), "6 x 0 pixels"),
        (np.zeros((1, 6), np.uint8), "6 x 1 pixels"),
        (b"\x89PNG", "bytes is no picture"),
        (None, "NoneType is no picture"),
        (7, "int is no picture"),
    ],
)
def test_refused_sources(source: Any, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        preprocess(source, config(6), 3)
    assert caught.value.path is None
    with pytest.raises(BadImageError, match="image 1 of the batch: " + reason):
        preprocess([np.zeros((6, 6), np.uint8), source], config(6), 3)


def test_batches_name_the_culprit(tmp_path: Path) -> None:
    good = np.zeros((6, 6), np.uint8)
    with pytest.raises(BadImageError) as caught:
        preprocess([good, tmp_path / "absent.png", good], config(6), 1)
    assert caught.value.path == str(tmp_path / "absent.png")
    with pytest.raises(BadImageError, match="image 2 of the batch: 32-bit") as caught:
        preprocess([good, good, Image.new("F", (6, 6))], config(6), 1)
    assert caught.value.path == "image 2 of the batch"
    with pytest.raises(BadImageError, match="image 1 of the batch: a float tensor of shape"):
        preprocess([good, torch.zeros(1, 7, 7)], config(6), 1)
    with pytest.raises(BadImageError, match=r"shape \[2, 6, 6, 1\] is a batch"):
        read_image(np.zeros((2, 6, 6, 1), np.uint8))


@pytest.mark.parametrize("empty", [[], (), np.zeros((0, 6, 6, 3), np.uint8)])
def test_nothing_is_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match="no images"):
        preprocess(empty, config(6), 3)


def test_finished_tensors_pass_straight_through() -> None:
    batch = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    assert torch.equal(preprocess(batch, config(6, 1), 3), batch)
    assert torch.equal(preprocess(batch[0], config(6, 1), 3), batch[:1])
    assert torch.equal(preprocess([batch[0], batch[1]], config(6, 1), 3), batch)
    half = preprocess(batch.bfloat16(), config(6, 1), 3)
    assert half.dtype == torch.float32 and torch.equal(half, batch.bfloat16().float())
    leaf = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(preprocess(leaf, config(6, 1), 3).sum(), leaf)
    assert (gradient == 1).all()
    assert preprocess(1.0005 * batch, config(6, 1), 3).max() > 1  # rounding of the user's own arithmetic


@pytest.mark.parametrize(
    ("tensor", "options", "reason"),
    [
        (torch.zeros(2, 3, 6, 6), {}, r"shape \[2, 3, 6, 6\]; this model takes \[3, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), {}, r"shape \[2, 1, 8, 8\]; this model takes \[3, 8, 8\]"),
        (torch.zeros(8, 8), {}, r"shape \[8, 8\]"),
        (torch.zeros(0, 3, 8, 8), {}, r"shape \[0, 3, 8, 8\]"),
        (torch.full((1, 3, 8, 8), 255.0), {}, r"from 255 to 255; \[-1, 1\] is needed"),
        (torch.full((1, 3, 8, 8), -1.01), {}, r"from -1.01 to"),
        (torch.tensor([0.0, float("nan")]).repeat(96).view(1, 3, 8, 8), {}, "nan"),
        (torch.tensor([0.0, float("inf")]).repeat(96).view(1, 3, 8, 8), {}, "to inf"),
        (torch.zeros(2, 3, 8, 8), {"invert": True}, "crop and invert do not apply"),
        (torch.zeros(2, 3, 8, 8), {"crop": "none"}, "crop and invert do not apply"),
    ],
)
def test_refused_float_tensors(tensor: torch.Tensor, options: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preprocess(tensor, config(6, 1), 3, **options)


def test_options_are_checked() -> None:
    picture = np.zeros((6, 6), np.uint8)
    with pytest.raises(ValueError, match="crop is 'centre'"):
        preprocess(picture, config(6), 1, crop="centre")
    with pytest.raises(ValueError, match="1 or 3 channels, this model 4"):
        preprocess(picture, config(6), 4)


@pytest.fixture
def first_time() -> Iterator[None]:
    """As in a new process."""
    _warn_of_unit_range.cache_clear()
    yield
    _warn_of_unit_range.cache_clear()


def test_a_batch_in_zero_to_one_is_told_once(first_time: None) -> None:
    """torchvision's habit: half of the range, and features of another picture."""
    model = create_model("bigbigan-tiny")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    score = functools.partial(model.discriminate, z=torch.zeros(2, model.config.z_dim))
    for call in (model.encode, score, model.reconstruct, model.preprocess):
        _warn_of_unit_range.cache_clear()
        with pytest.warns(UserWarning, match=r"lie in \[0, 1\], and they are taken as \[-1, 1\].*give 2 \* x - 1"):
            call(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(x)  # once


def test_what_may_well_be_in_minus_one_to_one_is_not_told(first_time: None) -> None:
    x = torch.rand(2, 3, 8, 8)
    dark = x.clone()
    dark[1, 2, 3, 4] = -0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (2 * x - 1, dark, torch.zeros_like(x), torch.full_like(x, 0.5), 1.0005 * torch.ones_like(x)):
            preprocess(batch, config(8), 3)


def test_reconstructions_in_zero_to_one_are_told(first_time: None) -> None:
    images = torch.rand(8, 1, 16, 16)
    with pytest.warns(UserWarning, match="lie in"):
        reconstruction_report(2 * images - 1, torch.arange(8) % 2, images, None, Classifier(1, 2))


# --- large pictures: cut before they are converted, converted in bands ------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", ["center", "resnet"])
@pytest.mark.parametrize("shape", [(41, 76, 3), (77, 40, 3)])
def test_a_crop_is_that_of_the_upright_picture(
    orientation: int, crop: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Odd remainders lie on another side of the stored picture."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(noise(*shape)).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(read_image(tmp_path / "a.png"))
    assert torch.equal(
        preprocess(tmp_path / "a.png", config(24, crop=crop), 3), preprocess(upright.copy(), config(24, crop=crop), 3)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "transparent P", "transparent L"])
def test_bands_change_nothing(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(noise(33, 21, 4, seed=3), "RGBA")
    options: dict[str, Any] = {}
    if mode == "I;16":
        picture = Image.fromarray(noise(33, 21, dtype=np.uint16))
        options = {"transparency": int(np.asarray(picture)[4, 5])}
    elif mode.startswith("transparent"):
        picture = picture.convert("RGB").convert(mode[-1])
        options = {"transparency": picture.getpixel((3, 4))}
    else:
        picture = picture.convert("RGB").convert(mode) if mode in ("P", "CMYK") else picture.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, **options)
    whole = read_image(path)
    monkeypatch.setattr("bigbigan.images._BAND_PIXELS", 50)  # two rows
    banded = read_image(path)
    assert whole.mode == banded.mode and np.array_equal(np.asarray(whole), np.asarray(banded))


def test_a_large_jpeg_is_decoded_at_a_fraction_that_looks_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves = np.add.outer(np.sin(np.arange(900) / 40), np.cos(np.arange(1200) / 55))
    Image.fromarray((waves * 60 + 128).astype(np.uint8)).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    exact = preprocess(tmp_path / "a.jpg", config(32), 3)
    monkeypatch.setattr("bigbigan.images.DRAFT_PIXELS", 1_000_000)
    sizes: list[tuple[int, int]] = []
    load = Image.core.new  # what decoders take their memory by
    monkeypatch.setattr("PIL.Image.core.new", lambda mode, size: sizes.append(size) or load(mode, size))
    fast = preprocess(tmp_path / "a.jpg", config(32), 3)
    assert (300, 225) in sizes and (1200, 900) not in sizes  # a quarter: 225 is more than four times 32
    difference = (fast - exact).abs() * 127.5
    assert difference.max() < 4 and difference.mean() < 1.5  # of 255


MEASURE = """
import re, sys, warnings
from pathlib import Path
from bigbigan.config import PreprocessConfig
from bigbigan.images import preprocess, read_image
warnings.simplefilter("ignore")
# Not getrusage: its peak is also that of the process which started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
preprocess(sys.argv[1], PreprocessConfig(256), 3)
before = peak()
out = preprocess(sys.argv[2], PreprocessConfig(256), 3)
print(peak() - before)
"""
LARGE = {
    "thin.png": lambda: Image.new("RGB", (2, 30_000_000), "teal"),
    "rgba.png": lambda: Image.new("RGBA", (7990, 7990), (10, 20, 30, 40)),
    "rgb.png": lambda: Image.new("RGB", (7990, 7990), "teal"),
    "wide.png": lambda: Image.new("RGBA", (8900, 7100), (10, 20, 30, 40)),
    "palette.png": lambda: Image.new("P", (7990, 7990), 3),
    "deep.png": lambda: Image.new("I;16", (7990, 7990), 30_000),
    "photo.jpg": lambda: Image.new("RGB", (7990, 7990), "teal"),
    "photo.webp": lambda: Image.new("RGBA", (7990, 7990), (10, 20, 30, 40)),
    "cmyk.tif": lambda: Image.new("CMYK", (7990, 7990), (10, 20, 30, 40)),
}


@pytest.mark.parametrize("name", [n if n in ("rgba.png",) else pytest.param(n, marks=pytest.mark.slow) for n in LARGE])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_picture_takes_less_than_one_gib(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "small.png")
    LARGE[name]().save(tmp_path / name, **({"compress_level": 1} if name.endswith("png") else {}))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small.png"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"{name}: {int(done.stdout) / 2**30:.2f} GiB")
    assert int(done.stdout) < 2**30


def test_a_png_header_that_its_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    Image.new("1", (2, 2)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 2, 30_000_000) + data[24:29]
    (tmp_path / "a.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    with pytest.raises(BadImageError, match=r"2 x 30000000 pixels by its header, more than \d+ bytes of PNG can hold"):
        read_image(tmp_path / "a.png")
