"""Nearest neighbours against scikit-learn, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from bigbigan.evaluation import StoredRows, knn
from bigbigan.evaluation.knn import knn_accuracy, nearest


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK", 7)


def features(n: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn((n, 5), generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize("metric, theirs", [("l2", "euclidean"), ("cosine", "cosine")])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_as_scikit_learn(metric: str, theirs: str, offset: float) -> None:
    rows, queries = features(60, 0, offset), features(23, 1, offset)
    distance, index = nearest(rows, queries, 9, metric=metric)
    wanted = NearestNeighbors(n_neighbors=9, metric=theirs, algorithm="brute").fit(rows.double().numpy())
    their_distance, their_index = wanted.kneighbors(queries.double().numpy())
    assert (index.numpy() == their_index).all()
    torch.testing.assert_close(distance, torch.from_numpy(their_distance), rtol=1e-6, atol=1e-9)
    y, z = torch.arange(60) % 4, torch.arange(23) % 4
    for result in knn_accuracy(rows, y, queries, z, ks=(1, 2, 5, 9), metric=metric):
        model = KNeighborsClassifier(result.k, metric=theirs, algorithm="brute")
        score = model.fit(rows.double().numpy(), y.numpy()).score(queries.double().numpy(), z.numpy())
        assert result.accuracy == pytest.approx(score), result


def grid(n: int, seed: int, dimensions: int = 3) -> torch.Tensor:
    """Points of {0, 1, 2}^3: every distance is exact, and most are shared."""
    return torch.randint(0, 3, (n, dimensions), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_tied_distances_go_to_the_lower_index(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """By a full stable sort of exact distances; scikit-learn agrees on the distances, and where nothing ties."""
    monkeypatch.setattr(knn, "CHUNK", chunk)
    rows, queries = grid(300, 0), grid(40, 1)
    exact = (queries[:, None] - rows).double().square().sum(2)
    distance, index = nearest(rows, queries, 20)
    values, order = exact.sort(dim=1, stable=True)
    assert torch.equal(index, order[:, :20])
    assert torch.equal(distance, values[:, :20].sqrt())
    theirs, _ = NearestNeighbors(n_neighbors=20, algorithm="brute").fit(rows.double().numpy()).kneighbors(queries)
    torch.testing.assert_close(distance, torch.from_numpy(theirs), rtol=0, atol=1e-7)  # theirs subtracts squares
    assert nearest(rows[:1].expand(200, 3), queries, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 40  # as of a collapsed model


def test_votes_among_tied_labels_as_scikit_learn() -> None:
    """Neighbours without ties, labels with many."""
    rows, queries = features(200, 0), features(300, 1)
    y, z = torch.arange(200) % 5, torch.arange(300) % 5
    for result in knn_accuracy(rows, y, queries, z, ks=(2, 4, 6, 10)):
        model = KNeighborsClassifier(result.k, algorithm="brute").fit(rows.double().numpy(), y.numpy())
        assert result.accuracy == pytest.approx(model.score(queries.double().numpy(), z.numpy()))


@pytest.mark.parametrize("scale", [1e-22, 1e-10, 1.0, 1e10, 1e25])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_float32_search_loses_no_neighbour(monkeypatch: pytest.MonkeyPatch, scale: float, precision: str) -> None:
    """Neighbours nearer to each other than float32 can tell at their distance from the centre, some rows huge."""
    monkeypatch.setattr(knn, "SPARE", 4)
    torch.set_float32_matmul_precision(precision)
    try:
        draws = torch.Generator().manual_seed(0)
        rows = 1 + 1e-6 * torch.randn((400, 6), generator=draws)
        rows[::7] *= 30
        queries = 1 + 1e-6 * torch.randn((50, 6), generator=draws)
        wanted = (queries.double()[:, None] * scale - rows.double() * scale).square().sum(2).sort(dim=1, stable=True)
        distance, index = nearest(rows.double() * scale, queries.double() * scale, 3)
        assert torch.equal(index, wanted.indices[:, :3])
        torch.testing.assert_close(distance, wanted.values[:, :3].sqrt(), rtol=1e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no such setting")
def test_torchs_newer_setting_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is used, torch refuses to tell the older one; the search in float64 needs neither."""
    draws = torch.Generator().manual_seed(0)
    rows, queries = torch.randn((400, 6), generator=draws), torch.randn((50, 6), generator=draws)
    expected = nearest(rows, queries, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert all(map(torch.equal, nearest(rows, queries, 3), expected))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_most_queries_need_no_second_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first would be for nothing."""
    monkeypatch.setattr(knn, "CHUNK", 500)
    searched: dict[torch.dtype, int] = {}
    inner = knn._candidates

    def counted(a: torch.Tensor, *arguments: object) -> object:
        searched[arguments[-1]] = searched.get(arguments[-1], 0) + len(a)  # type: ignore[index, call-overload]
        return inner(a, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(knn, "_candidates", counted)
    draws = torch.Generator().manual_seed(0)
    rows, queries = torch.randn((3000, 64), generator=draws), torch.randn((400, 64), generator=draws)
    _, index = nearest(rows, queries, 5)
    assert torch.equal(index, torch.cdist(queries.double(), rows.double()).topk(5, largest=False).indices)
    assert searched[torch.float32] == 400 and searched.get(torch.float64, 0) < 4


def test_wide_rows_come_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = features(60, 0), features(23, 1)
    expected = nearest(rows, queries, 4)
    seen, inner = [], knn._prepared
    monkeypatch.setattr(knn, "_prepared", lambda x, **options: seen.append(len(x)) or inner(x, **options))
    monkeypatch.setattr(knn, "CHUNK_VALUES", 7 * rows.shape[1] + 1)
    assert all(map(torch.equal, nearest(rows, queries, 4), expected))
    assert max(seen) == 7


def test_rows_on_the_disk(tmp_path: Path) -> None:
    rows, queries = features(60, 0), features(23, 1)
    for name, x in (("rows", rows), ("queries", queries)):
        np.save(tmp_path / f"{name}.npy", x.numpy())
    stored = nearest(StoredRows.open(tmp_path / "rows.npy"), StoredRows.open(tmp_path / "queries.npy"), 4)
    assert all(torch.equal(a, b) for a, b in zip(stored, nearest(rows, queries, 4), strict=True))


def test_the_smallest_of_tied_labels_wins() -> None:
    rows, y = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([2, 0, 0, 1])
    query = torch.tensor([[0.1]])
    answers = {label: knn_accuracy(rows, y, query, torch.tensor([label]), ks=(1, 2, 3)) for label in (0, 2)}
    assert [r.accuracy for r in answers[2]] == [1, 0, 0] and [r.accuracy for r in answers[0]] == [0, 1, 1]
    large = 10**12 * y + 7  # the number of a class is no size
    answers = {
        label: knn_accuracy(rows, large, query, 10**12 * torch.tensor([label]) + 7, ks=(1, 2)) for label in (0, 2)
    }
    assert [r.accuracy for r in answers[2]] == [1, 0] and [r.accuracy for r in answers[0]] == [0, 1]


def test_what_does_not_fit_is_refused() -> None:
    x, y = features(4, 0), torch.zeros(4, dtype=torch.long)
    for bad, message in (
        ({"ks": (5,)}, "from 1 to the 4 training rows"),
        ({"ks": ()}, "from 1 to the 4"),
        ({"metric": "l1"}, "choose l2 or cosine"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_accuracy(x, y, x, y, **{"ks": (1,), **bad})
    for other, message in ((features(3, 1)[:, :2], "do not fit"), (x * float("nan"), "NaN"), (x * 0, "no angle")):
        with pytest.raises(ValueError, match=message):
            nearest(x, other, 1, metric="cosine")
    with pytest.raises(ValueError, match="one label a row"):
        knn_accuracy(x, y[:2], x, y, ks=(1,))


def test_proportional_rows_tie_by_cosine_and_the_lower_index_wins() -> None:
    """Small whole numbers, so that the rows are proportional exactly; more of them than are ranked at once."""
    draws = np.random.default_rng(3)
    for width in (3, 17, 64):
        direction = draws.integers(-9, 10, width)
        factors = draws.permutation(np.arange(1, 201))
        other = draws.integers(-9, 10, (50, width)) + 100 * np.eye(50, width, dtype=int)
        rows = torch.tensor(np.concatenate([np.outer(factors, direction), other]), dtype=torch.float32)
        queries = torch.tensor(draws.normal(size=(20, width)) * 0.1 + direction, dtype=torch.float32)
        for k in (1, 5, 30):
            distances, found = nearest(rows, queries, k, metric="cosine")
            assert torch.equal(found, torch.arange(k).expand(20, k)), (width, k)
            assert (distances == distances[:, :1]).all()


def test_equal_rows_tie_and_the_lower_index_wins_however_many() -> None:
    draws = torch.Generator().manual_seed(0)
    kinds = torch.randn(7, 33, generator=draws)
    which = torch.randint(7, (500,), generator=draws)
    for metric in ("l2", "cosine"):
        rows, queries = kinds[which], kinds + 0.01 * torch.randn(7, 33, generator=draws)
        _, found = nearest(rows, queries, 20, metric=metric)
        for kind in range(7):
            assert found[kind].tolist() == (which == kind).nonzero().flatten()[:20].tolist()
    # Beyond the copies of the nearest kind come those of the second, by index too.
    _, found = nearest(rows, queries, 150, metric="l2")
    distances = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for kind in range(7):
        order = sorted(range(500), key=lambda i: (round(distances[kind, i].item(), 9), i))
        assert found[kind].tolist() == order[:150]
