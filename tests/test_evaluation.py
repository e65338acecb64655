"""Linear probe and reconstruction report, against scikit-learn, hand-computed numbers and a real data set."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bigbigan.evaluation import (
    Classifier,
    classifier_accuracy,
    linear_probe,
    logistic_path,
    reconstruction_report,
    train_classifier,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Overlapping classes, on features with very unequal directions and an offset."""
    y = torch.arange(n) % classes
    x = draw(0, n, 12) + draw(1, classes, 12)[y]
    return x @ draw(2, 12, 12) * torch.logspace(-1, 1, 12, dtype=torch.float64) + 3, y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_solver_finds_scikit_learns_minimum(classes: int, l2: float) -> None:
    """The same objective in scikit-learn's terms: C = 1 / (N l2), and two classes as two outputs, not one."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = correlated(400, classes)
    path = list(logistic_path(x, y, [1.0, l2], num_classes=classes, tolerance=1e-10))
    _, weight, bias = path[1]
    if classes == 2:  # scikit-learn fits the difference d: two outputs +-d/2 have half its penalty
        reference = sklearn.LogisticRegression(C=2 / (len(x) * l2), tol=1e-12, max_iter=10_000, solver="newton-cg")
    else:
        reference = sklearn.LogisticRegression(C=1 / (len(x) * l2), tol=1e-12, max_iter=10_000, solver="newton-cg")
    reference.fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(reference.coef_)
    ours = weight[1:] - weight[:1] if classes == 2 else weight
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.sum(0), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-8)
    probabilities = F.softmax(x @ weight.T + bias, dim=1)
    torch.testing.assert_close(probabilities, torch.from_numpy(reference.predict_proba(x.numpy())), rtol=0, atol=1e-6)


def test_float32_features_give_the_float64_solution() -> None:
    x, y = correlated(3000, 4)  # three chunks
    [(_, wide, _)] = logistic_path(x, y, [1e-3], num_classes=4, tolerance=1e-9)
    [(_, narrow, _)] = logistic_path(x.float(), y, [1e-3], num_classes=4)
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=1e-2, atol=1e-3)


def test_solution_computed_by_hand() -> None:
    """Rows x = -1 of class 0 and x = +1 of class 1: weights are -+w with sigmoid(-2 w) = 2 l2 w, and the bias is 0."""
    x, y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(3, 1), torch.tensor([0, 1]).repeat(3)
    l2 = (1 / (1 + math.e)) / 1.0  # 2 l2 w = 2 sigmoid(-2 w) * 1/2 ...: w = 1/2 solves sigmoid(-1) = 2 l2 / 2
    [(_, weight, bias)] = logistic_path(x, y, [l2], num_classes=2, tolerance=1e-12)
    torch.testing.assert_close(weight[:, 0].tolist(), [-0.5, 0.5])
    torch.testing.assert_close(bias, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_fit_that_stops_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, y = correlated(200, 3)
    list(logistic_path(x, y, [1e-3], num_classes=3, max_iterations=2))
    assert "stopped at gradient" in caplog.text
