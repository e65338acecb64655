"""Batch norm over processes against one process on their batches together: four real processes, gloo."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import close, random_normal, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist

from bigbigan.config import EncoderConfig, MLPConfig
from bigbigan.crossreplica import global_moments
from bigbigan.encoder import Encoder
from bigbigan.layers import (
    BatchNorm,
    ConditionalNormReLU,
    Layers,
    NormReLU,
    StandingStatistics,
    initialize,
    synchronize_batch_norm,
)

WORLD, CHANNELS = 4, 6
# Ranks of a group -> how many of the 12 samples each has.
SPLITS = {(0, 1, 2, 3): [(3, 3, 3, 3), (1, 5, 2, 4)], (0, 1): [(7, 5)], (2, 3): [(1, 11)], (3,): [(12,)]}
CASES = [(ranks, sizes) for ranks, splits in SPLITS.items() for sizes in splits]
ENCODER = EncoderConfig(32, architecture="revnet", depths=(1, 2), base_channels=4, z_dim=3, head=MLPConfig(8, 2))


class Conditional(nn.Module):
    """Conditional norm with a shared vector; the sample's first six values serve as its latent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ConditionalNormReLU(Layers(), CHANNELS, 6, 0, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x.flatten(1)[:, :6], None)


def images() -> Tensor:
    return random_normal(12, CHANNELS, 3, 4, seed=1) * 2 + 1


# Name -> (module, its input of 12 samples). What runs in the processes and, on all samples, in one.
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "norm": lambda: (BatchNorm(CHANNELS, 1e-3), images()),
    "channels-last": lambda: (BatchNorm(CHANNELS, 1e-3), images().to(memory_format=torch.channels_last)),
    "flat": lambda: (BatchNorm(CHANNELS, 1e-3), images()[:, :, 0, 0]),
    "without-affine": lambda: (NormReLU(CHANNELS, 1e-3, affine=False), images()),
    "conditional": lambda: (Conditional(), images()),
}


def gradients(module: nn.Module, x: Tensor, rows: slice) -> dict[str, Tensor]:
    """Output and gradients of the sum of random multiples of it; `rows` of the samples are this process's."""
    x = x[rows].detach().requires_grad_()
    out = module.train()(x)
    (out * random_normal(12, *out.shape[1:], seed=2)[rows].to(out.dtype)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **found}


def standing(module: nn.Module, x: Tensor, rows: slice) -> dict[str, Tensor]:
    with StandingStatistics(module) as statistics:
        statistics(x[rows])
        statistics(x[rows] ** 2)
    return {name: tensor for name, tensor in module.named_buffers() if "running" in name}


def trunk(reversible: bool = True) -> tuple[nn.Module, Tensor]:
    encoder = initialize(Encoder(ENCODER), torch.Generator().manual_seed(3)).double()
    encoder.trunk.reversible = reversible
    return encoder.trunk, random_normal(12, 3, 32, 32, seed=4)


def far_values(dtype: torch.dtype = torch.float32) -> Tensor:
    return (random_normal(12, CHANNELS, 16, 16, seed=5) + 1e4).to(dtype)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    groups = {ranks: dist.new_group(list(ranks)) for ranks in SPLITS}
    results = {}
    for ranks, sizes in CASES:
        if rank not in ranks:
            continue
        group, place = groups[ranks], ranks.index(rank)
        rows = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        found = {}
        for name, make in LAYERS.items():
            module, x = make()
            keys = list(randomize(module).state_dict())
            synchronize_batch_norm(module, group)
            assert list(module.state_dict()) == keys
            found |= {f"{name}/{key}": t for key, t in gradients(module, x, rows).items()}
            found |= {f"standing {name}/{key}": t for key, t in standing(module, x, rows).items()}
        module, x = trunk()
        synchronize_batch_norm(module, group)
        parallel = nn.parallel.DistributedDataParallel(module, process_group=group)
        found |= {f"trunk/{key}": t for key, t in gradients(parallel, x, rows).items()}
        norm = initialize(BatchNorm(CHANNELS, 1e-3), torch.Generator())
        synchronize_batch_norm(norm, group)
        found |= {f"far/{key}": t for key, t in gradients(norm, far_values(), rows).items()}
        for dtype in (torch.float32, torch.bfloat16):
            moments = global_moments((far_values() - 9990).to(dtype)[rows], group)
            found |= {f"moments {dtype}/mean": moments.mean, f"moments {dtype}/var": moments.var}
        if place == 0:  # evaluation and a restored norm do not wait for the others
            norm.eval()(far_values())
            synchronize_batch_norm(norm, None)
            found["restored/out"] = norm.train()(far_values()[rows]).detach()
        results |= {f"{sizes}/{key}": tensor for key, tensor in found.items()}
    save_file({key: tensor.contiguous() for key, tensor in results.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), WORLD)
    return [load_file(Path(folder, f"{rank}.safetensors")) for rank in range(WORLD)]


