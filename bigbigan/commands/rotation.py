"""`evaluate rotation`: whether a discriminator tells how images are rotated."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bigbigan.commands.options import Commands, add_command, add_model_options, open_model, positive
from bigbigan.commands.records import DATA, ENDING, add_data_options, make_record, print_record


def add_rotation(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "rotation",
        _rotation,
        "how well a discriminator tells the rotation of test images\n\n"
        "For SS-GAN: each test image in four orientations; chance is 25 %. Nothing is fitted.\n" + DATA,
        "Example: bigbigan evaluate rotation --model my-ssgan --data data/fashion_mnist\n" + ENDING,
    )
    add_data_options(parser, train=False)
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    add_model_options(parser)


def _rotation(arguments: argparse.Namespace) -> int:
    from torch import Tensor

    from bigbigan.data.opening import open_dataset
    from bigbigan.data.workers import default_workers
    from bigbigan.evaluation.rotation import rotation_accuracy
    from bigbigan.training.step import pool_to

    model = open_model(arguments, ("discriminator",))
    discriminator = model.part("discriminator")
    if not getattr(discriminator.config, "rotation_head", False):
        raise ValueError(f"the discriminator of {model.info.name!r} has no rotation head; SS-GAN recipes train one")
    test = open_dataset(arguments.data, split=arguments.test_split)
    workers = arguments.workers or default_workers()
    images = test.decode_all(model.config.preprocess, model.config.image_channels, workers=workers)

    def classify(x: Tensor) -> Tensor:
        logits = discriminator(pool_to(x.to(model.device, model.dtype), discriminator.config.resolution)).rotation
        assert logits is not None
        return logits

    result = rotation_accuracy(classify, images, batch_size=arguments.batch_size)
    rows = [("all", f"{100 * result.accuracy:.2f}")]
    rows += [(f"{90 * k} degrees", f"{100 * share:.2f}") for k, share in enumerate(result.per_turn)]
    protocol = {"name": "rotation", "turns": [0, 90, 180, 270]}
    record = make_record(model, protocol, test=test, results=[asdict(result)])
    print_record(arguments, ("Rotation", "Accuracy %"), rows, record)
    return 0
