"""Full-size TF-Hub modules (random weights) through `bigbigan convert`, with photos, within stated time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
name, module, output, photos, form = sys.argv[2:]
def peak_gib():  # of this program alone: what getrusage tells is inherited from the parent
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)
start = time.time()
def report(**facts):
    print(json.dumps({"seconds": round(time.time() - start, 1), "peak_gib": peak_gib(), **facts}))
"""
BUILD = """
from tfhub_builder import variants
from tfhub_builder.module import build_module
build_module(module, variants.FULL_SIZE[name])
report()
"""
CONVERT = """
from bigbigan.cli import main
pictures = sorted(Path(photos).rglob("*.jp*g"))[:4] if photos else []
options = ["-o", output, "--form", form]
code = main(["convert", module, *options, *(word for path in pictures for word in ("--image", str(path)))])
report(code=code)
"""
COMPARE = """
import bigbigan
from tfhub_builder import variants
from tfhub_builder.module import random_feeds, run_reference
model = bigbigan.load(output)
feeds, noise = random_feeds(variants.FULL_SIZE[name], 2, seed=5)
x = feeds["encode"]["x"]
if photos:
    x = model.preprocess(sorted(Path(photos).rglob("*.jp*g"))[:2]).permute(0, 2, 3, 1).contiguous().numpy()
wanted = run_reference(module, "encode", {"x": x}, noise)
got = model.encode(torch.from_numpy(x).permute(0, 3, 1, 2), noise=torch.from_numpy(noise))
errors = {key: float(np.abs(got[key].numpy() - wanted[key]).max() / np.abs(wanted[key]).max()) for key in got.keys()}
image = run_reference(module, "generate", feeds["generate"])["default"]
drawn = model.generate(torch.from_numpy(feeds["generate"]["z"])).permute(0, 2, 3, 1).numpy()
errors["image"] = float(np.abs(drawn - image).max() / np.abs(image).max())
report(errors=errors, widths=[wanted["avepool_feat"].shape[1], wanted["bn_crelu_feat"].shape[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["port", "graph"])
@pytest.mark.parametrize("name, features", [("resnet50", 2048), ("revnet50x4", 8192)])
def test_full_size_module(name: str, features: int, form: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
    tests = Path(__file__).parent
    data = Path(os.environ.get("BIGBIGAN_TEST_DATA", tests.parents[1] / "shared" / "data")) / "imagenet_samples"
    photos = str(data) if data.is_dir() else ""

    def child(script: str) -> dict:
        module, output = tmp_path / "module", tmp_path / "model"
        command = [sys.executable, "-c", SETUP + script, str(tests), name, str(module), str(output), photos, form]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
        assert done.returncode == 0, done.stderr[-3000:]
        print(name, form, done.stderr, done.stdout)  # shown by pytest -s
        return json.loads(done.stdout.splitlines()[-1])

    child(BUILD)
    converted = child(CONVERT)
    assert converted["code"] == 0 and converted["peak_gib"] < 12 and converted["seconds"] < 15 * 60
    compared = child(COMPARE)
    assert compared["widths"] == [features, 2 * features]
    assert max(compared["errors"].values()) < 1e-4, compared
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert set(provenance["forms"].values()) == {form}
    assert {d["inputs"] for d in provenance["differences"]} == ({"random", "images"} if photos else {"random"})
