"""`evaluate linear`, `knn`: what features know of labels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    markdown_table,
    names,
    open_model,
    positive,
)
from bigbigan.commands.records import DATA, ENDING, add_data_options, load_split, make_record, print_record

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.model import BigBiGAN

STANDING_PASSES, STANDING_BATCH = 100, 64  # as in the training recipes


def add_linear(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "linear",
        _linear,
        "accuracy of a linear classifier on frozen features\n\n"
        "Logistic regression on standardised features of the training split. Held-out training images choose the L2\n"
        "strength; then it is fitted on all of them, and tested once on the test split.\n" + DATA,
        "Example: bigbigan evaluate linear --data data/fashion_mnist --baselines --json linear.json\n" + ENDING,
    )
    add_data_options(parser)
    _add_feature_options(parser, "avepool_feat,bn_crelu_feat")
    parser.add_argument(
        "--l2",
        type=float,
        nargs="+",
        default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5],
        metavar="L2",
        help="(default: 0.1 … 1e-5)",
    )
    parser.add_argument(
        "--holdout", type=positive, metavar="N", help="held-out images (default: 10000, or a sixth if that is less)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of hold-out and baselines (default: %(default)s)")
    add_model_options(parser)


def add_knn(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "knn",
        _knn,
        "accuracy of the majority among the nearest training images\n\n"
        "Exact neighbours by features of the training split; nothing is fitted.\n" + DATA,
        "Example: bigbigan evaluate knn --data data/mnist --k 1 --features avepool_feat,z_mean --baselines\n" + ENDING,
    )
    add_data_options(parser)
    _add_feature_options(parser, "avepool_feat")
    parser.add_argument(
        "--k", type=positive, nargs="+", default=[1, 5, 25], metavar="K", help="neighbours (default: 1 5 25)"
    )
    parser.add_argument(
        "--metric", choices=("l2", "cosine"), nargs="+", default=["l2", "cosine"], help="(default: l2 cosine)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the untrained baselines (default: %(default)s)")
    add_model_options(parser)


def _add_feature_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--features",
        type=names,
        default=default,
        metavar="LIST",
        help="encoder outputs, with commas between (default: %(default)s)",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also on raw pixels, and on an untrained encoder, with initial and with estimated statistics",
    )
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="(default: %(default)s)")


def _linear(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.linear_probe import linear_probe

    model = open_model(arguments, ("encoder",))
    train, train_x = load_split(arguments, arguments.train_split, model)
    test, test_x = load_split(arguments, arguments.test_split, model)
    holdout = arguments.holdout or min(10_000, len(train) // 6)
    progress, results = not arguments.quiet, []

    def measure(what: str, feature: str, train_rows: Tensor, test_rows: Tensor) -> None:
        probe = linear_probe(
            train_rows,
            train.labels,
            test_rows,
            test.labels,
            l2_grid=arguments.l2,
            holdout=holdout,
            seed=arguments.seed,
            progress=progress,
        )
        results.append({"representation": what, "feature": feature, **asdict(probe)})

    for representation in _representations(arguments, model, train_x, test_x):
        measure(*representation)

    header = ("Representation", "Feature", "Width", "Top-1 %", "Top-5 %", "L2")
    table = [
        (
            result["representation"],
            result["feature"],
            str(result["num_features"]),
            f"{100 * result['accuracy']:.2f}",
            "-" if result["top5"] is None else f"{100 * result['top5']:.2f}",
            f"{result['l2']:g}",
        )
        for result in results
    ]
    protocol = {
        "name": "linear",
        "classifier": "multinomial logistic regression, standardised features, no augmentation",
        "l2_grid": arguments.l2,
        "holdout": holdout,
        "seed": arguments.seed,
    }
    print_record(
        arguments, markdown_table(header, table), make_record(model, protocol, train=train, test=test, results=results)
    )
    return 0


def _knn(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.knn import knn_accuracy

    model = open_model(arguments, ("encoder",))
    train, train_x = load_split(arguments, arguments.train_split, model)
    test, test_x = load_split(arguments, arguments.test_split, model)
    results = [
        {"representation": what, "feature": feature, **asdict(found)}
        for what, feature, train_rows, test_rows in _representations(arguments, model, train_x, test_x)
        for metric in arguments.metric
        for found in knn_accuracy(
            train_rows,
            train.labels,
            test_rows,
            test.labels,
            ks=arguments.k,
            metric=metric,
            progress=not arguments.quiet,
        )
    ]
    header = ("Representation", "Feature", "Width", "Metric", "k", "Top-1 %")
    table = [
        (
            r["representation"],
            r["feature"],
            str(r["num_features"]),
            r["metric"],
            str(r["k"]),
            f"{100 * r['accuracy']:.2f}",
        )
        for r in results
    ]
    protocol = {
        "name": "knn",
        "vote": "majority, ties to the smallest label",
        "k": arguments.k,
        "metric": arguments.metric,
    }
    print_record(
        arguments, markdown_table(header, table), make_record(model, protocol, train=train, test=test, results=results)
    )
    return 0


def _representations(
    arguments: argparse.Namespace, model: BigBiGAN, train_x: Tensor, test_x: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """What is measured: whose features, which, and their rows for both splits."""
    from bigbigan.evaluation.features import extract_features

    options = {"batch_size": arguments.batch_size, "progress": not arguments.quiet}
    for what, encoder in _encoders(arguments, model, train_x):
        rows = [extract_features(encoder, x, arguments.features, **options) for x in (train_x, test_x)]
        for feature in arguments.features:
            yield what, feature, rows[0][feature], rows[1][feature]
    if arguments.baselines:
        train_rows, test_rows = (x.flatten(1).float() / 127.5 - 1 for x in (train_x, test_x))
        yield "raw pixels", "pixels", train_rows, test_rows


def _encoders(arguments: argparse.Namespace, model: BigBiGAN, images: Tensor) -> Iterator[tuple[str, BigBiGAN]]:
    """The model, and its architecture untrained."""
    from bigbigan import create_model
    from bigbigan.training.export import standing_statistics

    yield model.info.name or "model", model
    if arguments.baselines:
        untrained = create_model(model.config, parts=("encoder",), seed=arguments.seed)
        yield "untrained encoder, initial statistics", untrained.to(model.device)
        standing_statistics(untrained.cpu(), images, STANDING_PASSES, STANDING_BATCH)  # as export does, on the CPU
        yield "untrained encoder, estimated statistics", untrained.to(model.device)
