"""Neighbours without the query itself, and precision, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bigbigan.evaluation.feature_files import feature_names
from bigbigan.evaluation.retrieval import labels_of, precision_at, retrieve

ROWS = torch.tensor([[0.0], [1.0], [3.0], [3.0], [3.0], [10.0]])


def test_the_query_itself_is_left_out_also_among_equals() -> None:
    own = torch.tensor([0, 3, 4, -1])
    distances, indices = retrieve(ROWS, ROWS[[0, 3, 4, 0]], 2, metric="l2", own=own)
    assert distances.tolist() == [[1, 3], [0, 0], [0, 0], [0, 1]]
    assert indices[0].tolist() == [1, 2] and indices[3].tolist() == [0, 1]
    assert set(indices[1].tolist()) <= {2, 4} and set(indices[2].tolist()) <= {2, 3}
    _, kept = retrieve(ROWS, ROWS[:1], 2, metric="l2")
    assert kept.tolist() == [[0, 1]]


def test_a_query_beyond_its_equals_costs_the_last_of_them() -> None:
    rows = torch.zeros(5, 2)
    rows[:, 0] = 1
    _, indices = retrieve(rows, rows[4:], 2, own=torch.tensor([4]))
    assert indices.shape == (1, 2) and 4 not in indices


def test_cosine_is_the_default() -> None:
    rows = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
    distances, indices = retrieve(rows, torch.tensor([[0.0, 9.0]]), 3)
    assert indices.tolist() == [[2, 1, 0]]
    assert distances.tolist()[0] == pytest.approx([0, 1 - 0.5**0.5, 1])


def test_precision_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 1])
    indices = torch.tensor([[0, 2, 1], [3, 0, 1]])
    assert precision_at(indices, labels, torch.tensor([0, 1]), (1, 2, 3)) == pytest.approx({1: 1, 2: 0.5, 3: 0.5})
    with pytest.raises(ValueError, match=r"k is \[4\]; give one or more from 1 to 3"):
        precision_at(indices, labels, torch.tensor([0, 1]), [4])
    with pytest.raises(ValueError, match="no label"):
        precision_at(indices, labels, torch.tensor([0, -1]), [1])


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 6; beside a query itself there are 5 images"):
        retrieve(ROWS, ROWS, 6, metric="l2", own=torch.arange(6))


def test_names_and_what_they_say_of_classes(tmp_path: Path) -> None:
    assert labels_of(["cat/1.png", "ant/2.png", "cat/old/3.png"]).tolist() == [1, 0, 1]
    assert labels_of(["cat/1.png", "2.png"]).tolist() == [-1, -1]
    np.savez(tmp_path / "a.npz", avepool_feat=np.zeros((2, 3)))
    assert feature_names(tmp_path / "a.npz") is None
    np.savez(tmp_path / "a.npz", avepool_feat=np.zeros((2, 3)), paths=["x/1.png", "2.png"])
    assert feature_names(tmp_path / "a.npz") == ["x/1.png", "2.png"]
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a.npz does not name its rows"):
        feature_names(tmp_path / "a.npz")
