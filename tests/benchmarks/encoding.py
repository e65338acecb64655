"""`bigbigan encode` on a folder of photos beside the bare encoder: images a second, and their ratio.

The bare encoder takes the same images, read and scaled beforehand, in the same batches. `encode_files` reads, scales,
encodes, and writes the file with all five outputs; starting its workers counts. Both are fused, weights are random.

python -m tests.benchmarks.encoding PHOTOS [--preset bigbigan-resnet50] [--rounds 3] [--batch-size 32] [--workers N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import bigbigan
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.evaluation.features import OUTPUTS, BatchEncoder


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--preset", default="bigbigan-resnet50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    model = bigbigan.create_model(args.preset, parts=("encoder",)).eval().fuse()
    files = find_images([args.photos])
    images = torch.cat([model.preprocess(path) for path in files.values()])
    rates: dict[str, list[float]] = {"bare encoder": [], "encode": []}
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            encode = BatchEncoder(model, OUTPUTS, args.batch_size, seed=0)
            for batch in images.split(args.batch_size):
                encode(batch, 0)
            rates["bare encoder"].append(len(files) / (time.perf_counter() - start))
            start = time.perf_counter()
            output = Path(folder) / "features.npz"
            encode_files(model, files, output, batch_size=args.batch_size, workers=args.workers)
            rates["encode"].append(len(files) / (time.perf_counter() - start))
        print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.1f} images/s" for k, v in rates.items()), flush=True)
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    print(f"{len(files)} images, {torch.get_num_threads()} threads, batches of {args.batch_size}: {ratio:.2f} of bare")


if __name__ == "__main__":
    main()
