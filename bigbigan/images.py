"""Pictures in: reading, cropping, scaling.

What a file or a Pillow image becomes (`read_image`), always 8 bits a channel:

    source                                    result
    1-bit, 8-bit grey                         "L"
    16-bit grey                               "L", rounded v / 257, so that a full ramp keeps 256 levels
    16-bit colour                             "RGB" from the high bytes, as Pillow decodes it
    32-bit integer or float (I, F)            refused: the range is unknown
    palette                                   "RGB", also where all its colours are grey
    alpha channel, transparent colour (tRNS)  composited on `background`; grey stays "L" if `background` is grey
    CMYK, YCCK, YCbCr, LAB, HSV               "RGB" by Pillow's conversion
    EXIF orientation 1 to 8                   applied; unreadable EXIF: pixels as stored and a warning
    ICC profile, gamma                        ignored: values are taken as sRGB
    animation, several pages                  the first; the current one of a Pillow image

Formats: PNG, JPEG, WebP, GIF, BMP (with or without its file header), TIFF, known by content, not by suffix. Arrays and
uint8 tensors hold grey, RGB or RGBA values in 0 to 255. Pillow misreads the transparent colour (tRNS) of 2- and 4-bit
grey and 16-bit colour PNGs.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from bigbigan.config import PreprocessConfig
from bigbigan.listing import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from bigbigan.listing import asset_images as asset_images
from bigbigan.listing import list_images as list_images
from bigbigan.saving import from_pixels
from bigbigan.saving import save_image as save_image
from bigbigan.saving import to_pil as to_pil
from bigbigan.saving import to_uint8 as to_uint8

Box = tuple[int, int, int, int]
ImageLike = str | os.PathLike[str] | Image.Image | NDArray[Any] | torch.Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "DIB")  # DIB: BMP without a file header
MAX_PIXELS = 64_000_000
DRAFT_PIXELS = 16_000_000  # larger JPEGs are decoded at a fraction of their size where all of it is not needed
_BAND_PIXELS = 2_000_000  # converted at a time: large pictures take little more memory than they and their result do
_MAX_DEFLATE = 1032  # bytes that one byte of a PNG's data can stand for
WHITE = (255, 255, 255)
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# `catch_warnings` swaps the process's filters: readers in several threads would restore them in the wrong order.
_WARNINGS_LOCK = threading.Lock()


class BadImageError(ValueError):
    """A picture that cannot be used.

    Attributes:
        path: the file, "image 3 of the batch" (counted from 0) for pixels, or None for pixels given alone.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | None, reason: str) -> None:
        super().__init__(path, reason)  # both in `args`, so that it can be pickled between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


