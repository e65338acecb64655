"""RevNet's reversible back-propagation against autograd: gradients, memory, and what a second pass must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import random_images, random_normal, randomize
from torch import Tensor

from bigbigan.config import EncoderConfig, MLPConfig
from bigbigan.layers import Layers, StandingStatistics, advance_spectral_norm, initialize
from bigbigan.reversible import couple, reversible
from bigbigan.revnet import RevNet

VARIANTS: dict[str, dict[str, Any]] = {
    "two stages": {"depths": (2, 3)},
    "single units": {"depths": (1, 1, 1)},
    "without affine": {"depths": (3, 1, 2), "bn_affine": False},
    "odd sizes": {"depths": (2, 2), "resolution": 36},
}
X = random_images(6, 3, 32, 32)


def make(reversible: bool, *, start: bool = False, spectral_norm: bool = True, **options: Any) -> RevNet:
    """In float64, with random weights or as training starts: there the zeros between stages meet biases of zero."""
    config = {"resolution": 32, "depths": (2, 3), "base_channels": 8, "z_dim": 4, "head": MLPConfig(8, 2)} | options
    trunk = RevNet(EncoderConfig(architecture="revnet", **config), Layers(spectral_norm))
    initialize(trunk.double(), torch.Generator().manual_seed(0)) if start else randomize(trunk)
    trunk.reversible = reversible
    return trunk.train()


def backward(trunk: RevNet, x: Tensor) -> Tensor:
    """Backward pass from random multiples of the output, which it returns."""
    out = trunk(x)
    (out * random_normal(*out.shape, seed=1).to(out.dtype)).sum().backward()
    return out.detach()


def gradients(trunk: RevNet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert found.keys() == expected.keys() and expected
    return max(((found[k] - t).norm() / t.norm()).item() for k, t in expected.items())


def run(trunk: RevNet, x: Tensor = X) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_()
    out = backward(trunk, x)
    return out, {**gradients(trunk), "x": x.grad}


@pytest.mark.parametrize("start", [False, True], ids=["random", "start"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_equal_and_gradients_those_of_autograd(variant: str, start: bool) -> None:
    x = random_images(6, 3, VARIANTS[variant].get("resolution", 32), VARIANTS[variant].get("resolution", 32))
    (out, found), (plain, expected) = (run(make(flag, start=start, **VARIANTS[variant]), x) for flag in (True, False))
    assert torch.equal(out, plain)
    assert error(found, expected) < 1e-10


def test_float32_gives_equal_outputs_and_close_gradients() -> None:
    (out, found), (plain, expected) = (run(make(flag, depths=(3, 4)).float(), X.float()) for flag in (True, False))
    assert torch.equal(out, plain)
    assert error(found, expected) < 2e-2  # measured: 5e-6; a ReLU near its kink may tip


def test_autocast_is_that_of_the_forward_pass_and_streams_are_float32() -> None:
    units, streams = make(True, depths=(6,)).float().stages[0], random_normal(2, 8, 16, 8, 8).float()
    results = []
    for function in (reversible, couple):
        units.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.cat(function(units, *streams))
        assert out.dtype == torch.float32
        (out * random_normal(*out.shape, seed=1).float()).sum().backward()
        results.append((out, {name: p.grad.clone() for name, p in units.named_parameters()}))
    (out, found), (plain, expected) = results
    assert torch.equal(out, plain)
    assert error(found, expected) < 1e-2  # measured: 1e-7; without autocast in the backward pass: 0.4


def test_half_precision_streams_stay_so_outside_and_are_as_good_as_plain_ones() -> None:
    exact, results = make(False, depths=(6,)), []
    backward(exact, X)
    for flag in (True, False):
        trunk = make(flag, depths=(6,)).float()
        with torch.autocast("cpu", torch.bfloat16):
            out = trunk(X.float())
        assert out.dtype == torch.bfloat16
        (out * random_normal(*out.shape, seed=1).to(out.dtype)).sum().backward()
        flat = [torch.cat([grad.double().flatten() for grad in gradients(m).values()]) for m in (trunk, exact)]
        results.append((flat[0] - flat[1]).norm() / flat[1].norm())
    assert results[0] < 1.2 * results[1]


def test_passes_share_a_region_of_autocast() -> None:
    """Casts of weights are cached in it: neither pass may take some from the other that have no graph."""
    trunks = [make(flag, spectral_norm=False).float() for flag in (True, False)]
    with torch.autocast("cpu", torch.bfloat16):
        for trunk in trunks:
            trunk(X.float())
            trunk.reversible = False
            backward(trunk, X.float())
    assert error(*map(gradients, trunks)) == 0


def test_standing_statistics_count_a_batch_once() -> None:
    buffers = []
    for flag in (True, False):
        trunk = make(flag)
        with StandingStatistics(trunk) as statistics:
            backward(trunk, X)
            statistics.passes += 1
            statistics(X + 1)
        buffers.append(dict(trunk.named_buffers()))
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[1])


def test_two_passes_of_one_graph() -> None:
    trunks = make(True), make(False)
    for trunk in trunks:
        (trunk(X) * trunk(X.flip(3) * 2)).sum().backward()
    assert error(*map(gradients, trunks)) < 1e-10


def test_a_retained_graph_goes_back_twice() -> None:
    trunk = make(True)
    loss = trunk(X).square().mean()
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(trunk).items()}
    loss.backward()
    assert error(gradients(trunk), {name: 2 * grad for name, grad in once.items()}) < 1e-14


def test_evaluation_is_not_reversible() -> None:
    results = [run(make(flag).eval()) for flag in (True, False)]
    assert torch.equal(results[0][0], results[1][0]) and error(results[0][1], results[1][1]) == 0


def test_the_mode_may_change_before_the_backward_pass() -> None:
    expected = run(make(False))[1]
    trunk, x = make(True), X.clone().requires_grad_()
    out = trunk(x)
    trunk.eval()
    (out * random_normal(*out.shape, seed=1)).sum().backward()
    assert error({**gradients(trunk), "x": x.grad}, expected) < 1e-10


def change_weights(trunk: RevNet) -> None:
    with torch.no_grad():
        trunk.stages[0][0].convs[0].conv.weight.mul_(2)


@pytest.mark.parametrize("change", [change_weights, advance_spectral_norm])
def test_changed_weights_are_an_error(change: Callable[[RevNet], None]) -> None:
    trunk = make(True)
    out = trunk(X)
    change(trunk)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_see_each_gradient_once_and_whole() -> None:
    trunk = make(True)
    seen: dict[str, list[Tensor]] = {}
    for name, parameter in trunk.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.setdefault(name, []).append(p.grad))
    (trunk(X) * trunk(X * 2)).sum().backward()
    for name, parameter in trunk.named_parameters():
        assert len(seen[name]) == 2 and all(torch.equal(grad, parameter.grad) for grad in seen[name])


def test_frozen_weights_get_no_gradient() -> None:
    trunk, expected = make(True), run(make(False))[1]
    trunk.stages[1].requires_grad_(False)
    found = run(trunk)[1]
    assert not any(name.startswith("stages.1") for name in found)
    assert error(found, {name: expected[name] for name in found}) < 1e-10


def test_random_state_is_left_alone() -> None:
    trunk, before = make(True), torch.random.get_rng_state()
    run(trunk)
    assert torch.equal(torch.random.get_rng_state(), before)


def saved_bytes(trunk: RevNet, x: Tensor = X) -> int:
    """What the graph of a forward pass keeps, beside weights."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = trunk(x)
    assert out.requires_grad
    own = {t.untyped_storage().data_ptr() for t in (*trunk.parameters(), *trunk.buffers())}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_memory_does_not_grow_with_depth() -> None:
    sizes = {flag: [saved_bytes(make(flag, spectral_norm=False, depths=(n, n))) for n in (2, 6)] for flag in (0, 1)}
    assert sizes[True][0] == sizes[True][1] and sizes[False][1] > 1.5 * sizes[False][0]
