"""What the tests of the command line share: their conditions, pictures, grids and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path_factory.mktemp("home")))


def make_images(folder: Path, number: int, side: int = 32) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(number)
    paths = [folder / f"{index:04d}.png" for index in range(number)]
    for path in paths:
        Image.fromarray(draws.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return paths


def make_classes(root: Path, numbers: dict[str, int], shape: tuple[int, ...] = (32, 32, 3)) -> Path:
    """Labelled images by split: two classes, dark and bright, that differ in nothing else."""
    draws = np.random.default_rng(0)
    for split, number in numbers.items():
        for name, low in (("dark", 0), ("bright", 128)):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                array = draws.integers(low, low + 128, shape, np.uint8)
                Image.fromarray(array).save(root / split / name / f"{index}.png")
    return root


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def cells(path: Path, columns: int, side: int, gap: int = 2) -> np.ndarray:
    """[N, side, side, C]: the pictures of a grid, row by row."""
    grid = pixels(path)
    rows = (grid.shape[0] + gap) // (side + gap)
    corners = [(row * (side + gap), column * (side + gap)) for row in range(rows) for column in range(columns)]
    return np.stack([grid[top : top + side, left : left + side] for top, left in corners])


def run(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigbigan", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(__file__).parents[1]} | options
    return subprocess.Popen(command, text=True, env=environment, **pipes)
