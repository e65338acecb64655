"""`evaluate reconstruction`: how well reconstructions keep their originals."""

from __future__ import annotations

import argparse

from bigbigan.commands.evaluation import DATA, ENDING, add_data_options, model_options, print_evaluation
from bigbigan.commands.options import Commands, add_command, add_model_options, add_output, check_picture, positive
from bigbigan.evaluation import evaluate_reconstruction
from bigbigan.evaluation.protocols.image_sets import picture_files
from bigbigan.evaluation.protocols.reconstruction import PAIRS
from bigbigan.images import save_image
from bigbigan.outputs import PICTURE


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "reconstruction",
        _reconstruction,
        "A small classifier, trained on real images of the training split alone, labels the reconstructions of the\n"
        "test split. Pixel errors and distances of avepool_feat are divided by those of random pairs. Where the\n"
        "encoder sees larger images than the reconstructions, both are enlarged for it.\n\n"
        "Reconstructions are the model's (from z_mean), or any other's: --reconstructions names a folder with a\n"
        "picture for each test image, at the same path apart from the suffix (000000.png, 000001.png, … where the\n"
        "test split is Parquet), or uint8 [N, S, S, C] in .npz or .npy, in the order of the test split (a .npz with\n"
        "`paths` is matched by these names). Test images are then read as --model reads them, or without it as the\n"
        "largest centre square, scaled to that size.\n" + DATA,
        "Example: bigbigan evaluate reconstruction --data data/fashion_mnist --grid pairs.png\n"
        "         bigbigan evaluate reconstruction --data data/photos --reconstructions vq/ --json vq.json\n" + ENDING,
    )
    add_data_options(parser)
    parser.add_argument("--reconstructions", metavar="PATH", help="another method's, in place of the model's")
    add_output(
        parser, "--grid", kind=PICTURE, metavar="PICTURE", help="also draw test images above their reconstructions"
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        default=6,
        metavar="N",
        help="epochs of the classifier (default: %(default)s)",
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the classifier's training images")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides classifier and pairs (default: %(default)s)")
    add_model_options(parser)


def _reconstruction(arguments: argparse.Namespace) -> int:
    if arguments.grid:
        given = (arguments.data.partition("?")[0], arguments.reconstructions)
        check_picture(arguments.grid, (file for path in given for file in picture_files(path)))
    evaluation = evaluate_reconstruction(
        **model_options(arguments),
        data=arguments.data,
        train_split=arguments.train_split,
        test_split=arguments.test_split,
        reconstructions=arguments.reconstructions or None,
        epochs=arguments.epochs,
        flip=arguments.flip,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    print_evaluation(arguments, evaluation)
    if arguments.grid:
        assert evaluation.draw is not None
        save_image(evaluation.draw(PAIRS), arguments.grid)
    return 0
