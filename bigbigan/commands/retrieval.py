"""`evaluate retrieval`: the nearest neighbours of images, as a picture and as figures."""

from __future__ import annotations

import argparse

from bigbigan.commands.evaluation import (
    DATA,
    ENDING,
    add_cache_option,
    add_record_option,
    add_workers_option,
    model_options,
    print_evaluation,
)
from bigbigan.commands.options import (
    Commands,
    Renamed,
    add_command,
    add_model_options,
    add_output,
    check_picture,
    positive,
)
from bigbigan.evaluation import evaluate_retrieval
from bigbigan.evaluation.protocols.image_sets import picture_files
from bigbigan.evaluation.protocols.retrieval import LISTED
from bigbigan.images import save_image
from bigbigan.outputs import PICTURE


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "retrieval",
        _retrieval,
        "Finds for each query the nearest images of a split, exactly. Queries are image files, another split\n"
        "(--query-split), or without either the images of the split themselves. A query that is in the split is left\n"
        "out of its own neighbours. The picture has one row per query: the query, then its neighbours, nearest first.\n"
        f"The record names the neighbours of the first {LISTED} queries.\n\n"
        "Features come from --model, or for the split from a file that `bigbigan encode` wrote (--feature-file): then\n"
        "--data is the folder that was encoded, and the class of an image is its first folder; or it is the Parquet\n"
        "set that was encoded. They may be any encoder's, unless there are QUERY files, which --model encodes.\n"
        + DATA,
        "Example: bigbigan evaluate retrieval cat.jpg dog.jpg --data photos/ -o neighbours.png\n"
        "         bigbigan evaluate retrieval --data data/fashion_mnist --query-split test --k 1 10\n" + ENDING,
    )
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="image files, or folders of them")
    parser.add_argument("--data", required=True, metavar="PATH", help="the images to choose from")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--query-split", metavar="SPLIT", help="all images of another split of --data as queries")
    parser.add_argument("--feature-file", metavar="FILE", help="features of --data: .npz, .safetensors or .parquet")
    parser.add_argument(
        "--features",
        action=Renamed,
        dest="feature_file",
        const="--feature-file",
        metavar="FILE",
        help="earlier name of --feature-file",
    )
    parser.add_argument(
        "--feature", default="avepool_feat", metavar="NAME", help="encoder output (default: %(default)s)"
    )
    parser.add_argument("--metric", choices=("cosine", "l2"), default="cosine", help="(default: %(default)s)")
    parser.add_argument("--k", type=positive, nargs="+", default=[10], metavar="K", help="neighbours (default: 10)")
    parser.add_argument("--keep-query", action="store_true", help="leave a query among its neighbours")
    add_output(parser, "-o", "--output", kind=PICTURE, metavar="PICTURE", help=".png, .jpg or .webp")
    parser.add_argument(
        "--rows", type=positive, default=8, metavar="N", help="queries in the picture (default: %(default)s)"
    )
    add_cache_option(parser)
    add_workers_option(parser)
    add_record_option(parser)
    add_model_options(parser)


def _retrieval(arguments: argparse.Namespace) -> int:
    if arguments.output:
        given = [*arguments.queries, arguments.data.partition("?")[0]]
        check_picture(arguments.output, (file for path in given for file in picture_files(path)))
    evaluation = evaluate_retrieval(
        **model_options(arguments),
        data=arguments.data,
        queries=arguments.queries,
        split=arguments.split,
        query_split=arguments.query_split or None,
        feature_file=arguments.feature_file or None,
        feature=arguments.feature,
        metric=arguments.metric,
        k=arguments.k,
        keep_query=arguments.keep_query,
        cache=arguments.feature_cache,
        progress=not arguments.quiet,
    )
    print_evaluation(arguments, evaluation)
    if arguments.output:
        assert evaluation.draw is not None
        save_image(evaluation.draw(arguments.rows), arguments.output)
    return 0
