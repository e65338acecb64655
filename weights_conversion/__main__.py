"""`python -m weights_conversion …` is `bigbigan convert …`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    runpy.run_module("bigbigan", run_name="__main__")
