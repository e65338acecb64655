"""`evaluate generation`: scores of generated images."""

from __future__ import annotations

import argparse

from bigbigan.commands.evaluation import (
    DATA,
    ENDING,
    add_record_option,
    add_workers_option,
    model_options,
    print_evaluation,
)
from bigbigan.commands.options import Commands, Renamed, add_command, add_model_options, add_output, positive
from bigbigan.evaluation import evaluate_generation
from bigbigan.evaluation.protocols.image_sets import BATCH
from bigbigan.outputs import STATISTICS


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generation",
        _generation,
        "Samples are drawn by --model, or come from --samples: a folder, Parquet, or uint8 [N, S, S, C] in .npz or\n"
        ".npy, from any generator. Reference images are read as --model reads them, and pooled to its samples' size;\n"
        "with --samples and no --model, as the model of `bigbigan generate -o FOLDER/` reads them; for other\n"
        "samples their largest centre square is scaled to the size of the samples, and a warning says so.\n\n"
        "Networks: inception   torch-fidelity's; only its figures are FID, KID and Inception Score\n"
        "          model:NAME  avepool_feat of a model's encoder; no classes, so no classifier score\n"
        "          FILE.py:F   the FeatureNetwork that F() returns; this runs FILE.py, as `python FILE.py` would\n"
        + DATA,
        "Example: bigbigan evaluate generation --data data/fashion_mnist --split train --json fid.json\n"
        "         bigbigan evaluate generation --samples vq/ --statistics train.npz --json vq.json\n" + ENDING,
    )
    source = parser.add_argument_group("samples")
    source.add_argument("--samples", metavar="PATH", help="images of another generator, in place of the model's")
    source.add_argument(
        "-n", "--number", type=positive, metavar="N", help="samples (default: 50000 of a model, all of --samples)"
    )
    source.add_argument("--seed", type=int, default=0, help="decides latents, subsets, splits (default: %(default)s)")
    source.add_argument("--truncation", type=float, metavar="T", help="as in `bigbigan generate` (default: none)")
    source.add_argument(
        "--truncation-mode", choices=("resample", "scale"), default="resample", help="(default: %(default)s)"
    )
    reference = parser.add_argument_group("reference")
    reference.add_argument("--data", metavar="PATH", help="real images; needed unless --statistics has them")
    reference.add_argument("--split", default="train", help="(default: %(default)s); train[:10000] is a part of it")
    reference.add_argument("--statistics", metavar="FILE", help="mean and covariance from --save-statistics; no KID")
    add_output(
        reference,
        "--save-statistics",
        kind=STATISTICS,
        metavar="FILE",
        help="write mean and covariance of the reference: .npz or .safetensors",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument("--network", default="inception", metavar="NETWORK", help="(default: %(default)s)")
    scores.add_argument(
        "--kid-subsets", type=int, default=100, metavar="N", help="0 leaves the kernel distance out (default: 100)"
    )
    scores.add_argument("--kid-subset-size", type=positive, default=1000, metavar="N", help="(default: %(default)s)")
    scores.add_argument(
        "--score-splits", type=positive, default=10, metavar="N", help="parts for the classifier score (default: 10)"
    )
    scores.add_argument(
        "--splits",
        action=Renamed,
        type=positive,
        dest="score_splits",
        const="--score-splits",
        metavar="N",
        help="earlier name of --score-splits",
    )
    parser.add_argument("--batch-size", type=positive, default=BATCH, metavar="N", help="(default: %(default)s)")
    add_workers_option(parser)
    add_record_option(parser)
    add_model_options(parser)


def _generation(arguments: argparse.Namespace) -> int:
    evaluation = evaluate_generation(
        **model_options(arguments),
        data=arguments.data or None,
        samples=arguments.samples or None,
        number=arguments.number,
        truncation=arguments.truncation,
        truncation_mode=arguments.truncation_mode,
        split=arguments.split,
        statistics=arguments.statistics or None,
        save_statistics=arguments.save_statistics or None,
        network=arguments.network,
        kid_subsets=arguments.kid_subsets,
        kid_subset_size=arguments.kid_subset_size,
        score_splits=arguments.score_splits,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    print_evaluation(arguments, evaluation)
    return 0
