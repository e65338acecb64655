"""Recipes: Table 1 against a table written by hand from the paper's description, and every one of them at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bigbigan
from bigbigan.cli import main
from bigbigan.data.opening import open_dataset
from bigbigan.schema import to_dict
from bigbigan.training import loop
from bigbigan.training.config import TrainConfig
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
# What all rows have: batch 2048, 500,000 steps, two D steps with fresh batches, Adam, EMA 0.9999 a step, ResNet crops.
# Whole dictionaries are compared, so a field that is not listed here fails.
RUN: dict[str, Any] = {
    "batch_size": 2048,
    "total_images": 1_024_000_000,
    "objective": "hinge",
    "rotated_batch_size": 0,
    "rotation_weight_d": 1.0,
    "rotation_weight_g": 0.2,
    "d_steps": 2,
    "reuse_batch": False,
    "simultaneous": False,
    "separate_passes": False,
    "accumulate": 1,
    "lr_g": 5e-5,
    "lr_d": 2e-4,
    "lr_decay_images": 0,
    "lr_decay": 1.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "initializer": "orthogonal",
    "ema_halflife_images": pytest.approx(2048 * 6931.12, rel=1e-4),  # log(1/2) / log(0.9999) steps
    "ema_rampup": 0.0,
    "ema_start_images": 0,
    "diff_augment": (),
    "augmentation": {
        "crop_scale": (0.08, 1),
        "aspect": (3 / 4, 4 / 3),
        "flip": True,
        "shift": 0,
        "original": True,
        "filter": "bicubic",
    },
    "precision": "fp32",
    "reversible": False,
    "compile": False,
    "seed": 0,
    "standing_passes": 100,
    "log_images": 204_800,
    "checkpoint_images": 2_048_000,
    "snapshot_images": 20_480_000,
    "probe_images": 15_000,
    "probe_l2": 1e-3,
}
GENERATOR = {"image_channels": 3, "shared_dim": 128, "attention_resolution": 64, "bn_eps": 1e-4}
Z_CHUNKS = {64: (24,) * 5, 128: (20,) * 6, 256: (18, 17, 17, 17, 17, 17, 17)}
MLP = {
    "activation": "relu",
    "order": "pre",
    "first_activation": False,
    "last_activation": True,
    "projection": "auto",
    "norm": "none",
    "bias": True,
}
ENCODER = {
    "image_channels": 3,
    "block": "bottleneck",
    "stem": "imagenet",
    "z_dim": 120,
    "head": MLP | {"width": 4096, "layers": 4},
    "stem_padding": "explicit",
    "strided_padding": "explicit",
    "pool_padding": "zero",
    "shortcut": "preactivated",
    "bn_eps": 1e-3,
    "bn_affine": True,
    "last_relu": True,
    "feature_norm_eps": 1e-3,
    "feature_norm_affine": False,
    "spectral_norm": False,
}
DISCRIMINATOR = {
    "image_channels": 3,
    "base_channels": 96,
    "z_dim": 120,
    "attention_resolution": 64,
    "z_mlp": MLP | {"width": 2048, "layers": 8},
    "joint_mlp": MLP | {"width": 2048, "layers": 8},
    "combine": "concat",
    "first_relu": False,
    "last_skip": True,
    "rotation_head": False,
}
PREPROCESS = {"pad": 0, "crop": "center", "filter": "bicubic", "polarity": "natural"}


def written(name: str, row: str) -> dict[str, Any]:
    """That row of the table as the whole recipe."""
    trunk, depths, factor, side, output, resolution, width, scores, multiplier = TABLE_1[row]
    side = side or resolution
    generator = {
        "resolution": resolution,
        "base_channels": width,
        "z_chunks": Z_CHUNKS[resolution],
        "prior": "uniform" if row == "uniform-pz" else "normal",
        "upsample_mode": "bilinear",
        "upsample_size": side,
    }
    encoder = {"resolution": side, "architecture": trunk, "depths": depths, "output": output}
    model = {
        "generator": GENERATOR | generator,
        "encoder": ENCODER | encoder | {"base_channels": 64 * factor} if trunk else None,
        "discriminator": DISCRIMINATOR | {"resolution": resolution, "scores": scores},
        "preprocess": PREPROCESS | {"size": side},
    }
    of_row = {"name": name, "model": model, "encoder_lr_multiplier": multiplier, "reversible": trunk == "revnet"}
    return RUN | of_row


@pytest.mark.parametrize("row", TABLE_1)
def test_row_of_table_1(row: str) -> None:
    name = f"bigbigan-{row}"
    assert dataclasses.asdict(RECIPES[name]) == written(name, row)


def test_baselines_on_imagenet() -> None:
    """They are the row without an encoder; their averages start at step 40,000; SS-GAN turns a quarter of the batch."""
    start = {"ema_start_images": 40_000 * 2048}
    assert dataclasses.asdict(RECIPES["biggan-imagenet-128"]) == written("biggan-imagenet-128", "no-e") | start
    ssgan = written("ssgan-imagenet-128", "no-e") | start | {"rotated_batch_size": 512}
    ssgan["model"]["discriminator"]["rotation_head"] = True
    assert dataclasses.asdict(RECIPES["ssgan-imagenet-128"]) == ssgan


def test_table_1_is_complete() -> None:
    others = {
        "bigbigan-fashion-mnist-32", "bigbigan-mnist-32", "bigbigan-cifar10-32", "bigan-mnist-mlp", "bigan-mnist-32",
        "bigan-fashion-mnist-32", "biggan-fashion-mnist-32", "ssgan-fashion-mnist-32", "biggan-imagenet-128",
        "ssgan-imagenet-128", "bigbigan-photos-64", "bigbigan-photos-128", "bigbigan-fruits-64",
    }  # fmt: skip
    assert set(RECIPES) == {f"bigbigan-{row}" for row in TABLE_1} | others


def test_bigan_of_its_authors() -> None:
    """200 epochs of 50,000 images, and 200 in which the rates fall to a hundredth."""
    part = {"resolution": 28, "image_channels": 1, "architecture": "mlp", "width": 1024, "z_dim": 50, "bn_eps": 1e-8}
    assert dataclasses.asdict(RECIPES["bigan-mnist-mlp"]) == RUN | {
        "name": "bigan-mnist-mlp",
        "model": {
            "generator": part | {"negative_slope": 0.0, "prior": "uniform"},
            "encoder": part | {"negative_slope": 0.2, "feature_norm_eps": 1e-3},
            "discriminator": part | {"negative_slope": 0.2},
            "preprocess": PREPROCESS | {"size": 28, "polarity": "light-on-dark"},
        },
        "total_images": 400 * 50_000,
        "batch_size": 128,
        "objective": "logistic",
        "d_steps": 1,
        "reuse_batch": True,
        "simultaneous": True,
        "separate_passes": True,
        "lr_g": 2e-4,
        "encoder_lr_multiplier": 1.0,
        "lr_decay_images": 200 * 50_000,
        "lr_decay": 0.01,
        "weight_decay": 2.5e-5,
        "adam_beta1": 0.5,
        "initializer": "normal",
        "ema_halflife_images": 0.0,
        "ema_rampup": 0.05,
        "augmentation": RUN["augmentation"] | {"crop_scale": (1, 1), "flip": False, "original": False},
        "standing_passes": 1000,
        "log_images": 50_000,
        "checkpoint_images": 250_000,
        "snapshot_images": 1_250_000,
    }


# They decide no weights.
WRITTEN = {"name", "log_images", "checkpoint_images", "snapshot_images", "probe_images", "probe_l2"}


def leaves(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif value is not None:  # a part the model lacks
            yield prefix + name


@pytest.mark.parametrize("name", RECIPES)
def test_sources_name_every_field_that_decides_weights(name: str) -> None:
    recipe, listed = RECIPES[name], sources(name)
    values = to_dict(recipe)
    fields = [field for source in listed for field in source.fields]
    assert len(set(fields)) == len(fields)
    for field in fields:
        assert reduce(getitem, field.split("."), values) is not None
    assert {source.certainty for source in listed} <= {"read", "second hand", "recalled", "chosen"}
    idle = set() if recipe.model.encoder else {"encoder_lr_multiplier"}
    idle |= set() if recipe.reversible else {"reversible"}
    idle |= set() if recipe.rotated_batch_size else {"rotated_batch_size", "rotation_weight_d", "rotation_weight_g"}
    covered = {path for path in leaves(values) if any(f"{path}.".startswith(f"{field}.") for field in fields)}
    assert set(leaves(values)) - covered == idle | WRITTEN
    assert recipe.model.encoder or not any("encoder" in source.source for source in listed)


def test_sources_say_what_is_not_read() -> None:
    certainty = {
        name: {field: source.certainty for source in sources(name) for field in source.fields}
        for name in ("bigbigan-resnet101", "ssgan-imagenet-128")
    }
    paper, ssgan = certainty.values()
    recalled = {"model.encoder.depths", "model.discriminator.combine", "standing_passes"}
    assert {field for field, level in paper.items() if level == "recalled"} == recalled
    assert {field for field, level in ssgan.items() if level == "recalled"} == {"rotated_batch_size", "standing_passes"}
    # BigGAN's baselines owe nothing to accounts of BigBiGAN.
    assert "second hand" not in ssgan.values()


def test_sources_fit_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECIPES:
        assert main(["recipes", name, "--sources"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


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
QUICK = (
    "bigbigan-photos-64",
    "bigbigan-uniform-pz",
    "bigbigan-revnet50",
    "ssgan-fashion-mnist-32",
    "bigan-mnist-mlp",
    "bigan-mnist-32",
)


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
