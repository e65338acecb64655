"""Checkpoints: exact, verified, and never half there."""

from __future__ import annotations

import builtins
import errno
import logging
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from bigbigan.training import checkpoint
from bigbigan.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)


def save(folder: Path, step: int, **options) -> Path:
    tensors = {
        "generator": {"w": torch.full((3,), step), "b": torch.tensor(step / 3)},
        "optimizer_d": {"0.exp_avg": torch.full((2,), -step)},
    }
    return save_checkpoint(folder, step, tensors, {"images_seen": step * 8, "loss": step / 7}, **options)


def check(loaded: checkpoint.Checkpoint | None) -> int:
    """The step of a checkpoint that `save` wrote, all of whose parts agree on it."""
    assert loaded is not None
    step = loaded.step
    assert loaded.state == {"images_seen": step * 8, "loss": step / 7}
    assert set(loaded.tensors) == {"generator", "optimizer_d"}
    assert loaded.tensors["generator"]["w"].tolist() == [step] * 3
    assert torch.equal(loaded.tensors["generator"]["b"], torch.tensor(step / 3))
    assert loaded.tensors["optimizer_d"]["0.exp_avg"].tolist() == [-step] * 2
    return step


def steps(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def newest(folder: Path) -> int:
    return max(int(name[5:]) for name in steps(folder) if name.startswith("step-"))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_tensors_of_every_kind_survive_bit_for_bit(tmp_path: Path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    group = {
        "scalar": torch.tensor(3.25),
        "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]),
        "half": base.bfloat16(),
        "double": base.double() / 3,
        "count": torch.tensor(2**62 + 1),
        "mask": base > 0,
        "rng": torch.Generator().manual_seed(5).get_state(),
        "empty": torch.empty(0, 3),
        "whole": base,
        "view": base[1:3],  # shares storage with the ones beside it
        "same": base,
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "grown": base[:, ::2].requires_grad_(),
    }
    state = {"lr": 0.1 + 0.2, "big": 2**70, "text": "ä\n", "nested": [{"a": None, "b": [True, -0.0]}]}
    path = save_checkpoint(tmp_path, 12, {"all": group, "none": {}}, state)
    assert path == tmp_path / "step-00000012"
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == state and loaded.tensors["none"] == {}
    assert set(loaded.tensors["all"]) == set(group)
    for name, tensor in group.items():
        again = loaded.tensors["all"][name]
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape), name
        assert bits(again) == bits(tensor.detach()), name
    generator = torch.Generator()
    generator.set_state(loaded.tensors["all"]["rng"])
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    loaded.tensors["all"]["whole"].add_(1)  # memory of its own: neither read-only nor the file's
    assert load_checkpoint(tmp_path, step=12) is not None


def test_keeps_the_newest_and_the_protected(tmp_path: Path):
    assert load_checkpoint(tmp_path / "absent") is None and load_checkpoint(tmp_path) is None
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2, protect={10})
    assert steps(tmp_path) == ["step-00000010", "step-00000030", "step-00000040"]
    assert check(load_checkpoint(tmp_path)) == 40
    assert check(load_checkpoint(tmp_path, 10)) == 10
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 20; it holds \[40, 30, 10\]"):
        load_checkpoint(tmp_path, 20)
    save(tmp_path, 35, keep=1)  # going on from 30: what is above may be corrupt and is not counted
    assert steps(tmp_path) == ["step-00000035", "step-00000040"]


def test_saving_a_step_again_keeps_it_if_intact_and_replaces_it_if_not(tmp_path: Path, caplog):
    path = save(tmp_path, 5)
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}
    save_checkpoint(tmp_path, 5, {"generator": {"w": torch.zeros(1)}}, {})
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()} == before
    assert check(load_checkpoint(tmp_path)) == 5
    (path / "generator.safetensors").unlink()
    save(tmp_path, 5)
    assert "replacing a corrupt checkpoint" in caplog.text and "generator.safetensors" in caplog.text
    assert check(load_checkpoint(tmp_path)) == 5 and steps(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: "a"}, {"a": float("nan")}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, state)
    assert not steps(tmp_path)


