"""Named training runs."""

from __future__ import annotations

from bigbigan.presets import EMBEDDED, PRESETS
from bigbigan.training.config import TrainConfig

RECIPES: dict[str, TrainConfig] = {
    recipe.name: recipe
    for recipe in (
        # What keeps D ahead of G at this size, found on Fashion-MNIST: two D steps, beta1 0.5, and these learning
        # rates. With one step, beta1 0 and 2e-4 its scores hover at chance. E's factor is between the paper's 1 and 10.
        TrainConfig(
            EMBEDDED,
            PRESETS[EMBEDDED].config,
            total_images=1_200_000,
            d_steps=2,
            lr_g=1e-4,
            lr_d=3e-4,
            encoder_lr_multiplier=3.0,
            adam_beta1=0.5,
            ema_halflife_images=20_000,
            log_images=6_000,
            checkpoint_images=30_000,
            snapshot_images=90_000,
        ),
    )
}
