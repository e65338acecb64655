"""Recipes: Table 1 against a table written by hand from the paper's description, and every one of them at work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bigbigan
from bigbigan.config import MLPConfig
from bigbigan.training import loop
from bigbigan.training.config import TrainConfig
from bigbigan.training.data import open_dataset
from bigbigan.training.recipes import RECIPES, sources

# Row: E's trunk, its stages, width factor, input size and output; G's size and base channels; scores; E's LR over G's.
R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
ALL = ("x", "z", "xz")
TABLE_1: dict[str, tuple[Any, ...]] = {
    "base": ("resnet", R50, 1, 128, "stochastic", 128, 96, ALL, 1),
    "deterministic-e": ("resnet", R50, 1, 128, "deterministic", 128, 96, ALL, 1),
    "uniform-pz": ("resnet", R50, 1, 128, "tanh", 128, 96, ALL, 1),
    "x-unary-only": ("resnet", R50, 1, 128, "stochastic", 128, 96, ("x", "xz"), 1),
    "z-unary-only": ("resnet", R50, 1, 128, "stochastic", 128, 96, ("z", "xz"), 1),
    "no-unaries": ("resnet", R50, 1, 128, "stochastic", 128, 96, ("xz",), 1),
    "small-g-32": ("resnet", R50, 1, 128, "stochastic", 128, 32, ALL, 1),
    "small-g-64": ("resnet", R50, 1, 128, "stochastic", 128, 64, ALL, 1),
    "no-e": (None, None, None, None, None, 128, 96, ("x",), 1),
    "high-res-e-256": ("resnet", R50, 1, 256, "stochastic", 128, 96, ALL, 1),
    "low-res-g-64": ("resnet", R50, 1, 256, "stochastic", 64, 96, ALL, 1),
    "high-res-g-256": ("resnet", R50, 1, 256, "stochastic", 256, 96, ALL, 1),
    "resnet101": ("resnet", R101, 1, 256, "stochastic", 128, 96, ALL, 1),
    "resnet50x2": ("resnet", R50, 2, 256, "stochastic", 128, 96, ALL, 1),
    "revnet50": ("revnet", R50, 1, 256, "stochastic", 128, 96, ALL, 1),
    "revnet50x2": ("revnet", R50, 2, 256, "stochastic", 128, 96, ALL, 1),
    "revnet50x4-base-lr": ("revnet", R50, 4, 256, "stochastic", 128, 96, ALL, 1),
    "resnet50": ("resnet", R50, 1, 256, "stochastic", 128, 96, ALL, 10),
    "revnet50x4": ("revnet", R50, 4, 256, "stochastic", 128, 96, ALL, 10),
}
# Of all rows: batch 2048, 500,000 steps, two D steps with fresh batches, Adam, EMA 0.9999 a step, ResNet crops.
EVERYWHERE = {
    "batch_size": 2048,
    "total_images": 1_024_000_000,
    "objective": "hinge",
    "d_steps": 2,
    "reuse_batch": False,
    "simultaneous": False,
    "separate_passes": False,
    "accumulate": 1,
    "rotated_batch_size": 0,
    "lr_g": 5e-5,
    "lr_d": 2e-4,
    "lr_decay_images": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "initializer": "orthogonal",
}


@pytest.mark.parametrize("row", TABLE_1)
def test_row_of_table_1(row: str) -> None:
    recipe = RECIPES[f"bigbigan-{row}"]
    g, e, d = recipe.model.generator, recipe.model.encoder, recipe.model.discriminator
    trunk = (e.architecture, e.depths, e.base_channels // 64, e.resolution, e.output) if e is not None else (None,) * 5
    assert (*trunk, g.resolution, g.base_channels, d.scores, recipe.encoder_lr_multiplier) == TABLE_1[row]
    assert {name: getattr(recipe, name) for name in EVERYWHERE} == EVERYWHERE
    assert recipe.ema_halflife_images == pytest.approx(2048 * 6931.12, rel=1e-4)  # log(1/2) / log(0.9999) steps
    crops = recipe.augmentation
    assert (crops.crop_scale, crops.aspect, crops.flip, crops.original) == ((0.08, 1), (3 / 4, 4 / 3), True, True)
    assert g.z_dim == 120 and g.prior == ("uniform" if row == "uniform-pz" else "normal") and g.shared_dim == 128
    assert (d.resolution, d.base_channels, d.z_dim) == (g.resolution, 96, 120)
    assert d.z_mlp == d.joint_mlp == MLPConfig(2048, 8) and d.combine == "concat" and not d.rotation_head
    if e is not None:
        assert e.block == "bottleneck" and e.head == MLPConfig(4096, 4) and not e.spectral_norm
        assert recipe.reversible == (e.architecture == "revnet")
    assert recipe.model.preprocess.size == (e.resolution if e is not None else 128)


def test_table_1_is_complete() -> None:
    others = {
        "bigbigan-fashion-mnist-32", "bigbigan-mnist-32", "bigbigan-cifar10-32", "bigan-mnist-mlp", "bigan-mnist-32",
        "bigan-fashion-mnist-32", "biggan-fashion-mnist-32", "ssgan-fashion-mnist-32", "biggan-imagenet-128",
        "ssgan-imagenet-128",
    }  # fmt: skip
    assert set(RECIPES) == {f"bigbigan-{row}" for row in TABLE_1} | others


def test_ss_gan_on_imagenet() -> None:
    recipe = RECIPES["ssgan-imagenet-128"]
    assert (recipe.rotated_batch_size, recipe.rotation_weight_d, recipe.rotation_weight_g) == (512, 1.0, 0.2)
    assert recipe.model.discriminator.rotation_head and recipe.model.encoder is None


def test_bigan_of_its_authors() -> None:
    recipe = RECIPES["bigan-mnist-mlp"]
    assert recipe.total_images == 400 * 50_000 and recipe.batch_size == 128
    assert (recipe.objective, recipe.simultaneous, recipe.separate_passes, recipe.d_steps) == (
        "logistic",
        True,
        True,
        1,
    )
    assert (recipe.lr_g, recipe.lr_d, recipe.encoder_lr_multiplier) == (2e-4, 2e-4, 1.0)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_eps) == (0.5, 0.999, 1e-8)
    assert (recipe.weight_decay, recipe.lr_decay_images, recipe.lr_decay) == (2.5e-5, 200 * 50_000, 0.01)
    assert (recipe.initializer, recipe.ema_halflife_images, recipe.standing_passes) == ("normal", 0.0, 1000)


@pytest.mark.parametrize("name", RECIPES)
def test_sources_name_fields(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)} | {"all but the below"}
    assert {source.field for source in sources(name)} <= fields
    assert {source.certainty for source in sources(name)} <= {"read", "second hand", "chosen"}


# --- at work, at reduced width ---------------------------------------------------------------------------------------


def reduced(name: str) -> TrainConfig:
    """The recipe with narrow networks and two steps of a few images."""
    recipe = RECIPES[name]
    parts: dict[str, Any] = {}
    for part in ("generator", "encoder", "discriminator"):
        config = getattr(recipe.model, part)
        if config is None:
            continue
        if getattr(config, "architecture", "") == "mlp":
            config = dataclasses.replace(config, width=16)
        elif part == "encoder":
            width = 8 if config.base_channels > 64 or config.architecture == "revnet" else 4
            config = dataclasses.replace(config, base_channels=width, head=dataclasses.replace(config.head, width=16))
        else:
            config = dataclasses.replace(config, base_channels=8)  # attention takes an eighth
            if part == "discriminator":
                mlps = {key: dataclasses.replace(getattr(config, key), width=16) for key in ("z_mlp", "joint_mlp")}
                config = dataclasses.replace(config, **mlps)
        parts[part] = config
    rotated = {"rotated_batch_size": 4} if recipe.rotated_batch_size else {}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **parts),
        total_images=8,
        batch_size=4,
        lr_decay_images=4 if recipe.lr_decay_images else 0,
        standing_passes=2,
        probe_images=0,
        log_images=4,
        checkpoint_images=4,
        snapshot_images=8,
        **rotated,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Small folders of pictures, grey and in colour."""
    folders = {}
    for channels in (1, 3):
        folders[channels] = tmp_path_factory.mktemp(f"pictures{channels}")
        draws = np.random.default_rng(channels)
        for i in range(8):
            pixels = draws.integers(0, 256, (40, 48, channels), np.uint8).squeeze()
            Image.fromarray(pixels).save(folders[channels] / f"{i}.png")
    return folders


# One of each kind by default: they share their code with the others.
QUICK = ("bigbigan-uniform-pz", "bigbigan-revnet50", "ssgan-fashion-mnist-32", "bigan-mnist-mlp", "bigan-mnist-32")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_recipe_starts_stops_goes_on_and_exports(name: str, pictures: dict[int, Path], tmp_path: Path) -> None:
    config = reduced(name)
    data = open_dataset(pictures[config.model.image_channels])
    loop.train(config, data, tmp_path / "run", max_minutes=1e-9, workers=0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    loop.train(config, data, tmp_path / "run", workers=0)
    (snapshot,) = (tmp_path / "run" / "snapshots").iterdir()
    model = bigbigan.load(snapshot)
    assert model.parts == config.model.parts
    side = config.model.generator.resolution
    assert model.generate(2, seed=0).shape == (2, config.model.image_channels, side, side)
    assert any((tmp_path / "run" / "samples").iterdir())
