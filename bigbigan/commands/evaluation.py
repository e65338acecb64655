"""`evaluate linear`, `knn`, `reconstruction`: figures of a model on labelled images, and what they rest on."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    check_picture,
    help_formatter,
    markdown_table,
    names,
    open_model,
    positive,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.model import BigBiGAN
    from bigbigan.training.data import ImageDataset

STANDING_PASSES, STANDING_BATCH = 100, 64  # as in the training recipes
DATA = (
    "Data: a folder with train.parquet and test.parquet (Hugging Face layout: image, label; also in shards),\n"
    "or with train/ and test/, each with a folder of images a class.\n"
)
ENDING = (
    "Prints a Markdown table, then the record: figures, protocol, digests of model and data, versions.\n"
    "Exit codes: 0 done, 2 wrong usage, no such model, or data that do not fit."
)


def add_parsers(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model on labelled images",
        description="measure a model on labelled images",
        formatter_class=help_formatter,
    )
    protocols = evaluate.add_subparsers(dest="protocol", metavar="PROTOCOL", required=True, title="protocols")
    _add_linear(protocols)
    _add_knn(protocols)
    _add_reconstruction(protocols)


def _add_linear(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "linear",
        _linear,
        "accuracy of a linear classifier on frozen features\n\n"
        "Logistic regression on standardised features of the training split. Held-out training images choose the L2\n"
        "strength; then it is fitted on all of them, and tested once on the test split.\n" + DATA,
        "Example: bigbigan evaluate linear --data data/fashion_mnist --baselines --json linear.json\n" + ENDING,
    )
    _add_data_options(parser)
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


def _add_knn(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "knn",
        _knn,
        "accuracy of the majority among the nearest training images\n\n"
        "Exact neighbours by features of the training split; nothing is fitted.\n" + DATA,
        "Example: bigbigan evaluate knn --data data/mnist --k 1 --features avepool_feat,z_mean --baselines\n" + ENDING,
    )
    _add_data_options(parser)
    _add_feature_options(parser, "avepool_feat")
    parser.add_argument(
        "--k", type=positive, nargs="+", default=[1, 5, 25], metavar="K", help="neighbours (default: 1 5 25)"
    )
    parser.add_argument(
        "--metric", choices=("l2", "cosine"), nargs="+", default=["l2", "cosine"], help="(default: l2 cosine)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the untrained baselines (default: %(default)s)")
    add_model_options(parser)


def _add_reconstruction(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "reconstruction",
        _reconstruction,
        "what reconstructions keep of their originals\n\n"
        "A small classifier, trained on real images of the training split alone, labels the reconstructions of the\n"
        "test split (from z_mean). Also pixel errors and distances of avepool_feat, over those of random pairs.\n"
        + DATA,
        "Example: bigbigan evaluate reconstruction --data data/fashion_mnist --grid pairs.png\n" + ENDING,
    )
    _add_data_options(parser)
    parser.add_argument("--grid", metavar="PICTURE", help="also draw test images above their reconstructions")
    parser.add_argument(
        "--epochs", type=positive, default=6, metavar="N", help="of the classifier (default: %(default)s)"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the classifier's training images")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of classifier and pairs (default: %(default)s)")
    add_model_options(parser)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="PATH", help="labelled training and test images")
    parser.add_argument(
        "--train-split",
        default="train",
        metavar="SPLIT",
        help="(default: %(default)s); train[:50000] is its first 50,000 images",
    )
    parser.add_argument("--test-split", default="test", metavar="SPLIT", help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the record there instead of printing it")


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
    train, train_x = _load(arguments, arguments.train_split, model)
    test, test_x = _load(arguments, arguments.test_split, model)
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
    _report(arguments, markdown_table(header, table), _record(model, protocol, train=train, test=test, results=results))
    return 0


def _knn(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.knn import knn_accuracy

    model = open_model(arguments, ("encoder",))
    train, train_x = _load(arguments, arguments.train_split, model)
    test, test_x = _load(arguments, arguments.test_split, model)
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
    _report(arguments, markdown_table(header, table), _record(model, protocol, train=train, test=test, results=results))
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


def _reconstruction(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation import reconstruction_report, train_classifier

    if arguments.grid:
        check_picture(arguments.grid)
    model = open_model(arguments, ("generator", "encoder"))
    train, train_x = _load(arguments, arguments.train_split, model)
    test, test_x = _load(arguments, arguments.test_split, model)
    generator, encoder = model.config.generator, model.config.encoder
    assert generator and encoder
    classes = max(len(train.class_names), int(train.labels.max()) + 1)
    settings = {"epochs": arguments.epochs, "flip": arguments.flip, "seed": arguments.seed}
    classifier = train_classifier(
        _pooled(train_x, generator.resolution).to(model.device),
        train.labels,
        num_classes=classes,
        progress=not arguments.quiet,
        **settings,
    )
    result = reconstruction_report(
        test_x,
        test.labels,
        model.reconstruct,
        lambda x: model.encode(_enlarged(x, encoder.resolution)).avepool_feat,
        classifier,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    figures = asdict(result)
    class_names = [*train.class_names, *map(str, range(len(train.class_names), classes))]
    figures["per_class"] = dict(zip(class_names, result.per_class, strict=True))
    rows = [(name, value) for name, value in figures.items() if name != "per_class"]
    rows += [(f"label_agreement, {name}", value) for name, value in figures["per_class"].items()]
    table = markdown_table(("Measure", "Value"), [(name, "-" if v is None else f"{v:.4g}") for name, v in rows])
    protocol = {"name": "reconstruction", "latent": "z_mean", "features": "avepool_feat", "classifier": settings}
    _report(arguments, table, _record(model, protocol, train=train, test=test, results=figures))
    if arguments.grid:
        _draw_pairs(model, test_x[:32], arguments.grid)
    return 0


def _pooled(images: Tensor, side: int) -> Tensor:
    """uint8 [N, C, S, S] mean-pooled to `side`, as the report pools originals."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    if images.shape[-1] == side:
        return images
    return torch.cat([adaptive_avg_pool2d(chunk.float(), side).round().byte() for chunk in images.split(256)])


