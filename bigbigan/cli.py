"""The command `bigbigan`: its parser, and how what happens in a verb becomes messages and an exit code."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bigbigan._version import __version__
from bigbigan.commands.options import claim_outputs, help_formatter
from bigbigan.commands.verbs import add_verbs


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of a command line: only the verb that `argv` asks for is defined in full; all of them for None."""
    parser = argparse.ArgumentParser(
        prog="bigbigan",
        formatter_class=help_formatter,
        description="BigBiGAN: draw images, encode them into features, and train models that do both.",
        epilog="`bigbigan COMMAND --help` explains a command. Results go to stdout or to files, messages to stderr.\n"
        "Exit codes: 0 done, 1 done in part, diverged or refused, 2 wrong usage or no such model, 3 no image worked,\n"
        "130 interrupted, 141 stdout was closed, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"bigbigan {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, title="commands")
    add_verbs(commands, argv)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (default: the process's arguments) and returns the exit code; a stranger's error is raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(argv).parse_args(argv)
    arguments.argv = argv  # for records of what was measured
    label = f"bigbigan {arguments.verb}"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no text come out as they are
    with _messages(label, logging.WARNING if getattr(arguments, "quiet", False) else logging.INFO):
        try:
            with claim_outputs(arguments):
                code = arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # `bigbigan list | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit is quiet
            return 141
        except KeyboardInterrupt:
            print(f"{label}: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            if isinstance(error, ModuleNotFoundError):  # not one of ours, which name the extra to install
                raise
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):  # see `run_jobs`
                raise
            print(f"{label}: {_one_line(error)}", file=sys.stderr)
            return 2
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    *lines, last = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "".join(
        f"{line} " if line.endswith((".", ":", ";", "?", "!")) else f"{line}. " for line in lines
    ) + last.rstrip(".")


@contextmanager
def _messages(label: str, level: int) -> Iterator[None]:
    """The library's log and warnings as lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{label}: %(message)s"))
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("bigbigan", "weights_conversion"))}
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:  # once, though every picture may cause it
        if str(message) not in shown:
            shown.add(str(message))
            print(f"{label}: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        for logger, before in loggers.items():
            logger.removeHandler(handler)
            logger.setLevel(before)
