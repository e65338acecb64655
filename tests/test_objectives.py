"""Other objectives of the trainer, BiGAN's and SS-GAN's, and steps out of the ordinary."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.discriminator import DiscriminatorOutput
from bigbigan.evaluation.rotation import rotation_accuracy
from bigbigan.presets import PRESETS, small
from bigbigan.schema import ConfigError
from bigbigan.training.config import TrainConfig
from bigbigan.training.cost import estimate
from bigbigan.training.losses import discriminator_loss, generator_encoder_loss, rotation_loss, turn
from bigbigan.training.recipes import RECIPES, halflife
from bigbigan.training.step import Batch, Pairs, TrainingState, make_pairs, score, train_step

N = 8
BIGAN = dataclasses.replace(RECIPES["bigan-mnist-mlp"], batch_size=N)
_GREY = small(1, PRESETS["ssgan-fashion-mnist-32"].config.preprocess, base_channels=2, z_chunk=2, mlp=16)
SSGAN = dataclasses.replace(
    RECIPES["ssgan-fashion-mnist-32"],
    model=dataclasses.replace(
        PRESETS["ssgan-fashion-mnist-32"].config,
        generator=_GREY.generator,
        discriminator=dataclasses.replace(_GREY.discriminator, scores=("x",), rotation_head=True),
    ),
    batch_size=N,
    rotated_batch_size=16,
)
TINY = TrainConfig("tiny", PRESETS["bigbigan-tiny"].config, total_images=100, batch_size=N)


def batch(config: TrainConfig, seed: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    side = config.model.preprocess.resolution
    x = torch.rand((N, config.model.image_channels, side, side), generator=draws) * 2 - 1
    return Batch(x, *(torch.randn((N, config.model.z_dim), generator=draws) for _ in range(2)))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def outputs(score_xz: list[float]) -> DiscriminatorOutput:
    return DiscriminatorOutput(None, None, torch.tensor(score_xz))


def test_logistic_loss_is_the_mean_cross_entropy_of_both_kinds() -> None:
    real, fake = outputs([0.5, -1.0]), outputs([2.0, 0.0])

    def entropy(*probabilities: float) -> float:
        return -sum(map(math.log, probabilities)) / len(probabilities)

    p = [1 / (1 + math.exp(-s)) for s in (0.5, -1.0, 2.0, 0.0)]
    right, wrong = entropy(p[0], p[1], 1 - p[2], 1 - p[3]), entropy(1 - p[0], 1 - p[1], p[2], p[3])
    assert discriminator_loss(real, fake, "logistic").item() == pytest.approx(right)
    assert generator_encoder_loss(real, fake, "logistic").item() == pytest.approx(wrong)


# --- SS-GAN ----------------------------------------------------------------------------------------------------------


def test_quarter_turns() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 1, 2, 2)
    turned = turn(x)[:, 0].tolist()
    assert turned == [[[2.0, 4.0], [1.0, 3.0]], [[4.0, 3.0], [2.0, 1.0]], [[3.0, 1.0], [4.0, 2.0]]]


def test_rotation_loss_by_hand() -> None:
    logits = torch.zeros(8, 4)  # two images, four turns, image by image within a turn
    logits[2, 1], logits[3, 1] = math.log(3), math.log(3)  # both are seen to be turned once
    uniform, sure = math.log(4), math.log(6 / 3)
    assert rotation_loss(logits).item() == pytest.approx((6 * uniform + 2 * sure) / 8)


class Judge(nn.Module):
    """Tells turns by where the bright corner is, and remembers how many images it saw."""

    def forward(self, x: Tensor, z: Tensor | None) -> DiscriminatorOutput:
        self.seen = len(x)
        corners = torch.stack([x[:, 0, 0, 0], x[:, 0, -1, 0], x[:, 0, -1, -1], x[:, 0, 0, -1]], 1)
        return DiscriminatorOutput(x.sum(dim=(1, 2, 3)), None, None, 20 * corners)


def test_each_kth_image_is_turned_and_scores_are_of_upright_ones() -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # the bright corner, top left
    judge = Judge()
    real, fake = score(judge, Pairs(x, None, -x, torch.zeros(4, 1)), rotate_every=2)
    assert judge.seen == 2 * (4 + 3 * 2)
    assert real.score_x.tolist() == [1, 2, 3, 4] and fake.score_x.tolist() == [-1, -2, -3, -4]
    assert real.rotation.shape == (8, 4) and rotation_loss(real.rotation) < 1e-6
    assert real.rotation.amax(1).div(20).tolist() == [2, 4, 2, 4, 2, 4, 2, 4]  # the second and fourth image
    assert rotation_loss(fake.rotation) > 20


def test_rotation_enters_both_objectives_with_its_weight() -> None:
    losses = {}
    for weights in ((1.0, 0.2), (0.0, 0.0), (3.0, 0.0), (0.0, 5.0)):
        config = dataclasses.replace(SSGAN, rotation_weight_d=weights[0], rotation_weight_g=weights[1])
        state = TrainingState(dataclasses.replace(config, d_steps=1))
        losses[weights] = train_step(state, lambda i: batch(SSGAN), N)
    plain, first = losses[0.0, 0.0], losses[1.0, 0.2]
    assert first["loss_d"] - plain["loss_d"] == pytest.approx(first["loss_rotation"].item(), rel=1e-4)
    thrice = losses[3.0, 0.0]["loss_d"] - plain["loss_d"]
    assert thrice.item() == pytest.approx(3 * first["loss_rotation"].item(), rel=1e-4)
    assert losses[0.0, 5.0]["loss_ge"] - plain["loss_ge"] > 4  # five times an untrained log(4), less rounding
    assert losses[0.0, 5.0]["loss_d"] == plain["loss_d"]


def test_rotation_needs_its_head_and_a_fitting_batch() -> None:
    with pytest.raises(ConfigError, match="rotation_head"):
        dataclasses.replace(TINY, rotated_batch_size=4)
    with pytest.raises(ConfigError, match="rotated_batch_size is 12; it does not divide"):
        dataclasses.replace(SSGAN, rotated_batch_size=12)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, r"must be in \[0, 2\*\*64\)"),
        ("rotated_batch_size", -16, "must not be negative"),
        ("probe_images", -3, "must not be negative"),
        ("probe_l2", 0.0, "must be positive"),
        ("objective", "wgan", "expected 'hinge', 'logistic'"),
        ("precision", "fp16", "expected 'fp32', 'bf16', 'fp64'"),
        ("accumulate", 3, "batch_size is 8; it is no multiple of accumulate, 3"),
    ],
)
def test_a_value_that_would_fail_late_or_be_taken_for_another_is_refused(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **{field: value})


def test_d_takes_one_step_where_all_are_simultaneous() -> None:
    with pytest.raises(ConfigError, match="d_steps is 2; it must be 1 if simultaneous"):
        dataclasses.replace(BIGAN, d_steps=2)


# --- BiGAN's step ----------------------------------------------------------------------------------------------------


def opinionated(config: TrainConfig) -> TrainingState:
    """A fresh state whose D scores by something: at its initial zeros no other weight has a gradient."""
    state = TrainingState(config)
    torch.nn.init.normal_(state.discriminator.score_xz.weight, generator=torch.Generator().manual_seed(0))
    return state


def test_simultaneous_step_takes_all_gradients_at_the_same_weights() -> None:
    state, fresh = opinionated(BIGAN), opinionated(BIGAN)
    train_step(state, lambda i: batch(BIGAN), N)
    pairs = make_pairs(fresh, batch(BIGAN))
    loss_d = discriminator_loss(*score(fresh.discriminator, pairs.detach(), separate=True), "logistic")
    wanted_d = torch.autograd.grad(loss_d, list(fresh.discriminator.parameters()))
    loss_ge = generator_encoder_loss(*score(fresh.discriminator, pairs, separate=True), "logistic")
    wanted_ge = torch.autograd.grad(loss_ge, [p for m in (fresh.generator, fresh.encoder) for p in m.parameters()])
    torch.testing.assert_close(gradients(state.discriminator), list(wanted_d))
    torch.testing.assert_close(gradients(state.generator) + gradients(state.encoder), list(wanted_ge))
    alternating = opinionated(dataclasses.replace(BIGAN, simultaneous=False))
    train_step(alternating, lambda i: batch(BIGAN), N)
    assert not torch.allclose(gradients(alternating.generator)[0], wanted_ge[0], rtol=1e-3)


def test_batch_norm_of_d_sees_each_kind_of_pairs_alone() -> None:
    state = opinionated(BIGAN)
    pairs = make_pairs(state, batch(BIGAN))
    real, fake = score(state.discriminator, pairs, separate=True)
    alone = state.discriminator(pairs.real_x, pairs.real_z)
    torch.testing.assert_close(real.score_xz, alone.score_xz)
    together, _ = score(state.discriminator, pairs)
    assert (together.score_xz - real.score_xz).abs().max() > 1e-3 and fake.score_xz.shape == (N,)


def test_bigan_weights_and_decay_are_those_of_its_authors() -> None:
    state = TrainingState(RECIPES["bigan-mnist-mlp"])
    weights = [
        p.detach().flatten() for n in state.networks.values() for k, p in n.named_parameters() if "score" not in k
    ]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.01)
    first = train_step(
        TrainingState(BIGAN), lambda i: batch(BIGAN), N
    )  # as the log in the README of jeffdonahue/bigan begins: 0.6932
    assert first["loss_d"].item() == first["loss_ge"].item() == pytest.approx(math.log(2))
    assert all(group["weight_decay"] == 2.5e-5 for group in state.optimizer_ge.param_groups)
    epoch = 50_000
    factors = [RECIPES["bigan-mnist-mlp"].lr_factor(e * epoch) for e in (0, 200, 300, 400)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01])


def test_three_steps_of_bigan_are_those_of_its_formulas() -> None:
    """Networks, losses, decay and Adam of jeffdonahue/bigan, written out; 300 epochs on, where the rate is a tenth."""
    config = dataclasses.replace(BIGAN, precision="fp64")
    state = opinionated(config)
    weights = {f"{part}.{k}": p.detach().clone() for part, n in state.networks.items() for k, p in n.named_parameters()}
    assert all(name.endswith("weight") for name in weights)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-8).sqrt()

    def leaky(x: Tensor, slope: float) -> Tensor:
        return torch.where(x > 0, x, slope * x)

    def draw(z: Tensor) -> Tensor:
        h = leaky(norm(layer(z, "generator.hidden.linear1")), 0)
        h = layer(h, "generator.hidden.linear2") + layer(z, "generator.hidden.linear_z")
        return torch.sigmoid(layer(leaky(norm(h), 0), "generator.image"))

    def encode(x: Tensor) -> Tensor:
        h = layer(leaky(layer(x, "encoder.hidden.linear1"), 0.2), "encoder.hidden.linear2")
        return 2 * torch.sigmoid(layer(leaky(norm(h), 0.2), "encoder.latent")) - 1

    def score_xz(x: Tensor, z: Tensor) -> Tensor:
        h = layer(leaky(layer(x, "discriminator.hidden.linear1"), 0.2), "discriminator.hidden.linear2")
        return layer(leaky(norm(h + layer(z, "discriminator.hidden.linear_z")), 0.2), "discriminator.score_xz")

    for step in (1, 2, 3):
        drawn = batch(config, step)
        data = Batch(drawn.x.double(), drawn.z.double(), drawn.noise.double())
        metrics = train_step(state, lambda i: data, 300 * 50_000)  # noqa: B023
        for w in weights.values():
            w.requires_grad_()
        x = (data.x.flatten(1) + 1) / 2
        real, fake = score_xz(x, encode(x)), score_xz(draw(data.z), data.z)  # before D's sigmoid
        loss_d = (F.softplus(-real) + F.softplus(fake)).mean() / 2
        loss_ge = (F.softplus(real) + F.softplus(-fake)).mean() / 2
        torch.testing.assert_close(metrics["loss_d"], loss_d.detach())
        torch.testing.assert_close(metrics["loss_ge"], loss_ge.detach())
        slopes = {
            name: torch.autograd.grad(loss_d if name.startswith("disc") else loss_ge, w, retain_graph=True)[0]
            for name, w in weights.items()
        }
        for name, w in weights.items():
            slope, (first, second) = slopes[name] + 2.5e-5 * w.detach(), moments[name]
            first, second = 0.5 * first + 0.5 * slope, 0.999 * second + 0.001 * slope**2
            moments[name] = first, second
            move = first / (1 - 0.5**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights[name] = w.detach() - 0.1 * 2e-4 * move
    for part, network in state.networks.items():
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[f"{part}.{name}"], rtol=0, atol=1e-10)


def test_normal_weights_under_spectral_norm_take_a_step() -> None:
    config = dataclasses.replace(TINY, initializer="normal")
    metrics = train_step(TrainingState(config), lambda i: batch(config), N)
    assert all(value.isfinite() for value in metrics.values())


def test_decayed_learning_rate_is_what_the_weights_move_by() -> None:
    """With beta1 = 0, Adam's first step moves every weight with a gradient by the learning rate."""
    state = TrainingState(dataclasses.replace(TINY, lr_g=1e-3, lr_decay_images=100, lr_decay=0.25))
    before = [p.detach().clone() for p in state.generator.parameters()]
    train_step(state, lambda i: batch(TINY), 50)
    moved = max((p.detach() - b).abs().max().item() for p, b in zip(state.generator.parameters(), before, strict=True))
    assert moved == pytest.approx(0.5e-3, rel=1e-3)


