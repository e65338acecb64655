"""Linear probes of frozen features: `evaluate_linear`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bigbigan.data.augment import AugmentationConfig
from bigbigan.data.batches import Images
from bigbigan.evaluation.linear_probe import check_holdout, labelled_subset, linear_probe
from bigbigan.evaluation.protocols.comparison import (
    LabelledData,
    Measured,
    Settings,
    Splits,
    measured,
    own_accuracy,
    summary,
)
from bigbigan.evaluation.protocols.evaluation import Evaluation, ModelLike, opened_model
from bigbigan.evaluation.rows import Rows, select
from bigbigan.evaluation.sgd_probe import paper_probe

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class _Probe:
    """Settings of both protocols; see `evaluate_linear`."""

    protocol: str
    l2: list[float]
    lr: list[float]
    steps: int
    batch_size: int
    ema: float
    augment: str
    holdout: int | None
    seed: int
    progress: bool

    def held_out(self, number: int) -> int:
        return self.holdout or max(1, min(10_000, number // 6))


def evaluate_linear(
    data: LabelledData,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    features: Sequence[str] = ("avepool_feat", "bn_crelu_feat"),
    compare: Sequence[str] = (),
    crelu: bool = False,
    protocol: Literal["logistic", "paper"] = "logistic",
    labels: Sequence[float] | None = None,
    holdout: int | None = None,
    l2: Sequence[float] = L2_GRID,
    lr: Sequence[float] = LEARNING_RATES,
    steps: int = 100_000,
    probe_batch_size: int = 2048,
    ema: float = 0.9999,
    augment: Literal["resnet", "none"] = "resnet",
    seed: int = 0,
    batch_size: int = 256,
    cache: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Accuracy of linear classifiers on frozen features, as `bigbigan evaluate linear` measures it.

    Args:
        data: a path, as `open_training_data` takes it, or the opened (training, test) data sets.
        model: a model, or what `load` takes; None is the model inside the package.
        revision: commit, tag or branch, of a model on the Hugging Face Hub.
        train_split, test_split: read from a path only; "train[:50000]" is a part.
        features: outputs of the encoder, or "z_logit".
        compare: other representations for the same table: "pixels", "pca:64", "untrained", "supervised[:EPOCHS]",
            "timm:NAME", "hf:ORG/NAME[@REV][:cls|:mean]", "file:TRAIN,TEST", or a model's name.
        crelu: measure features also as BN+CReLU, normalised over the training split.
        protocol: "logistic" regression (uses `l2`), or the "paper"'s (`lr`, `steps`, `probe_batch_size`, `ema`,
            `augment`).
        labels: fractions of the training labels to train on, sampled per class; default all of them.
        holdout: number of held-out training images that choose `l2` or `lr`; default 10,000, or a sixth if that is
            less.
        l2, lr: L2 strengths, and learning rates of Adam, to choose from.
        steps, probe_batch_size, ema: optimizer steps, images per step, decay per step of the averaged weights.
        augment: "resnet" encodes random crops and flips at every step; "none" encodes each image once.
        seed: decides hold-out, label subsets and baselines.
        batch_size: images encoded at a time.
        cache: a folder to cache features in and stream them from; default in memory.
        workers: processes that decode images; default by the number of cores.
        device: for models that are loaded here; a model object stays on its own.
        progress: show bars on a terminal's stderr.

    Raises:
        ValueError: data, splits, labels, comparisons or settings that do not fit. All are checked before any feature
            is computed, as far as they can be.
        FileNotFoundError, DownloadError: no such model.
        ImportError: a comparison needs a package that is not installed.
    """
    model = opened_model(model, ("encoder",), device=device, revision=revision)
    splits = Splits(data, train_split, test_split, batch_size=batch_size, workers=workers)
    options = {"steps": steps, "batch_size": probe_batch_size, "ema": ema, "augment": augment}
    probe = _Probe(protocol, list(l2), list(lr), **options, holdout=holdout, seed=seed, progress=progress)  # type: ignore[arg-type]
    shares = [(share, labelled_subset(splits.train.labels, share, seed=seed)) for share in labels or [1.0]]
    if protocol == "paper" or len(l2) > 1:
        for _, rows in shares:
            check_holdout(probe.held_out(len(rows)), len(rows))
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
        augmented=protocol == "paper" and augment != "none",
        whole=protocol == "logistic",
    )
    results, found = [], []
    for one in measured(settings, model, splits):
        found.append(one)
        for _, rows in shares:
            train = {name: x if len(rows) == len(x) else select(x, rows) for name, x in one.train.items()}
            labelled = _Labelled(train, splits.train.labels[rows], rows)
            figures = {"logistic": _logistic, "paper": _paper}[protocol](probe, settings, splits, one, labelled)
            results += [
                {"representation": one.name, "feature": feature, "labels": len(rows), **values, **one.facts}
                for feature, values in figures.items()
            ]
        results += own_accuracy(one, labels=len(splits.train))
        one.train, one.test = {}, {}  # only the names are needed from here on
    described = {"name": "linear", **_description(probe, splits, shares if labels else [])}
    return summary(model, described, splits, results, found)


