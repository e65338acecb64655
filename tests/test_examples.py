"""Every example runs as its first line says, offline, and writes something to look at."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import make_classes
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUTS = {
    "generate_grid.py": "grid.png",
    "reconstruct_photos.py": "pairs.png",
    "extract_features.py": None,
    "interpolate.py": "strip.png",
    "encode_folder.py": "features.npz",
}


def test_all_examples_are_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *OUTPUTS,
        "table1_in_miniature.py",
        "efficientnet_lite0.py",
    }


@pytest.mark.parametrize("name", OUTPUTS)
def test_example(name: str, tmp_path: Path) -> None:
    if name == "extract_features.py":
        pytest.importorskip("sklearn")
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() and not run.stderr.strip(), run.stderr
    output = OUTPUTS[name]
    if output is not None:
        assert (tmp_path / output).stat().st_size > 500
        if output.endswith(".png"):
            with Image.open(tmp_path / output) as picture:
                assert picture.width > 400 and len(picture.convert("L").getcolors()) > 50


def test_evaluation_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    """The documents' lines for any module: a class is told by one pixel, and samples of noise are far from images."""
    pytest.importorskip("torchmetrics")
    draws = torch.Generator().manual_seed(0)
    images = torch.zeros(2200, 1, 32, 32, dtype=torch.uint8)
    labels = torch.randint(0, 6, (2200,), generator=draws)
    images[torch.arange(2200), 0, 0, labels] = 255
    given = {
        "module": nn.Flatten(),
        "train_images": images[:2000],
        "train_labels": labels[:2000],
        "test_images": images[2000:],
        "test_labels": labels[2000:],
        "samples": torch.randint(0, 256, (300, 1, 32, 32), dtype=torch.uint8, generator=draws),
    }
    page = (EXAMPLES.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (block for block in blocks if "module_features" in block)
    exec(code, given)
    accuracy, distance = map(float, capsys.readouterr().out.split())
    assert accuracy == 1.0 and distance > 100


def test_table_1_in_miniature(tmp_path: Path) -> None:
    make_classes(tmp_path / "data", {"train": 8, "test": 8}, (28, 28))
    (tmp_path / "network.py").write_text(
        "from bigbigan.evaluation.feature_networks import FeatureNetwork\n"
        "def means(): return FeatureNetwork('means', 'd', 'as they are', lambda x: (x.float().mean((2, 3)), None))\n"
    )
    command = [sys.executable, str(EXAMPLES / "table1_in_miniature.py"), "--data", "data", "--runs", "runs"]
    command += ["--network", "network.py:means", "--images", "8", "--samples", "20", "--rows", "base", "no E"]
    command += ["--set=batch_size=4", "--set=standing_passes=1"]
    run = subprocess.run([*command, "--seeds", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    again = subprocess.run([*command, "--table", "--seeds", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == run.stdout
    header, _, base, no_e = ([cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()[:4])
    assert header[:2] == ["row", "seeds"] and "Fréchet distance (means)" in header
    assert base[:2] == ["base", "2"] and all("±" in cell for cell in base[2:])
    assert no_e[:2] == ["no E", "2"] and "-" in no_e
    with Image.open(tmp_path / "table1_in_miniature.png") as picture:
        assert picture.width > 16 * 32
    other = subprocess.run([*command, "--images", "12"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 1 and "choose another folder for --runs" in other.stderr
