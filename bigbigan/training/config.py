"""A training run as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from bigbigan.config import BigBiGANConfig, ConfigError
from bigbigan.training.data import AugmentationConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's weights. Lengths and intervals count images seen by the G and E steps."""

    name: str
    model: BigBiGANConfig
    total_images: int
    batch_size: int = 64
    d_steps: int = 1  # D steps a G and E step
    reuse_batch: bool = True  # the G and E step takes the last D step's pairs, so they are computed once
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    encoder_lr_multiplier: float = 1.0  # E's learning rate over G's (paper, section 3.1: 1, or 10)
    adam_beta1: float = 0.0
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    ema_halflife_images: float = 50_000.0
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, for devices with bf16 units
    seed: int = 0
    standing_passes: int = 100  # batches behind the statistics of an exported model
    log_images: int = 10_000
    checkpoint_images: int = 100_000
    snapshot_images: int = 200_000  # picture grids, held-out scores, best model
    probe_images: int = 15_000  # labelled images a snapshot's probe trains on; a third as many score it; 0: none
    probe_l2: float = 1e-3

    def __post_init__(self) -> None:
        for field in ("total_images", "batch_size", "d_steps", "standing_passes", "log_images", "checkpoint_images"):
            if getattr(self, field) < 1:
                raise ConfigError(f"TrainConfig.{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("lr_g", "lr_d", "encoder_lr_multiplier", "adam_eps", "ema_halflife_images"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"TrainConfig.{field} is {getattr(self, field)}; it must be positive and finite")

    @property
    def batches_per_step(self) -> int:
        """Batches of real images that one step consumes."""
        return self.d_steps + (0 if self.reuse_batch else 1)
