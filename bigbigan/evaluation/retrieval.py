"""Nearest neighbours of images by their features, exactly, and how many of them are of the same class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigbigan.arrays import as_tensor
from bigbigan.evaluation.knn import nearest
from bigbigan.evaluation.rows import Rows, as_rows


def retrieve(
    rows: Rows,
    queries: Rows,
    k: int,
    *,
    metric: str = "cosine",
    own: Tensor | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Distances and indices, [M, k] each and nearest first, of the rows [N, D] nearest to the queries [M, D].

    Args:
        metric: "cosine", 1 - cos; or "l2", Euclidean distance.
        own: [M], the row that is the query itself and is left out of its neighbours; -1 where none is.

    Raises:
        ValueError: as `nearest`, or more neighbours than rows.
    """
    rows, queries = as_rows(rows, "rows"), as_rows(queries, "queries")
    own = None if own is None else as_tensor(own, "own")
    if own is None or not (own >= 0).any():
        return nearest(rows, queries, k, metric=metric, device=device, progress=progress)
    if not 1 <= k < len(rows):
        raise ValueError(f"k is {k}; beside a query itself there are {len(rows) - 1} images to choose from")
    distances, indices = nearest(rows, queries, k + 1, metric=metric, device=device, progress=progress)
    # The query stands somewhere among images equal to it, or beyond the last of them: then the last is left out.
    left_out = indices == own[:, None].cpu()
    left_out[:, -1] |= ~left_out.any(1)
    kept = (~left_out).nonzero()[:, 1].reshape(len(indices), k)
    return distances.gather(1, kept), indices.gather(1, kept)


def precision_at(indices: Tensor, labels: Tensor, query_labels: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """For each k the mean fraction, over queries [M], of the first k neighbours [M, K] that have the query's label.

    Args:
        labels: [N] of the rows.

    Raises:
        ValueError: k beyond the neighbours, or a negative label.
    """
    indices, labels = as_tensor(indices, "indices"), as_tensor(labels, "labels")
    query_labels = as_tensor(query_labels, "query_labels")
    if not ks or min(ks) < 1 or max(ks) > indices.shape[1]:
        raise ValueError(f"k is {list(ks)}; give one or more from 1 to {indices.shape[1]}, the neighbours found")
    if int(labels.min()) < 0 or int(query_labels.min()) < 0:
        raise ValueError("some images have no label")
    same = (labels.cpu()[indices] == query_labels.cpu()[:, None]).double()
    return {k: same[:, :k].mean().item() for k in ks}


def labels_of(names: Sequence[str]) -> Tensor:
    """[N], by the first folder of each name; -1 for all where a name has none."""
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    if None in folders:
        return torch.full((len(names),), -1)
    numbers = {folder: number for number, folder in enumerate(sorted(set(map(str, folders))))}
    return torch.tensor([numbers[str(folder)] for folder in folders])
