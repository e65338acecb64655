"""What a run will take: parameters, arithmetic, memory. Counted in a step on shapes alone; nothing is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bigbigan.training.config import TrainConfig
from bigbigan.training.step import Batch, TrainingState, train_step


@dataclass(frozen=True)
class Cost:
    """Of one step on the whole batch."""

    parameters: dict[str, int]
    flops: float  # of convolutions and matrix products, a multiplication and an addition counting two
    state_bytes: int  # weights, gradients, Adam's moments, averages: in every process
    activation_bytes: int  # the most that is kept at a time (float32, not `reversible`): over all processes

    def lines(self, config: TrainConfig) -> list[str]:
        """For people."""
        steps = -(-config.total_images // config.batch_size)
        return [
            "parameters: " + ", ".join(f"{part} {number:,}" for part, number in self.parameters.items()),
            f"arithmetic: {self.flops / 1e9:,.1f} GFLOP per step, {self.flops * steps:.2g} FLOP in {steps:,} steps",
            f"memory: {_size(self.state_bytes)} for weights, gradients, moments and averages in each process, and "
            f"{_size(self.activation_bytes)} for activations over all processes (float32"
            + (", before reversible saves some)" if config.reversible else ")"),
        ]


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def estimate(config: TrainConfig) -> Cost:
    """Counts two small batches and extrapolates, as everything is linear in the batch but for spectral norm."""
    config = replace(config, precision="fp32", reversible=False)
    every = 4 * config.batch_size // config.rotated_batch_size if config.rotated_batch_size else 1
    small = 2 * config.accumulate * every
    (flops, kept, sizes), (flops_2, kept_2, _) = (_count(config, every, n) for n in (small, 2 * small))
    averaged = sum(sizes.get(name, 0) for name in ("generator", "encoder")) if config.ema_halflife_images else 0

    def at_batch(first: float, second: float) -> float:
        return first + (second - first) * (config.batch_size - small) / small

    state_bytes = 4 * (4 * sum(sizes.values()) + averaged)
    return Cost(sizes, at_batch(flops, flops_2), state_bytes, round(at_batch(kept, kept_2)))


def _count(config: TrainConfig, every: int, size: int) -> tuple[int, int, dict[str, int]]:
    """FLOPs, peak of kept bytes, parameters."""
    rotated = 4 * size // every if config.rotated_batch_size else 0
    state = TrainingState(replace(config, batch_size=size, rotated_batch_size=rotated), "meta")
    state.all_finite = lambda loss: True  # type: ignore[method-assign]
    state.optimizer_d = state.optimizer_ge = _NoOptimizer()  # type: ignore[assignment]
    state.ema = {}
    side = config.model.preprocess.resolution
    x = torch.empty(size, config.model.image_channels, side, side, device="meta")
    z = torch.empty(size, config.model.z_dim, device="meta")
    weights = {_storage(p) for network in state.networks.values() for p in (*network.parameters(), *network.buffers())}
    ledger = _Ledger(weights)
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(ledger.keep, _Kept.tensor_of):
        train_step(state, lambda i: Batch(x, z, z), 0)
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in state.networks.items()}
    return counter.get_total_flops(), ledger.peak, sizes


class _NoOptimizer:
    param_groups: tuple[dict[str, float], ...] = ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def step(self) -> None:
        pass


class _Ledger:
    """Bytes that graphs hold at a time, each storage once."""

    def __init__(self, ignored: set[int]):
        self.ignored, self.holders, self.held, self.peak = ignored, Counter[int](), 0, 0

    def keep(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)


class _Kept:
    """A tensor as a graph keeps it; gone from the ledger when the graph is."""

    def __init__(self, ledger: _Ledger, tensor: Tensor):
        self.ledger, self.tensor, self.key = ledger, tensor, _storage(tensor)
        if self.key not in ledger.ignored:
            ledger.holders[self.key] += 1
            if ledger.holders[self.key] == 1:
                ledger.held += tensor.untyped_storage().nbytes()
                ledger.peak = max(ledger.peak, ledger.held)

    def __del__(self) -> None:
        if self.key not in self.ledger.ignored:
            self.ledger.holders[self.key] -= 1
            if self.ledger.holders[self.key] == 0:
                self.ledger.held -= self.tensor.untyped_storage().nbytes()

    @staticmethod
    def tensor_of(kept: _Kept) -> Tensor:
        return kept.tensor


def _storage(tensor: Tensor | nn.Parameter) -> int:
    return tensor.untyped_storage()._cdata
