"""DiffAugment against loops over pixels written from the paper's code, and in the training step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bigbigan.presets import PRESETS
from bigbigan.training.config import TrainConfig
from bigbigan.training.diffaugment import diff_augment
from bigbigan.training.step import Batch, TrainingState, make_pairs, score, train_step

DRAWS = torch.rand((6, 7), generator=torch.Generator().manual_seed(0)) * 2 - 1
TINY = TrainConfig("tiny", PRESETS["bigbigan-tiny"].config, total_images=48, batch_size=4)


def images(side: int) -> torch.Tensor:
    return torch.rand((6, 3, side, side), generator=torch.Generator().manual_seed(1)) * 2 - 1


def shifted(image: np.ndarray, right: int, down: int) -> np.ndarray:
    out, side = np.zeros_like(image), image.shape[-1]
    for y, x in itertools.product(range(side), range(side)):
        if 0 <= y - down < side and 0 <= x - right < side:
            out[:, y, x] = image[:, y - down, x - right]
    return out


@pytest.mark.parametrize("side", [64, 28])
def test_translation_moves_whole_pixels_and_leaves_zeros(side: int) -> None:
    most = int(side * 0.125 + 0.5)
    out = diff_augment(images(side), DRAWS, ("translation",)).numpy()
    for image, before, draw in zip(out, images(side).numpy(), DRAWS.numpy(), strict=True):
        right, down = (int(np.clip(np.rint(u * (most + 0.5)), -most, most)) for u in draw[3:5])
        np.testing.assert_array_equal(image, shifted(before, right, down))


def test_translation_reaches_both_ends_and_takes_each_step_as_often() -> None:
    draws = torch.zeros((3400, 7))
    draws[:, 3] = torch.linspace(-1, 1, 3402)[1:-1]
    ramp = torch.arange(1.0, 65).expand(3400, 1, 64, 64)
    moved = diff_augment(ramp, draws, ("translation",))[:, 0, 32, 32]
    steps, counts = np.unique((33 - moved).numpy(), return_counts=True)
    assert steps.tolist() == list(range(-8, 9)) and counts.min() >= 199 and counts.max() <= 201


def test_cutout_is_a_square_of_half_the_side_around_any_point() -> None:
    out = diff_augment(torch.ones(6, 1, 32, 32), DRAWS, ("cutout",))[:, 0].numpy()
    for image, draw in zip(out, DRAWS.numpy(), strict=True):
        x, y = (min(int((u + 1) / 2 * 33), 32) for u in draw[5:7])  # 0 to 32, as randint(0, 33) there
        expected = np.ones((32, 32))
        for i, j in itertools.product(range(16), range(16)):
            if 0 <= y + i - 8 < 32 and 0 <= x + j - 8 < 32:
                expected[y + i - 8, x + j - 8] = 0
        np.testing.assert_array_equal(image, expected)


def test_color_changes_brightness_saturation_and_contrast_in_this_order() -> None:
    out = diff_augment(images(8), DRAWS, ("color",)).numpy()
    for image, before, (b, s, c, *_) in zip(out, images(8).numpy().astype(np.float64), DRAWS.tolist(), strict=True):
        expected = before + b / 2
        grey = expected.mean(0)
        expected = grey + (1 + s) * (expected - grey)
        expected = expected.mean() + (1 + c / 2) * (expected - expected.mean())
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_gradients_reach_the_images_that_are_seen() -> None:
    x = images(32).double().requires_grad_()
    small = DRAWS.double()
    assert torch.autograd.gradcheck(
        lambda x: diff_augment(x, small, ("color", "translation", "cutout")), x[:1, :, :8, :8]
    )
    diff_augment(x, small, ("translation", "cutout")).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}


def batch(n: int = 4) -> Batch:
    draws = torch.Generator().manual_seed(3)
    shapes = ((n, 3, 32, 32), (n, 8), (n, 8), (n, 2, 7))
    return Batch(*(torch.rand(shape, generator=draws) * 2 - 1 for shape in shapes))


def test_discriminator_sees_real_and_generated_images_changed_by_their_own_draws() -> None:
    state = TrainingState(replace(TINY, diff_augment=("translation", "cutout")))
    whole = batch()
    with torch.no_grad():
        pairs = make_pairs(state, whole)
        real, fake = score(state.discriminator, pairs, augmentations=("translation", "cutout"))
        for output, x, z, column in ((real, whole.x, pairs.real_z, 0), (fake, pairs.fake_x, whole.z, 1)):
            changed = diff_augment(x, whole.draws[:, column], ("translation", "cutout"))
            torch.testing.assert_close(output.score_xz, state.discriminator(changed, z).score_xz)


@pytest.mark.parametrize("options", [{}, {"reuse_batch": False}, {"accumulate": 2}])
def test_steps_use_it_in_every_update(options: dict[str, object]) -> None:
    """Of G and E too: with a learning rate of D that changes nothing, their loss is that of changed images."""
    losses = {}
    for policy in ((), ("cutout",)):
        state = TrainingState(replace(TINY, precision="fp64", lr_d=1e-15, diff_augment=policy, **options))
        doubled = Batch(*(getattr(batch(), name).double() for name in ("x", "z", "noise", "draws")))
        losses[policy] = train_step(state, lambda i, data=doubled: data, 4)
    for name in ("loss_d", "loss_ge"):
        assert not torch.isclose(losses[()][name], losses[("cutout",)][name], rtol=1e-3)
