"""`evaluate reconstruction`: what reconstructions keep of their originals."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    check_picture,
    markdown_table,
    open_model,
    positive,
)
from bigbigan.commands.records import DATA, ENDING, add_data_options, load_split, make_record, print_record

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.model import BigBiGAN


def add_reconstruction(protocols: Commands) -> None:
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
    add_data_options(parser)
    parser.add_argument("--grid", metavar="PICTURE", help="also draw test images above their reconstructions")
    parser.add_argument(
        "--epochs", type=positive, default=6, metavar="N", help="of the classifier (default: %(default)s)"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the classifier's training images")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of classifier and pairs (default: %(default)s)")
    add_model_options(parser)


def _reconstruction(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation import reconstruction_report, train_classifier

    if arguments.grid:
        check_picture(arguments.grid)
    model = open_model(arguments, ("generator", "encoder"))
    train, train_x = load_split(arguments, arguments.train_split, model)
    test, test_x = load_split(arguments, arguments.test_split, model)
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
    print_record(arguments, table, make_record(model, protocol, train=train, test=test, results=figures))
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
