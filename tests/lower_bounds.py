"""Installs the oldest versions that pyproject.toml promises into a new environment, and runs the tests there.

    python tests/lower_bounds.py FOLDER [--extras test,convert] [--python python3.10] [-- PYTEST OPTIONS]

FOLDER is made for the environment, or used again. torch comes from the index that pip is set to: its old wheels for
Linux bring CUDA libraries of several gigabytes along.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest(extras: list[str]) -> list[str]:
    """`name==version` for each `name>=version` of the dependencies and of these extras; others as they are."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # by hand: Python 3.10 has no tomllib
    lists = {
        name: re.findall(r'"([^"]+)"', body) for name, body in re.findall(r"^(\w+) = \[(.*?)\]$", text, re.M | re.S)
    }
    found, wanted = list(lists["dependencies"]), list(extras)
    for extra in wanted:
        for requirement in lists[extra]:
            if own := re.fullmatch(r"bigbigan\[(.*)\]", requirement):
                wanted += [name for name in own[1].split(",") if name not in wanted]
            else:
                found.append(requirement)
    return [re.sub(r">=([\w.]+)", r"==\1", requirement) for requirement in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", default="test")
    parser.add_argument("--python", default="python3.10", help="the oldest that is promised (default: %(default)s)")
    options, rest = parser.parse_known_args()
    versions = lowest(options.extras.split(","))
    print("\n".join(versions), flush=True)
    if not options.folder.exists():
        subprocess.run([options.python, "-m", "venv", str(options.folder)], check=True)
    python = str(options.folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *versions], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True)
    pytest = [python, "-m", "pytest", *[option for option in rest if option != "--"]]
    return subprocess.run(pytest, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}).returncode


if __name__ == "__main__":
    sys.exit(main())
