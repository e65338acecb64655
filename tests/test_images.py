"""Pictures in and out, against hand-computed values and plain NumPy arithmetic."""

from __future__ import annotations

import colorsys
import io
import os
import pickle
import random
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from bigbigan.config import PreprocessConfig
from bigbigan.grids import make_grid
from bigbigan.images import (
    BadImageError,
    list_images,
    preprocess,
    read_image,
    save_image,
    to_pil,
    to_uint8,
)

FUZZ_CASES = int(os.environ.get("BIGBIGAN_FUZZ", "1500"))
ORIENTATION = 0x0112
Array = NDArray[Any]


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> Array:
    """Asymmetric by being random."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def values(image: Image.Image) -> Array:
    return np.asarray(image, int)


def pixels(tensor: torch.Tensor) -> Array:
    """[N, C, H, W] in [-1, 1] as [N, H, W, C]; fails where a value stands for no integer."""
    exact: Array = tensor.double().numpy() * 127.5 + 127.5
    assert np.abs(exact - np.rint(exact)).max() < 1e-4
    return np.rint(exact).astype(int).transpose(0, 2, 3, 1)


def over(colour: Array, alpha: Array, background: int | tuple[int, ...] = 255) -> Array:
    """Composition rounded to nearest, in integers."""
    result: Array = (2 * (colour * alpha + np.array(background) * (255 - alpha)) + 255) // 510
    return result


# Orientation and modes


def upright(stored: Array, orientation: int) -> Array:
    """By the EXIF standard's wording: which side of the scene the stored row 0 and column 0 are."""
    row_0, column_0 = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    height, width = stored.shape[:2]
    turned = row_0 in ("left", "right")
    result = np.zeros(((width, height) if turned else (height, width)) + stored.shape[2:], stored.dtype)
    for row in range(height):
        for column in range(width):
            down = height - 1 - row if row_0 in ("bottom", "right") else row
            along = width - 1 - column if column_0 in ("bottom", "right") else column
            result[(along, down) if turned else (down, along)] = stored[row, column]
    return result


def palette_image(transparency: bytes | int | None = None) -> tuple[Image.Image, Array]:
    indices, colours = noise(5, 7) % 16, noise(16, 3, seed=1)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image, colours[indices].astype(int)


