"""Every example runs as its first line says, offline, and writes something to look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUTS = {
    "generate_grid.py": "grid.png",
    "reconstruct_photos.py": "pairs.png",
    "extract_features.py": None,
    "interpolate.py": "strip.png",
    "encode_folder.py": "features.npz",
}


def test_all_examples_are_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(OUTPUTS)


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
