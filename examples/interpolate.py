"""Walks between two pictures in latent space: python examples/interpolate.py [A B] [-m MODEL] [-o strip.png]"""

import argparse

import torch

from bigbigan import load
from bigbigan.grids import make_grid
from bigbigan.images import asset_images, save_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="*", help="two pictures; default: two bundled ones")
parser.add_argument("-m", "--model", help="name, folder or Hub repository; default: the embedded model")
parser.add_argument("-o", "--output", default="strip.png")
args = parser.parse_args()
if len(args.images) not in (0, 2):
    parser.error(f"give two pictures, not {len(args.images)}")

model = load(args.model, parts=("generator", "encoder"))
start, end = model.encode(args.images or [asset_images()[9], asset_images()[1]]).z_mean  # [z_dim] each
steps = torch.linspace(0, 1, 10).to(start)[:, None]  # [10, 1]
save_image(make_grid(model.generate(torch.lerp(start, end, steps)), columns=10, scale=2), args.output)
print(f"{args.output}: ten pictures along a line between two latents")