def _enlarged(images: Tensor, side: int) -> Tensor:
    from torch.nn.functional import interpolate

    return images if images.shape[-1] == side else interpolate(images, size=side, mode="bilinear").clamp(-1, 1)


def _draw_pairs(model: BigBiGAN, images: Tensor, path: str) -> None:
    from bigbigan.grids import make_pairs
    from bigbigan.images import save_image

    x = images.float() / 127.5 - 1  # as uint8 they would be preprocessed once more
    save_image(make_pairs(x, model.reconstruct(x)), path)


def _load(arguments: argparse.Namespace, split: str, model: BigBiGAN) -> tuple[ImageDataset, Tensor]:
    """The split, and its images [N, C, S, S] uint8 under the model's evaluation preprocessing."""
    from bigbigan.training.data import open_dataset

    dataset = open_dataset(arguments.data, split=split)
    return dataset, dataset.decode_all(model.config.preprocess, model.config.image_channels)


def _record(
    model: BigBiGAN, protocol: dict[str, Any], *, train: ImageDataset, test: ImageDataset, results: Any
) -> dict[str, Any]:
    import numpy
    import torch

    from bigbigan import __version__
    from bigbigan.evaluation.features import digest

    splits = {"train": train, "test": test}
    digests = {f"{part}_digest": digest(getattr(model, part)) for part in model.parts}
    return {
        "protocol": protocol,
        "model": {"name": model.info.name, **digests},
        "data": {
            name: {"digest": split.digest, "images": len(split), "unreadable": len(split.bad)}
            for name, split in splits.items()
        },
        "results": results,
        "versions": {
            "bigbigan": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def _report(arguments: argparse.Namespace, table: str, record: dict[str, Any]) -> None:
    from bigbigan.files import atomic_write

    text = json.dumps(record, indent=2) + "\n"
    print(table)
    if not arguments.json:
        print(f"\n{text}", end="")
        return
    with atomic_write(arguments.json) as temporary:
        temporary.write_text(text, encoding="utf-8")
