"""Named training runs, and where each of their values comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from bigbigan.data.augment import AugmentationConfig
from bigbigan.presets import EMBEDDED, PRESETS
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
        ema_rampup=0.0,
        ema_start_images=0 if name.startswith("bigbigan") else 40_000 * IMAGENET_BATCH,
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


# For thousands of colour photos, not millions: D sees them moved and with holes. Not "color": it would hide from D
# whether G kept an image's colours.
_PHOTOS = {"augmentation": AugmentationConfig(flip=True), "diff_augment": ("translation", "cutout")}
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
        _small("bigbigan-photos-64", **_PHOTOS),
        _small("bigbigan-photos-128", **_PHOTOS),
        _small("bigbigan-fruits-64", **_PHOTOS, probe_images=12_000),
        _BIGAN_MNIST,
        _small("bigan-mnist-32", **_BIGAN),
        _small("bigan-fashion-mnist-32", **_BIGAN),
        _small("biggan-fashion-mnist-32", probe_images=0),
        _small("ssgan-fashion-mnist-32", probe_images=0, rotated_batch_size=16),
    )
}


Certainty = Literal["read", "second hand", "recalled", "chosen"]
_Rows = tuple[tuple[str, Certainty, str], ...]


@dataclass(frozen=True)
class Source:
    """Where values of a recipe come from. The line of a field holds for all inside it that has no line of its own.

    `certainty` is that of the weakest link: "read" in what is named, "second hand" (in an account of it), "recalled"
    (remembered, not seen in print), or "chosen" (no source settles it, or sources differ).
    """

    fields: tuple[str, ...]  # dotted
    certainty: Certainty
    source: str


_COMPUTED: _Rows = (
    ("accumulate precision compile seed", "chosen", "how it is computed: the whole batch at once, in float32"),
)
_TABLE_1: _Rows = (
    ("model.generator", "second hand", "BigGAN's (paper, section 3.1; there also the row's size and width): layers as "
     "google/compare_gan, but nearest upsampling and gains of 1 + linear as BigGAN's PyTorch code"),
    ("model.generator.prior", "second hand", "paper, section 3.1"),
    ("model.generator.shared_dim", "second hand", "one label for all images (paper, section 3.1), so one learned "
     "vector, of google/compare_gan's size"),
    ("model.generator.bn_eps", "chosen", "as DeepMind's released BigGAN; not stated for BigBiGAN"),
    ("model.discriminator", "second hand", "F is BigGAN's (paper, section 3.1): google/compare_gan and BigGAN's "
     "PyTorch code"),
    ("model.discriminator.first_relu model.discriminator.last_skip", "chosen", "as BigGAN's PyTorch code; "
     "google/compare_gan has the opposite of both, DeepMind's is not stated"),
    ("model.discriminator.scores", "second hand", "paper, sections 2 and 3.1"),
    ("model.preprocess", "chosen", "for evaluation: the largest centre square. How much the authors' centre crop "
     "leaves out is not stated"),
    ("model.preprocess.size", "second hand", "paper, section 3.1"),
    ("total_images", "second hand", "500,000 steps (paper, appendix A)"),
    ("batch_size d_steps", "second hand", "paper, appendix A"),
    ("objective", "second hand", "hinge, each score clamped separately (paper, section 2; released demo)"),
    ("reuse_batch simultaneous separate_passes", "chosen", "fresh images and latents for each D step and for the step "
     "after them, as google/compare_gan; D sees both kinds in one pass, as BigGAN's PyTorch code"),
    ("lr_g lr_d", "second hand", "BigGAN's (paper, appendix A), as its author's PyTorch code reports them"),
    ("lr_decay_images lr_decay weight_decay", "chosen", "none: no source mentions any"),
    ("adam_beta1 adam_beta2", "second hand", "BigGAN's (paper, appendix A), as google/compare_gan has them"),
    ("adam_eps", "chosen", "TensorFlow's default; not stated"),
    ("initializer", "chosen", "as BigGAN (google/compare_gan, PyTorch code); not stated for BigBiGAN"),
    ("ema_halflife_images ema_rampup", "second hand", "decay 0.9999 a step throughout (paper, appendix A)"),
    ("ema_start_images", "chosen", "from the first step: not stated"),
    ("diff_augment", "chosen", "none: no source mentions any"),
    ("augmentation", "read", "ResNet crops and flips (released demo), as tensorflow/tpu's resnet_preprocessing"),
    ("augmentation.filter", "chosen", "bicubic as there, but antialiased"),
    ("standing_passes", "recalled", "BigGAN's number of passes; not stated for BigBiGAN"),
)  # fmt: skip
_ENCODER: _Rows = (
    ("model.encoder", "second hand", "ResNet-v2 or RevNet and an average pool; the row's depth, width and output "
     "(paper, section 3.1). Units as google/revisiting-self-supervised"),
    ("model.encoder.stem_padding model.encoder.strided_padding model.encoder.pool_padding model.encoder.shortcut "
     "model.encoder.bn_eps model.encoder.bn_affine model.encoder.last_relu", "chosen",
     "as google/revisiting-self-supervised; not stated for BigBiGAN"),
    ("model.encoder.feature_norm_eps", "chosen", "as the encoder's other norms; not stated"),
    ("model.encoder.feature_norm_affine", "second hand", "a norm without parameters (paper, section 3.2)"),
    ("model.encoder.spectral_norm", "second hand", "in G and D only (paper, appendix A)"),
    ("model.encoder.head.width model.encoder.head.layers", "second hand", "two residual blocks of two layers (paper, "
     "section 3.1)"),
    ("model.encoder.head", "chosen", "ReLU in ResNet-v2's order, projections where widths differ, biases, no norm: "
     "not stated"),
    ("model.discriminator.z_mlp.width model.discriminator.z_mlp.layers model.discriminator.joint_mlp.width "
     "model.discriminator.joint_mlp.layers", "second hand", "H and J: four residual blocks of two layers (paper, "
     "section 3.1)"),
    ("model.discriminator.z_mlp model.discriminator.joint_mlp", "chosen", "as the encoder's head"),
    ("model.discriminator.combine", "recalled", "J takes F(x) and H(z) side by side"),
    ("encoder_lr_multiplier", "second hand", "10 in the rows 'up E LR' (paper, section 3.1), else 1"),
)  # fmt: skip
_128_PIXELS: _Rows = (("model.generator.z_chunks", "second hand", "paper, section 3.1"),)
_OTHER_PIXELS: _Rows = (
    ("model.generator.z_chunks", "chosen", "120 cut as evenly as it goes; stated for 128 pixels alone"),
)
_REVNET: _Rows = (("reversible", "chosen", "memory alone: the gradients are the same up to rounding"),)
_RESNET101: _Rows = (("model.encoder.depths", "recalled", "that this row of Table 1 is a ResNet-101"),)
_BASELINE: _Rows = (
    ("model.generator", "read", "BigGAN's at 128 pixels: google/compare_gan, but nearest upsampling and gains of "
     "1 + linear as BigGAN's PyTorch code"),
    ("model.generator.shared_dim", "read", "google/compare_gan with one label for all (single_class_imagenet_128), so "
     "one learned vector"),
    ("model.generator.z_chunks", "read", "google/compare_gan"),
    ("model.generator.bn_eps", "chosen", "as DeepMind's released BigGAN; google/compare_gan has 1e-5"),
    ("model.discriminator", "read", "BigGAN's at 128 pixels without the label's projection: google/compare_gan and "
     "BigGAN's PyTorch code"),
    ("model.discriminator.first_relu model.discriminator.last_skip", "chosen", "as BigGAN's PyTorch code; "
     "google/compare_gan, whose images are in [0, 1], has the opposite of both"),
    ("model.preprocess", "chosen", "for evaluation: google/compare_gan's middle square, but bicubic and antialiased"),
    ("total_images", "chosen", "500,000 steps, as Table 1 of BigBiGAN to compare with; google/compare_gan has 250,000"),
    ("batch_size d_steps adam_beta1 adam_beta2", "read", "google/compare_gan, biggan_imagenet128.gin"),
    ("objective", "read", "hinge: google/compare_gan"),
    ("reuse_batch simultaneous", "read", "fresh images and latents for each D step and for the step after them: "
     "google/compare_gan"),
    ("separate_passes", "read", "D sees real and generated images in one pass: BigGAN's PyTorch code"),
    ("lr_g lr_d", "read", "BigGAN's, as its author's PyTorch code reports them; google/compare_gan has 1e-4 and 5e-4"),
    ("lr_decay_images lr_decay weight_decay", "read", "none: google/compare_gan"),
    ("adam_eps", "read", "TensorFlow's default, which google/compare_gan leaves; BigGAN's PyTorch code has 1e-6"),
    ("initializer", "read", "google/compare_gan and BigGAN's PyTorch code"),
    ("ema_halflife_images ema_rampup ema_start_images", "read", "decay 0.9999 a step from step 40,000 on, until then "
     "the weights themselves: google/compare_gan"),
    ("diff_augment", "read", "none: google/compare_gan"),
    ("augmentation", "chosen", "BigBiGAN's ResNet crops and flips, to compare with it; google/compare_gan cuts squares "
     "of at least half the area and mirrors none"),
    ("standing_passes", "recalled", "BigGAN's number of passes. google/compare_gan takes as many images in smaller "
     "batches, BigGAN's PyTorch code 16 passes"),
)  # fmt: skip
_SS_GAN: _Rows = (
    ("model.discriminator.rotation_head", "read", "linear on F(x): google/compare_gan, ssgan.py"),
    ("rotated_batch_size", "recalled", "a quarter of the batch, as in the SS-GAN paper; counted, as google/compare_gan "
     "does, over all four turns. It has no default, and the paper may count images before they are turned"),
    ("rotation_weight_d rotation_weight_g", "read", "google/compare_gan, ssgan.py"),
)  # fmt: skip
_AUTHORS_MNIST: _Rows = (
    ("model", "read", "jeffdonahue/bigan, as every file named below: net.py, dist.py, gan.py"),
    ("total_images", "read", "train_mnist.sh: 400 epochs of 50,000 images, there 391 whole batches each, here 390.6"),
    ("batch_size lr_g lr_d encoder_lr_multiplier weight_decay", "read", "train_gan.py's defaults, for all networks"),
    ("objective", "read", "gan.py: cross-entropy, the mean of both kinds of pairs; labels flipped for G and E"),
    ("d_steps simultaneous reuse_batch separate_passes", "read", "train_gan.py's defaults: k 1, one update of all, no "
     "cat_inputs"),
    ("lr_decay_images lr_decay", "read", "train_mnist.sh: over the last 200 epochs, to 1 %. train_gan.py sets the rate "
     "once an epoch, 2.3 % below that of the one before; here it falls at every step, to reach that value at the "
     "epoch's end"),
    ("adam_beta1", "read", "train_gan.py's default; lib/updates.py also shrinks it, by 1e-8 of itself a step"),
    ("adam_beta2 adam_eps", "read", "lib/updates.py"),
    ("initializer", "read", "net.py: N(0, 0.02); gan.py: zero for D's score"),
    ("ema_halflife_images ema_rampup ema_start_images", "read", "no average: train_gan.py scores and saves the "
     "weights themselves"),
    ("augmentation diff_augment", "read", "none: data.py"),
    ("standing_passes", "read", "deploy_iters in train_mnist.sh"),
)  # fmt: skip
_SMALL_ROWS: _Rows = (
    ("model", "chosen", "this project's small networks: bigbigan/presets.py"),
    ("total_images batch_size reuse_batch ema_halflife_images ema_rampup ema_start_images augmentation", "chosen",
     "sized for a CPU"),
    ("diff_augment", "chosen", "none, but in the recipes for a person's own photos: translation and cutout as "
     "DiffAugment (arXiv 2006.10738) has them for small data sets. Not its colour, which would hide from D whether G "
     "kept an image's colours"),
    ("simultaneous separate_passes lr_decay_images lr_decay weight_decay adam_beta2 adam_eps initializer "
     "standing_passes", "chosen", "as in the recipes for ImageNet"),
)  # fmt: skip
_SMALL_HINGE: _Rows = (
    ("objective", "read", "hinge, as BigGAN: google/compare_gan"),
    ("d_steps lr_g lr_d adam_beta1", "chosen", "keep D ahead of G: tried on Fashion-MNIST"),
)
_SMALL_ENCODER: _Rows = (("encoder_lr_multiplier", "chosen", "between the 1 and 10 of BigBiGAN's Table 1"),)
_SMALL_BIGAN: _Rows = (
    ("model.encoder.output", "chosen", "tanh; jeffdonahue/bigan has 2 sigmoid - 1, which is tanh of half"),
    ("model.generator.prior model.discriminator.scores objective d_steps lr_g lr_d "
     "encoder_lr_multiplier adam_beta1", "read", "jeffdonahue/bigan, on MNIST"),
)  # fmt: skip


def sources(name: str) -> list[Source]:
    """Where the values of a recipe come from; fields that only a part it lacks would use are left out."""
    recipe = RECIPES[name]
    encoder = recipe.model.encoder
    if name == _BIGAN_MNIST.name:
        rows = _AUTHORS_MNIST
    elif recipe.batch_size != IMAGENET_BATCH:
        hinge = _SMALL_HINGE + (_SMALL_ENCODER if encoder else ())
        rows = _SMALL_ROWS + (hinge if recipe.objective == "hinge" else _SMALL_BIGAN)
    elif name.startswith("bigbigan"):
        rows = _TABLE_1 + (_128_PIXELS if getattr(recipe.model.generator, "resolution", 0) == 128 else _OTHER_PIXELS)
        rows += (_ENCODER if encoder else ()) + (_REVNET if recipe.reversible else ())
        rows += _RESNET101 if name == "bigbigan-resnet101" else ()
    else:
        rows = _BASELINE
    rows += _COMPUTED + (_SS_GAN if recipe.rotated_batch_size else ())
    return [Source(tuple(fields.split()), certainty, source) for fields, certainty, source in rows]
