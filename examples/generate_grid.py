"""Draws a grid of samples, one row for each truncation: python examples/generate_grid.py [MODEL] [-o grid.png]"""

import argparse

import torch

from bigbigan import load
from bigbigan.grids import make_grid
from bigbigan.images import save_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", help="name, folder or Hub repository; default: the embedded model")
parser.add_argument("-o", "--output", default="grid.png")
args = parser.parse_args()

model = load(args.model, parts=("generator",))
rows = [model.generate(12, seed=0, truncation=t) for t in (0.5, 1.0, 2.0)]  # lower: more typical, less varied
save_image(make_grid(torch.cat(rows), columns=12, scale=2), args.output)
print(f"{args.output}: 12 samples at truncation 0.5, 1 and 2, from top to bottom")
