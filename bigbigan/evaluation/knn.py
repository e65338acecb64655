"""k-nearest-neighbour classification of features: exact, in chunks, for several k and metrics in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

METRICS = ("l2", "cosine")
CHUNK = 4096  # rows of either side at a time


@dataclass(frozen=True)
class KNNResult:
    """Accuracy, a fraction of 1, of the majority among the k nearest training rows."""

    metric: str
    k: int
    accuracy: float
    num_features: int


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 25),
    metric: str = "l2",
    progress: bool = False,
) -> list[KNNResult]:
    """Accuracy on the test rows for each k, all rows counting alike; of labels that tie, the smallest wins.

    Args:
        train_x, test_x: [N, D] and [M, D] features.
        train_y, test_y: [N] and [M] integer labels, not negative.
        metric: "l2", Euclidean distance; or "cosine", the angle between rows.

    Raises:
        ValueError: shapes, labels, values, k or metric do not fit.
    """
    if not ks or min(ks) < 1 or max(ks) > len(train_x):
        raise ValueError(f"k is {list(ks)}; give one or more from 1 to the {len(train_x)} training rows")
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if y.shape != x.shape[:1] or y.is_floating_point() or not len(y) or int(y.min()) < 0:
            raise ValueError(f"{name} features are {list(x.shape)}, labels {y.dtype} {list(y.shape)}; one label a row")
    neighbours = nearest(train_x, test_x, max(ks), metric=metric, progress=progress)[1]
    labels, wanted = train_y.cpu().long()[neighbours], test_y.cpu()  # [M, k], nearest first
    votes = torch.zeros(len(labels), int(labels.max()) + 1)
    results = []
    for k in range(1, max(ks) + 1):
        votes.scatter_add_(1, labels[:, k - 1 : k], torch.ones(len(labels), 1))
        if k in ks:
            # `argmax` promises no order among equals; the smallest label gets the largest bonus below one vote.
            bonus = torch.linspace(0.5, 0.0, votes.shape[1])
            right = (votes + bonus).argmax(1) == wanted
            results.append(KNNResult(metric, k, right.double().mean().item(), train_x.shape[1]))
    return results


@torch.no_grad()
def nearest(
    rows: Tensor, queries: Tensor, k: int, *, metric: str = "l2", progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances [M, k], nearest first, and indices [M, k] of the rows [N, D] that are nearest to the queries [M, D].

    In float64, where distances of distinct float32 features do not round to each other, on the queries' device.
    Distances are Euclidean, or 1 - cos.

    Raises:
        ValueError: shapes or metric do not fit, values are not finite, or a row of zeros has no angle.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose {' or '.join(METRICS)}")
    if rows.ndim != 2 or queries.ndim != 2 or rows.shape[1] != queries.shape[1] or not 1 <= k <= len(rows):
        raise ValueError(f"rows are {list(rows.shape)}, queries {list(queries.shape)}, k is {k}; they do not fit")
    center = rows.double().mean(0) if metric == "l2" else 0.0  # keeps |a|^2 + |b|^2 - 2 a.b from cancelling
    found = []
    for query in tqdm(queries.split(CHUNK), "neighbours", unit="chunk", disable=None if progress else True):
        a = _prepared(query, center, metric)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(rows), CHUNK):
            b = _prepared(rows[start : start + CHUNK].to(query.device), center, metric)
            distance = (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
            index = torch.arange(start, start + len(b), device=query.device).expand(len(a), -1)
            if best is not None:
                distance, index = torch.cat([best[0], distance], 1), torch.cat([best[1], index], 1)
            values, order = distance.topk(min(k, distance.shape[1]), largest=False)
            best = values, index.gather(1, order)
        assert best is not None
        found.append((best[0].sqrt() if metric == "l2" else best[0] / 2, best[1]))
    return torch.cat([d.cpu() for d, _ in found]), torch.cat([i.cpu() for _, i in found])


def _prepared(x: Tensor, center: Tensor | float, metric: str) -> Tensor:
    x = x.double() - center
    if not torch.isfinite(x).all():
        raise ValueError("features hold NaN or infinite values")
    if metric == "l2":
        return x
    norms = x.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError("a row of zeros has no angle; use the metric l2")
    return x / norms
