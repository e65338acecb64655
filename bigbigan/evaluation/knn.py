"""k-nearest-neighbour classification of features: exact, in chunks of rows, for several k in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from bigbigan.arrays import as_tensor, seeded
from bigbigan.evaluation.rows import Rows, as_rows, chunks, column_mean, select

METRICS = ("l2", "cosine")
CHUNK = 4096  # rows of either side at a time
SPARE = 16  # candidates beyond k
PIECE = 1 << 20  # float64 values of candidates at a time
CHUNK_VALUES = 1 << 25  # of either side at a time, whatever the width: 256 MiB in float64


@dataclass(frozen=True)
class KNNResult:
    """Accuracy, a fraction of 1, of the majority among the k nearest training rows."""

    metric: str
    k: int
    accuracy: float
    num_features: int


def knn_accuracy(
    train_x: Rows,
    train_y: Tensor,
    test_x: Rows,
    test_y: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 25),
    metric: str = "l2",
    device: str | torch.device = "cpu",
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
    train_x, test_x = as_rows(train_x), as_rows(test_x)
    train_y, test_y = as_tensor(train_y, "training labels"), as_tensor(test_y, "test labels")
    if not ks or min(ks) < 1 or max(ks) > len(train_x):
        raise ValueError(f"k is {list(ks)}; give one or more from 1 to the {len(train_x)} training rows")
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if tuple(y.shape) != tuple(x.shape[:1]) or y.is_floating_point() or not len(y) or int(y.min()) < 0:
            raise ValueError(f"{name} features are {list(x.shape)}, labels {y.dtype} {list(y.shape)}; one label a row")
    neighbours = nearest(train_x, test_x, max(ks), metric=metric, device=device, progress=progress)[1]
    classes, numbers = train_y.cpu().unique(return_inverse=True)  # votes of labels that do not occur take no memory
    labels, wanted = numbers[neighbours], test_y.cpu()  # [M, k], nearest first
    votes = torch.zeros(len(labels), len(classes))
    results = []
    for k in range(1, max(ks) + 1):
        votes.scatter_add_(1, labels[:, k - 1 : k], torch.ones(len(labels), 1))
        if k in ks:
            # `argmax` promises no order among equals; the smallest label gets the largest bonus below one vote.
            bonus = torch.linspace(0.5, 0.0, votes.shape[1])
            right = classes[(votes + bonus).argmax(1)] == wanted
            results.append(KNNResult(metric, k, right.double().mean().item(), train_x.shape[1]))
    return results


@torch.no_grad()
def nearest(
    rows: Rows, queries: Rows, k: int, *, metric: str = "l2", device: str | torch.device = "cpu", progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances [M, k], nearest first, and indices [M, k] of the rows [N, D] that are nearest to the queries [M, D].

    By Euclidean distance or 1 - cos, computed in float64; of equal distances the lower index comes first, also of rows
    that are equal or, by cosine, proportional, however many. The float32 search before that drops only rows that a
    bound of its rounding errors rules out. Queries where it cannot are searched again in float64, whose rounding may
    decide between more than `SPARE` different rows that are all but as near.

    Raises:
        ValueError: shapes or metric do not fit, values are not finite, or a row of zeros has no angle.
    """
    rows, queries = as_rows(rows, "rows"), as_rows(queries, "queries")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose {' or '.join(METRICS)}")
    if len(rows.shape) != 2 or len(queries.shape) != 2 or rows.shape[1] != queries.shape[1] or not 1 <= k <= len(rows):
        raise ValueError(f"rows are {list(rows.shape)}, queries {list(queries.shape)}, k is {k}; they do not fit")
    if torch.device(device).type == "mps":
        device = "cpu"  # the other has no float64
    kept = _without_further_copies(rows, k, metric)
    if kept is not None:
        distance, index = nearest(select(rows, kept), queries, k, metric=metric, device=device, progress=progress)
        return distance, kept[index]
    center: Tensor | float = 0.0
    if metric == "l2":
        # Keeps |a|^2 + |b|^2 - 2 a.b from cancelling; of few bits, so that equal distances of plain numbers stay equal.
        center = column_mean(rows).bfloat16().double().to(device)
    prepare = partial(_prepared, center=center, metric=metric, device=device)
    width, found = min(k + SPARE, len(rows)), []
    step = _chunk(rows.shape[1])
    starts = range(0, len(queries), step)
    for start in tqdm(starts, "neighbours", unit="chunk", disable=None if progress else True):
        a, size = prepare(queries[start : start + step])
        bound, index = _candidates(a, size, rows, prepare, width, torch.float32)
        query = queries[start : start + step].to(device)
        distance, index = _ranked(query, rows, index, metric)
        unproven = (
            ~(distance[:, k - 1].square() < bound) if width < len(rows) else torch.zeros_like(bound, dtype=torch.bool)
        )
        if unproven.any():
            _, candidates = _candidates(a[unproven], size[unproven], rows, prepare, width, torch.float64)
            distance[unproven], index[unproven] = _ranked(query[unproven], rows, candidates, metric)
        distance = distance[:, :k] if metric == "l2" else distance[:, :k].square() / 2
        found.append((distance.cpu(), index[:, :k].cpu()))
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _candidates(
    a: Tensor,
    size: Tensor,
    rows: Rows,
    prepare: Callable[[Tensor], tuple[Tensor, Tensor]],
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """[m], a lower bound of the squared distance of all other rows, and [m, width], the rows of the lowest bounds.

    The computed |a|^2 + |b|^2 - 2 a.b is off by at most g (|a|^2 + |b|^2), g = n u / (1 - n u) with unit roundoff u
    and n = D + 8: D for the product, in whatever order it is summed (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), the rest for rounding a, b, both squares, and two sums; and less than 1e8 times the
    smallest number where values underflow. In float64 it is taken as it is.
    """
    n, u = a.shape[1] + 8, torch.finfo(dtype).eps / 2
    shrink, underflow = (1 - n * u / (1 - n * u), 1e-30) if dtype == torch.float32 else (1.0, 0.0)
    narrow = a.to(dtype)
    # Beyond that range, and where torch may multiply in less than float32, the bound would not hold: nothing is proven.
    sound = _multiplies_exactly() and bool((size < 1e30).all())
    best: tuple[Tensor, Tensor] | None = None
    step = _chunk(a.shape[1])
    for start in range(0, len(rows), step):
        b, squares = prepare(rows[start : start + step])
        sound = sound and bool((squares < 1e30).all())
        bound = (shrink * (size[:, None] + squares) - underflow).to(dtype).addmm_(narrow, b.to(dtype).T, alpha=-2)
        index = torch.arange(start, start + len(b), device=a.device).expand(len(a), -1)
        if best is not None:
            bound, index = torch.cat([best[0], bound], 1), torch.cat([best[1], index], 1)
        if dtype == torch.float64:  # stable: of equal bounds, the lower index stays
            bound, order = (x[:, :width] for x in bound.sort(dim=1, stable=True))
        else:
            bound, order = bound.topk(min(width, bound.shape[1]), largest=False)
        best = bound, index.gather(1, order)
    assert best is not None
    last = best[0][:, -1].double()
    return last if sound else torch.full_like(last, -torch.inf), best[1]


def _chunk(width: int) -> int:
    return max(1, min(CHUNK, CHUNK_VALUES // width))


def has_zero_row(rows: Rows) -> bool:
    """Whether one of the rows [N, D] is all zeros, and so without an angle."""
    return any(bool((chunk == 0).all(1).any()) for chunk in chunks(rows))


def _multiplies_exactly() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # what torch answers once `fp32_precision`, its newer setting, was used
        return False


def _ranked(queries: Tensor, rows: Rows, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Distances [m, width] to the rows of `index` [m, width], and these, by distance and then by index.

    By differences, of rows that are not centred: where rows are equal, so are their distances.
    """
    index = index.sort(1).values
    piece = max(1, PIECE // (index.shape[1] * queries.shape[1]))
    distances = torch.empty(index.shape, dtype=torch.float64, device=index.device)  # no list: it would fragment memory
    for some, wanted, out in zip(queries.split(piece), index.split(piece), distances.split(piece), strict=True):
        some = some.double()
        near = rows[wanted.flatten().cpu()].to(queries.device).double().view(*wanted.shape, -1)
        if metric == "cosine":
            near, some = _direction(near), _direction(some)
        torch.linalg.vector_norm(near.sub_(some[:, None]), dim=2, out=out)
    distance, order = distances.sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def _prepared(x: Tensor, *, center: Tensor | float, metric: str, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Centred or normalised rows, and their squared lengths, in float64."""
    x = x.to(device).double() - center
    squares = x.square().sum(1)
    if not squares.isfinite().all():
        raise ValueError("features hold NaN or infinite values")
    if metric == "l2":
        return x, squares
    if (squares == 0).any():
        raise ValueError("a row of zeros has no angle; use the metric l2")
    return _direction(x), torch.ones_like(squares)


def _scaled(x: Tensor) -> Tensor:
    """Rows over their largest magnitude: since division rounds correctly, proportional rows become exactly equal."""
    return x / x.abs().amax(-1, keepdim=True)


def _direction(x: Tensor) -> Tensor:
    """Rows of length 1."""
    x = _scaled(x)
    return x / x.norm(dim=-1, keepdim=True)


def _without_further_copies(rows: Rows, k: int, metric: str) -> Tensor | None:
    """Numbers of the rows without those that have k equal (by cosine: proportional) ones before them; None: all.

    None of those left out can be among the k nearest, since k of lower index are as near. Equality is found by a hash
    and then checked.
    """
    if len(rows) <= k + SPARE:  # all of them are ranked
        return None
    multipliers = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=seeded(0)) | 1

    def canonical(x: Tensor) -> Tensor:
        x = x.cpu().double()
        return (_scaled(x) if metric == "cosine" else x) + 0.0  # -0.0 becomes 0.0

    def hashed(x: Tensor) -> Tensor:
        bits = canonical(x).view(torch.int64)
        return ((bits ^ (bits >> 29)) * multipliers).sum(1)

    keys = torch.cat([hashed(chunk) for chunk in chunks(rows)])
    keys, order = keys.sort(stable=True)
    later = (keys[k:] == keys[:-k]).nonzero().flatten() + k  # has k of its key before it
    if not len(later):
        return None
    drop = torch.zeros(len(rows), dtype=torch.bool)
    first = torch.searchsorted(keys, keys[later])
    step = _chunk(rows.shape[1])
    for some, one in zip(order[later].split(step), order[first].split(step), strict=True):
        drop[some] = (canonical(rows[some]) == canonical(rows[one])).all(1)
    kept = (~drop).nonzero().flatten()
    return kept if len(kept) < len(rows) else None
