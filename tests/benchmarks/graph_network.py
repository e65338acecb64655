"""Rate of a network in graph form beside the plain port of the same module: `python -m tests.benchmarks.graph_network`.

The two folders come from one module, by `bigbigan convert MODULE -o A --form port` and `… -o B --form graph`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import bigbigan
from bigbigan.onnx import part_inputs


def seconds(network: torch.nn.Module, inputs: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    network(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.graph_network", description=__doc__)
    parser.add_argument("port", help="model folder with ports")
    parser.add_argument("graph", help="model folder with graph networks")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    models = [bigbigan.load(folder, device=args.device) for folder in (args.port, args.graph)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}, {args.device}")
    for part in models[0].parts:
        inputs = list(part_inputs(models[0], part, args.batch_size).values())
        times: list[list[float]] = [[], []]
        with torch.inference_mode():
            for round_ in range(args.rounds + 1):  # in turn, so that what else the machine does meets both
                for model, taken in zip(models, times, strict=True):
                    elapsed = seconds(model.part(part), inputs)
                    if round_:
                        taken.append(elapsed)
        port, graph = (args.batch_size / min(taken) for taken in times)
        ratio = statistics.median(p / g for p, g in zip(*times, strict=True))
        print(f"{part:13} port {port:7.2f} images/s, graph {graph:7.2f} images/s, graph / port {ratio:.2f} (median)")


if __name__ == "__main__":
    main()
