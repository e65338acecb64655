"""`python -m weights_conversion` is `bigbigan convert`."""

import sys

from bigbigan.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