@pytest.mark.parametrize("group", ["../evil", "a/b", "", "a.b"])
def test_group_names_are_plain(tmp_path: Path, group: str):
    with pytest.raises(ValueError, match="plain file names"):
        save_checkpoint(tmp_path, 1, {group: {}}, {})


def test_every_flipped_byte_is_noticed(tmp_path: Path, caplog):
    path = save(tmp_path, 7)
    caplog.set_level(logging.CRITICAL)
    flips = 0
    for file in path.iterdir():
        data = file.read_bytes()
        for position in range(len(data)):
            file.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match=file.name):
                load_checkpoint(tmp_path)
            flips += 1
        file.write_bytes(data)
    assert flips > 500 and check(load_checkpoint(tmp_path)) == 7


FILES = ("generator.safetensors", "optimizer_d.safetensors", "manifest.json")


def swap(a: Path, b: Path) -> None:
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "swap", "of_another_step", "extra"])
def test_damage_is_reported_and_the_older_checkpoint_taken(tmp_path: Path, caplog, file: str, damage: str):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    target = new / file
    data = target.read_bytes()
    if damage == "flip":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        target.write_bytes(data[:-1])
    elif damage == "empty":
        target.write_bytes(b"")
    elif damage == "remove":
        target.unlink()
    elif damage == "swap":
        swap(target, new / FILES[FILES.index(file) - 1])
    elif damage == "of_another_step":
        shutil.copyfile(old / file, target)
    elif damage == "extra":
        shutil.copyfile(target, new / f"more_{file}")
    assert check(load_checkpoint(tmp_path)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(new) in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(tmp_path, step=2)
    shutil.rmtree(old)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        load_checkpoint(tmp_path)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path):
    save(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="is of step 1"):
        load_checkpoint(tmp_path)


def test_a_failing_disk_at_any_call_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)
    calls = {"now": 0, "fail": 0}

    def failing(module, name, applies=lambda *arguments: True):
        real = getattr(module, name)

        def call(*arguments, **options):
            if applies(*arguments):
                calls["now"] += 1
                if calls["now"] == calls["fail"]:
                    raise OSError(errno.ENOSPC, "no space left")
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    failing(os, "mkdir", lambda path, *rest: Path(path) != tmp_path)  # which exists, so its error is harmless
    failing(builtins, "open", lambda path, mode="r", *rest: "x" in mode or "w" in mode)
    failing(os, "fsync")
    failing(os, "replace")
    step = 2
    for fail in range(1, 100):
        calls.update(now=0, fail=fail)
        before = step
        try:
            save(tmp_path, step, keep=1)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            calls.update(fail=0)
            step = check(load_checkpoint(tmp_path)) + 1
            # once renamed, the new one is complete; before, the old one is
            assert step in (before, before + 1)
            assert not [name for name in steps(tmp_path) if name.startswith(".")]  # a full disk gets its space back
        else:
            break
    assert 10 < fail < 100
    monkeypatch.undo()
    save(tmp_path, step + 1, keep=1)
    assert steps(tmp_path) == [f"step-{step + 1:08d}"]


def _save_forever(folder: Path, step: int) -> None:
    """Child process: saves as slowly as a large model does, until killed."""

    def slow_write(path: Path, data: bytes) -> None:
        with open(path, "xb") as file:
            for start in range(0, len(data), 100):
                file.write(data[start : start + 100])
                file.flush()
                time.sleep(0.002)

    replace, rmtree = os.replace, shutil.rmtree

    def slow_replace(source, target):
        replace(source, target)
        time.sleep(0.005)

    def slow_rmtree(path, **options):
        for file in list(Path(path).iterdir()):
            file.unlink()
            time.sleep(0.002)
        rmtree(path, **options)

    checkpoint._write_file = slow_write
    os.replace, shutil.rmtree = slow_replace, slow_rmtree
    while True:
        save(folder, step, keep=2)
        step += 1