# --- micro-batches, averages, costs ----------------------------------------------------------------------------------


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    config = dataclasses.replace(TINY, accumulate=2, precision="fp64", simultaneous=True)
    state, fresh = TrainingState(config), TrainingState(config)
    whole = batch(TINY)
    whole = Batch(whole.x.double(), whole.z.double(), whole.noise.double())
    train_step(state, lambda i: whole, N)
    wanted = {}
    for half in (slice(0, 4), slice(4, 8)):
        pairs = make_pairs(fresh, Batch(whole.x[half], whole.z[half], whole.noise[half]))
        for name, loss in (
            ("discriminator", discriminator_loss(*score(fresh.discriminator, pairs.detach()))),
            ("generator", generator_encoder_loss(*score(fresh.discriminator, pairs))),
        ):
            part = torch.autograd.grad(loss, list(fresh.networks[name].parameters()), retain_graph=True)
            wanted[name] = [a + b / 2 for a, b in zip(wanted.get(name, [0.0] * len(part)), part, strict=True)]
    for name, values in wanted.items():
        torch.testing.assert_close(gradients(state.networks[name]), values, rtol=1e-9, atol=1e-12)


def test_no_averages_export_the_weights_themselves() -> None:
    from bigbigan.training.export import inference_model

    state = TrainingState(dataclasses.replace(BIGAN, standing_passes=2))
    assert state.ema == {}
    images = torch.randint(0, 256, (2 * N, 1, 28, 28), dtype=torch.uint8)
    model = inference_model(state, images)
    assert torch.equal(model.encoder.latent.weight, state.encoder.latent.weight)
    norm = model.discriminator.hidden.norm2
    assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))


