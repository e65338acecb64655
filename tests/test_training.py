"""The training core: objective, steps, averages, export, and runs that stop and go on."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bigbigan
from bigbigan import files
from bigbigan.data.latents import draw_latents
from bigbigan.data.opening import open_dataset
from bigbigan.discriminator import DiscriminatorOutput
from bigbigan.layers import SpectralNorm, advance_spectral_norm
from bigbigan.presets import PRESETS
from bigbigan.schema import ConfigError
from bigbigan.training import loop, runfolder, runstate
from bigbigan.training.config import TrainConfig
from bigbigan.training.ema import EMA
from bigbigan.training.export import inference_model
from bigbigan.training.losses import discriminator_loss, generator_encoder_loss
from bigbigan.training.monitor import Monitor
from bigbigan.training.step import Batch, TrainingState, make_pairs, score, train_step

TINY = TrainConfig(
    "tiny",
    PRESETS["bigbigan-tiny"].config,
    total_images=48,
    batch_size=4,
    encoder_lr_multiplier=10.0,
    standing_passes=2,
    log_images=8,
    checkpoint_images=16,
    snapshot_images=24,
    probe_images=12,
)


def tiny_batch(step: int, i: int = 0) -> Batch:
    x = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(100 * step + i)) * 2 - 1
    return Batch(x, draw_latents(0, step, 2 * i, (4, 8)), draw_latents(0, step, 2 * i + 1, (4, 8)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 pictures of two classes: bright and dark."""
    draws = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "photos" / ("bright" if i % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 100, (32, 32, 3)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


# --- the objective ---------------------------------------------------------------------------------------------------


def outputs(*columns: list[float] | None) -> DiscriminatorOutput:
    return DiscriminatorOutput(*(None if c is None else torch.tensor(c) for c in columns))


def test_losses_by_hand() -> None:
    real = outputs([2.0, 0.0], [-1.0, 0.5], [1.0, 3.0])
    fake = outputs([-2.0, 0.0], [1.0, -0.5], [0.0, -4.0])
    # real: (0 + 1) / 2 + (2 + 0.5) / 2 + (0 + 0) / 2; fake: (0 + 1) / 2 + (2 + 0.5) / 2 + (1 + 0) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 + 1.25 + 0 + 0.5 + 1.25 + 0.5)
    # means of real 1, -0.25, 2; of fake -1, 0.25, -2
    assert generator_encoder_loss(real, fake).item() == pytest.approx((1 - 0.25 + 2) - (-1 + 0.25 - 2))


def test_each_score_is_clamped_separately() -> None:
    real, fake = outputs([5.0], [-1.0], None), outputs([-9.0], [-9.0], None)
    assert discriminator_loss(real, fake).item() == 2.0  # clamping the sum, 1 - (5 - 1), would give 0


def test_gradient_directions() -> None:
    """E lowers the scores of its pairs, G raises those of its own, D does the opposite."""
    state = TrainingState(TINY)
    pairs = make_pairs(state, tiny_batch(0))
    pairs.real_z.retain_grad(), pairs.fake_x.retain_grad()

    def scores() -> tuple[Tensor, Tensor]:
        real, fake = score(state.discriminator, pairs)
        return sum(s.mean() for s in real.present()), sum(s.mean() for s in fake.present())

    real, fake = scores()
    generator_encoder_loss(*score(state.discriminator, pairs)).backward()
    with torch.no_grad():
        pairs.real_z.sub_(1e-3 * pairs.real_z.grad)
        pairs.fake_x.sub_(1e-3 * pairs.fake_x.grad)
    new_real, new_fake = scores()
    assert new_real < real and new_fake > fake
    assert pairs.detach().real_z.grad_fn is None and pairs.detach().fake_x.grad_fn is None


# --- one step --------------------------------------------------------------------------------------------------------


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("d_steps, reuse, batches", [(1, True, 1), (2, True, 2), (2, False, 3)])
def test_a_step_takes_fresh_batches(d_steps: int, reuse: bool, batches: int) -> None:
    config = dataclasses.replace(TINY, d_steps=d_steps, reuse_batch=reuse)
    state, taken = TrainingState(config), []
    train_step(state, lambda i: taken.append(i) or tiny_batch(0, i), 4)
    assert taken == list(range(batches)) and config.batches_per_step == batches


def test_first_adam_step_shows_the_learning_rates() -> None:
    """With beta1 = 0, Adam's first step moves every weight with a gradient by its learning rate."""
    config = dataclasses.replace(TINY, lr_g=1e-3, lr_d=2e-3, encoder_lr_multiplier=10.0)
    state = TrainingState(config)
    before = {name: weights(network) for name, network in state.networks.items()}
    train_step(state, lambda i: tiny_batch(0, i), 4)
    for name, rate in (("generator", 1e-3), ("encoder", 1e-2), ("discriminator", 2e-3)):
        network = getattr(state, name)
        moves = torch.cat([(p.detach() - before[name][n]).abs().flatten() for n, p in network.named_parameters()])
        assert moves.max().item() == pytest.approx(rate, rel=1e-3), name


def test_spectral_norm_advances_once_a_step_with_the_weights_of_the_forward_pass() -> None:
    state = TrainingState(TINY)
    layers = {
        f"{part}.{name}": layer
        for part in ("generator", "discriminator")
        for name, layer in getattr(state, part).named_modules()
        if isinstance(layer, SpectralNorm)
    }
    expected = {}
    for name, layer in layers.items():
        matrix = layer.weight.detach().flatten(1).double().numpy()
        v = layer.u.double().numpy() @ matrix
        u = (v / max(np.linalg.norm(v), 1e-4)) @ matrix.T
        expected[name] = u / max(np.linalg.norm(u), 1e-4)
    train_step(state, lambda i: tiny_batch(0, i), 4)
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.u.numpy(), expected[name], atol=1e-5, err_msg=name)


