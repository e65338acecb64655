"""The paper's linear probe against classifiers trained one by one, and its protocol."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.evaluation import StackedClassifiers, StoredRows, labelled_subset, paper_probe


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, classes: int = 7, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % classes
    return 2 * draw(1, classes, 12)[y] + noise * draw(n, n, 12), y


def test_each_rate_is_trained_as_if_alone() -> None:
    """As alone, and as a plain layer under autograd, with an average of its own; to rounding, as batched products
    may take another kernel for one matrix than for three."""
    rates, (x, y) = (1e-3, 1e-2, 1e-1), blobs(300)
    together = StackedClassifiers(12, 7, rates, 0.9)
    alone = [StackedClassifiers(12, 7, [rate], 0.9) for rate in rates]
    layers = [nn.Linear(12, 7) for _ in rates]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizers = [torch.optim.Adam(layer.parameters(), lr=rate) for layer, rate in zip(layers, rates, strict=True)]
    averages = [[torch.zeros_like(p) for p in layer.parameters()] for layer in layers]
    for start in range(0, 300, 50):
        batch = x[start : start + 50], y[start : start + 50]
        for probe in (together, *alone):
            probe.step(*batch)
        for layer, optimizer, average in zip(layers, optimizers, averages, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(layer(batch[0]), batch[1]).backward()
            optimizer.step()
            for mean, value in zip(average, layer.parameters(), strict=True):
                mean.mul_(0.9).add_(value.detach(), alpha=0.1)
    for i, (one, layer, average) in enumerate(zip(alone, layers, averages, strict=True)):
        torch.testing.assert_close(together.weight[i], one.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[i], one.bias[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.average[0][i], one.average[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.weight[i].T, layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.average[0][i].T, average[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.average[1][i], average[1], rtol=1e-4, atol=1e-5)
        logits = x @ average[0].T + average[1]
        for k in (1, 3):
            expected = (logits.topk(k).indices == y[:, None]).any(1).double().mean().item()
            assert together.top_k(x, y, k)[i] == pytest.approx(expected, abs=1.01 / 300)


def test_held_out_rows_choose_the_rate_and_are_not_trained_on() -> None:
    """Whatever the held-out labels say, the weights stay; the rate is theirs."""
    x, y = blobs(700)
    test_x, test_y = blobs(210)
    options = {"lrs": (1e-6, 1e-2), "steps": 60, "batch_size": 64, "ema": 0.9, "holdout": 100, "seed": 4}
    held = torch.randperm(700, generator=torch.Generator().manual_seed(4))[-100:]
    result = paper_probe({"a": x}, y * 3, {"a": test_x}, test_y * 3, **options)["a"]  # labels with gaps
    assert (result.lr, result.n_train, result.n_test, result.num_features) == (1e-2, 600, 210, 12)
    assert result.accuracy > 0.95 and result.top5 is not None and result.top5 >= result.accuracy
    assert result.holdout_accuracy[1e-2] == max(result.holdout_accuracy.values())
    broken = x.clone()
    broken[held] = 1e9  # trained on, it would show
    again = paper_probe({"a": broken}, y * 3, {"a": test_x}, test_y * 3, **{**options, "lrs": [1e-2]})["a"]
    assert (again.accuracy, again.top5) == (result.accuracy, result.top5)


def test_rows_on_the_disk_and_several_kinds_of_features_give_the_same(tmp_path: Path) -> None:
    x, y = blobs(500)
    np.save(tmp_path / "x.npy", x.numpy())
    stored = StoredRows.open(tmp_path / "x.npy")
    options = {"lrs": (1e-3, 1e-2), "steps": 40, "batch_size": 50, "holdout": 50}
    wide = torch.cat([x, x], 1)
    both = paper_probe({"a": stored, "b": wide}, y, {"a": stored, "b": wide}, y, **options)
    assert both["a"] == paper_probe({"a": x}, y, {"a": x}, y, **options)["a"]
    assert both["b"] == paper_probe({"b": wide}, y, {"b": wide}, y, **options)["b"]
    assert paper_probe({"a": x}, y, {"a": x}, y, **{**options, "batch_size": 10**6})["a"].n_train == 450


def test_augmented_batches_take_the_place_of_training_rows() -> None:
    x, y = blobs(400)
    asked: list[Tensor] = []

    def augmented(fit: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        asked.append(fit)
        for k in itertools.count():
            rows = fit[(torch.arange(40) + 40 * k) % len(fit)]
            yield {"a": x[rows] + 0.1 * draw(k, 40, 12)}, y[rows] * 2

    options = {"steps": 80, "ema": 0.9, "holdout": 80, "lrs": [1e-2], "augmented": augmented}
    result = paper_probe({"a": x}, y * 2, {"a": x}, y * 2, **options)["a"]
    assert result.accuracy > 0.95
    assert len(asked) == 1 and len(asked[0].unique()) == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": (0.1, -1.0)}, "lrs .* do not fit"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"holdout": 50}, "holdout is 50; of 50 training rows"),
        ({"train_y": torch.zeros(50, dtype=torch.long)}, "the one label 0"),
        ({"train_y": torch.arange(49)}, "one label a row"),
        ({"test_x": {"b": draw(0, 50, 12)}}, r"training has features \['a'\], test \['b'\]"),
        ({"train_x": {"a": draw(0, 50)}}, r"a is \[50\] in training, \[50, 12\] in test; expected \[N, D\]"),
        ({"test_x": {"a": draw(0, 50, 11)}}, "a: 12 features in training, 11 in test"),
        ({"train_x": {"a": draw(0, 50, 12) / 0}}, "NaN or infinity"),
        ({"test_x": {"a": draw(0, 50, 12) / 0}}, "NaN or infinity between rows 0 and 50"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    x, y = blobs(50)
    arguments = {"train_x": {"a": x}, "train_y": y, "test_x": {"a": x}, "test_y": y, "holdout": 10, "steps": 3} | change
    with pytest.raises(ValueError, match=message):
        paper_probe(**arguments)


def test_labelled_subset_keeps_shares_of_each_class() -> None:
    labels = torch.cat([torch.full((n,), label) for label, n in ((3, 1000), (8, 101), (9, 2))])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    chosen = labelled_subset(labels, 0.1, seed=1)
    assert labels[chosen].unique(return_counts=True)[1].tolist() == [100, 10, 1]  # 10.1, and 0.2 but at least one
    assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, labelled_subset(labels, 0.1, seed=1))
    assert not torch.equal(chosen, labelled_subset(labels, 0.1, seed=2))
    assert set(labelled_subset(labels, 0.01, seed=1).tolist()) < set(chosen.tolist())
    assert torch.equal(labelled_subset(labels, 1.0), torch.arange(len(labels)))
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="a share of labels is"):
            labelled_subset(labels, share)
