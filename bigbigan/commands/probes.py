"""`evaluate linear`, `knn`: linear and nearest-neighbour probes of frozen features."""

from __future__ import annotations

import argparse
from typing import Any

from bigbigan.commands.evaluation import (
    DATA,
    ENDING,
    add_cache_option,
    add_data_options,
    model_options,
    print_evaluation,
)
from bigbigan.commands.options import Commands, add_command, add_model_options, names, positive, positive_number
from bigbigan.evaluation import evaluate_knn, evaluate_linear
from bigbigan.evaluation.protocols.comparison import parse_spec

COMPARE = """\
SPEC of --compare; each adds a row or several to the table:
  pixels, pca:64       the model's input, and its 64 principal components over the training split
  untrained            the model's architecture before training, with initial and with estimated statistics
  supervised[:EPOCHS]  a small network trained on all training labels, even with --labels: its last
                       hidden layer, and its own accuracy
  timm:NAME            a pretrained encoder of timm
  hf:ORG/NAME[@REV]    one of transformers: pooled output; :cls the first token, :mean the mean of all
  file:TRAIN,TEST      features in .npz, .npy, .safetensors or .parquet, one row per image: matched by name
                       where the file names its rows, as `encode` does, else in the order of the images
  NAME                 another model of this package: a name, a model folder, or org/name[@REV]
Each encoder uses its own preprocessing.
"""


def add_parsers(commands: Commands) -> None:
    _add_linear(commands)
    _add_knn(commands)


def _spec(text: str) -> str:
    try:
        parse_spec(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _add_feature_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--features",
        type=names,
        default=default,
        metavar="LIST",
        help="encoder outputs, with commas between, or z_logit: z_mean before the mapping into (-1, 1), for models "
        "that have one (default: %(default)s)",
    )
    parser.add_argument(
        "--compare", type=_spec, action="append", default=[], metavar="SPEC", help="also measure this; repeatable"
    )
    parser.add_argument("--baselines", action="store_true", help="--compare untrained --compare pixels")
    parser.add_argument(
        "--crelu",
        action="store_true",
        help="measure features also as BN+CReLU, normalised over this training split; of models only avepool_feat, "
        "since their bn_crelu_feat is normalised over their training data",
    )
    add_cache_option(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=256, metavar="N", help="images encoded at a time (default: 256)"
    )


def _add_linear(commands: Commands) -> None:
    parser = add_command(
        commands,
        "linear",
        _linear,
        "--protocol logistic: logistic regression on standardised features of the training split. Held-out training\n"
        "images choose the L2 strength; then it is fitted on all of them, and tested once on the test split.\n"
        "--protocol paper: BigBiGAN's. Adam from zero weights, several learning rates in one pass over augmented\n"
        "images, averaged weights; held-out training images, never trained on, choose the rate.\n" + DATA + COMPARE,
        "Example: bigbigan evaluate linear --data data/fashion_mnist --baselines --json linear.json\n"
        "         bigbigan evaluate linear --data imagenet/ --model bigbigan-resnet50 --protocol paper \\\n"
        "           --feature-cache features/\n" + ENDING,
    )
    add_data_options(parser)
    _add_feature_options(parser, "avepool_feat,bn_crelu_feat")
    parser.add_argument(
        "--protocol", dest="probe", choices=("logistic", "paper"), default="logistic", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=float,
        nargs="+",
        metavar="FRACTION",
        help="train on these fractions of the labels, sampled per class (at least one each): 0.01 0.1",
    )
    parser.add_argument(
        "--holdout", type=positive, metavar="N", help="held-out images (default: 10000, or a sixth if that is less)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides hold-out, label subsets and baselines (default: %(default)s)"
    )
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


def _add_knn(commands: Commands) -> None:
    parser = add_command(
        commands,
        "knn",
        _knn,
        "Exact neighbours by features of the training split; nothing is fitted.\n" + DATA + COMPARE,
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
    parser.add_argument("--seed", type=int, default=0, help="decides the untrained baselines (default: %(default)s)")
    add_model_options(parser)


def _feature_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **model_options(arguments),
        "data": arguments.data,
        "train_split": arguments.train_split,
        "test_split": arguments.test_split,
        "features": arguments.features,
        "compare": [*arguments.compare, *(["untrained", "pixels"] if arguments.baselines else [])],
        "crelu": arguments.crelu,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "cache": arguments.feature_cache,
        "progress": not arguments.quiet,
    }


def _linear(arguments: argparse.Namespace) -> int:
    evaluation = evaluate_linear(
        **_feature_options(arguments),
        protocol=arguments.probe,
        labels=arguments.labels,
        holdout=arguments.holdout,
        l2=arguments.l2,
        lr=arguments.lr,
        steps=arguments.steps,
        probe_batch_size=arguments.probe_batch_size,
        ema=arguments.ema,
        augment=arguments.augment,
    )
    print_evaluation(arguments, evaluation)
    return 0


def _knn(arguments: argparse.Namespace) -> int:
    evaluation = evaluate_knn(**_feature_options(arguments), k=arguments.k, metric=arguments.metric)
    print_evaluation(arguments, evaluation)
    return 0
