"""The two released architectures at full size, on photos (random weights), through Python and the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import home, one_thread, run  # noqa: F401 (fixtures for every test here)

from bigbigan import create_model

SCRIPT = """
import json, sys, time, torch, bigbigan
from bigbigan.images import list_images
peak_gib_source = '''
def peak_gib():  # of this program alone: what getrusage tells is inherited from the parent
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)
'''
exec(peak_gib_source)
torch.set_num_threads(2)
name, folder, photos = sys.argv[1:]
facts = {}
def note(what, start):
    facts[what] = round(time.time() - start, 1)
start = time.time(); model = bigbigan.create_model(name); note("create_s", start)
start = time.time(); model.save(folder); note("save_s", start)
del model
child = peak_gib_source + '''
import json, sys, torch, bigbigan
from bigbigan.images import list_images
torch.set_num_threads(2)
part, folder, photos = sys.argv[1:]
model = bigbigan.load(folder, parts=(part,))
assert model.parts == (part,)
facts = {}
if part == "encoder":
    out = model.encode(list_images(photos)[:3], seed=0)
    facts = {key: [list(out[key].shape), out[key].min().item(), out[key].max().item()] for key in out.keys()}
elif part == "generator":
    images = model.generate(3, seed=0)
    facts["images"] = [list(images.shape), images.min().item(), images.max().item()]
    facts["upsampled"] = list(model.generate(1, seed=0, upsample=True).shape)
else:
    x = torch.rand(3, 3, 128, 128) * 2 - 1
    scores = model.discriminate(x, torch.randn(3, 120))
    facts["scores"] = [list(s.shape) for s in scores.present()]
facts["peak_gib"] = peak_gib()
print(json.dumps(facts))
'''
import subprocess
for part in ("generator", "encoder", "discriminator"):
    command = [sys.executable, "-c", child, part, folder, photos]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    facts[part] = json.loads(out.stdout)
facts["peak_gib"] = peak_gib()
print(json.dumps(facts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, features", [("bigbigan-resnet50", 2048), ("bigbigan-revnet50x4", 8192)])
def test_released_architecture(name: str, features: int, tmp_path: Path, shared_data: Path) -> None:
    photos = shared_data / "imagenet_samples"
    command = [sys.executable, "-c", SCRIPT, name, str(tmp_path / "model"), str(photos)]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(name, json.dumps(facts, indent=1))  # shown by pytest -s
    encoder, generator = facts["encoder"], facts["generator"]
    shapes = {key: encoder[key][0] for key in encoder if key != "peak_gib"}
    latents = {"z_sample": [3, 120], "z_mean": [3, 120], "z_stdev": [3, 120]}
    assert shapes == latents | {"avepool_feat": [3, features], "bn_crelu_feat": [3, 2 * features]}
    assert encoder["z_stdev"][1] > 0 and encoder["avepool_feat"][1] >= 0 and encoder["bn_crelu_feat"][1] == 0
    assert generator["images"][0] == [3, 3, 128, 128] and generator["upsampled"] == [1, 3, 256, 256]
    assert -1 <= generator["images"][1] < generator["images"][2] <= 1
    assert facts["discriminator"]["scores"] == [[3], [3], [3]]


@pytest.mark.slow
@pytest.mark.parametrize("name, width", [("bigbigan-resnet50", 2048), (None, 256)])
def test_full_size_and_embedded_models_take_the_same_road(
    tmp_path: Path, shared_data: Path, name: str | None, width: int
) -> None:
    """Real photos through `encode`, then each of `evaluate` on a few of them, in processes of their own."""
    photos = sorted((shared_data / "imagenet_samples").rglob("*.jpg"))[:12]
    if name is not None:
        create_model(name, parts=("generator", "encoder")).save(tmp_path / "model")
    model = () if name is None else ("--model", tmp_path / "model")
    for split, some in (("train", photos[:8]), ("test", photos[8:])):
        for index, path in enumerate(some):
            (tmp_path / "data" / split / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "data" / split / "ab"[index % 2])
    encode = run("encode", tmp_path / "data" / "train", *model, "-o", tmp_path / "train.npz", "--batch-size", 4)
    assert encode.communicate()[1] and encode.returncode == 0
    assert dict(np.load(tmp_path / "train.npz"))["bn_crelu_feat"].shape == (8, 2 * width)
    command = ("evaluate", "linear", "--data", tmp_path / "data", *model, "--l2", 1, "--batch-size", 4)
    probe = run(*command, "--compare", "pixels", "--feature-cache", tmp_path / "cache", "--json", tmp_path / "r.json")
    _, err = probe.communicate()
    assert probe.returncode == 0, err
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["num_features"] for row in found][:2] == [width, 2 * width] and len(found) == 3
    # An encoder on random weights has one cluster: 4 samples show that figures come, not what they are.
    network = ("--network", f"model:{tmp_path / 'model' if name else 'bigbigan-fashion-mnist-32'}")
    for what, options, figures in (
        ("knn", ("--k", 1), {"accuracy"}),
        ("reconstruction", ("--grid", tmp_path / "pairs.png"), {"label_agreement", "pixel_l1"}),
        ("generation", ("-n", 4, "--kid-subsets", 0, *network), {"samples"}),
        ("retrieval", ("--query-split", "test", "--k", 1, "-o", tmp_path / "near.png"), {"precision"}),
    ):
        target = tmp_path / f"{what}.json"
        process = run("evaluate", what, "--data", tmp_path / "data", *model, *options, "--json", target)
        _, err = process.communicate()
        assert process.returncode == 0, err
        result = json.loads(target.read_text())["results"][0]
        assert figures <= result.keys() and all(np.isfinite(v) for v in result.values() if isinstance(v, float)), result
    assert (tmp_path / "pairs.png").is_file() and (tmp_path / "near.png").is_file()
