"""What checkpoints cost a run: one save over the steps between two, at a recipe's own interval.

python -m tests.benchmarks.checkpointing [RECIPE] [--precision fp32|bf16] [--saves 5] [--steps 10] [--threads 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bigbigan.data.opening import open_dataset
from bigbigan.presets import EMBEDDED
from bigbigan.training import loop, runstate
from bigbigan.training.recipes import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=EMBEDDED, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable()
    recipe = RECIPES[args.recipe]
    batch, between = recipe.batch_size, recipe.checkpoint_images / recipe.batch_size
    taken: dict[str, list[float]] = {"step": [], "save": []}
    originals: dict[str, Callable[..., Any]] = {"step": loop.train_step, "save": runstate.save_checkpoint}

    def timed(what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = originals[what](*arguments, **options)
            taken[what].append(time.perf_counter() - begin)
            return result

        return call

    loop.train_step, runstate.save_checkpoint = timed("step"), timed("save")
    with tempfile.TemporaryDirectory() as folder:
        draws = np.random.default_rng(0)
        side, channels = recipe.model.preprocess.size, recipe.model.image_channels
        for i in range(2 * batch):
            pixels = draws.integers(0, 256, (side, side, channels), np.uint8).squeeze()
            Image.fromarray(pixels).save(Path(folder) / f"{i}.png")
        images = args.saves * args.steps * batch
        config = dataclasses.replace(
            recipe, total_images=images, precision=args.precision, lr_decay_images=0, standing_passes=1, probe_images=0,
            checkpoint_images=args.steps * batch, snapshot_images=images,
        )  # fmt: skip
        loop.train(config, open_dataset(folder), Path(folder) / "run")
    save, step = statistics.median(taken["save"]), statistics.median(taken["step"])
    print(f"{args.recipe}, {args.precision}: a save takes {save:.3f} s, the {between:.0f} steps between two", end=" ")
    print(f"{between * step:.1f} s: {save / step / between:.2%}")


if __name__ == "__main__":
    main()
