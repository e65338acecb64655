"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The tensors are small: threads that wait for a busy core cost more than they give, here, in TensorFlow, and in the
# processes that tests start.
torch.set_num_threads(1)
for _name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(_name, "1")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Tests that draw from torch's global state see the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of evaluation data sets (BIGBIGAN_TEST_DATA, or `../shared/data` beside the checkout)."""
    folder = Path(os.environ.get("BIGBIGAN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set BIGBIGAN_TEST_DATA to a folder with fashion_mnist/test.parquet …")
    return folder


@pytest.fixture(params=["packed", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """oneDNN's kernels on packed weights where there are any, for narrow layers too, and PyTorch's own."""
    monkeypatch.setattr("bigbigan.fused.swap.PACKED_LINEAR", 1)
    if request.param == "plain":
        monkeypatch.setattr("bigbigan.fused.kernels.packs", lambda: False)
    yield request.param
