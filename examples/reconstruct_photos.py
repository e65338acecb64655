"""Encodes pictures and redraws them: python examples/reconstruct_photos.py [IMAGE ...] [-m MODEL] [-o pairs.png]"""

import argparse

from bigbigan import load
from bigbigan.grids import make_pairs
from bigbigan.images import asset_images, save_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="*", help="default: 8 bundled pictures")
parser.add_argument("-m", "--model", help="name, folder or Hub repository; default: the embedded model")
parser.add_argument("-o", "--output", default="pairs.png")
args = parser.parse_args()

model = load(args.model, parts=("generator", "encoder"))
x = model.preprocess(args.images or asset_images()[:8])  # [N, C, S, S]
again = model.reconstruct(x)  # [N, C, s, s]
save_image(make_pairs(x, again), args.output)
print(f"{args.output}: {len(x)} pictures above their reconstructions")
