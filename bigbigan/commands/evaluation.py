"""`evaluate`: its protocols."""

from __future__ import annotations

from bigbigan.commands.generation import add_generation
from bigbigan.commands.options import Commands, help_formatter
from bigbigan.commands.probes import add_knn, add_linear
from bigbigan.commands.reconstruction import add_reconstruction
from bigbigan.commands.retrieval import add_retrieval
from bigbigan.commands.rotation import add_rotation


def add_parsers(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model on labelled images",
        description="measure a model on labelled images",
        formatter_class=help_formatter,
    )
    protocols = evaluate.add_subparsers(dest="protocol", metavar="PROTOCOL", required=True, title="protocols")
    add_linear(protocols)
    add_knn(protocols)
    add_reconstruction(protocols)
    add_generation(protocols)
    add_retrieval(protocols)
    add_rotation(protocols)
