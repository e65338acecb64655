"""Nearest neighbours against scikit-learn, and by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from bigbigan.evaluation import knn
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


def test_the_smallest_of_tied_labels_wins() -> None:
    rows, y = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([2, 0, 0, 1])
    query = torch.tensor([[0.1]])
    answers = {label: knn_accuracy(rows, y, query, torch.tensor([label]), ks=(1, 2, 3)) for label in (0, 2)}
    assert [r.accuracy for r in answers[2]] == [1, 0, 0] and [r.accuracy for r in answers[0]] == [0, 1, 1]


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
