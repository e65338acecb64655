"""`evaluate linear`, `knn`: what features know of labels."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bigbigan.commands.comparison import COMPARE, Measured, Splits, add_feature_options, measured
from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    choose_device,
    open_model,
    positive,
    positive_number,
)
from bigbigan.commands.records import DATA, ENDING, add_data_options, make_record, print_record

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.evaluation.rows import Rows
    from bigbigan.model import BigBiGAN

logger = logging.getLogger(__name__)


def add_linear(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "linear",
        _linear,
        "accuracy of a linear classifier on frozen features\n\n"
        "--protocol logistic: logistic regression on standardised features of the training split. Held-out training\n"
        "images choose the L2 strength; then it is fitted on all of them, and tested once on the test split.\n"
        "--protocol paper: BigBiGAN's. Adam from zero weights, several learning rates in one pass over augmented\n"
        "images, averaged weights; held-out training images, never trained on, choose the rate.\n" + DATA + COMPARE,
        "Example: bigbigan evaluate linear --data data/fashion_mnist --baselines --json linear.json\n"
        "         bigbigan evaluate linear --data imagenet/ --model bigbigan-resnet50 --protocol paper \\\n"
        "           --feature-cache features/\n" + ENDING,
    )
    add_data_options(parser)
    add_feature_options(parser, "avepool_feat,bn_crelu_feat")
    parser.add_argument(
        "--protocol", dest="probe", choices=("logistic", "paper"), default="logistic", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="train on these shares of the training labels instead of all, drawn a class, at least one each: 0.01 0.1",
    )
    parser.add_argument(
        "--holdout", type=positive, metavar="N", help="held-out images (default: 10000, or a sixth if that is less)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of hold-out, shares and baselines (default: %(default)s)")
    group = parser.add_argument_group("--protocol logistic")
    group.add_argument(
        "--l2",
        type=positive_number,
        nargs="+",
        default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5],
        metavar="L2",
        help="(default: 0.1 … 1e-5)",
    )
    _add_paper_options(parser.add_argument_group("--protocol paper ([open]: not settled by the paper)"))
    add_model_options(parser)


def _decay(text: str) -> float:
    if not 0 <= (decay := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return decay


_decay.__name__ = "decay"


def _add_paper_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lr",
        type=positive_number,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metavar="LR",
        help="learning rates of Adam (default: 1e-4 3e-4 1e-3 3e-3 1e-2) [open: Adam, and which]",
    )
    group.add_argument("--steps", type=positive, default=100_000, metavar="N", help="(default: %(default)s) [open]")
    group.add_argument(
        "--probe-batch-size", type=positive, default=2048, metavar="N", help="(default: %(default)s) [open]"
    )
    group.add_argument(
        "--ema", type=_decay, default=0.9999, metavar="DECAY", help="of the classifier's weights (default: %(default)s)"
    )
    group.add_argument(
        "--augment",
        choices=("resnet", "none"),
        default="resnet",
        help="random crops and flips of the training images, encoded afresh at every step, or their features computed "
        "once (default: %(default)s)",
    )


def add_knn(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "knn",
        _knn,
        "accuracy of the majority among the nearest training images\n\n"
        "Exact neighbours by features of the training split; nothing is fitted.\n" + DATA + COMPARE,
        "Example: bigbigan evaluate knn --data data/mnist --k 1 --features avepool_feat,z_mean --baselines\n" + ENDING,
    )
    add_data_options(parser)
    add_feature_options(parser, "avepool_feat")
    parser.add_argument(
        "--k", type=positive, nargs="+", default=[1, 5, 25], metavar="K", help="neighbours (default: 1 5 25)"
    )
    parser.add_argument(
        "--metric", choices=("l2", "cosine"), nargs="+", default=["l2", "cosine"], help="(default: l2 cosine)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the untrained baselines (default: %(default)s)")
    add_model_options(parser)


def _linear(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.linear_probe import check_holdout, labelled_subset
    from bigbigan.evaluation.rows import select

    model = open_model(arguments, ("encoder",))
    splits = Splits(arguments)
    shares = [
        (share, labelled_subset(splits.train.labels, share, seed=arguments.seed)) for share in arguments.labels or [1.0]
    ]
    if arguments.probe == "paper" or len(arguments.l2) > 1:
        for _, rows in shares:
            check_holdout(_holdout(arguments, len(rows)), len(rows))
    probe = {"logistic": _logistic, "paper": _paper}[arguments.probe]
    results, found = [], []
    for one in measured(arguments, model, splits):
        found.append(one)
        for _, rows in shares:
            train = {name: x if len(rows) == len(x) else select(x, rows) for name, x in one.train.items()}
            labelled = _Labelled(train, splits.train.labels[rows], rows)
            results += [
                {"representation": one.name, "feature": feature, "labels": len(rows), **figures, **one.facts}
                for feature, figures in probe(arguments, splits, one, labelled).items()
            ]
        results += _own_accuracy(one, labels=len(splits.train))
        one.train, one.test = {}, {}  # only the names are needed on
    strength = {"logistic": "l2", "paper": "lr"}[arguments.probe]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Representation": lambda r: r["representation"],
        "Feature": lambda r: r["feature"],
        "Width": lambda r: str(r["num_features"]),
        **({"Labels": lambda r: str(r["labels"])} if arguments.labels else {}),
        "Top-1 %": lambda r: f"{100 * r['accuracy']:.2f}",
        "Top-5 %": lambda r: "-" if r.get("top5") is None else f"{100 * r['top5']:.2f}",
        strength.upper(): lambda r: f"{r[strength]:g}" if strength in r else "-",
    }
    protocol = {"name": "linear", **_description(arguments, splits, shares)}
    _print(arguments, columns, model, protocol, splits, results, found)
    return 0


def _description(arguments: argparse.Namespace, splits: Splits, shares: list[tuple[float, Tensor]]) -> dict[str, Any]:
    counts = [splits.train.labels[rows].unique(return_counts=True)[1] for _, rows in shares]
    labels = [
        {
            "share": share,
            "images": len(rows),
            "images a class": [int(count.min()), int(count.max())],
            "holdout": _holdout(arguments, len(rows)),
        }
        for (share, rows), count in zip(shares, counts, strict=True)
    ]
    settings: dict[str, Any] = {
        "classifier": "multinomial logistic regression, standardised features, no augmentation",
        "l2_grid": arguments.l2,
    }
    if arguments.probe == "paper":
        settings = {
            "classifier": "Adam from zero weights, moving average of weights",
            "learning_rates": arguments.lr,
            "steps": arguments.steps,
            "batch_size": arguments.probe_batch_size,
            "ema": arguments.ema,
            "augmentation": arguments.augment,
        }
    holdout = _holdout(arguments, len(splits.train))
    return {**settings, "holdout": holdout, "seed": arguments.seed, **({"labels": labels} if arguments.labels else {})}


def _holdout(arguments: argparse.Namespace, number: int) -> int:
    return arguments.holdout or max(1, min(10_000, number // 6))


@dataclass(frozen=True)
class _Labelled:
    """Training rows that a probe gets the labels of, by feature, and their numbers in the training split."""

    x: dict[str, Rows]
    y: Tensor
    numbers: Tensor


def _logistic(
    arguments: argparse.Namespace, splits: Splits, one: Measured, train: _Labelled
) -> dict[str, dict[str, Any]]:
    from bigbigan.evaluation.linear_probe import linear_probe

    return {
        feature: asdict(
            linear_probe(
                x,
                train.y,
                one.test[feature],
                splits.test.labels,
                l2_grid=arguments.l2,
                holdout=_holdout(arguments, len(train.y)),
                seed=arguments.seed,
                progress=not arguments.quiet,
            )
        )
        for feature, x in train.x.items()
    }


def _paper(arguments: argparse.Namespace, splits: Splits, one: Measured, train: _Labelled) -> dict[str, dict[str, Any]]:
    from bigbigan.evaluation.sgd_probe import paper_probe

    def augmented(fit: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        return _augmented(arguments, splits, one, train.numbers[fit])

    results = paper_probe(
        train.x,
        train.y,
        one.test,
        splits.test.labels,
        lrs=arguments.lr,
        steps=arguments.steps,
        batch_size=arguments.probe_batch_size,
        ema=arguments.ema,
        holdout=_holdout(arguments, len(train.y)),
        augmented=None if arguments.augment == "none" else augmented,
        seed=arguments.seed,
        device=choose_device(arguments.device),
        progress=not arguments.quiet,
    )
    return {feature: asdict(result) for feature, result in results.items()}


def _augmented(
    arguments: argparse.Namespace, splits: Splits, one: Measured, rows: Tensor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless batches: features of random crops and flips of these training images, and labels."""
    import itertools

    import torch

    from bigbigan.data.augment import AugmentationConfig
    from bigbigan.data.batches import Images

    assert one.representation is not None
    augmentation = AugmentationConfig(crop_scale=(0.08, 1.0), flip=True, original=True)
    data, size = splits.train.select(rows), min(arguments.probe_batch_size, len(rows))
    options = {"augmentation": augmentation, "in_memory": False, "workers": arguments.workers}
    images = Images(data, one.representation.preprocess, one.representation.channels, **options)
    batches = images.batches(size, arguments.seed)
    try:
        for k in itertools.count(0, size):
            pieces = [
                one.features(piece, k + number * arguments.batch_size)
                for number, piece in enumerate(batches.at(k).split(arguments.batch_size))
            ]
            yield (
                {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]},
                data.labels[batches.indices(k)],
            )
    finally:
        batches.close()