def select(runs: list[dict[str, Tensor]], ranks: tuple[int, ...], prefix: str) -> dict[str, list[Tensor]]:
    """Of each tensor, what the ranks have of it."""
    keys = [key for key in runs[ranks[0]] if key.startswith(f"{prefix}/")]
    assert keys
    return {key.removeprefix(f"{prefix}/"): [runs[rank][key] for rank in ranks] for key in keys}


cases = pytest.mark.parametrize(("ranks", "sizes"), CASES, ids=str)


@cases
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_one_process(
    runs: list[dict[str, Tensor]], ranks: tuple[int, ...], sizes: tuple[int, ...], name: str
) -> None:
    module, x = LAYERS[name]()
    expected = gradients(randomize(module), x, slice(None))
    found = select(runs, ranks, f"{sizes}/{name}")
    assert found.keys() == expected.keys()
    for key, parts in found.items():  # gradients of parameters are sums over processes
        close(torch.cat(parts) if key in ("out", "x") else sum(parts), expected[key], 1e-12)


@cases
@pytest.mark.parametrize("name", LAYERS)
def test_standing_statistics_are_of_all_processes_and_the_same_bits_on_each(
    runs: list[dict[str, Tensor]], ranks: tuple[int, ...], sizes: tuple[int, ...], name: str
) -> None:
    module, x = LAYERS[name]()
    expected = standing(randomize(module), x, slice(None))
    found = select(runs, ranks, f"{sizes}/standing {name}")
    assert found.keys() == expected.keys()
    for key, parts in found.items():
        close(parts[0], expected[key], 1e-12)
        assert all(torch.equal(part, parts[0]) for part in parts)


@cases
def test_a_reversible_trunk_under_ddp_has_the_gradients_of_a_plain_one_in_one_process(
    runs: list[dict[str, Tensor]], ranks: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    expected = gradients(*trunk(reversible=False), slice(None))
    found = select(runs, ranks, f"{sizes}/trunk")
    assert found.keys() == {key if key in ("out", "x") else f"module.{key}" for key in expected}
    for key, value in expected.items():
        parts = found.get(key) or [len(ranks) * part for part in found[f"module.{key}"]]  # DDP gives the mean
        for part in [torch.cat(parts)] if key in ("out", "x") else parts:
            close(part / value.norm(), value / value.norm(), 1e-12)


@cases
def test_float32_survives_a_mean_of_ten_thousand_deviations(
    runs: list[dict[str, Tensor]], ranks: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    norm = initialize(BatchNorm(CHANNELS, 1e-3), torch.Generator()).double()
    expected = gradients(norm, far_values().double(), slice(None))
    found = select(runs, ranks, f"{sizes}/far")
    for key, parts in found.items():
        value = expected[key]
        error = (torch.cat(parts) if key in ("out", "x") else sum(parts)).double() - value
        assert error.norm() / value.norm() < 4e-3, key  # the last place of an input is 1e-3


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_have_the_precision_of_float32(
    runs: list[dict[str, Tensor]], ranks: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (far_values() - 9990).to(dtype).double()
    found = select(runs, ranks, f"{sizes}/moments {dtype}")
    close(found["mean"][0].double(), x.mean((0, 2, 3)), 1e-5)
    close(found["var"][0].double(), x.var((0, 2, 3), correction=0), 1e-5)


def test_none_restores_the_norm_of_one_process(runs: list[dict[str, Tensor]]) -> None:
    norm = initialize(BatchNorm(CHANNELS, 1e-3), torch.Generator()).train()
    assert torch.equal(runs[0]["(1, 5, 2, 4)/restored/out"], norm(far_values()[:1]))
