"""Inference of the released architectures (random weights): a Markdown table of ratios, all taken in one run.

Contenders run in turn, again and again, and medians are compared: what else the machine does hits all alike. `share` is
the rate at which the definition's own multiplications and additions are got through, over the machine's best
convolution in the same run: a form that needs fewer of them may exceed 100 %. `difference` is the largest one to the
plain modules over the largest value. Memory and load time are those of a process of its own: `read` is what
safetensors alone takes to read every weight, `loaded` the growth of memory over the size of the weights.

python -m tests.benchmarks.inference [--works generator-8 …] [--contenders plain fused …] [--repeats 7] [--threads N]
python -m tests.benchmarks.inference --layers        sum of each leaf's own best time over the whole's
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bigbigan
from bigbigan.fused.kernels import Kernel
from bigbigan.fused.leaves import Leaf
from bigbigan.layers import BatchNorm
from bigbigan.model import BigBiGAN
from bigbigan.onnx import export_onnx
from bigbigan.presets import get_preset
from tests.benchmarks import naive_port
from tests.benchmarks.imports import cpu_seconds

Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
REST = 0.1  # seconds before a run, in which threads that wait for more of the one before go to sleep
RESNET, REVNET = "bigbigan-resnet50", "bigbigan-revnet50x4"


@dataclass(frozen=True)
class Work:
    """What is done once: `parts` of a preset on a batch."""

    preset: str
    parts: tuple[str, ...]
    batch: int

    def inputs(self) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        config = get_preset(self.preset).config
        if self.parts == ("generator",):
            return torch.randn(self.batch, config.z_dim, generator=draws)
        side = config.preprocess.resolution
        return torch.rand(self.batch, 3, side, side, generator=draws) * 2 - 1

    def module(self, model: BigBiGAN) -> nn.Module:
        return Pass(model, self.parts)


class Pass(nn.Module):
    """The work on one tensor, tensors out, as exporters and compilers like it."""

    def __init__(self, model: BigBiGAN, parts: tuple[str, ...]):
        super().__init__()
        self.encoder, self.generator = (getattr(model, p) if p in parts else None for p in ("encoder", "generator"))
        self.z_dim = model.config.z_dim

    def forward(self, x: Tensor) -> Outputs:
        if self.encoder is None:
            return (self.generator(x),)
        out = self.encoder(x, torch.zeros(len(x), self.z_dim))
        return (
            (out.z_mean, out.avepool_feat, out.bn_crelu_feat)
            if self.generator is None
            else (self.generator(out.z_mean),)
        )


WORKS = {
    **{f"generator-{n}": Work(RESNET, ("generator",), n) for n in (1, 8)},
    **{f"resnet50-{n}": Work(RESNET, ("encoder",), n) for n in (1, 8)},
    **{f"revnet50x4-{n}": Work(REVNET, ("encoder",), n) for n in (1, 2, 8)},
    **{f"reconstruct-{n}": Work(RESNET, ("encoder", "generator"), n) for n in (1, 8)},
}


# ---- contenders: each makes of a work and a model folder what runs it once ----


def naive(work: Work, folder: Path) -> Run:
    config = get_preset(work.preset).config
    encoder = naive_port.Encoder(config.encoder).eval() if "encoder" in work.parts else None  # type: ignore[arg-type]
    generator = naive_port.Generator(config.generator).eval() if "generator" in work.parts else None  # type: ignore[arg-type]
    x = work.inputs()
    if encoder is None:
        return lambda: (generator(x),)
    return lambda: encoder(x) if generator is None else (generator(encoder(x)[0]),)


def loaded(work: Work, folder: Path, **options: Any) -> Run:
    module, x = work.module(bigbigan.load(folder, parts=work.parts, **options)), work.inputs()
    return lambda: module(x)


def plain(work: Work, folder: Path) -> Run:
    return loaded(work, folder)


def fused(work: Work, folder: Path) -> Run:
    return loaded(work, folder, fuse=True)


def compiled(work: Work, folder: Path) -> Run:
    """`torch.compile` of the plain modules in channels_last, weights frozen: packed weights are nothing to trace."""
    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    module = work.module(bigbigan.load(folder, parts=work.parts)).to(memory_format=torch.channels_last)
    run, x = torch.compile(module), work.inputs()
    return lambda: run(x)


def exported(work: Work, folder: Path) -> list[tuple[Path, list[str]]]:
    """The parts as `bigbigan export-onnx` writes them, beside the model, and the outputs that are asked of each."""
    for part in work.parts:
        if not (folder / f"{part}.onnx").exists():
            export_onnx(bigbigan.load(folder, parts=(part,)), folder)
    wanted = ["z_mean"] if len(work.parts) > 1 else ["z_mean", "avepool_feat", "bn_crelu_feat"]
    return [(folder / f"{part}.onnx", wanted if part == "encoder" else ["images"]) for part in work.parts]


def onnxruntime(work: Work, folder: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = [
        (ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), outputs)
        for path, outputs in exported(work, folder)
    ]
    x, noise = work.inputs().numpy(), torch.zeros(work.batch, get_preset(work.preset).config.z_dim).numpy()

    def run() -> Outputs:
        values = [x]
        for session, outputs in sessions:
            names = [given.name for given in session.get_inputs()]
            values = session.run(outputs, dict(zip(names, [values[0], noise][: len(names)], strict=True)))
        return tuple(map(torch.from_numpy, values))

    return run


def openvino(work: Work, folder: Path) -> Run:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    models = [
        (ov.Core().compile_model(str(path), "CPU", settings), outputs) for path, outputs in exported(work, folder)
    ]
    x, noise = work.inputs().numpy(), torch.zeros(work.batch, get_preset(work.preset).config.z_dim).numpy()

    def run() -> Outputs:
        values = [x]
        for model, outputs in models:
            results = model([values[0], noise][: len(model.inputs)])
            values = [results[name] for name in outputs]
        return tuple(map(torch.from_numpy, values))

    return run


CONTENDERS: dict[str, tuple[Callable[[Work, Path], Run], tuple[str, ...]]] = {  # with the modules that it needs
    "naive": (naive, ()),
    "plain": (plain, ()),
    "fused": (fused, ()),
    "compiled": (compiled, ()),
    "onnxruntime": (onnxruntime, ("onnx", "onnxruntime", "onnxscript")),
    "openvino": (openvino, ("openvino", "onnx", "onnxruntime", "onnxscript")),
}


# ---- measuring ----


@torch.no_grad()
def save_model(work: Work, folder: Path) -> Path:
    """A model folder with weights and statistics away from their neutral values, once a set of parts."""
    path = folder / f"{work.preset}-{'-'.join(work.parts)}"
    if not path.exists():
        model = bigbigan.create_model(work.preset, parts=work.parts)
        draws = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=draws)
                module.running_var.uniform_(0.5, 1.5, generator=draws)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
        model.save(path)
    return path


def alternate(
    runs: dict[str, Run], repeats: int, clock: Callable[[], float], rest: float = REST
) -> dict[str, list[float]]:
    """Seconds of each run, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(rest)
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def ceiling_runs() -> dict[str, tuple[Run, float]]:
    """Convolutions among which a machine's fastest should be, and their GFLOP."""
    runs: dict[str, tuple[Run, float]] = {}
    for batch, channels, side in ((1, 128, 64), (1, 256, 32), (2, 512, 16)):
        x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        kernel = Kernel(torch.randn(channels, channels, 3, 3), None, (side, side), 1, 1)
        flop = 2 * x.numel() * channels * 9 / 1e9
        runs[f"conv {channels}@{side}"] = (lambda kernel=kernel, x=x: (kernel(x),), flop)
    return runs


