"""Named training runs, and where each of their values comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bigbigan.presets import EMBEDDED, PRESETS
from bigbigan.training.augment import AugmentationConfig
from bigbigan.training.config import TrainConfig

IMAGENET_IMAGES, IMAGENET_BATCH, IMAGENET_STEPS = 1_281_167, 2048, 500_000
RAISED_ENCODER_LR = ("bigbigan-resnet50", "bigbigan-revnet50x4")  # Table 1's rows "up E LR"
RESNET_CROPS = AugmentationConfig((0.08, 1.0), (3 / 4, 4 / 3), flip=True, original=True)


def halflife(decay: float, batch_size: int) -> float:
    """Images after which an average with that decay a step has forgotten half."""
    return batch_size * math.log(0.5) / math.log(decay)


def _imagenet(name: str) -> TrainConfig:
    model = PRESETS[name].config
    images = IMAGENET_STEPS * IMAGENET_BATCH
    return TrainConfig(
        name,
        model,
        total_images=images,
        batch_size=IMAGENET_BATCH,
        rotated_batch_size=IMAGENET_BATCH // 4 if name.startswith("ssgan") else 0,
        d_steps=2,
        reuse_batch=False,
        lr_g=5e-5,
        lr_d=2e-4,
        encoder_lr_multiplier=10.0 if name in RAISED_ENCODER_LR else 1.0,
        ema_halflife_images=halflife(0.9999, IMAGENET_BATCH),
        augmentation=RESNET_CROPS,
        reversible=getattr(model.encoder, "architecture", "") == "revnet",
        standing_passes=100,
        log_images=100 * IMAGENET_BATCH,
        checkpoint_images=1000 * IMAGENET_BATCH,
        snapshot_images=10_000 * IMAGENET_BATCH,
    )


# What keeps D ahead of G at this size, found on Fashion-MNIST: two D steps, beta1 0.5, and these learning rates. With
# one step, beta1 0 and 2e-4 its scores hover at chance. The encoder's factor is between the paper's 1 and 10.
_SMALL = TrainConfig(
    EMBEDDED,
    PRESETS[EMBEDDED].config,
    total_images=1_200_000,
    d_steps=2,
    lr_g=1e-4,
    lr_d=3e-4,
    encoder_lr_multiplier=3.0,
    adam_beta1=0.5,
    ema_halflife_images=20_000.0,
    log_images=6_000,
    checkpoint_images=30_000,
    snapshot_images=90_000,
)
_MNIST_EPOCH = 50_000  # the authors score the last 10,000 of the 60,000
_BIGAN_MNIST = TrainConfig(
    "bigan-mnist-mlp",
    PRESETS["bigan-mnist-mlp"].config,
    total_images=400 * _MNIST_EPOCH,
    batch_size=128,
    objective="logistic",
    simultaneous=True,
    separate_passes=True,
    adam_beta1=0.5,
    lr_decay_images=200 * _MNIST_EPOCH,
    lr_decay=0.01,
    weight_decay=2.5e-5,
    initializer="normal",
    ema_halflife_images=0.0,
    standing_passes=1000,
    log_images=_MNIST_EPOCH,
    checkpoint_images=5 * _MNIST_EPOCH,
    snapshot_images=25 * _MNIST_EPOCH,
)


def _small(name: str, **changes: object) -> TrainConfig:
    return replace(_SMALL, name=name, model=PRESETS[name].config, **changes)  # type: ignore[arg-type]


_BIGAN = {"objective": "logistic", "encoder_lr_multiplier": 1.0, "d_steps": 1, "lr_g": 2e-4, "lr_d": 2e-4}

RECIPES: dict[str, TrainConfig] = {
    recipe.name: recipe
    for recipe in (
        *(_imagenet(name) for name, preset in PRESETS.items() if preset.description.startswith("Table 1")),
        _imagenet("biggan-imagenet-128"),
        _imagenet("ssgan-imagenet-128"),
        _SMALL,
        _small("bigbigan-mnist-32"),
        _small("bigbigan-cifar10-32", augmentation=AugmentationConfig(flip=True)),
        _BIGAN_MNIST,
        _small("bigan-mnist-32", **_BIGAN),
        _small("bigan-fashion-mnist-32", **_BIGAN),
        _small("biggan-fashion-mnist-32", probe_images=0),
        _small("ssgan-fashion-mnist-32", probe_images=0, rotated_batch_size=16),
    )
}


@dataclass(frozen=True)
class Source:
    """Where a recipe's value comes from. `certainty` is "read", "second hand" or "chosen" (no source settles it)."""

    field: str
    source: str
    certainty: str