def _description(probe: _Probe, splits: Splits, shares: list[tuple[float, Tensor]]) -> dict[str, Any]:
    counts = [splits.train.labels[rows].unique(return_counts=True)[1] for _, rows in shares]
    labels = [
        {
            "share": share,
            "images": len(rows),
            "images a class": [int(count.min()), int(count.max())],
            "holdout": probe.held_out(len(rows)),
        }
        for (share, rows), count in zip(shares, counts, strict=True)
    ]
    settings: dict[str, Any] = {
        "classifier": "multinomial logistic regression, standardised features, no augmentation",
        "l2_grid": probe.l2,
    }
    if probe.protocol == "paper":
        settings = {
            "classifier": "Adam from zero weights, moving average of weights",
            "learning_rates": probe.lr,
            "steps": probe.steps,
            "batch_size": probe.batch_size,
            "ema": probe.ema,
            "augmentation": probe.augment,
        }
    holdout = probe.held_out(len(splits.train))
    return {**settings, "holdout": holdout, "seed": probe.seed, **({"labels": labels} if labels else {})}


@dataclass(frozen=True)
class _Labelled:
    """Training rows that a probe gets the labels of, by feature, and their numbers in the training split."""

    x: dict[str, Rows]
    y: Tensor
    numbers: Tensor


def _logistic(
    probe: _Probe, settings: Settings, splits: Splits, one: Measured, train: _Labelled
) -> dict[str, dict[str, Any]]:
    options: dict[str, Any] = {"l2_grid": probe.l2, "holdout": probe.held_out(len(train.y))}
    options |= {"seed": probe.seed, "progress": probe.progress}
    return {
        feature: asdict(linear_probe(x, train.y, one.test[feature], splits.test.labels, **options))
        for feature, x in train.x.items()
    }


def _paper(
    probe: _Probe, settings: Settings, splits: Splits, one: Measured, train: _Labelled
) -> dict[str, dict[str, Any]]:
    def augmented(fit: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        return _augmented(probe, settings, splits, one, train.numbers[fit])

    results = paper_probe(
        train.x,
        train.y,
        one.test,
        splits.test.labels,
        lrs=probe.lr,
        steps=probe.steps,
        batch_size=probe.batch_size,
        ema=probe.ema,
        holdout=probe.held_out(len(train.y)),
        augmented=augmented if settings.augmented else None,
        seed=probe.seed,
        device=settings.device,
        progress=probe.progress,
    )
    return {feature: asdict(result) for feature, result in results.items()}


def _augmented(
    probe: _Probe, settings: Settings, splits: Splits, one: Measured, rows: Tensor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless batches: features of random crops and flips of these training images, and labels."""
    assert one.representation is not None
    augmentation = AugmentationConfig(crop_scale=(0.08, 1.0), flip=True, original=True)
    data, size = splits.train.select(rows), min(probe.batch_size, len(rows))
    images = Images(
        data,
        one.representation.preprocess,
        one.representation.channels,
        augmentation=augmentation,
        in_memory=False,
        workers=settings.workers,
    )
    batches = images.batches(size, probe.seed)
    try:
        for k in itertools.count(0, size):
            pieces = [
                one.features(piece, k + number * settings.batch_size)
                for number, piece in enumerate(batches.at(k).split(settings.batch_size))
            ]
            yield (
                {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]},
                data.labels[batches.indices(k)],
            )
    finally:
        batches.close()
