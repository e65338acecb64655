"""What a run shows of itself at each snapshot: picture grids and scores on held-out training images."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from bigbigan.arrays import seeded
from bigbigan.data.batches import Images
from bigbigan.evaluation.features import BatchEncoder
from bigbigan.evaluation.knn import knn_accuracy
from bigbigan.evaluation.linear_probe import linear_probe
from bigbigan.grids import enlargement, make_grid, make_pairs, match_size
from bigbigan.images import save_image
from bigbigan.model import BigBiGAN
from bigbigan.training.config import TrainConfig

# Mean absolute differences of the grid's images, which are training images, to their reconstructions, to the mean of
# all, to each one's mean colour and to another one.
PIXEL_L1 = ("pixel_l1", "mean_image_l1", "mean_color_l1", "random_pair_l1")
GRID_IMAGES, PROBE_BATCH, NEIGHBOURS = 32, 256, 5

logger = logging.getLogger(__name__)


class Monitor:
    """Scores a model on labelled training images by a linear probe and by its nearest neighbours, with the images that
    are scored held out of what the probe and the neighbours come from (the networks see all images, never a label).

    Where there are fewer labelled images than `probe_images` and a third as many, a quarter of them is scored.
    """

    def __init__(self, images: Tensor | Images, labels: Tensor, config: TrainConfig):
        self.config = config
        order = torch.randperm(len(images), generator=seeded(config.seed))
        self.grid = images[order[:GRID_IMAGES].sort().values]
        self.chosen: Tensor | None = None
        if config.probe_images and config.model.encoder is not None:
            labelled = order[labels[order] >= 0]
            n = config.probe_images
            if len(labelled) < n + n // 3:
                n = 3 * len(labelled) // 4
            self.fitted = n
            known = labels[labelled[:n]].unique()
            scored = labelled[n : n + n // 3]
            scored = scored[torch.isin(labels[scored], known)]  # of a rare class there may be none to learn from
            if len(scored) and len(known) > 1:
                self.chosen = torch.cat([labelled[:n], scored])
            if self.chosen is None or n < config.probe_images:
                how = f"fit on {n} and score {len(scored)}" if self.chosen is not None else "are left out"
                classes = len(labels[labelled].unique())
                logger.warning(
                    "the data has %d labelled images of %d classes: the snapshots' probes %s",
                    *(len(labelled), classes, how),
                )
        self.images, self.labels = images, labels

    @torch.no_grad()
    def __call__(self, model: BigBiGAN, num_images: int, folder: Path) -> dict[str, float]:
        """Writes `samples-….png` and, with an encoder, `reconstructions-….png`; returns scores."""
        samples = model.generate(64, seed=self.config.seed).cpu()
        save_image(make_grid(samples, 8, scale=enlargement(samples)), folder / f"samples-{num_images:010d}.png")
        if model.encoder is None:
            return {}
        x = self.grid.float() / 127.5 - 1  # [N, C, S, S]
        again = model.reconstruct(x).cpu()  # [N, C, s, s]
        save_image(make_pairs(x, again), folder / f"reconstructions-{num_images:010d}.png")
        shown = match_size(x, again)
        others = (again, shown.mean(0, keepdim=True), shown.mean((2, 3), keepdim=True), shown.roll(1, 0))
        scores = {
            name: round((other - shown).abs().mean().item(), 5) for name, other in zip(PIXEL_L1, others, strict=True)
        }
        if self.chosen is not None:
            encode = BatchEncoder(model, ("avepool_feat", "bn_crelu_feat"), PROBE_BATCH, 0)
            parts = [encode(self.images[i].float() / 127.5 - 1, 0) for i in self.chosen.split(PROBE_BATCH)]
            # Where the model is: a probe of a large encoder's features takes a host much longer.
            device = next(model.parameters()).device
            labels, n = self.labels[self.chosen].to(device), self.fitted
            for name, rows in ((name, torch.cat([part[name] for part in parts]).to(device)) for name in parts[0]):
                probe = linear_probe(
                    rows[:n], labels[:n], rows[n:], labels[n:], l2_grid=(self.config.probe_l2,), holdout=0
                )
                scores[f"linear_{name}"] = round(probe.accuracy, 5)
                if name == "avepool_feat":
                    (near,) = knn_accuracy(
                        rows[:n], labels[:n], rows[n:], labels[n:], ks=(min(NEIGHBOURS, n),), device=device
                    )
                    scores[f"knn_{name}"] = round(near.accuracy, 5)
        return scores
