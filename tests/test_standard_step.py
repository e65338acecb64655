"""The training step against one written with PyTorch's own layers, spectral norm and optimiser."""

from __future__ import annotations

from dataclasses import replace

import torch
from benchmarks.standard_step import StandardTraining, copy_weights, raw_weight, weighted_layers
from reference import close

from bigbigan.config import PreprocessConfig
from bigbigan.layers import advance_spectral_norm
from bigbigan.presets import EMBEDDED, PRESETS
from bigbigan.training.recipes import RECIPES
from bigbigan.training.step import Batch, TrainingState, train_step


def test_step_is_the_one_of_standard_parts() -> None:
    # D stands still, so that the losses of all its steps, and G's and E's, are at weights that are the same.
    # E sees 64 pixels and D their means over 2x2, as the paper's networks do at 256 and 128.
    model = PRESETS["bigbigan-tiny"].config
    model = replace(model, encoder=replace(model.encoder, resolution=64), preprocess=PreprocessConfig(64))
    config = replace(RECIPES[EMBEDDED], model=model, precision="fp64", lr_d=1e-15)
    state = TrainingState(config)
    draws = torch.Generator().manual_seed(1)
    for network in state.networks.values():
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        for _ in range(1500):  # to where vectors of one and of two iterations a step agree
            advance_spectral_norm(network)
    standard = StandardTraining(config, ema_decay=0.9)
    copy_weights(state.networks, standard.networks)
    batches = [Batch(*(torch.randn(8, *shape, generator=draws, dtype=torch.float64) for shape in SHAPES)) for _ in "12"]

    expected = standard.step(batches.__getitem__)
    metrics = train_step(state, batches.__getitem__, config.batch_size)
    for name in ("loss_d", "loss_ge"):
        close(metrics[name], expected[name], 1e-6)
    for name in ("generator", "encoder", "discriminator"):
        ours, theirs = weighted_layers(state.networks[name]), weighted_layers(standard.networks[name])
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if name != "generator" or i > 0:  # the seed's rows are ordered otherwise
                close(a.weight.grad, raw_weight(b).grad, 1e-6)


SHAPES = ((3, 64, 64), (8,), (8,))


def test_standard_parts_have_as_many_parameters() -> None:
    def count(networks: dict[str, torch.nn.Module]) -> list[int]:
        return [sum(p.numel() for p in network.parameters()) for network in networks.values()]

    config = RECIPES[EMBEDDED]
    assert count(TrainingState(config).networks) == count(StandardTraining(config, 0.9).networks)
