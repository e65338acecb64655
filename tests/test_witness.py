"""Modules written by TensorFlow 1.15, tensorflow_hub 0.7, Sonnet 1.36 and tensorflow-probability 0.8, converted.

Needs a Python 3.7 with these, named by BIGBIGAN_PYTHON37; `tests/witness/README.md` has the set-up.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import bigbigan

SCRIPT = Path(__file__).parent / "witness" / "write_modules.py"
GRAPHS = {  # networks that become graphs, by spelling; all others are ports
    "plain": (),
    "fused": (),
    "resource": (),
    "partitioned": (),
    "spectral": (),
    "spectral_loop": (),
    "layer_norm_elu": ("encoder", "discriminator"),
    "print_normalised": ("encoder",),
    "gather_clipped": ("generator",),
    "conditional": (),
    "deconvolution": ("generator",),
    "dilated_leaky": ("generator", "encoder", "discriminator"),
    "exp_deviation": ("encoder",),
    "no_discriminator": (),
}


def tensor(array: np.ndarray) -> torch.Tensor:
    value = torch.from_numpy(array)
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value


@pytest.mark.slow
@pytest.mark.skipif(
    "BIGBIGAN_PYTHON37" not in os.environ, reason="BIGBIGAN_PYTHON37 names no Python with TensorFlow 1.15"
)
@pytest.mark.parametrize("spelling", GRAPHS)
def test_modules_of_the_old_exporter(spelling: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
    from weights_conversion.convert import convert

    command = [os.environ["BIGBIGAN_PYTHON37"], str(SCRIPT), str(tmp_path), spelling]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    written = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert written.returncode == 0, written.stderr[-2000:]
    model = bigbigan.load(convert(tmp_path / "module", tmp_path / "model", report=lambda text: None))
    forms = model.info.provenance["forms"]
    assert tuple(part for part, form in forms.items() if form == "graph") == GRAPHS[spelling], model.info.provenance
    wanted = np.load(tmp_path / "reference.npz")
    parts = ("generator", "encoder") if spelling == "no_discriminator" else ("generator", "encoder", "discriminator")
    assert model.parts == parts
    for count in (1, 3, 5):
        given = {key.partition("/")[2]: tensor(wanted[key]) for key in wanted.files if key.startswith(f"{count}/")}
        z, x = given["generate/in/z"], given["encode/in/x"]
        images = [model.generate(z, upsample=large).permute(0, 2, 3, 1) for large in (False, True)]
        found = {"generate/out/default": images[0], "generate/out/upsampled": images[1]}
        encoded = model.encode(x, noise=torch.from_numpy(wanted[f"noise/{count}"]))
        found |= {f"encode/out/{name}": encoded[name] for name in tuple(encoded.keys())}
        if "discriminator" in parts:
            scores = model.discriminate(given["discriminate/in/x"], given["discriminate/in/z"])
            names = ("score_x", "score_z", "score_xz")
            found |= {f"discriminate/out/{name}": getattr(scores, name) for name in names}
        for name, value in found.items():
            exact = wanted[f"{count}/{name}"]
            assert np.abs(value.numpy() - exact).max() <= 1e-4 * np.abs(exact).max(), (count, name)
