"""Named training runs."""

from __future__ import annotations

from bigbigan.presets import EMBEDDED, PRESETS
from bigbigan.training.config import TrainConfig

RECIPES: dict[str, TrainConfig] = {
    recipe.name: recipe
    for recipe in (
        TrainConfig(EMBEDDED, PRESETS[EMBEDDED].config, total_images=1_500_000, lr_d=4e-4, encoder_lr_multiplier=2.5),
    )
}
