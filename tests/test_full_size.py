"""The two released architectures at full size, on photos (random weights)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