def read_image(
    source: ImageLike, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """A new upright 8-bit picture, mode "RGB" or "L", without metadata, by the table above; `source` stays as it was.

    `source` is a file, a Pillow image, a uint8 array [H, W] or [H, W, 1|3|4] or a uint8 tensor [1|3|4, H, W].

    Raises:
        BadImageError: unreadable, damaged, of another format, more than `max_pixels` (checked before decoding),
            or with a side under 2 pixels.
    """
    return _read(source, max_pixels, background, None)


def _read(source: ImageLike, max_pixels: int, background: tuple[int, int, int], cut: _Cut | None) -> Image.Image:
    """As `read_image`, or only the part that `cut` needs."""
    if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
        raise ValueError(f"background is {background!r}; give three integers from 0 to 255")
    path = None
    try:
        if isinstance(source, Image.Image):
            path = str(getattr(source, "filename", "")) or None
            return _flatten(source, path, max_pixels, background, cut)
        if isinstance(source, np.ndarray | torch.Tensor):
            pixels = _pixels(source)
            if pixels.ndim != 3:
                raise BadImageError(None, f"shape {list(source.shape)} is a batch; one picture is needed here")
            return _flatten(from_pixels(pixels), None, max_pixels, background, cut)
        if not isinstance(source, str | os.PathLike):
            raise BadImageError(
                None, f"{type(source).__name__} is no picture; give a path, a Pillow image or a uint8 array"
            )
        path = os.fspath(source)
        _check_regular(path)
        with open(path, "rb") as stream, _open(stream, path) as image:
            _check_size(*image.size, path, max_pixels)
            _check_content(image, path, os.fstat(stream.fileno()).st_size)
            return _flatten(image, path, max_pixels, background, cut)
    except BadImageError:
        raise
    # Damaged files escape Pillow's decoders as OSError, ValueError, SyntaxError, struct.error, TypeError, IndexError,
    # DecompressionBombError, MemoryError, …: the set is open and changes with Pillow, so no list can be complete.
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"cannot be decoded ({type(error).__name__}: {error})"
        raise BadImageError(path, reason) from error


def opened(data: bytes) -> Image.Image:
    """A picture in memory, as far as its header.

    Raises:
        BadImageError: it is damaged, or of another format.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # as open a set as in `_read`
        raise BadImageError(None, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _check_regular(path: str) -> None:
    """Before opening: a FIFO would block, a device may do anything."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise BadImageError(path, "no such file") from error
    if stat.S_ISDIR(mode):
        raise BadImageError(path, "is a folder; list_images(folder) finds the pictures in it")
    if not stat.S_ISREG(mode):
        raise BadImageError(path, "is not a regular file")


def _open(stream: BinaryIO, path: str) -> Image.Image:
    head = stream.read(16)
    # `max_pixels` decides on size; Pillow's warning, at a limit of its own, would contradict it.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError as error:
            reason = f"not readable as {', '.join(FORMATS)}; it starts with {head!r}"
            raise BadImageError(path, reason) from error


def _check_size(width: int, height: int, path: str | None, max_pixels: int) -> None:
    if width < 2 or height < 2:
        raise BadImageError(path, f"{width} x {height} pixels; both sides must be 2 or more")
    if width * height > max_pixels:
        raise BadImageError(path, f"{width} x {height} pixels, more than max_pixels={max_pixels}")


def _check_content(image: Image.Image, path: str, size: int) -> None:
    """Refuses a header that lies, before memory is taken for what it promises."""
    width, height = image.size
    if image.format == "PNG" and width * height > 8 * _MAX_DEFLATE * size:  # a bit a pixel is the least
        raise BadImageError(path, f"{width} x {height} pixels by its header, more than {size} bytes of PNG can hold")


@dataclass(frozen=True)
class _Cut:
    """The crop that `preprocess` takes of a picture, and the size that it is then scaled to."""

    crop: str
    size: int

    def box(self, width: int, height: int) -> Box:
        """Left, top, right, bottom of the crop of an upright picture."""
        if self.crop == "none" or (width, height) == (self.size, self.size):
            return 0, 0, width, height
        edge = min(width, height)
        side = edge if self.crop == "center" else max(1, edge * self.size // (self.size + 32))
        # An odd remainder goes to the left and top, as in TensorFlow's resnet_preprocessing.py.
        left, top = ((length - side + 1) // 2 for length in (width, height))
        return left, top, left + side, top + side

    def draft(self, image: Image.Image) -> None:
        """Has a large JPEG decoded at 1/2, 1/4 or 1/8, but at no less than four times what is left of it in the end."""
        if image.format == "JPEG" and image.size[0] * image.size[1] > DRAFT_PIXELS:
            left, top, right, bottom = self.box(*image.size)
            edge = round(4 * self.size * min(image.size) / min(right - left, bottom - top))
            image.draft(image.mode, (edge, edge))


def _stored(box: Box, size: tuple[int, int], orientation: Any) -> Box:
    """Where a box of the upright picture lies in the picture of `size` as it is stored."""
    left, top, right, bottom = box
    if orientation in (5, 6, 7, 8):
        left, top, right, bottom = top, left, bottom, right
    width, height = size
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _part(image: Image.Image, box: Box) -> Image.Image:
    """`image` itself, or a copy of a part of it; `Image.crop` warns at Pillow's own limit on size."""
    left, top, right, bottom = box
    if box == (0, 0, *image.size):
        return image
    return image.resize((right - left, bottom - top), Image.Resampling.NEAREST, box=box)


def _flatten(
    image: Image.Image, path: str | None, max_pixels: int, background: tuple[int, int, int], cut: _Cut | None
) -> Image.Image:
    """The table of the module's docstring."""
    _check_size(*image.size, path, max_pixels)
    if cut is not None:
        cut.draft(image)
    image.load()
    orientation = _orientation(image, path)  # after loading: TIFF turns itself and then forgets the tag
    if cut is not None:
        upright = image.size if orientation not in (5, 6, 7, 8) else image.size[::-1]
        image = _part(image, _stored(cut.box(*upright), image.size, orientation))
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    result = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = _flatten_band(_part(image, (0, top, width, bottom)), path, background)
        if result is None:
            result = band if bottom == height else Image.new(band.mode, image.size)
        if band is not result:
            result.paste(band, (0, top))
    assert result is not None
    return result.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else result


def _flatten_band(image: Image.Image, path: str | None, background: tuple[int, int, int]) -> Image.Image:
    """A new picture of some rows of a decoded one, but for its orientation."""
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise BadImageError(path, f"32-bit pixels (mode {image.mode}) have no known range; scale them to 8 bits")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        # The copy: converting a palette image writes the alpha into the palette of its source.
        layer = image.copy().convert("LA" if grey else "RGBA")
        grey = grey and len(set(background)) == 1
        result = Image.new("L", image.size, background[0]) if grey else Image.new("RGB", image.size, background)
        result.paste(layer.convert(result.mode), mask=layer.getchannel("A"))
    else:
        result = image.convert("L" if grey else "RGB")
    result.info = {}  # a surviving EXIF block would turn the picture again when it is read once more
    return result


def _orientation(image: Image.Image, path: str | None) -> Any:
    try:
        exif = image.getexif()
        if not exif and "exif" in image.info:
            Image.Exif().load(image.info["exif"])  # raises what Pillow's JPEG reader met before and kept to itself
        return exif.get(ExifTags.Base.Orientation)
    except Exception as error:  # as open a set as in `read_image`; pixels without EXIF are still a picture
        warnings.warn(f"{path or 'image'}: unreadable EXIF ignored ({type(error).__name__}: {error})", stacklevel=5)
        return None


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit picture white.
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _pixels(source: NDArray[Any] | torch.Tensor) -> NDArray[np.uint8]:
    """[H, W, C] or [N, H, W, C] with C of 1, 3 or 4."""
    if str(source.dtype).removeprefix("torch.") != "uint8":
        hint = "from [0, 1]: np.rint(255 * array).astype(np.uint8)"
        wanted = f"give uint8 ({hint}), or a float torch tensor [N, C, S, S] in [-1, 1] of the model's size"
        raise BadImageError(None, f"{source.dtype} values; {wanted}")
    if isinstance(source, torch.Tensor):
        array = source.cpu().numpy()
        array = np.moveaxis(array, -3, -1) if array.ndim > 2 else array
    else:
        array = source
    if array.ndim == 2:
        array = array[..., None]
    # [N, H, W] could be grey pictures or channels first, and a wrong guess would go unnoticed.
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        wanted = "[H, W], [H, W, C] or [N, H, W, C] (tensors: [C, H, W] or [N, C, H, W]) with C of 1, 3 or 4"
        raise BadImageError(None, f"shape {list(source.shape)}; give {wanted}, grey [N, H, W] with an axis for C")
    return array


def preprocess(
    images: ImageLike | Sequence[ImageLike],
    config: PreprocessConfig,
    channels: int,
    *,
    crop: str | None = None,
    invert: bool = False,
    background: tuple[int, int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    first: int = 0,
    tell_colour: bool = True,
) -> torch.Tensor:
    """The encoder's input [N, channels, S, S] in [-1, 1], float32, where S = `config.resolution`.

    Args:
        images: one picture as in `read_image`, a sequence of them, an array [N, H, W, 1|3|4] or a uint8 tensor
            [N, 1|3|4, H, W]. A float tensor [N, channels, S, S] or [channels, S, S] in [-1, 1] is taken as finished;
            a batch that lies in [0, 1] causes a warning, once.
        channels: 1 (colour becomes grey by Pillow's luma, with a warning) or 3 (grey is repeated).
        crop: in place of `config.crop`. "center": the largest centre square; "resnet": a centre square of side
            min_edge * size / (size + 32), TensorFlow's ResNet evaluation crop; "none": the whole picture, squashed.
            What is left is scaled to `config.size` by Pillow's (antialiased) filter. A picture of that very size is
            neither cropped nor scaled; one of the padded size S is, like any other.
        invert: 255 - v, before the black border of `config.pad` pixels is added.
        tell_colour: warn where colour becomes grey.
        background: behind transparent pixels. Default white; black for "light-on-dark" models without `invert`.

    Raises:
        BadImageError: names the file, or the place in the batch.
        ValueError: no images, `channels` not 1 or 3, an unknown `crop`; a float tensor with `crop` or `invert`, of
            another shape, outside [-1.001, 1.001] or not finite.
    """
    finished_shape = (channels, config.resolution, config.resolution)
    if _is_finished(images) and crop is None and not invert:
        return _finished(images, finished_shape)  # in one piece: a check per image would wait for a GPU each time
    if crop not in (None, "center", "resnet", "none"):
        raise ValueError(f"crop is {crop!r}; give 'center', 'resnet' or 'none'")
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, this model {channels}; give a float tensor in [-1, 1]")
    if background is None:
        background = (0, 0, 0) if config.polarity == "light-on-dark" and not invert else WHITE
    sources = _split(images)
    if not sources:
        raise ValueError("no images given")
    rows, colour = [], False
    cut = _Cut(crop or config.crop, config.size)
    for index, source in enumerate(sources):
        try:
            if _is_finished(source):
                if crop is not None or invert:
                    raise BadImageError(None, "crop and invert do not apply to a float tensor: it is taken as finished")
                rows.append(_finished(source, finished_shape))
                continue
            picture = _read(source, max_pixels, background, cut)
        except BadImageError as error:
            if error.path or (len(sources) == 1 and not first):
                raise
            raise BadImageError(f"image {first + index} of the batch", error.reason) from error
        colour |= picture.mode == "RGB"
        rows.append(_to_input(picture, config, channels, invert)[None])
    if colour and channels == 1 and tell_colour:
        hint = "; invert=True helps for dark things on a light ground" if config.polarity == "light-on-dark" else ""
        warnings.warn(f"this model was trained on grey images: colour is converted to grey{hint}", stacklevel=2)
    return torch.cat(rows)


def _split(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray | torch.Tensor) and not _is_finished(images):
        pixels = _pixels(images)
        return list(pixels) if pixels.ndim == 4 else [pixels]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)
    return [images]  # what is no picture at all is refused by `read_image`


def _is_finished(images: object) -> TypeGuard[torch.Tensor]:
    return isinstance(images, torch.Tensor) and images.is_floating_point()


def _finished(tensor: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """[N, C, S, S], float32."""
    batch = tensor if tensor.ndim == 4 else tensor[None]
    if batch.shape[1:] != shape or len(batch) == 0:
        raise BadImageError(
            None, f"a float tensor of shape {list(tensor.shape)}; this model takes {list(shape)}, or a batch of it"
        )
    check_range(batch)
    return batch.float()


def check_range(images: torch.Tensor, name: str = "float tensor values") -> None:
    """Refuses floats outside [-1, 1]; where all lie in [0, 1], a warning says so once.

    Raises:
        BadImageError: the range; NaN counts as outside.
    """
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (low >= -1.001 and high <= 1.001):  # false for NaN too
        raise BadImageError(None, f"{name} from {low:g} to {high:g}; [-1, 1] is needed (from [0, 1]: 2 * x - 1)")
    if low >= 0 and low < high <= 1:
        _warn_of_unit_range()


@functools.cache
def _warn_of_unit_range() -> None:
    """Once in a process: a whole batch of floats lies in [0, 1], as torchvision makes them, where [-1, 1] is meant."""
    warnings.warn(
        "all values of a batch of float images lie in [0, 1], and they are taken as [-1, 1]; if they come from "
        "torchvision's ToTensor or the like, give 2 * x - 1",
        stacklevel=2,
    )


def _to_input(picture: Image.Image, config: PreprocessConfig, channels: int, invert: bool) -> torch.Tensor:
    """[channels, S, S] in [-1, 1], of a picture that is cropped already: the filter must see no pixel outside."""
    mode = "L" if channels == 1 else "RGB"
    picture = picture if picture.mode == mode else picture.convert(mode)
    picture = picture.resize((config.size, config.size), Image.Resampling[config.filter.upper()])
    pixels = np.asarray(picture).reshape(config.size, config.size, channels)
    if invert:
        pixels = 255 - pixels
    pixels = np.pad(pixels, ((config.pad, config.pad), (config.pad, config.pad), (0, 0)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
