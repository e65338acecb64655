"""A training run as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from bigbigan.arrays import as_seed
from bigbigan.config import BigBiGANConfig
from bigbigan.data.augment import AugmentationConfig
from bigbigan.layers import Initializer
from bigbigan.schema import ConfigError, check_choices
from bigbigan.training.diffaugment import Transformation


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's weights. Lengths and intervals count images seen by the G and E steps."""

    name: str
    model: BigBiGANConfig
    total_images: int
    batch_size: int = 64  # over all processes
    # The objective: which scores it sums is the discriminator's configuration.
    objective: Literal["hinge", "logistic"] = "hinge"  # BigGAN's and BigBiGAN's, or BiGAN's
    rotated_batch_size: int = 0  # SS-GAN: images a batch of each kind, in four orientations, whose turn D tells
    rotation_weight_d: float = 1.0  # of that loss, on real images, in D's objective
    rotation_weight_g: float = 0.2  # ... on generated images, in G's
    # The steps.
    d_steps: int = 1  # D steps a G and E step
    reuse_batch: bool = True  # the G and E step takes the last D step's pairs, so they are computed once
    simultaneous: bool = False  # D changes only after G's and E's gradients are taken (BiGAN)
    separate_passes: bool = False  # D sees real and generated pairs in passes of their own, if it has batch norm
    accumulate: int = 1  # micro-batches whose mean gradient makes a step; batch norm sees each alone
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    encoder_lr_multiplier: float = 1.0  # E's learning rate over G's (paper, section 3.1: 1, or 10)
    lr_decay_images: int = 0  # learning rates fall exponentially over the last so many images ...
    lr_decay: float = 1.0  # ... to this share
    weight_decay: float = 0.0  # L2, added to the gradient
    adam_beta1: float = 0.0
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    initializer: Initializer = "orthogonal"  # BigGAN's; or normal, BiGAN's (bigbigan.layers.initialize)
    ema_halflife_images: float = 50_000.0  # of the averages of G and E that are exported; 0: none
    ema_rampup: float = 0.05  # early on the half-life is at most this share of the images seen so far; 0: no such limit
    ema_start_images: int = 0  # until then the averages are the weights themselves
    diff_augment: tuple[Transformation, ...] = ()  # of all images that D sees, real and generated, for small data sets
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    # How it is computed.
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16: autocast, for devices with bf16 units
    reversible: bool = False  # RevNet: recompute activations in the backward pass instead of keeping them
    compile: bool = False  # torch.compile the networks
    seed: int = 0
    # What is written.
    standing_passes: int = 100  # batches, taken in pieces if large, behind the statistics of an exported model
    log_images: int = 10_000
    checkpoint_images: int = 100_000
    snapshot_images: int = 200_000  # picture grids, held-out scores, best model
    probe_images: int = 15_000  # labelled images a snapshot's probe trains on; a third as many score it; 0: none
    probe_l2: float = 1e-3

    def __post_init__(self) -> None:
        check_choices(self)
        for field in ("total_images", "batch_size", "d_steps", "accumulate", "standing_passes", "log_images"):
            self._require(field, getattr(self, field) >= 1, "must be at least 1")
        for field in ("checkpoint_images", "snapshot_images"):
            self._require(field, getattr(self, field) >= 1, "must be at least 1")
        try:
            as_seed(self.seed, "TrainConfig.seed")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for field in ("rotated_batch_size", "probe_images"):
            self._require(field, getattr(self, field) >= 0, "must not be negative")
        for field in ("lr_g", "lr_d", "encoder_lr_multiplier", "adam_eps", "lr_decay", "probe_l2"):
            self._require(field, 0 < getattr(self, field) < float("inf"), "must be positive and finite")
        for field in ("ema_halflife_images", "ema_rampup", "ema_start_images", "weight_decay"):
            self._require(field, 0 <= getattr(self, field) < float("inf"), "must be finite, and not negative")
        for field in ("rotation_weight_d", "rotation_weight_g"):
            self._require(field, 0 <= getattr(self, field) < float("inf"), "must be finite, and not negative")
        for field in ("adam_beta1", "adam_beta2"):
            self._require(field, 0 <= getattr(self, field) < 1, "is outside 0 to 1")
        multiple = self.batch_size % self.accumulate == 0
        self._require("batch_size", multiple, f"is no multiple of accumulate, {self.accumulate}")
        self._require("d_steps", self.d_steps == 1 or not self.simultaneous, "must be 1 if simultaneous")
        self._require("lr_decay_images", 0 <= self.lr_decay_images <= self.total_images, "is not within the run")
        discriminator = self.model.discriminator
        if discriminator is None or self.model.generator is None:
            raise ConfigError("training needs a generator and a discriminator")
        joint = set(discriminator.scores) != {"x"}
        if joint and self.model.encoder is None:
            raise ConfigError(f"scores {discriminator.scores} need an encoder; a GAN without one has ('x',)")
        if self.reversible and getattr(self.model.encoder, "architecture", "") != "revnet":
            raise ConfigError("TrainConfig.reversible needs a revnet encoder")
        if self.rotated_batch_size:
            self._require("rotated_batch_size", self.rotated_batch_size % 4 == 0, "is no multiple of 4")
            divides = 4 * self.batch_size % self.rotated_batch_size == 0
            self._require("rotated_batch_size", divides, f"does not divide 4 * batch_size, {4 * self.batch_size}")
            if not getattr(discriminator, "rotation_head", False) or joint:
                raise ConfigError("rotated_batch_size needs a discriminator with rotation_head and scores ('x',)")

    def _require(self, field: str, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"TrainConfig.{field} is {getattr(self, field)}; it {message}")

    @property
    def batches_per_step(self) -> int:
        """Batches of real images that one step consumes."""
        return self.d_steps + (0 if self.reuse_batch else 1)

    def lr_factor(self, num_images: int) -> float:
        """Share of the learning rates in force after `num_images`."""
        if not self.lr_decay_images:
            return 1.0
        progress = max(0.0, num_images - (self.total_images - self.lr_decay_images)) / self.lr_decay_images
        return self.lr_decay ** min(progress, 1.0)