def test_non_finite_loss_stops_before_any_weight_changes() -> None:
    state = TrainingState(TINY)
    before = weights(state.discriminator)
    batch = tiny_batch(0)
    batch.x[0] = float("nan")
    with pytest.raises(FloatingPointError, match="discriminator loss is nan"):
        train_step(state, lambda i: batch, 4)
    assert all(torch.equal(before[name], value) for name, value in state.discriminator.state_dict().items())


# --- averages and export ---------------------------------------------------------------------------------------------


def test_ema_halflife_and_buffers() -> None:
    module = nn.BatchNorm1d(1)
    average = EMA(module, halflife_images=100, rampup=0)
    module.weight.data.fill_(3.0)  # from 1
    module.running_mean.fill_(7.0)
    for k in range(10):
        average.update(module, 10 * (k + 1), 10)
    assert average.module.weight.item() == pytest.approx(2.0)  # half of the way after one half-life
    assert average.module.running_mean.item() == 7.0  # buffers are copied


def test_ema_rampup_shortens_the_halflife_early() -> None:
    average = EMA(nn.Linear(1, 1), halflife_images=1000, rampup=0.05)
    assert average.decay(200, 10) == pytest.approx(0.5)  # half-life 10 images
    assert average.decay(10**9, 10) == pytest.approx(0.5 ** (10 / 1000))


def test_ema_copies_the_weights_until_it_starts() -> None:
    average = EMA(nn.Linear(1, 1), halflife_images=1000, start_images=500)
    assert average.decay(500, 10) == 0
    assert average.decay(510, 10) == pytest.approx(0.5 ** (10 / 1000))


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        ({"ema_rampup": 0.05}, 0.5 ** (4 / 50)),  # a twentieth of 1000 images
        ({"ema_rampup": 0.0}, 0.5 ** (4 / 100)),
        ({"ema_rampup": 0.0, "ema_start_images": 1000}, 0.0),
    ],
)
def test_steps_average_by_the_rule_of_their_configuration(rule: dict[str, float], decay: float) -> None:
    state = TrainingState(dataclasses.replace(TINY, lr_g=0.1, ema_halflife_images=100, **rule))
    before = state.ema["generator"].module.conv.weight.clone()
    train_step(state, lambda i: tiny_batch(0, i), 1000)
    expected = decay * before + (1 - decay) * state.generator.conv.weight
    torch.testing.assert_close(state.ema["generator"].module.conv.weight, expected)


