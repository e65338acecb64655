"""The paper's Table 1 in miniature: its ablations on Fashion-MNIST at one small budget, in slices that can be stopped.

python examples/table1_in_miniature.py --data data/fashion_mnist --runs runs/table1 \\
    --network examples/efficientnet_lite0.py:network --set precision=bf16

Each run has a folder `{row}-{seed}` with its training run, the exported model and the records of two evaluations. The
command goes on where it was stopped; at the end, or with --table, it prints the table and draws samples of each row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

from bigbigan import load
from bigbigan.cli import main
from bigbigan.files import atomic_write
from bigbigan.grids import enlargement, make_grid
from bigbigan.images import save_image

BIGBIGAN, GAN = "bigbigan-fashion-mnist-32", "biggan-fashion-mnist-32"
SCORES = "model.discriminator.scores"
ROWS: dict[str, tuple[str, dict[str, object]]] = {  # recipe and what the row changes
    "base": (BIGBIGAN, {}),
    "deterministic E": (BIGBIGAN, {"model.encoder.output": "deterministic"}),
    "uniform P_z": (BIGBIGAN, {"model.encoder.output": "tanh", "model.generator.prior": "uniform"}),
    "x unary only": (BIGBIGAN, {SCORES: ["x", "xz"]}),
    "z unary only": (BIGBIGAN, {SCORES: ["z", "xz"]}),
    "no unaries": (BIGBIGAN, {SCORES: ["xz"]}),
    "no E": (GAN, {}),
    "raised E learning rate": (BIGBIGAN, {"encoder_lr_multiplier": 10.0}),
}
SEEDS = {"base": 3}  # others: two

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="Fashion-MNIST: a folder with train.parquet and test.parquet")
parser.add_argument("--runs", required=True, type=Path, help="where the runs live")
parser.add_argument("--network", required=True, help="features of the Fréchet distance, as in `evaluate generation`")
parser.add_argument("--images", type=int, default=96_000, help="seen by G and E in a run (default: %(default)s)")
parser.add_argument("--samples", type=int, default=5_000, help="for the Fréchet distance (default: %(default)s)")
parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="(default: all)")
parser.add_argument("--seeds", type=int, default=3, help="at most, of each row (default: %(default)s)")
parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, to go on later, after so long")
parser.add_argument("--set", action="append", default=[], dest="settings", help="for every run, as in `train`")
parser.add_argument("--picture", type=Path, default=Path("table1_in_miniature.png"), help="(default: %(default)s)")
parser.add_argument("--table", action="store_true", help="no training: what is there so far")
args = parser.parse_args()


def command(*arguments: object) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        code = main([*map(str, arguments)])
    if code:
        sys.exit(code)


def check_settings() -> None:
    """Runs of one folder share what their figures depend on: it is written down there, and other settings refused."""
    path = args.runs / "settings.json"
    settings = {name: getattr(args, name) for name in ("data", "network", "images", "samples", "settings")}
    args.runs.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        sys.exit(f"{path} has {before}; this command has {settings}: choose another folder for --runs")


def run(row: str, seed: int, folder: Path, deadline: float) -> bool:
    """Trains and measures; False if the time was over before."""
    recipe, changes = ROWS[row]
    settings = {
        "total_images": args.images,
        "snapshot_images": args.images,
        "ema_halflife_images": args.images / 10,
        "encoder_lr_multiplier": 1.0,
        "probe_images": 0,
        "seed": seed,
        **changes,
    }
    options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    options += [f"--set={setting}" for setting in args.settings]
    left = (deadline - time.monotonic()) / 60
    if left <= 0:
        return False
    limit = [] if left == float("inf") else ["--max-minutes", left]
    command("train", recipe, "--data", args.data, "--run", folder / "run", *limit, *options)
    if not any((folder / "run" / "snapshots").iterdir()):
        return False
    model = folder / "model"
    if not model.exists():
        command("export", folder / "run", "-o", model, "--snapshot", "last", "--name", f"{row}, seed {seed}")
    if row != "no E" and not (folder / "linear.json").exists():
        command("evaluate", "linear", "--data", args.data, "--model", model, "--json", folder / "linear.json")
    if not (folder / "generation.json").exists():
        statistics_file = args.runs / "reference.safetensors"
        saving: list[object] = ["--data", args.data, "--split", "test", "--save-statistics", statistics_file]
        if statistics_file.exists():
            saving = ["--statistics", statistics_file]
        command("evaluate", "generation", "--model", model, "-n", args.samples, "--network", args.network,
                "--kid-subsets", 0, *saving, "--json", folder / "generation.json")  # fmt: skip
    return True


def figures(folder: Path) -> dict[str, float]:
    """Measured figures of a run by name."""
    found: dict[str, float] = {}
    if (folder / "linear.json").exists():
        for result in json.loads((folder / "linear.json").read_text())["results"]:
            found[f"linear, {result['feature']} %"] = 100 * result["accuracy"]
    if (folder / "generation.json").exists():
        for result in json.loads((folder / "generation.json").read_text())["results"]:
            found.update({key: value for key, value in result.items() if key.startswith("Fréchet")})
    return found


def table(folders: dict[str, list[Path]]) -> str:
    """Mean and standard deviation over seeds, a row of the paper's table each."""
    rows = {row: [figures(folder) for folder in group] for row, group in folders.items()}
    names = sorted({name for found in rows.values() for one in found for name in one}, reverse=True)
    lines = [["row", "seeds", *names], ["---"] * (2 + len(names))]
    for row, found in rows.items():
        cells = []
        for name in names:
            values = [one[name] for one in found if name in one]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "-")
        lines.append([row, str(len(found)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


runs = {(row, seed): args.runs / f"{row.replace(' ', '-')}-{seed}"
        for seed in range(args.seeds) for row in args.rows if seed < SEEDS.get(row, 2)}  # fmt: skip
check_settings()
deadline = time.monotonic() + 60 * args.minutes
done = {key: path for key, path in runs.items() if (path / "generation.json").exists()}
for (row, seed), folder in runs.items():
    if not args.table and (row, seed) not in done:
        folder.mkdir(parents=True, exist_ok=True)
        if not run(row, seed, folder, deadline):
            print(f"{len(done)} of {len(runs)} runs are done; the same command goes on", file=sys.stderr)
            sys.exit(0)
        done[row, seed] = folder
print(table({row: [path for (name, _), path in done.items() if name == row] for row in args.rows}))
first = [done[row, 0] / "model" for row in ROWS if (row, 0) in done]
if first:
    import torch

    samples = torch.cat([load(folder, parts=("generator",)).generate(16, seed=0) for folder in first])
    save_image(make_grid(samples, 16, scale=enlargement(samples)), args.picture)
    print(f"\n{args.picture}: a line of samples each, of {', '.join(row for row in ROWS if (row, 0) in done)}")