def test_sigkill_at_any_moment_leaves_a_verified_checkpoint(tmp_path: Path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "bigbigan.training.checkpoint"])
    moments = random.Random(0)
    step, interrupted = 1, 0
    save(tmp_path, step)
    for _ in range(8):
        child = processes.Process(target=_save_forever, args=(tmp_path, step + 1), daemon=True)
        child.start()
        while newest(tmp_path) < step + 2:  # it has come to prune, too
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        child.kill()
        child.join()
        interrupted += any(name.startswith(".") for name in steps(tmp_path))
        for name in steps(tmp_path):  # whatever looks like a checkpoint is one
            assert name.startswith(".") or check(load_checkpoint(tmp_path, int(name[5:])))
        found = check(load_checkpoint(tmp_path))
        assert found >= step + 2
        step = found + 1
        save(tmp_path, step)
        assert steps(tmp_path) == [f"step-{number:08d}" for number in (step - 1, step)]
    assert interrupted >= 2


def network() -> tuple[torch.nn.Sequential, torch.optim.Adam]:
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    layers.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))  # Adam keeps no state for it
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    parts = [{"params": layers[0].parameters()}, {"params": [layers.unused, *layers[2].parameters()], "lr": 3e-3}]
    return layers, torch.optim.Adam(parts, lr=1e-3, betas=(0.0, 0.999), eps=1e-8, amsgrad=True)


def train(layers: torch.nn.Module, optimizer: torch.optim.Adam, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()


def test_adam_goes_on_bit_for_bit(tmp_path: Path):
    layers, optimizer = network()
    train(layers, optimizer, 0, 4)
    optimizer.param_groups[0]["lr"] = 0.1 / 3  # as a schedule would leave it
    moments, hyperparameters = optimizer_tensors(optimizer)
    save_checkpoint(tmp_path, 4, {"model": layers.state_dict(), "adam": moments}, {"adam": hyperparameters})
    train(layers, optimizer, 4, 7)

    loaded = load_checkpoint(tmp_path)
    resumed, again = network()
    resumed.load_state_dict(loaded.tensors["model"])
    load_optimizer(again, loaded.tensors["adam"], loaded.state["adam"])
    kept = loaded.tensors["adam"]["0.exp_avg"].clone()
    train(resumed, again, 4, 7)
    assert torch.equal(loaded.tensors["adam"]["0.exp_avg"], kept)
    for (name, expected), actual in zip(layers.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert bits(actual) == bits(expected), name
    expected_tensors, expected_state = optimizer_tensors(optimizer)
    actual_tensors, actual_state = optimizer_tensors(again)
    assert actual_state == expected_state and again.param_groups[0]["betas"] == (0.0, 0.999)
    assert {name: bits(value) for name, value in actual_tensors.items()} == {
        name: bits(value) for name, value in expected_tensors.items()
    }


def test_an_optimizer_refuses_what_does_not_fit():
    layers, optimizer = network()
    train(layers, optimizer, 0, 1)
    tensors, state = optimizer_tensors(optimizer)
    _, fresh = network()
    without = {name: value for name, value in tensors.items() if name != "1.exp_avg_sq"}
    for wrong, named in [
        (without, "1.exp_avg_sq is missing"),
        ({name: value for name, value in tensors.items() if not name.startswith("0.")}, "4 optimizer tensors"),
        ({**tensors, "9.exp_avg": torch.zeros(1)}, "9.exp_avg is .* expected none"),
        ({**tensors, "2.exp_avg": torch.zeros(3)}, "2.exp_avg"),  # of the unused parameter
        ({**tensors, "0.exp_avg": tensors["0.exp_avg"].t().contiguous()}, "0.exp_avg"),
        ({**tensors, "0.exp_avg": tensors["0.exp_avg"].double()}, "0.exp_avg"),
    ]:
        with pytest.raises(CheckpointError, match=named):
            load_optimizer(fresh, wrong, state)
    with pytest.raises(CheckpointError, match=r"groups of \[6\] .* of \[2, 3\]|groups of \[5\] .* of \[2, 3\]"):
        load_optimizer(torch.optim.Adam(layers.parameters()), tensors, state)
    odd = {**state, "param_groups": [{**group, "momentum": 0.9} for group in state["param_groups"]]}
    with pytest.raises(CheckpointError, match="momentum"):
        load_optimizer(fresh, tensors, odd)
    assert not fresh.state