def _knn(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.knn import has_zero_row, knn_accuracy

    model = open_model(arguments, ("encoder",))
    splits = Splits(arguments)
    if max(arguments.k) > len(splits.train):
        raise ValueError(f"--k {max(arguments.k)} of {len(splits.train)} training images; give that many at most")
    results, found = [], []
    for one in measured(arguments, model, splits):
        found.append(one)
        for feature, train in one.train.items():
            for metric in arguments.metric:
                if metric == "cosine" and (has_zero_row(train) or has_zero_row(one.test[feature])):
                    logger.warning("%s, %s: a row of zeros has no angle, so cosine is left out", one.name, feature)
                    continue
                neighbours = knn_accuracy(
                    train,
                    splits.train.labels,
                    one.test[feature],
                    splits.test.labels,
                    ks=arguments.k,
                    metric=metric,
                    device=model.device,
                    progress=not arguments.quiet,
                )
                results += [
                    {"representation": one.name, "feature": feature, **asdict(n), **one.facts} for n in neighbours
                ]
        results += _own_accuracy(one)
        one.train, one.test = {}, {}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Representation": lambda r: r["representation"],
        "Feature": lambda r: r["feature"],
        "Width": lambda r: str(r["num_features"]),
        "Metric": lambda r: r.get("metric", "-"),
        "k": lambda r: str(r.get("k", "-")),
        "Top-1 %": lambda r: f"{100 * r['accuracy']:.2f}",
    }
    protocol = {
        "name": "knn",
        "vote": "majority, ties to the smallest label",
        "k": arguments.k,
        "metric": arguments.metric,
        "seed": arguments.seed,
    }
    _print(arguments, columns, model, protocol, splits, results, found)
    return 0


def _own_accuracy(one: Measured, **more: Any) -> list[dict[str, Any]]:
    """The row of a network that has a classifier of its own."""
    if one.own_accuracy is None:
        return []
    width = next(iter(one.train.values())).shape[1]
    what = {"representation": one.name, "feature": "its own classifier", "num_features": width}
    return [{**what, **more, "accuracy": one.own_accuracy}]


def _print(
    arguments: argparse.Namespace,
    columns: dict[str, Callable[[dict[str, Any]], str]],
    model: BigBiGAN,
    protocol: dict[str, Any],
    splits: Splits,
    results: list[dict[str, Any]],
    found: list[Measured],
) -> None:
    from bigbigan.schema import to_dict

    table = [[cell(result) for cell in columns.values()] for result in results]
    record = make_record(model, protocol, results=results, train=splits.train, test=splits.test)
    record["representations"] = {  # not in the protocol: it tells which records may be compared
        one.name: {
            "digest": one.digest,
            "preprocess": None if one.representation is None else to_dict(one.representation.preprocess),
        }
        for one in found
    }
    print_record(arguments, tuple(columns), table, record)
