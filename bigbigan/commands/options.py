"""What the verbs share: option groups, what they mean, and tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bigbigan.commands.verbs import ABOUT
from bigbigan.outputs import PICTURE, Kind, OutputError, check_output, claim

if TYPE_CHECKING:
    from bigbigan.model import BigBiGAN

Commands = Any  # what `add_subparsers` returns has no public name

# A fixed width: the help reads the same everywhere.
help_formatter: Any = partial(argparse.RawDescriptionHelpFormatter, width=96, max_help_position=28)


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], about: str, epilog: str
) -> argparse.ArgumentParser:
    """A verb or protocol; `about` is printed below its line in `ABOUT`."""
    description = f"{ABOUT[name]}\n\n{about}".strip()
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=ABOUT[name], description=description, epilog=epilog, formatter_class=help_formatter
    )
    parser.set_defaults(run=run)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", metavar="auto|cpu|cuda|mps", default="auto", help="auto is cuda where there is one, else cpu"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own choice)")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes, only warnings and errors")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a name from `bigbigan list`, a model folder, or org/name on the Hugging Face Hub "
        "(default: the model inside the package)",
    )
    group.add_argument("--revision", metavar="REV", help="commit, tag or branch of a repository")
    add_run_options(parser)


def add_fuse_option(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--no-fuse",
        dest="fuse",
        action="store_false",
        help="run the networks as they are defined; by default they are put into a faster, equal form first",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading images (PNG, JPEG, WebP, GIF, BMP, TIFF)")
    group.add_argument(
        "--crop",
        choices=("center", "resnet", "none"),
        help="the largest centre square, TensorFlow's ResNet crop, or all of it squashed (default: the model's own)",
    )
    group.add_argument(
        "--invert", action="store_true", help="swap dark and light, for dark drawings and a model of bright ones"
    )


def image_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"crop": arguments.crop, "invert": arguments.invert}


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def not_negative(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


not_negative.__name__ = "whole number"
positive.__name__ = "whole number"  # argparse names it: "invalid whole number value"


def positive_number(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


positive_number.__name__ = "number"


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def set_threads(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def choose_device(name: str) -> str:
    """A device that exists here.

    Raises:
        ValueError: it does not.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise ValueError(f"--device is {name!r}; choose auto, cpu, cuda or mps")
    if not available[kind]:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no {kind} device here")
    return name


def open_model(arguments: argparse.Namespace, parts: Sequence[str] | None, name: str | None = None) -> BigBiGAN:
    """The model that the options (or `name`) ask for; fused if the verb has the option and it was not taken back."""
    from bigbigan import factory

    set_threads(arguments)
    device = choose_device(arguments.device)
    options = {"revision": arguments.revision, "fuse": getattr(arguments, "fuse", False)}
    return factory.load(name or arguments.model, parts=parts, device=device, **options)


class Renamed(argparse.Action):
    """The earlier name of an option, which still works and warns; `const` is the name of today."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        print(f"{parser.prog}: {option} is now called {self.const}; please use that name", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_output(parser: Any, *flags: str, kind: Kind, **options: Any) -> None:
    """An option, of a parser or a group, for a file that `claim_outputs` keeps for the command."""
    action = parser.add_argument(*flags, **options)
    parser.set_defaults(claimed=[*(parser.get_default("claimed") or ()), (action.dest, kind)])


@contextlib.contextmanager
def claim_outputs(arguments: argparse.Namespace) -> Iterator[None]:
    """Keeps the files of `add_output` for this command from its start to its end.

    Raises:
        OutputError: as `bigbigan.outputs.claim`, or two of them are one file.
    """
    taken: set[str] = set()
    with contextlib.ExitStack() as stack:
        for name, kind in getattr(arguments, "claimed", ()):
            if (path := getattr(arguments, name)) is None:
                continue
            if (real := os.path.realpath(path)) in taken:
                raise OutputError(f"{path} is named for two outputs; give each a file of its own")
            taken.add(real)
            stack.enter_context(claim(path, kind))
        yield


def check_picture(path: str, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuses, before any work, a picture that could not be written, or would overwrite an input."""
    check_output(path, PICTURE, inputs)


def columns_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)
