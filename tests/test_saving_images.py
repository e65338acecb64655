"""From tensors to pictures, grids and files, and lists of the images in a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import ORIENTATION, PHOTO, config, encoded, noise, values
from PIL import Image, PngImagePlugin

from bigbigan.cli import main
from bigbigan.grids import make_grid
from bigbigan.images import FORMATS, list_images, preprocess, read_image, save_image, to_pil, to_uint8


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
    with pytest.warns(UserWarning) as told:
        found = list_images(tmp_path)
    assert [str(warning.message) for warning in told] == [
        f"{tmp_path}: 3 files with other endings were left out (.csv, .txt, none); "
        "2 left out that lead to no regular file (dangling.png, pipe.png)"
    ]
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


def test_other_names_of_the_same_formats_are_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Every ending that Pillow has for a format that is read; none is dropped."""
    Image.init()
    known = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
    for name in (*known, ".JFIF", ".mpo"):
        PHOTO.save(tmp_path / f"x{name}", {".mpo": "MPO", ".JFIF": "JPEG"}.get(name))
    found = list_images(tmp_path)
    assert len(found) == len(known) + 2 and not recwarn
    for path in found:
        assert read_image(path).size == PHOTO.size
    (tmp_path / "y.heic").touch()
    with pytest.warns(UserWarning, match=r"1 file with another ending was left out \(.heic\)"):
        list_images(tmp_path)
    for number in range(9):
        (tmp_path / f"y.{number}").touch()
    with pytest.warns(UserWarning, match=r"10 files with other endings were left out \(.*, …\)"):
        list_images(tmp_path)


def test_the_command_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.jfif", "c.heic"):
        PHOTO.save(tmp_path / name, "PNG")
    assert main(["encode", str(tmp_path), "-o", str(tmp_path / "x.npz"), "--outputs", "z_mean"]) == 0
    err = capsys.readouterr().err
    assert err.count("1 file with another ending was left out (.heic)") == 1 and "2 of 2 images" in err


def test_list_images_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no pictures in it.*1 file with another ending was left out \(.txt\)"):
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