def test_exported_ema_weights_have_spectral_norm_one() -> None:
    """Dividing the average by what the live or the averaged vectors give would leave norms above one."""
    state = TrainingState(TINY)
    for network in (state.generator, state.ema["generator"].module):
        for layer in network.modules():
            if isinstance(layer, SpectralNorm):
                layer.weight.data.mul_(3).add_(torch.randn(layer.weight.shape))
        advance_spectral_norm(network)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    model = inference_model(state, images)
    average = dict(state.ema["generator"].module.named_modules())
    checked = 0
    for name, layer in model.generator.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            raw = average[name].weight.detach().flatten(1).double().numpy()
            wanted = raw / np.linalg.svd(raw, compute_uv=False)[0]
            np.testing.assert_allclose(layer.weight.detach().flatten(1).numpy(), wanted, atol=1e-6)
            checked += 1
    assert checked > 10


def test_export_has_standing_statistics_of_its_own_weights() -> None:
    """The first norm of E sees the stem's output: its statistics are those of the images, averaged over batches."""
    state = TrainingState(TINY)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    model = inference_model(state, images)  # two passes of four images: each image once, in some order
    stem = model.encoder.trunk.stem(images.float() / 127.5 - 1).detach()
    norm = model.encoder.trunk.units[0].norms[0]
    torch.testing.assert_close(norm.running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not torch.equal(model.generator.norm.running_var, torch.ones_like(model.generator.norm.running_var))
    assert not torch.equal(model.encoder.feature_norm.running_mean, torch.zeros(model.encoder.num_features))
    assert not any(module.training for module in model.modules())


def test_shared_vector_folds_into_biases() -> None:
    """The paper's generator in training form and its exported form draw the same images."""
    wide = dataclasses.replace(TINY.model.generator, shared_dim=6)
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, generator=wide))
    state = TrainingState(config)
    source = state.ema["generator"].module.eval()
    for _ in range(300):
        advance_spectral_norm(source)
    plain = bigbigan.BigBiGAN(config.model, ("generator",)).eval()
    plain.generator.load_state_dict(dict(bigbigan.layers.effective_state(source)), strict=True)
    z = torch.randn(3, 8)
    torch.testing.assert_close(plain.generator(z), source(z), atol=2e-4, rtol=0)


# --- runs ------------------------------------------------------------------------------------------------------------