def flops(run: Run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def difference(actual: Outputs, expected: Outputs) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True))


def resident(field: str) -> int:
    """MiB of VmRSS (now) or VmHWM (at most so far)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def alone(name: str, work: str, folder: Path, threads: int) -> dict[str, float]:
    """Load time, and memory after loading and at its peak over two passes, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.inference", "--alone", name, "--works", work]
    command += ["--folder", str(folder), "--threads", str(threads)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def print_alone(name: str, work: Work, folder: Path) -> None:
    path = save_model(work, folder)
    weights = sum((path / f"{part}.safetensors").stat().st_size for part in work.parts) / 2**20
    start = time.perf_counter()
    for part in work.parts:
        for tensor in load_file(path / f"{part}.safetensors").values():
            tensor.sum()
    facts = {"read_s": time.perf_counter() - start}
    before, start = resident("VmRSS"), time.perf_counter()
    run = CONTENDERS[name][0](work, path)
    facts |= {"load_s": time.perf_counter() - start, "loaded": (resident("VmRSS") - before) / weights}
    facts["load_peak"] = (resident("VmHWM") - before) / weights
    run()
    run()
    print(json.dumps({**facts, "peak_mib": resident("VmHWM") - before}))


@torch.no_grad()
def measure(name: str, contenders: list[str], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a contender."""
    work = WORKS[name]
    path = save_model(work, folder)
    runs = {contender: CONTENDERS[contender][0](work, path) for contender in contenders}
    reference = loaded(work, path)
    expected, gflop = reference(), flops(reference)
    del reference
    ceilings = ceiling_runs()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    times = alternate({**runs, **{key: run for key, (run, _) in ceilings.items()}}, args.repeats, clock)
    best = max(gflop / statistics.median(times[key]) for key, (_, gflop) in ceilings.items())
    rows = []
    for contender, run in runs.items():
        seconds = statistics.median(times[contender])
        row = {"work": name, "contender": contender, "ms": seconds * 1e3, "images_s": work.batch / seconds}
        for other in ("naive", "plain", "onnxruntime"):
            if other in runs:  # pairs of one turn
                pairs = zip(times[other], times[contender], strict=True)
                row[f"x_{other}"] = statistics.median(a / b for a, b in pairs)
        row |= {"share": gflop / seconds / best, "ceiling_gflop_s": best}
        if contender != "naive":
            row["difference"] = difference(run(), expected)
        if not args.no_memory:
            row |= alone(contender, name, folder, args.threads)
        rows.append(row)
    return rows


# ---- each leaf on its own ----


@torch.no_grad()
def layer_share(name: str, folder: Path, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Sum of each fused leaf's best time on the tensors of a real pass, over the best time of the whole pass."""
    work = WORKS[name]
    module = work.module(bigbigan.load(save_model(work, folder), parts=work.parts, fuse=True))
    calls: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    with ExitStack() as hooks:
        for path, leaf in module.named_modules():
            if isinstance(leaf, Leaf) or not list(leaf.children()):
                hook = leaf.register_forward_pre_hook(
                    lambda leaf, given, path=path: calls.append((path, leaf, tuple(map(copied, given))))
                )
                hooks.callback(hook.remove)
        x = work.inputs()
        module(x)
    inner = {m for _, leaf, _ in calls for m in leaf.modules() if m is not leaf}
    calls = [call for call in calls if call[1] not in inner]
    runs: dict[Any, Run] = {
        i: (lambda leaf=leaf, given=given: leaf(*given)) for i, (_, leaf, given) in enumerate(calls)
    }
    best: dict[Any, float] = {}
    for key, run in {**runs, "whole": lambda: module(x)}.items():
        best[key] = min(alternate({"": run}, repeats, clock, rest=0)[""])
    whole = best.pop("whole")
    kinds: dict[str, float] = {}
    for i, seconds in best.items():
        kind = type(calls[i][1]).__name__
        kinds[kind] = kinds.get(kind, 0) + seconds * 1e3
    row = {"work": name, "whole_ms": whole * 1e3, "sum_ms": sum(best.values()) * 1e3}
    return {**row, "share": sum(best.values()) / whole, "kinds_ms": kinds}


def copied(value: Any) -> Any:
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value


# ---- report ----

COLUMNS: dict[str, tuple[str, str]] = {
    "work": ("work", "{}"),
    "contender": ("contender", "{}"),
    "ms": ("ms", "{:.0f}"),
    "images_s": ("images/s", "{:.2f}"),
    "x_naive": ("x naive", "{:.2f}"),
    "x_plain": ("x plain", "{:.2f}"),
    "x_onnxruntime": ("x ONNX Runtime", "{:.2f}"),
    "share": ("share", "{:.0%}"),
    "difference": ("difference", "{:.0e}"),
    "read_s": ("read s", "{:.1f}"),
    "load_s": ("load s", "{:.1f}"),
    "loaded": ("loaded / weights", "{:.2f}"),
    "load_peak": ("at most", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
}


def markdown(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys], ["---"] * len(keys)]
    lines += [[COLUMNS[key][1].format(row[key]) if key in row else "" for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a busy machine, one thread")
    parser.add_argument("--no-memory", action="store_true", help="no processes for memory and load time")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--folder", type=Path, help="where model folders are kept (default: a temporary one)")
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with ExitStack() as stack, torch.no_grad():
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.alone:
            print_alone(args.alone, WORKS[args.works[0]], folder)
            return
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        if args.layers:
            rows = [layer_share(name, folder, args.repeats, clock) for name in args.works]
            for row in rows:
                kinds = ", ".join(f"{k} {v:.0f}" for k, v in sorted(row["kinds_ms"].items(), key=lambda kv: -kv[1]))
                facts = f"{row['sum_ms']:.0f} of {row['whole_ms']:.0f} ms, {row['share']:.0%}"
                print(f"{row['work']}: leaves' own best times {facts} ({kinds})", flush=True)
        else:
            present = [c for c in args.contenders if all(map(importlib.util.find_spec, CONTENDERS[c][1]))]
            print(f"torch {torch.__version__}, {args.threads} threads, {args.clock} clock", flush=True)
            print(
                f"import bigbigan over import torch: {cpu_seconds('bigbigan') / cpu_seconds('torch'):.2f}", flush=True
            )
            rows = [row for name in args.works for row in measure(name, present, folder, args)]
            print(markdown(rows))
            print("\nbest convolution: " + ", ".join(sorted({f"{row['ceiling_gflop_s']:.0f} GFLOP/s" for row in rows})))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
