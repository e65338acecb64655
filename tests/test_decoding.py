"""Every mode, depth and orientation that files hold, against plain NumPy arithmetic."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import ORIENTATION, PHOTO, Array, encoded, noise, over, values
from PIL import Image, ImageOps

from bigbigan.images import BadImageError, read_image


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