_PAPER = (
    Source("model", "paper, section 3 and Table 1's row; open details as in bigbigan/config.py", "second hand"),
    Source("total_images", "500,000 steps (paper, section 4)", "second hand"),
    Source("batch_size", "paper, appendix A", "second hand"),
    Source("objective", "each score clamped separately (paper, section 2; released demo)", "second hand"),
    Source("d_steps", "paper, appendix A, after BigGAN", "second hand"),
    Source("reuse_batch", "fresh images and latents a sub-step, as google/compare_gan", "read"),
    Source("lr_g", "BigGAN's, as its author's PyTorch code reports them", "read"),
    Source("lr_d", "BigGAN's, as its author's PyTorch code reports them", "read"),
    Source("encoder_lr_multiplier", "10 in the rows 'up E LR' (paper, section 3.1), else 1", "second hand"),
    Source("adam_beta1", "BigGAN's, google/compare_gan", "read"),
    Source("adam_beta2", "BigGAN's, google/compare_gan", "read"),
    Source("adam_eps", "TensorFlow's default", "chosen"),
    Source("initializer", "orthogonal, google/compare_gan and BigGAN's PyTorch code; E's is not stated", "read"),
    Source("ema_halflife_images", "decay 0.9999 a step on G and E (paper, appendix A), reached as the run passes 20 "
           "half-lives: its start is not stated", "second hand"),
    Source("augmentation", "ResNet crops and flips (released demo), as tensorflow/tpu's resnet_preprocessing", "read"),
    Source("standing_passes", "as BigGAN's standing statistics; the number is not stated for BigBiGAN", "chosen"),
    Source("reversible", "memory alone: the gradients are the same up to rounding", "chosen"),
)  # fmt: skip
_SS_GAN = (
    Source("rotated_batch_size", "google/compare_gan has no default; a quarter of the batch", "chosen"),
    Source("rotation_weight_d", "google/compare_gan, ssgan.py", "read"),
    Source("rotation_weight_g", "google/compare_gan, ssgan.py", "read"),
)  # fmt: skip
_BIGAN_SOURCE = "jeffdonahue/bigan, train_mnist.sh and the defaults of train_gan.py"  # the decay there goes by epochs
_BIGAN_FIELDS = (
    "model", "total_images", "batch_size", "objective", "simultaneous", "separate_passes", "d_steps", "lr_g", "lr_d",
    "encoder_lr_multiplier", "lr_decay_images", "lr_decay", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps",
    "initializer", "standing_passes",
)  # fmt: skip


def sources(name: str) -> list[Source]:
    """Where the values of a recipe come from; fields that are not listed are this project's choice."""
    if name == "bigan-mnist-mlp":
        return [Source(field, _BIGAN_SOURCE, "read") for field in _BIGAN_FIELDS]
    if RECIPES[name].batch_size == IMAGENET_BATCH:
        return [*_PAPER, *(_SS_GAN if RECIPES[name].rotated_batch_size else ())]
    chosen = [
        Source("all but the below", "this project's, for small images; see bigbigan/training/recipes.py", "chosen")
    ]
    return [*chosen, *(_SS_GAN if RECIPES[name].rotated_batch_size else ())]
