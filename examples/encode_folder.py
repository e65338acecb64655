"""Encodes a folder of any size: python examples/encode_folder.py [FOLDER] [-m MODEL] [-o features.npz]

Unreadable pictures are reported and skipped; a killed run goes on where it was. `bigbigan encode` is the same thing.
"""

import argparse
from pathlib import Path

import numpy as np

from bigbigan import load
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.images import asset_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, help="default: the bundled pictures")
parser.add_argument("-m", "--model", help="name, folder or Hub repository; default: the embedded model")
parser.add_argument("-o", "--output", default="features.npz", type=Path)
args = parser.parse_args()

files = find_images([args.folder] if args.folder else asset_images())  # names and paths
report = encode_files(load(args.model, parts=("encoder",)), files, args.output)
for path, reason in report.failed:
    print(f"skipped {path}: {reason}")
with np.load(args.output) as saved:
    print({name: saved[name].shape for name in saved.files})