def digest(run: Path) -> str:
    """Of the newest checkpoint's tensors: networks, averages and optimisers."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    return f"{folder.name} {hashlib.sha256(content).hexdigest()}"


def test_run_leaves_pictures_metrics_and_a_model(photos: Path, tmp_path: Path) -> None:
    run = loop.train(TINY, open_dataset(photos), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses, scores = [x for x in lines if "loss_d" in x], [x for x in lines if "linear_avepool_feat" in x]
    assert [x["num_images"] for x in losses] == [8, 16, 24, 32, 40, 48] and len(scores) == 2
    assert scores[-1]["linear_avepool_feat"] == scores[-1]["knn_avepool_feat"] == 1.0  # bright and dark
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == [f"{kind}-{n:010d}.png" for kind in ("reconstructions", "samples") for n in (24, 48)]
    with Image.open(run / "samples" / names[0]) as picture:
        assert picture.width > 8 * 64
    model = bigbigan.load(run / "snapshots" / "images-0000000048")
    assert model.generate(2, seed=0).shape == (2, 3, 32, 32)
    assert model.info.provenance["num_images"] == 48
    assert runfolder.read_run_config(run) == TINY


def test_stopped_by_time_then_resumed_is_bit_identical(photos: Path, tmp_path: Path) -> None:
    data, config = open_dataset(photos), dataclasses.replace(TINY, total_images=16)
    whole = digest(loop.train(config, data, tmp_path / "whole"))
    for _ in range(4):  # each call does one step, checkpoints and returns
        loop.train(config, data, tmp_path / "pieces", max_minutes=1e-9)
    assert digest(tmp_path / "pieces") == whole


def test_sigterm_finishes_the_step_and_the_same_command_goes_on(photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys, dataclasses, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[3]);"
        "from test_training import TINY, loop, open_dataset\n"
        "config = dataclasses.replace(TINY, total_images=120, snapshot_images=1000)\n"
        "try: loop.train(config, open_dataset(sys.argv[1]), sys.argv[2])\n"
        "except loop.TrainingStopped as stop: sys.exit(stop.exit_code)"
    )

    def command(run: str) -> list[str]:
        return [sys.executable, "-c", code, str(photos), str(tmp_path / run), os.path.dirname(__file__)]

    child = subprocess.Popen(command("stopped"))
    log = tmp_path / "stopped" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143
    stopped_at = digest(tmp_path / "stopped")
    subprocess.run(command("stopped"), check=True)
    subprocess.run(command("whole"), check=True)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole") != stopped_at


def test_changed_settings_and_changed_data_are_refused_with_the_difference(photos: Path, tmp_path: Path) -> None:
    loop.train(dataclasses.replace(TINY, total_images=4), open_dataset(photos), tmp_path / "run")
    changed = dataclasses.replace(TINY, total_images=4, lr_g=9e-4)
    with pytest.raises(ConfigError, match=r"train\.lr_g was 0\.0002, now 0\.0009"):
        loop.train(changed, open_dataset(photos), tmp_path / "run")
    next(photos.rglob("*.png")).unlink()
    with pytest.raises(ConfigError, match=r"data\.images was 24, now 23"):
        loop.train(dataclasses.replace(TINY, total_images=4), open_dataset(photos), tmp_path / "run")


def test_non_finite_run_keeps_its_last_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_that_diverges(state: TrainingState, batches: object, num_images: int) -> dict[str, Tensor]:
        if num_images == 40:
            state.discriminator.score_x.bias.data.fill_(float("inf"))
        return train_step(state, batches, num_images)

    monkeypatch.setattr(loop, "train_step", step_that_diverges)
    with pytest.raises(FloatingPointError):
        loop.train(TINY, open_dataset(photos), tmp_path / "run")
    saved = runstate.load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved.step == 8  # 32 images
    assert all(value.isfinite().all() for group in saved.tensors.values() for value in group.values())


def test_best_snapshot_is_kept_beside_the_newest(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([{"linear_avepool_feat": s} for s in (0.5, 0.9, 0.7, 0.8)])
    monkeypatch.setattr(Monitor, "__call__", lambda *_: next(scores))
    run = loop.train(dataclasses.replace(TINY, snapshot_images=12), open_dataset(photos), tmp_path / "run")
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["images-0000000024", "images-0000000048"]
    assert runstate.load_checkpoint(run / "checkpoints").state["best"]["num_images"] == 24


def test_settings_can_be_corrected_until_there_is_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    run, wrong = tmp_path / "run", dataclasses.replace(TINY, total_images=8, lr_g=float(np.float32(1e30)))
    with pytest.raises(FloatingPointError):
        loop.train(dataclasses.replace(wrong, checkpoint_images=1000, snapshot_images=1000), open_dataset(photos), run)
    assert json.loads((run / "config.json").read_text())["train"]["lr_g"] > 1
    right = dataclasses.replace(TINY, total_images=8)
    loop.train(right, open_dataset(photos), run)
    assert json.loads((run / "config.json").read_text())["train"]["lr_g"] == right.lr_g
    # Without config.json the checkpoint tells what the run is, and another command does not change it.
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"step-.*train\.seed was 0, now 1"):
        loop.train(dataclasses.replace(right, seed=1), open_dataset(photos), run)
    assert not (run / "config.json").exists()
    loop.train(right, open_dataset(photos), run)
    assert (run / "config.json").exists()


def test_a_killed_process_leaves_its_run_to_the_next_though_its_workers_live(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, pathlib; from bigbigan.training.runfolder import claim_run\n"
        "with claim_run(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork(): print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match="another process trains in"), runfolder.claim_run(tmp_path):
                pass
            process.kill()
            process.wait()
            with runfolder.claim_run(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_lock", refuse)
    with runfolder.claim_run(tmp_path):
        pass
    assert f"{tmp_path}/.lock cannot be locked" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("reversible", [False, True])
def test_compiled_networks_take_the_same_steps(photos: Path, tmp_path: Path, reversible: bool) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    config, losses = dataclasses.replace(TINY, total_images=12, log_images=4, probe_images=0), []
    if reversible:
        encoder = dataclasses.replace(TINY.model.encoder, architecture="revnet", block="bottleneck")
        config = dataclasses.replace(config, model=dataclasses.replace(TINY.model, encoder=encoder), reversible=True)
    for compiled in (False, True):
        run = loop.train(dataclasses.replace(config, compile=compiled), open_dataset(photos), tmp_path / str(compiled))
        assert (counters["frames"]["ok"] > 0) == compiled
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([v for r in records for name, v in r.items() if name.startswith(("loss", "score"))])
    assert len(losses[0]) >= 3 * 8
    torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-4)
