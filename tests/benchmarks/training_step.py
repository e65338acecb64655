"""Images a second of a recipe's training step, with its speed-ups undone and put back one by one.

For the embedded model's recipe the first row is the same step of PyTorch's standard parts,
`standard_step.StandardTraining`. The next is `train_step` with each of the recipe's `CHANGES` undone; from row to row
one more of them is in force, until the last is `train_step` as it is. All start from the same weights, take the same
batches, and do a step in turn, so that other work on the machine meets each alike. Ratios are medians over rounds.

python -m tests.benchmarks.training_step [RECIPE] [--precision fp32|bf16] [--rounds 7] [--threads 1] [--ends]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan import mlp
from bigbigan.discriminator import DiscriminatorBlock
from bigbigan.generator import GeneratorBlock
from bigbigan.layers import DownsampleConv2d, SpectralNorm, UpsampleConv2d, upsample_nearest
from bigbigan.presets import EMBEDDED
from bigbigan.training import step as step_module
from bigbigan.training.config import TrainConfig
from bigbigan.training.recipes import RECIPES
from bigbigan.training.step import Batch, TrainingState, train_step
from tests.benchmarks.standard_step import StandardTraining, copy_spectral_norm, copy_weights, sn

NUM_IMAGES = 600_000  # halfway, where averages have their full half-life
Undo = Callable[[TrainingState], contextlib.AbstractContextManager[object] | None]  # what is None lasts


def contiguous(state: TrainingState) -> contextlib.AbstractContextManager[object]:
    for network in [*state.networks.values(), *(average.module for average in state.ema.values())]:
        network.to(memory_format=torch.contiguous_format)
    state.generator.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return mock.patch.object(step_module, "channels_last", lambda x: x)


def full_size_shortcuts(state: TrainingState) -> None:
    def generate(block: GeneratorBlock, x: Tensor, z: Tensor, shared: None) -> Tensor:
        h = block.conv2(block.norm2(block.conv1(block.norm1(x, z, shared)), z, shared))
        return h + block.shortcut(upsample_nearest(x))

    def discriminate(block: DiscriminatorBlock, x: Tensor) -> Tensor:
        h = block.conv2(F.relu(block.conv1(F.relu(x) if block.relu else x)))
        x = block.shortcut(x) if block.shortcut is not None else x
        return h + (F.avg_pool2d(x, 2) if block.downsample else x)

    override(state, GeneratorBlock, generate)
    override(state, DiscriminatorBlock, discriminate)


def separate_resampling(state: TrainingState) -> None:
    override(state, UpsampleConv2d, lambda layer, x: layer.conv(upsample_nearest(x)))
    override(state, DownsampleConv2d, lambda layer, x: F.avg_pool2d(layer.conv(x), 2))


def override(state: TrainingState, kind: type[nn.Module], forward: Callable[..., Tensor]) -> None:
    for network in state.networks.values():
        for module in network.modules():
            if isinstance(module, kind):
                module.forward = functools.partial(forward, module)


def standard_spectral_norm(state: TrainingState) -> None:
    for network in state.networks.values():
        for parent in list(network.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, SpectralNorm):
                    setattr(parent, name, standard_layer(layer))
    for name, average in state.ema.items():
        average.module = copy.deepcopy(state.networks[name]).requires_grad_(False)


def standard_layer(layer: SpectralNorm) -> nn.Module:
    """With the very same parameters, which the optimiser knows."""
    if isinstance(layer, nn.Conv2d):
        plain: nn.Module = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    else:
        assert isinstance(layer, nn.Linear)
        plain = nn.Linear(layer.in_features, layer.out_features)
    plain.weight, plain.bias = layer.weight, layer.bias
    plain = sn(plain)
    copy_spectral_norm(layer, plain)
    return plain


def pairs_anew(state: TrainingState) -> contextlib.AbstractContextManager[object]:
    original = step_module._discriminator_gradients
    anew = lambda state, batch, keep_graph, metrics: original(state, batch, False, metrics)  # noqa: E731
    return mock.patch.object(step_module, "_discriminator_gradients", anew)


def separate_passes(state: TrainingState) -> None:
    state.config = dataclasses.replace(state.config, separate_passes=True)


def foreach_adam(state: TrainingState) -> None:
    for optimizer in (state.optimizer_d, state.optimizer_ge):
        for group in optimizer.param_groups:
            group |= {"fused": None, "foreach": True}
        optimizer._step_supports_amp_scaling = False  # only fused Adam's


def linear_by_pytorch(state: TrainingState) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(mlp, "trained_linear", F.linear)


BIGAN = "bigan-mnist-mlp"
CHANGES: dict[str, dict[str, Undo]] = {  # by recipe
    EMBEDDED: {
        "channels last": contiguous,
        "1x1 shortcuts at the small side": full_size_shortcuts,
        "resampling within the convolution": separate_resampling,
        "spectral norm of one vector": standard_spectral_norm,
        "last D step's pairs kept for G and E": pairs_anew,
        "one pass of D over both kinds": separate_passes,
        "fused Adam": foreach_adam,
    },
    BIGAN: {"linear layers by oneDNN's kernels": linear_by_pytorch, "fused Adam": foreach_adam},
}


class Variant:
    """A way to do the step; `undo` is what to undo of `train_step`, None the standard parts."""

    def __init__(self, name: str, config: TrainConfig, undo: list[Undo] | None):
        self.name, self.seconds, self.patches = name, [], []
        self.state = TrainingState(config)
        if config.name == BIGAN:  # its scores begin at zero, whatever is below them: `check` would see nothing
            nn.init.normal_(self.state.discriminator.score_xz.weight, generator=torch.Generator().manual_seed(0))
        self.standard: StandardTraining | None = None
        if undo is None:
            self.standard = StandardTraining(config, self.state.ema["generator"].decay(NUM_IMAGES, config.batch_size))
            copy_weights(self.state.networks, self.standard.networks)
        self.patches = [patch for change in undo or [] if (patch := change(self.state)) is not None]

    @property
    def num_parameters(self) -> int:
        networks = self.state.networks if self.standard is None else self.standard.networks
        return sum(p.numel() for network in networks.values() for p in network.parameters())

    def step(self, batches: Callable[[int], Batch]) -> dict[str, Tensor]:
        if self.standard is not None:
            return self.standard.step(batches)
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch)
            return train_step(self.state, batches, NUM_IMAGES)


def variants(config: TrainConfig, ends: bool) -> list[Variant]:
    names, undos = zip(*CHANGES[config.name].items(), strict=True)
    rows: list[tuple[str, list[Undo] | None]] = [("train_step, changes undone", list(undos))]
    rows += [(f"+ {name}", list(undos[i + 1 :])) for i, name in enumerate(names)]
    if config.name == EMBEDDED:
        rows.insert(0, ("standard parts", None))
    return [Variant(name, config, undo) for name, undo in (rows[:: len(rows) - 1] if ends else rows)]


def draw_batches(config: TrainConfig) -> list[Batch]:
    draws, z_dim = torch.Generator().manual_seed(0), config.model.z_dim
    side = config.model.preprocess.resolution
    shapes = ((1, side, side), (z_dim,), (z_dim,))
    return [
        Batch(*(torch.randn(config.batch_size, *shape, generator=draws) for shape in shapes))
        for _ in range(config.d_steps)
    ]


def check(rows: list[Variant], batches: list[Batch]) -> None:
    """A first step: as many parameters, and the same losses but for rounding and, after D's update, spectral norm's
    estimates. That the gradients are the same too is proven in tests/test_standard_step.py."""
    losses = []
    for row in rows:
        assert row.num_parameters == rows[0].num_parameters, f"{row.name} has {row.num_parameters} parameters"
        metrics = row.step(batches.__getitem__)
        losses.append(torch.stack([metrics["loss_d"], metrics["loss_ge"]]))
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses), 2), rtol=0.01, atol=0.05)


def measure(rows: list[Variant], batches: list[Batch], rounds: int, clock: Callable[[], float]) -> None:
    for row in rows:
        row.step(batches.__getitem__)  # a second one, with optimisers and memory in place
    for _ in range(rounds):
        for row in rows:
            start = clock()
            row.step(batches.__getitem__)
            row.seconds.append(clock() - start)


def report(rows: list[Variant], batch_size: int) -> Iterator[str]:
    yield f"{'':44}  img/s  over the row above  over the first"
    for previous, row in zip([rows[0], *rows], rows, strict=False):
        above, standard = (
            statistics.median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))
            for other in (previous, rows[0])
        )
        yield f"{row.name:44} {batch_size / statistics.median(row.seconds):6.1f}  {above:18.2f}  {standard:14.2f}"


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=list(CHANGES), default=EMBEDDED, help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ends", action="store_true", help="the first and the last row only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = dataclasses.replace(RECIPES[args.recipe], precision=args.precision)
    rows, batches = variants(config, args.ends), draw_batches(config)
    check(rows, batches)
    # On one thread, time that other processes take is left out.
    measure(rows, batches, args.rounds, time.process_time if args.threads == 1 else time.perf_counter)
    kind = "CPU time" if args.threads == 1 else "wall-clock time"
    print(f"{config.name}, batch {config.batch_size}, {args.precision}; torch {torch.__version__}")
    print(f"{cpu_name()}, threads: {args.threads}; medians of {args.rounds} rounds, by {kind}")
    print(*report(rows, config.batch_size), sep="\n")


if __name__ == "__main__":
    main()
