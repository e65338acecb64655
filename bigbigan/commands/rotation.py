"""`evaluate rotation`: how well a discriminator recognises rotations."""

from __future__ import annotations

import argparse

from bigbigan.commands.evaluation import DATA, ENDING, add_data_options, model_options, print_evaluation
from bigbigan.commands.options import Commands, add_command, add_model_options, positive
from bigbigan.evaluation import evaluate_rotation


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rotation",
        _rotation,
        "For SS-GAN: each test image in four orientations; chance is 25 %. Nothing is fitted.\n" + DATA,
        "Example: bigbigan evaluate rotation --model my-ssgan --data data/fashion_mnist\n" + ENDING,
    )
    add_data_options(parser, train=False)
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    add_model_options(parser)


def _rotation(arguments: argparse.Namespace) -> int:
    evaluation = evaluate_rotation(
        **model_options(arguments),
        data=arguments.data,
        test_split=arguments.test_split,
        batch_size=arguments.batch_size,
    )
    print_evaluation(arguments, evaluation)
    return 0
