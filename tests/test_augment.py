"""Crops of original pictures: their boxes computed by hand, and their pixels against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bigbigan.config import PreprocessConfig
from bigbigan.data.augment import CROP_ATTEMPTS, NUM_CROP_DRAWS, AugmentationConfig, crop_box, uniform
from bigbigan.data.decoding import Decoder
from bigbigan.images import preprocess, read_image
from bigbigan.schema import ConfigError, from_dict, to_dict

RESNET = AugmentationConfig(crop_scale=(0.08, 1.0), flip=True, original=True)
SQUARE = AugmentationConfig(crop_scale=(0.5, 1.0), aspect=(1.0, 1.0), original=True, filter="bilinear")


def attempts(*rows: tuple[float, float, float, float], flip: float = 0.9) -> np.ndarray:
    """Draws whose first attempts have these (aspect, height, top, left)."""
    draws = np.full((CROP_ATTEMPTS, 4), 0.5)
    draws[: len(rows)] = np.reshape(rows, (-1, 4))
    return np.concatenate([[flip], draws.ravel()])


def test_a_box_by_hand():
    config = AugmentationConfig(crop_scale=(0.25, 0.75), aspect=(1.0, 1.0), original=True)
    # 100 x 80: areas 2000 to 6000, so heights 45 to 77, of which the middle one of 33 is 61; free 39 and 19
    assert crop_box((100, 80), attempts((0.5, 0.5, 0.25, 0.75)), config) == (29, 4, 90, 65)
    assert crop_box((100, 80), attempts((0.5, 0.0, 0.0, 0.0)), config) == (0, 0, 45, 45)
    # 77 high; the last offset, 3 from the bottom and 23 from the right, is never taken
    assert crop_box((100, 80), attempts((0.5, 0.9999, 0.9999, 0.9999)), config) == (22, 2, 99, 79)


def test_a_box_limited_by_the_width_and_by_rounding():
    config = AugmentationConfig(crop_scale=(0.5, 1.0), aspect=(4 / 3, 4 / 3), original=True)
    # heights from sqrt(5000 * 3 / 4) = 61 to 75, the last whose width fits; 61 x 81 is under 5000, so 62 x 83
    assert crop_box((100, 100), attempts((0.5, 0.0, 0.5, 0.5)), config) == (8, 19, 91, 81)
    assert crop_box((100, 100), attempts((0.5, 0.9999, 0.0, 0.0)), config) == (0, 0, 100, 75)


def test_crops_under_a_tenth_are_drawn_again_and_impossible_ones_give_the_centre_crop():
    config = AugmentationConfig(crop_scale=(0.08, 1.0), aspect=(1.0, 1.0), original=True)
    # 28 x 28 is too small by rounding, 29 x 29 under a tenth; the second attempt is 28 + 36 high
    assert crop_box((100, 100), attempts((0.5, 0.0, 0, 0), (0.5, 0.5, 0, 0)), config) == (0, 0, 64, 64)
    assert crop_box((100, 100), attempts(*[(0.5, 0.0, 0, 0)] * CROP_ATTEMPTS), config) is None
    assert crop_box((100, 100), attempts((0.5, 0.9999, 0, 0)), config) is None  # the whole picture
    assert crop_box((300, 100), attempts(), SQUARE) is None  # no square holds half of it


@pytest.mark.parametrize("config", [RESNET, SQUARE])
@pytest.mark.parametrize("size", [(500, 375), (64, 97), (17, 16)])
def test_boxes_keep_their_promises(config: AugmentationConfig, size: tuple[int, int]):
    draws = uniform(3, np.arange(2000), NUM_CROP_DRAWS)
    boxes = np.array([crop_box(size, row, config) or (0, 0, *size) for row in draws])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / (size[0] * size[1])
    assert boxes.min() >= 0 and (boxes[:, 2] <= size[0]).all() and (boxes[:, 3] <= size[1]).all()
    assert share.min() >= max(0.1, config.crop_scale[0]) - 1e-9
    cut = share < 1
    low, high = config.aspect  # the width is the rounded one for this height
    assert (width[cut] >= np.floor(height[cut] * low)).all() and (width[cut] <= np.ceil(height[cut] * high)).all()
    assert len(np.unique(boxes, axis=0)) > (100 if config is RESNET else 5)


def jpeg(orientation: int = 1, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    picture = Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC).convert(mode)
    exif = picture.getexif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (3, "L"), (1, "L"), (1, "RGB")])
def test_crops_are_cut_from_the_upright_original_then_scaled_padded_and_flipped(channels: int, mode: str):
    config = PreprocessConfig(size=16, pad=2)
    draws, flipped = attempts((0.3, 0.4, 0.6, 0.2)), attempts((0.3, 0.4, 0.6, 0.2), flip=0.1)
    encoded = jpeg(6, mode)  # stored 120 x 90, shown 90 x 120
    picture = read_image(Image.open(io.BytesIO(encoded)))
    assert picture.size == (90, 120)
    box = crop_box((90, 120), draws, RESNET)
    assert box is not None and box[3] > 90 - 1  # reaches below what an unturned picture has
    for augmentation, scale in ((RESNET, Image.Resampling.BICUBIC), (SQUARE, Image.Resampling.BILINEAR)):
        box = crop_box((90, 120), draws, augmentation)
        scaled = np.asarray(picture.crop(box).resize((16, 16), scale).convert("RGB" if channels == 3 else "L"))
        expected = np.pad(scaled.reshape(16, 16, channels), ((2, 2), (2, 2), (0, 0))).transpose(2, 0, 1)
        decoder = Decoder((), config, channels, 0, augmentation)
        assert np.array_equal(decoder.decode(encoded, draws), expected)
        again = decoder.decode(encoded, flipped)
        assert np.array_equal(again, expected[:, :, ::-1] if augmentation.flip else expected)


def test_where_no_crop_fits_it_is_the_centre_crop_of_resnet_evaluation():
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 200, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    config = PreprocessConfig(size=16)
    expected = preprocess(noise, config, 3, crop="resnet")[0].add(1).mul(127.5).round().byte().numpy()
    assert np.array_equal(Decoder((), config, 3, 0, SQUARE).decode(stream.getvalue(), attempts()), expected)


def test_transparent_pictures_lie_on_the_ground_that_the_model_knows():
    stream = io.BytesIO()
    Image.new("RGBA", (40, 40)).save(stream, "PNG")
    for polarity, value in (("natural", 255), ("light-on-dark", 0)):
        decoder = Decoder((), PreprocessConfig(size=16, polarity=polarity), 1, 0, RESNET)
        assert (decoder.decode(stream.getvalue(), attempts()) == value).all()


def test_configuration_of_original_crops():
    assert from_dict(AugmentationConfig, to_dict(SQUARE)) == SQUARE
    for wrong in ({"original": True}, {"original": True, "crop_scale": (0.5, 1.0), "shift": 1}, {"filter": "box"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AugmentationConfig(**wrong)