def mode_cases() -> dict[str, tuple[Image.Image, Array, str]]:
    """Name -> stored picture, its 8-bit values by the written rule, file suffix ("" where no format stores it)."""
    grey, rgb, alpha = noise(5, 7), noise(5, 7, 3, seed=2), noise(5, 7, 1, seed=3)
    deep = noise(5, 7, seed=4, dtype=np.uint16)
    wide_grey, wide_rgb, wide_alpha = grey.astype(int), rgb.astype(int), alpha.astype(int)
    la, rgba = np.concatenate([grey[..., None], alpha], 2), np.concatenate([rgb, alpha], 2)
    cmyk = noise(5, 7, 4, seed=5)
    ink = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    palette, colours = palette_image()
    indices = np.asarray(palette)
    part = np.array([0, 128, 17] + [255] * 13)[indices][..., None]
    keyed_grey, keyed_rgb = Image.fromarray(grey), Image.fromarray(rgb)
    keyed_grey.info["transparency"], keyed_rgb.info["transparency"] = int(grey[2, 3]), tuple(map(int, rgb[2, 3]))
    keyed_deep = Image.fromarray(deep)
    keyed_deep.info["transparency"] = int(deep[2, 3])
    rounded = np.floor(deep / 257 + 0.5).astype(int)
    hole = np.zeros((5, 7), bool)
    hole[2, 3] = True
    premultiplied = np.concatenate([rgb // 2, np.full_like(alpha, 128)], 2)
    y, cb, cr = (noise(5, 7, 3, seed=6) // 4 + 96).astype(float).transpose(2, 0, 1)
    from_ycbcr = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    hsv = noise(5, 7, 3, seed=7)
    from_hsv = np.array([[colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in row] for row in hsv]) * 255
    return {
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255, 0), ".png"),
        "L": (Image.fromarray(grey), wide_grey, ".png"),
        "L tRNS": (keyed_grey, np.where(grey == grey[2, 3], 255, wide_grey), ".png"),
        "LA": (Image.fromarray(la), over(wide_grey, wide_alpha[..., 0]), ".png"),
        "P": (palette, colours, ".png"),
        "P gif": (palette, colours, ".gif"),
        "P tRNS alpha": (palette_image(bytes([0, 128, 17]))[0], over(colours, part), ".png"),
        "P tRNS index": (palette_image(5)[0], np.where(indices[..., None] == 5, 255, colours), ".png"),
        "RGB": (Image.fromarray(rgb), wide_rgb, ".png"),
        "RGB tRNS": (keyed_rgb, np.where(hole[..., None], 255, wide_rgb), ".png"),
        "RGB webp": (Image.fromarray(rgb), wide_rgb, ".webp"),
        "RGB tiff": (Image.fromarray(rgb), wide_rgb, ".tif"),
        "RGBA": (Image.fromarray(rgba), over(wide_rgb, wide_alpha), ".png"),
        "RGBA tiff": (Image.fromarray(rgba), over(wide_rgb, wide_alpha), ".tiff"),
        "CMYK": (Image.fromarray(cmyk, "CMYK"), ink, ".tif"),
        "I;16": (Image.fromarray(deep), rounded, ".png"),
        "I;16 tRNS": (keyed_deep, np.where(deep == deep[2, 3], 255, rounded), ".png"),
        "I;16 tiff": (Image.fromarray(deep), rounded, ".tif"),
        "I;16B": (Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes()), rounded, ".tif"),
        "I;16L": (Image.frombytes("I;16L", (7, 5), deep.astype("<u2").tobytes()), rounded, ""),
        "RGBX": (Image.fromarray(rgba, "RGBX"), wide_rgb, ""),
        "RGBa": (Image.fromarray(premultiplied, "RGBa"), rgb // 2 + 127, ""),
        "PA": (Image.merge("PA", [palette, Image.fromarray(alpha[..., 0])]), over(colours, wide_alpha), ""),
        "La": (Image.fromarray(np.stack([grey // 2, np.full_like(grey, 128)], 2), "La"), wide_grey // 2 + 127, ""),
        "YCbCr": (Image.fromarray(np.stack([y, cb, cr], 2).astype(np.uint8), "YCbCr"), np.stack(from_ycbcr, 2), ""),
        "HSV": (Image.fromarray(hsv, "HSV"), from_hsv, ""),
    }


INEXACT = {"CMYK": 1, "RGBa": 1, "La": 1, "YCbCr": 1, "HSV": 2}  # conversions of Pillow's that round on the way


@pytest.mark.parametrize("name", mode_cases())
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_mode_and_orientation(name: str, orientation: int, tmp_path: Path) -> None:
    image, expected, suffix = mode_cases()[name]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    source: Any = tmp_path / f"picture{suffix}"
    if suffix == ".gif":  # carries no EXIF
        image.save(source)
        orientation = 1
    elif suffix:
        lossless: Any = {"lossless": True} if suffix == ".webp" else {}
        keyed = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        image.save(source, exif=exif, **lossless, **keyed)
    else:
        source = image
        source.getexif()[ORIENTATION] = orientation
    result = read_image(source)
    assert result.mode == ("RGB" if expected.ndim == 3 else "L")
    expected = upright(expected, orientation)
    assert result.size == (expected.shape[1], expected.shape[0])
    assert np.abs(values(result) - expected).max() <= INEXACT.get(name, 0)
    again = read_image(result)  # nothing left in it that would turn or blend it twice
    assert np.array_equal(values(again), values(result)) and not result.info


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation(mode: str, orientation: int, tmp_path: Path) -> None:
    blocks = noise(2, 3, len(mode.replace("RGB", "123").replace("CMYK", "1234")), seed=8).repeat(8, 0).repeat(8, 1)
    stored = Image.fromarray(blocks[..., 0] if mode == "L" else blocks, mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    result = read_image(tmp_path / "a.jpg")
    expected = values(stored if mode == "L" else stored.convert("RGB"))
    assert result.mode == ("L" if mode == "L" else "RGB")
    assert np.abs(values(result) - upright(expected, orientation)).max() <= 4  # JPEG's own loss


def test_composition_is_exact_for_every_value_and_alpha() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    la = Image.fromarray(np.stack([colour, alpha], 2).astype(np.uint8))
    for background in (255, 0, 77):
        result = read_image(la, background=(background,) * 3)
        assert result.mode == "L" and np.array_equal(values(result), over(colour, alpha, background))
    result = read_image(la, background=(10, 200, 30))
    assert result.mode == "RGB"
    assert np.array_equal(values(result), over(colour[..., None], alpha[..., None], (10, 200, 30)))


def test_16_bit_ramp_keeps_256_levels(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        result = np.asarray(read_image(tmp_path / name)).reshape(-1)
        assert len(np.unique(result)) == 256 and result[0] == 0 and result[-1] == 255
        assert np.array_equal(result[::257], np.arange(256)) and (np.diff(result.astype(int)) >= 0).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused_with_the_reason(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), 3).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match="known range") as caught:
        read_image(tmp_path / "a.tif")
    assert caught.value.path == str(tmp_path / "a.tif")


def test_lab_goes_through_pillow() -> None:
    lab = Image.merge(
        "LAB", [Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)), *[Image.new("L", (2, 2), 128)] * 2]
    )
    assert np.abs(values(read_image(lab)) - np.array([[[0] * 3, [255] * 3]] * 2)).max() <= 1


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "png", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        options: Any = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(values(read_image(path)), values(frames[0]))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_broken_exif_keeps_the_pixels_and_warns(suffix: str, tmp_path: Path) -> None:
    path, image = tmp_path / f"a.{suffix}", Image.new("RGB", (6, 4), "teal")
    image.save(path, exif=b"Exif\0\0 no TIFF header here")
    with pytest.warns(UserWarning, match=r"unreadable EXIF") as caught:
        result = read_image(path)
    assert result.size == (6, 4) and str(path) in str(caught[0].message) and caught[0].filename == __file__


def test_turned_by_the_caller_is_not_broken(recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name in ("PNG", "JPEG"):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(PHOTO, name, exif=exif))))
        assert image.info["exif"] and not image.getexif()  # a block without tags is left
        assert read_image(image).size == (24, 32)
    assert not recwarn.list


def test_pillow_images_stay_as_they_were() -> None:
    for name in ("P tRNS alpha", "P tRNS index", "RGBA", "I;16", "PA", "L tRNS"):
        image = mode_cases()[name][0]
        image.getexif()[ORIENTATION] = 6

        def state(image: Image.Image = image) -> Any:
            palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
            return image.mode, image.size, image.tobytes(), palette, dict(image.info), dict(image.getexif())

        before = state()
        read_image(image)
        assert state() == before


# Bad files


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


PHOTO = Image.fromarray(noise(24, 32, 3, seed=9))
PSD = struct.pack(">4sH6xHIIHHIII", b"8BPS", 1, 3, 4, 4, 8, 3, 0, 0, 0) + struct.pack(">H", 0) + bytes(48)
BAD_FILES = {
    "empty.png": (b"", r"starts with b''"),
    "page.png": (b"<!DOCTYPE html><html>", r"starts with b'<!DOCTYPE html>"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", r"starts with b'version https://"),
    "eps.png": (encoded(PHOTO, "EPS"), r"starts with b'%!PS"),
    "psd.png": (PSD, r"starts with b'8BPS"),
    "ppm.png": (encoded(PHOTO, "PPM"), r"starts with b'P6"),
    "half.png": (encoded(PHOTO, "PNG")[:-900], "truncated"),
    "half.jpg": (encoded(PHOTO, "JPEG")[:-300], "truncated"),
    "half.webp": (encoded(PHOTO, "WEBP")[:-200], "cannot be decoded|not readable"),
    "thin.png": (encoded(PHOTO.resize((1, 9)), "PNG"), r"1 x 9 pixels; both sides must be 2"),
    "flat.gif": (encoded(PHOTO.resize((9, 1)), "GIF"), r"9 x 1 pixels; both sides must be 2"),
    "large.png": (png(9000, 8000), r"9000 x 8000 pixels, more than max_pixels=64000000"),
    "larger.png": (png(12000, 10000), r"12000 x 10000 pixels, more than max_pixels=64000000"),  # Pillow warns here
    "bomb.png": (png(60000, 60000), "DecompressionBombError"),
    "hole.png": (png(40, 40), "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_a_reason(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name][0])
    with pytest.raises(BadImageError, match=BAD_FILES[name][1]) as caught:
        read_image(path)
    assert caught.value.path == str(path) and str(caught.value) == f"{path}: {caught.value.reason}"
    assert not recwarn.list


def test_list_of_formats_is_what_refuses_them() -> None:
    for name, size in [("eps.png", (32, 24)), ("psd.png", (4, 4)), ("ppm.png", (32, 24))]:
        assert Image.open(io.BytesIO(BAD_FILES[name][0])).size == size


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    cases: list[tuple[Path | str, str]] = [
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "loop.png", "Too many levels"),
        ("nul\0.png", "null"),
        (os.devnull, "not a regular file"),
    ]
    for path, reason in cases:
        with pytest.raises(BadImageError, match=reason) as caught:
            read_image(path)
        assert caught.value.path == str(path)


def test_unreadable_file_keeps_the_system_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    PHOTO.save(path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))  # chmod would not stop root

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadImageError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: Permission denied"


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    seen: list[BaseException] = []

    def read() -> None:
        try:
            read_image(path)
        except BadImageError as error:
            seen.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert len(seen) == 1 and "not a regular file" in str(seen[0])


def test_own_pixel_limit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PHOTO.resize((12, 13)).save(tmp_path / "a.png")  # 156 pixels, 144 after the crop
    PHOTO.resize((20, 20)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above 100, refuses above 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").size == (12, 13)
        preprocess(tmp_path / "a.png", PreprocessConfig(size=8), 3)
        with pytest.raises(BadImageError, match="12 x 13 pixels, more than max_pixels=155"):
            read_image(tmp_path / "a.png", max_pixels=155)
        with pytest.raises(BadImageError, match="max_pixels=155"):
            preprocess(Image.new("L", (12, 13)), PreprocessConfig(size=8), 1, max_pixels=155)
        with pytest.raises(BadImageError, match="DecompressionBombError"):
            read_image(tmp_path / "b.png")


def test_threads_leave_the_warning_filters_alone(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "a.png")
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # many more chances to meet
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(read_image, [tmp_path / "a.png"] * 400))) == 400
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def test_lazily_opened_damage_in_a_pillow_image(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(BAD_FILES["half.png"][0])
    with Image.open(path) as image, pytest.raises(BadImageError, match=r"half\.png: .*truncated"):
        read_image(image)


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.png", "no such file")))
    assert (error.path, error.reason, str(error)) == ("a.png", "no such file", "a.png: no such file")
    assert isinstance(error, ValueError) and str(BadImageError(None, "empty")) == "empty"


def fuzz_seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    grey16, rgba = Image.fromarray(noise(24, 32, dtype=np.uint16)), PHOTO.convert("RGBA")
    rgba.putalpha(Image.fromarray(noise(24, 32)))
    palette = PHOTO.quantize(16)
    return [
        encoded(PHOTO, "PNG", exif=exif),
        encoded(grey16, "PNG"),
        encoded(rgba.convert("LA"), "PNG"),
        encoded(palette, "PNG", transparency=bytes(range(16))),
        encoded(PHOTO, "JPEG", exif=exif),
        encoded(PHOTO, "JPEG", progressive=True),
        encoded(PHOTO.convert("CMYK"), "JPEG"),
        encoded(PHOTO, "WEBP", exif=exif),
        encoded(rgba, "WEBP", lossless=True),
        encoded(palette, "GIF", transparency=3),
        encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
        encoded(PHOTO, "BMP"),
        encoded(palette, "BMP"),
        encoded(PHOTO, "TIFF", exif=exif),
        encoded(PHOTO, "TIFF", compression="tiff_lzw"),
        encoded(grey16, "TIFF", compression="tiff_adobe_deflate"),
    ]


def mutate(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # Headers are where most decisions are taken.
        place = rng.randrange(min(len(result), 64)) if rng.random() < 0.5 else rng.randrange(len(result))
        kind = rng.randrange(6)
        if kind == 0:
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            result[place : place + 4] = rng.randbytes(4)
        elif kind == 3:
            result[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del result[place : place + rng.randrange(1, 9)]
        else:
            del result[max(place, 4) :]
        if not result:
            break
    return bytes(result)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    path, seeds, refused = tmp_path / "mutant", fuzz_seeds(), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in range(FUZZ_CASES):
            path.write_bytes(mutate(seeds[case % len(seeds)], random.Random(case)))
            try:
                result = read_image(path, max_pixels=4_000_000)
            except BadImageError as error:
                refused += 1
                assert error.path == str(path) and error.reason, case
            except BaseException as error:
                pytest.fail(f"case {case}: {error!r}")
            else:
                assert result.mode in ("L", "RGB") and min(result.size) >= 2, case
    assert 0.2 * FUZZ_CASES < refused < 0.95 * FUZZ_CASES  # neither side of the promise is idle
    assert not any(issubclass(entry.category, Image.DecompressionBombWarning) for entry in caught)


# Preprocessing


def config(size: int, pad: int = 0, **fields: Any) -> PreprocessConfig:
    return PreprocessConfig(size=size, pad=pad, **fields)


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


# From the model outwards


def test_to_uint8_inverts_preprocess_and_rounds() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    batch = preprocess(ramp, config(16), 1)
    assert to_uint8(batch).dtype == np.uint8 and np.array_equal(to_uint8(batch), ramp)
    exact = torch.tensor([-7.0, -1.0, -0.996, 0.0, 0.004, 0.999, 1.0, 9.0]).view(1, 1, 2, 4)
    assert to_uint8(exact).reshape(-1).tolist() == [0, 0, 1, 128, 128, 255, 255, 255]  # 127.5 goes to the even 128
    assert to_uint8(exact.bfloat16())[0, 0, 0, 0] == 0
    layout = torch.zeros(2, 3, 4, 5)
    layout[1, 2, 3, 4] = 1
    assert to_uint8(layout).shape == (2, 4, 5, 3) and to_uint8(layout)[1, 3, 4, 2] == 255


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_images_are_not_drawn(value: float) -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, 1, 2, 3] = value
    for function in (to_uint8, to_pil, make_grid):
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(images)


def test_wrong_shapes_are_not_drawn() -> None:
    for images, reason in [
        (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\); give floats"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8 of shape"),
        (torch.zeros(1, 2, 4, 4), "1 or 3 channels"),
    ]:
        with pytest.raises(ValueError, match=reason):
            to_pil(images)


def test_to_pil() -> None:
    picture = noise(2, 4, 5, 3)
    images = torch.from_numpy(picture.transpose(0, 3, 1, 2) / 127.5 - 1)
    drawn = to_pil(images)
    assert [image.mode for image in drawn] == ["RGB", "RGB"] and drawn[0].size == (5, 4)
    assert np.array_equal(np.stack([np.asarray(image) for image in drawn]), picture)
    assert np.array_equal(np.asarray(to_pil(images[:, :1])[1]), picture[1, ..., 0])
    assert to_pil(images[:, :1])[0].mode == "L"


def test_grid_layout() -> None:
    levels = torch.tensor([0, 51, 102, 153, 204]) / 127.5 - 1
    images = levels.view(5, 1, 1, 1).expand(5, 1, 1, 2)
    grid = make_grid(images, columns=3, gap=3, scale=2)
    expected = np.full((7, 18), 255)
    for index, (top, left) in enumerate([(0, 0), (0, 7), (0, 14), (5, 0), (5, 7)]):
        expected[top : top + 2, left : left + 4] = 51 * index
    assert grid.mode == "L" and np.array_equal(values(grid), expected)
    assert make_grid(images).size == (3 * 2 + 2 * 2, 2 * 1 + 2)  # 3 columns for 5 images
    assert make_grid(images[:4]).size == (2 * 2 + 2, 2 * 1 + 2)
    assert make_grid(images[:1], columns=8).size == (2, 1)
    assert make_grid(images, gap=0, columns=5).size == (10, 1)


def test_grid_enlarges_pixels_in_colour() -> None:
    picture = noise(1, 2, 3, 3)
    grid = make_grid(torch.from_numpy(picture.transpose(0, 3, 1, 2) / 127.5 - 1), scale=3)
    assert grid.mode == "RGB" and grid.size == (9, 6)
    assert all(np.array_equal(np.asarray(grid)[y, x], picture[0, y // 3, x // 3]) for y in range(6) for x in range(9))


@pytest.mark.parametrize("options", [{"columns": 0}, {"columns": -1}, {"gap": -1}, {"scale": 0}, {"scale": -1}])
def test_grid_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        make_grid(torch.zeros(2, 1, 4, 4), **options)
    with pytest.raises(ValueError, match="0 images"):
        make_grid(torch.zeros(0, 1, 4, 4))


def test_saved_pixels_come_back_without_metadata(tmp_path: Path) -> None:
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ORIENTATION] = 6
    text.add_text("place", "home")
    smooth = Image.fromarray(noise(2, 2, 3)).resize((32, 24))
    image = Image.open(io.BytesIO(encoded(smooth, "PNG", exif=exif, icc_profile=b"icc", pnginfo=text, dpi=(72, 72))))
    image.load()
    image.info["comment"] = b"private"
    private = {"exif", "icc_profile", "place", "dpi", "comment"}
    assert private <= set(image.info)
    for suffix, loss in [("png", 0), ("webp", 0), ("jpg", 10), ("JPEG", 10)]:
        path = tmp_path / "new" / f"a.{suffix}"
        save_image(image, path)
        with Image.open(path) as saved:
            assert saved.format == {"jpg": "JPEG"}.get(suffix, suffix.upper()) and not private & set(saved.info)
            assert np.abs(values(saved) - values(smooth)).max() <= loss
    save_image(smooth.convert("L"), tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").mode == "L"
    assert private <= set(image.info)


def test_save_refuses_before_writing(tmp_path: Path) -> None:
    for image, name, reason in [
        (PHOTO, "a.gif", r"cannot write '\.gif'; use \.png"),
        (PHOTO, "a", "no suffix"),
        (PHOTO.convert("RGBA"), "a.png", "mode RGBA"),
        (PHOTO.quantize(4), "a.png", "mode P"),
    ]:
        with pytest.raises(ValueError, match=reason):
            save_image(image, tmp_path / "folder" / name)
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_no_file_and_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(PHOTO, tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    original: Callable[..., None] = Image.Image.save

    def fill_the_disk(image: Image.Image, target: Any, **options: Any) -> None:
        original(image, target, **options)
        Path(target).write_bytes(Path(target).read_bytes()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    for name in ("old.png", "new.png"):
        with pytest.raises(OSError, match="No space left"):
            save_image(PHOTO.rotate(180), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == before


def test_list_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["B.PNG", "a-b/x.tiff", "a/-z.Jpeg", "a/x y.webp", "a/é\n.gif", "a.bmp", "c/d/e.TIF", "z.JPG"]
    ignored = [".hidden.png", ".cache/x.png", "a/notes.txt", "a/png", "list.csv"]
    for name in wanted + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "c" / "self").symlink_to(tmp_path / "c", target_is_directory=True)
    found = list_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == sorted(wanted)
    monkeypatch.chdir(tmp_path)
    assert [path.as_posix() for path in list_images(".")] == sorted(wanted)


def test_list_images_follows_links_once(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    PHOTO.save(tmp_path / "store" / "x.png")
    (tmp_path / "set").mkdir()
    for name in ("cat", "same"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "set" / "y.png").symlink_to(tmp_path / "store" / "x.png")
    assert list_images(tmp_path / "set") == [tmp_path / "set" / "cat" / "x.png", tmp_path / "set" / "y.png"]


def test_list_images_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="no pictures in it"):
        list_images(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="no such folder"):
            list_images(path)


def test_list_images_skips_no_folder_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # chmod would not stop root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        list_images(tmp_path)
