"""`python -m weights_conversion`: a module or a third-party checkpoint into a model folder."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from weights_conversion.errors import ConversionError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weights_conversion",
        description="Convert DeepMind's BigBiGAN TF-Hub modules, or a third-party generator checkpoint (.pth).",
        epilog="Exit codes: 0 done, 1 refused (nothing written), 2 wrong usage or no such source.",
    )
    parser.add_argument(
        "source", help="bigbigan-resnet50, bigbigan-revnet50x4, a module's folder or .tar.gz, or a .pth"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="model folder (default: where `load(NAME)` finds it)")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], type=Path,
                        help="compare on this picture too; may be repeated")  # fmt: skip
    parser.add_argument("--inspect", action="store_true", help="print signatures and layers instead of converting")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if options.source.endswith((".pth", ".pt")):
            if options.inspect or options.output is None:
                parser.error("a checkpoint takes -o FOLDER and no --inspect")
            from weights_conversion.biggan_pth import convert_checkpoint

            print(f"wrote {convert_checkpoint(Path(options.source), Path(options.output))}")
            return 0
        from weights_conversion.convert import convert, inspect

        if options.inspect:
            inspect(options.source, print)
        else:
            print(f"wrote {convert(options.source, options.output, images=options.image, report=print)}")
    except ConversionError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except (OSError, ImportError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
