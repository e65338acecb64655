"""Files that are no images, or damaged, hostile or odd: read, or refused with their name and the reason."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import ORIENTATION, PHOTO, encoded, noise
from PIL import Image

from bigbigan.config import PreprocessConfig
from bigbigan.images import BadImageError, preprocess, read_image

FUZZ_CASES = int(os.environ.get("BIGBIGAN_FUZZ", "1500"))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


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
