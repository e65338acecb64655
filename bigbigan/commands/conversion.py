"""`convert`, `push`: from other people's weights to a model folder, and from there to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from bigbigan.commands.options import Commands, add_command, add_run_options, set_threads

CHECKPOINTS = (".pth", ".pt")

logger = logging.getLogger(__name__)


def add_parsers(commands: Commands) -> None:
    _add_convert(commands)
    _add_push(commands)


def _add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        _convert,
        "A module's architecture is read from its graph, network by network. A network that this package's layers do\n"
        "not express becomes a graph network: it runs the module's operations and gives the same outputs, but it\n"
        "cannot be trained by a recipe or fused. Every output is then computed by the module and by the result, on\n"
        "the same inputs: a network that differs by more than 1e-4 of an output's largest value is not written.\n"
        "Needs the extra: pip install 'bigbigan[convert]' (a .pth does not).",
        "Examples:\n"
        "  bigbigan convert bigbigan-resnet50                    download it; load('bigbigan-resnet50') finds it\n"
        "  bigbigan convert resnet50.tar.gz --name bigbigan-resnet50   the same, downloaded by hand\n"
        "  bigbigan convert FOLDER -o my-model --image cat.jpg   to a place of your own, compared on a photo too\n"
        "  bigbigan convert BigBiGAN_x1.pth -o my-generator      a third-party generator checkpoint\n"
        "Example: bigbigan convert FOLDER --inspect\n"
        "Exit codes: 0 done (networks left out are warned of), 1 refused (nothing written), 2 wrong usage, or no such\n"
        "source.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="bigbigan-resnet50 or bigbigan-revnet50x4 (downloaded), a module's folder or .tar.gz, or a .pth",
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="model folder (default: where load(NAME) finds it)")
    parser.add_argument("--name", help="of the model (default: the source's)")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        dest="images",
        help="compare on this picture too; may be repeated",
    )
    parser.add_argument(
        "--form",
        choices=("auto", "port", "graph"),
        default="auto",
        help="port: this package's layers, or refuse; graph: the module's operations; auto: a port where it matches, "
        "else a graph network (default: %(default)s)",
    )
    parser.add_argument(
        "--inspect", action="store_true", help="print signatures and layers, without weights, and write nothing"
    )
    add_run_options(parser)


def _add_push(commands: Commands) -> None:
    parser = add_command(
        commands,
        "push",
        _push,
        "One commit with weights, config.json and a model card; the repository is made if need be. The token is that\n"
        "of `hf auth login`, or HF_TOKEN. A converted model's licence is that of its source: state it with --license.",
        "Example: bigbigan push my-model org/bigbigan-resnet50 --private\n"
        "Exit codes: 0 done, 2 no such folder, a damaged one, or refused by the Hub.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or the name of a local conversion")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="an existing branch (default: main)")
    parser.add_argument("--message", default="Upload BigBiGAN model", help="of the commit (default: %(default)r)")
    parser.add_argument("--license", help="of the weights, such as apache-2.0 (default: as the folder says)")


def _convert(arguments: argparse.Namespace) -> int:
    from weights_conversion.errors import ConversionError

    set_threads(arguments)
    try:
        return _convert_checkpoint(arguments) if arguments.source.endswith(CHECKPOINTS) else _module(arguments)
    except ConversionError as error:  # in several lines: a table of differences, a node and its neighbours
        print(f"bigbigan convert: refused: {error}\n{_what_next(arguments)}", file=sys.stderr)
        return 1


def _what_next(arguments: argparse.Namespace) -> str:
    """After a refusal."""
    import shlex

    if arguments.inspect or arguments.source.endswith(CHECKPOINTS):
        return "Nothing was written. If the file is as its authors published it, please report this message."
    return (
        "Nothing was written. If this is a module as its authors published it, please report this message, and what "
        f"{shlex.join(['bigbigan', 'convert', arguments.source, '--inspect'])} prints; it holds no weights."
    )


def _convert_checkpoint(arguments: argparse.Namespace) -> int:
    from weights_conversion.biggan_pth import convert_checkpoint

    if arguments.output is None or arguments.inspect or arguments.images:
        raise ValueError("a checkpoint needs -o FOLDER, and takes neither --inspect nor --image")
    print(convert_checkpoint(Path(arguments.source), Path(arguments.output), name=arguments.name))
    return 0


def _module(arguments: argparse.Namespace) -> int:
    from weights_conversion.convert import convert, inspect

    if arguments.inspect:
        inspect(arguments.source, print)
        return 0
    options = {"name": arguments.name, "images": arguments.images, "form": arguments.form}
    print(convert(arguments.source, arguments.output, **options, report=logger.info))
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from bigbigan import factory

    model = factory.load(arguments.folder, local_files_only=True)
    if arguments.license:
        model.info = replace(model.info, license=arguments.license)
    url = model.push_to_hub(
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.message,
    )
    print(url)
    return 0