@pytest.mark.parametrize(("batch_size", "accumulate", "taken"), [(300, 1, 100), (128, 1, 128), (32, 4, 8)])
def test_standing_statistics_take_as_many_images_in_passes_that_fit_a_device(
    batch_size: int, accumulate: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigbigan.layers import StandingStatistics
    from bigbigan.training import export

    sizes: list[int] = []
    monkeypatch.setattr(StandingStatistics, "__call__", lambda self, *inputs: sizes.append(len(inputs[0])))
    config = dataclasses.replace(TINY, batch_size=batch_size, accumulate=accumulate, standing_passes=2)
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    export.inference_model(TrainingState(config), images)
    assert set(sizes) == {taken} and sum(sizes) == 2 * 2 * batch_size  # of G and of E


def test_half_life_of_a_decay() -> None:
    assert 0.9999 ** (halflife(0.9999, 2048) / 2048) == pytest.approx(0.5)


def test_cost_counts_what_a_step_computes() -> None:
    """BiGAN's step is matrix products alone: forward 1, backward 1 for weights, 1 for inputs that need it."""
    config = dataclasses.replace(BIGAN, batch_size=128)
    cost = estimate(config)
    g = 50 * 1024 * 2 + 1024 * 1024 + 1024 * 784
    e = 784 * 1024 + 1024 * 1024 + 1024 * 50
    d = 784 * 1024 + 1024 * 1024 + 50 * 1024 + 1024
    assert cost.parameters == {"generator": g, "encoder": e, "discriminator": d}
    drawn = (3 * g - 2 * 50 * 1024) + (3 * e - 784 * 1024)  # no gradient for z, or x
    judged = 2 * (3 * d - 784 * 1024 - 50 * 1024)  # D's step: no gradient for its inputs
    passed = 2 * d + (d + 1024)  # E and G's: no gradient for D's weights, real images or given latents
    assert cost.flops == 2 * 128 * (drawn + judged + passed)
    assert cost.state_bytes == 16 * (g + e + d)
    doubled = estimate(dataclasses.replace(config, batch_size=256))
    assert doubled.flops == 2 * cost.flops and doubled.activation_bytes == pytest.approx(
        2 * cost.activation_bytes, 0.05
    )


def test_cost_is_linear_in_the_batch_but_for_spectral_norm() -> None:
    costs = [estimate(dataclasses.replace(TINY, batch_size=n)).flops for n in (10, 20, 30)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0]) and costs[1] < 2 * costs[0]


def test_rotation_accuracy_counts_quarter_turns_counterclockwise() -> None:
    images = torch.zeros(6, 1, 16, 16, dtype=torch.uint8)
    images[:, :, :4] = 255  # bright at the top; turned counterclockwise at the left, the bottom, the right

    def classify(x: Tensor) -> Tensor:
        edges = [x[:, 0, 0].mean(1), x[:, 0, :, 0].mean(1), x[:, 0, -1].mean(1), x[:, 0, :, -1].mean(1)]
        return torch.stack(edges, 1)

    found = rotation_accuracy(classify, images, batch_size=4)
    assert (found.accuracy, found.per_turn, found.num_images) == (1.0, (1.0,) * 4, 6)
    always = rotation_accuracy(lambda x: torch.tensor([0.0, 1, 0, 0]).expand(len(x), 4), images)
    assert (always.accuracy, always.per_turn) == (0.25, (0.0, 1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"gave \[6, 3\] for 6 images; expected \[6, 4\]"):
        rotation_accuracy(lambda x: torch.zeros(len(x), 3), images)
    with pytest.raises(ValueError, match="torch.float32"):
        rotation_accuracy(classify, images.float())
