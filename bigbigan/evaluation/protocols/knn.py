"""Nearest neighbours of frozen features: `evaluate_knn`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bigbigan.evaluation.knn import has_zero_row, knn_accuracy
from bigbigan.evaluation.protocols.comparison import LabelledData, Settings, Splits, measured, own_accuracy, summary
from bigbigan.evaluation.protocols.evaluation import Evaluation, ModelLike, opened_model

logger = logging.getLogger(__name__)


def evaluate_knn(
    data: LabelledData,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    features: Sequence[str] = ("avepool_feat",),
    compare: Sequence[str] = (),
    crelu: bool = False,
    k: Sequence[int] = (1, 5, 25),
    metric: Sequence[str] = ("l2", "cosine"),
    seed: int = 0,
    batch_size: int = 256,
    cache: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Accuracy of the majority among the k nearest training images, as `bigbigan evaluate knn` measures it.

    Neighbours are exact, and nothing is fitted.

    Args:
        k: numbers of neighbours, at most the number of training images.
        metric: "l2" and "cosine", or one of them.
        data, model, revision, train_split, test_split, features, compare, crelu, seed, batch_size, cache, workers,
            device, progress: as in `evaluate_linear`.

    Raises:
        ValueError, FileNotFoundError, DownloadError, ImportError: as `evaluate_linear`, or k is too large.
    """
    model = opened_model(model, ("encoder",), device=device, revision=revision)
    splits = Splits(data, train_split, test_split, batch_size=batch_size, workers=workers)
    if max(k) > len(splits.train):
        raise ValueError(f"--k {max(k)} of {len(splits.train)} training images; give that many at most")
    settings = Settings(
        features=list(features),
        compare=compare,
        crelu=crelu,
        cache=cache,
        batch_size=batch_size,
        workers=workers,
        device=model.device,
        seed=seed,
        progress=progress,
    )
    results, found = [], []
    for one in measured(settings, model, splits):
        found.append(one)
        for feature, train in one.train.items():
            for name in metric:
                if name == "cosine" and (has_zero_row(train) or has_zero_row(one.test[feature])):
                    logger.warning("%s, %s: a row of zeros has no angle, so cosine is left out", one.name, feature)
                    continue
                neighbours = knn_accuracy(
                    train,
                    splits.train.labels,
                    one.test[feature],
                    splits.test.labels,
                    ks=list(k),
                    metric=name,
                    device=model.device,
                    progress=progress,
                )
                results += [
                    {"representation": one.name, "feature": feature, **asdict(n), **one.facts} for n in neighbours
                ]
        results += own_accuracy(one)
        one.train, one.test = {}, {}  # only the names are needed from here on
    protocol = {
        "name": "knn",
        "vote": "majority, ties to the smallest label",
        "k": list(k),
        "metric": list(metric),
        "seed": seed,
    }
    return summary(model, protocol, splits, results, found)
