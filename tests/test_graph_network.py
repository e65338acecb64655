"""Networks in graph form: their file and its limits, what the public interface does with them, and each operation."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks.harness import run_children
from fake_hub import FakeHub

import bigbigan
from bigbigan import graph as graphs
from bigbigan.cli import main
from bigbigan.config import (
    BigBiGANConfig,
    GraphDiscriminatorConfig,
    GraphEncoderConfig,
    GraphGeneratorConfig,
    ModelInfo,
    PreprocessConfig,
)
from bigbigan.evaluation.features import digest
from bigbigan.graph import Graph, GraphEncoder, Operation, check_graph, parse_graph
from bigbigan.graph_operations import OPERATIONS, Context, standard_uniform, truncated_normal
from bigbigan.integrity import WeightsError
from bigbigan.model import BigBiGAN
from bigbigan.onnx import export_onnx, export_program, part_inputs
from bigbigan.schema import ConfigError

Z, SIZE, FEATURES = 6, 8, 5


def operation(op: str, *inputs: int | str, **attributes: Any) -> Operation:
    return Operation(op, inputs, attributes)


def generator_graph() -> Graph:
    operations = (
        operation("linear", "z", "c0_seed"),
        operation("reshape", 0, shape=[-1, 3, SIZE // 2, SIZE // 2]),
        operation("nearest", 1, factors=[2, 2]),
        operation("conv2d", 2, "c1_conv", stride=[1, 1], padding=[1, 1, 1, 1], dilation=[1, 1], groups=1),
        operation("tanh", 3),
        operation("nearest", "image", factors=[2, 2]),
    )
    constants = {"c0_seed": (3 * SIZE * SIZE // 4, Z), "c1_conv": (3, 3, 3, 3)}
    inputs = {"z": (Z,), "image": (3, SIZE, SIZE)}
    return Graph(inputs, constants, operations, {"default": 4, "upsampled": 5})


def encoder_graph() -> Graph:
    operations = (
        operation("conv2d", "x", "c0_conv", "c1_bias", stride=[2, 2], padding=[0, 1, 0, 1], dilation=[1, 1], groups=1),
        operation("max_pool", 0, size=[3, 3], stride=[2, 2], padding=[0, 1, 0, 1]),
        operation("mean", 1, axes=[2, 3], keep=False),
        operation("scalar", 2, factor=-1.0, term=0.0),
        operation("concat", 2, 3, axis=1),
        operation("relu", 4),
        operation("linear", 2, "c2_mean"),
        operation("linear", 2, "c3_deviation"),
        operation("softplus", 7),
        operation("mul", "noise", 8),
        operation("add", 6, 9),
    )
    constants = {"c0_conv": (FEATURES, 3, 3, 3), "c1_bias": (FEATURES,), "c2_mean": (Z, FEATURES)}
    constants["c3_deviation"] = (Z, FEATURES)
    outputs = {"z_sample": 10, "z_mean": 6, "z_stdev": 8, "avepool_feat": 2, "bn_crelu_feat": 5}
    return Graph({"x": (3, 2 * SIZE, 2 * SIZE), "noise": (Z,)}, constants, operations, outputs)


def discriminator_graph() -> Graph:
    operations = (
        operation("mean", "x", axes=[2, 3], keep=False),
        operation("linear", 0, "c0_x"),
        operation("linear", "z", "c1_z"),
        operation("add", 1, 2),
        *(operation("reshape", i, shape=[-1]) for i in (1, 2, 3)),
    )
    outputs = {"score_x": 4, "score_z": 5, "score_xz": 6}
    return Graph({"x": (3, SIZE, SIZE), "z": (Z,)}, {"c0_x": (1, 3), "c1_z": (1, Z)}, operations, outputs)


def make() -> BigBiGAN:
    made = {"generator": generator_graph(), "encoder": encoder_graph(), "discriminator": discriminator_graph()}
    sizes = {"image_channels": 3, "z_dim": Z}
    config = BigBiGANConfig(
        GraphGeneratorConfig(SIZE, **sizes, sha256=made["generator"].sha256, upsample_size=2 * SIZE),
        GraphEncoderConfig(2 * SIZE, **sizes, sha256=made["encoder"].sha256, num_features=FEATURES),
        GraphDiscriminatorConfig(SIZE, **sizes, sha256=made["discriminator"].sha256),
        PreprocessConfig(2 * SIZE),
    )
    model = BigBiGAN(config, info=ModelInfo("graphs"), graphs=made)
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=draws)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("graph") / "model"
    make().save(made)
    return made


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))


# ---- what users do with a model


def test_outputs_are_those_of_the_operations_written_in_torch(folder: Path) -> None:
    model = bigbigan.load(folder)
    x, noise = torch.randn(5, 3, 16, 16).clamp(-1, 1), torch.randn(5, Z)
    state = {name.rpartition(".")[2]: tensor for name, tensor in model.encoder.state_dict().items()}
    F = torch.nn.functional
    h = F.conv2d(F.pad(x, (0, 1, 0, 1)), state["c0_conv"], state["c1_bias"], 2)
    features = F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=-1e30), 3, 2).mean((2, 3))
    mean, stdev = features @ state["c2_mean"].T, F.softplus(features @ state["c3_deviation"].T)
    out = model.encode(x, noise=noise)
    torch.testing.assert_close(out.z_sample, mean + noise * stdev)
    torch.testing.assert_close(out.avepool_feat, features)
    torch.testing.assert_close(out.bn_crelu_feat, torch.cat([features.relu(), (-features).relu()], 1))


def test_the_public_interface(folder: Path, tmp_path: Path) -> None:
    model = bigbigan.load(folder)
    images = model.generate(5, seed=1, truncation=0.5)
    assert images.shape == (5, 3, SIZE, SIZE)
    torch.testing.assert_close(images[2:], model.generate(model.sample_latents(3, seed=1, truncation=0.5, start=2)))
    torch.testing.assert_close(images, model.generate(5, seed=1, truncation=0.5, batch_size=2))
    large = model.generate(2, seed=0, upsample=True)
    assert large.shape == (2, 3, 2 * SIZE, 2 * SIZE)
    out = model.encode(large, seed=3)
    torch.testing.assert_close(model.encode(large[1:], seed=3, start=1).z_sample, out.z_sample[1:])
    assert model.reconstruct(large).shape == (2, 3, SIZE, SIZE) and model.encoder.num_features == FEATURES
    assert model.discriminate(images, torch.randn(5, Z)).score_xz.shape == (5,)
    with pytest.raises(ValueError, match="need latents"):
        model.discriminator(images)
    assert bigbigan.load(folder, parts=("encoder",)).parts == ("encoder",)
    assert GraphEncoder.from_pretrained(folder).config == model.config.encoder
    with pytest.raises(ValueError, match="call GraphEncoder.from_pretrained"):
        bigbigan.Encoder.from_pretrained(folder)
    assert main(["info", str(folder)]) == 0 and main(["generate", str(folder), "-o", str(tmp_path / "grid.png")]) == 0


def test_the_folder_holds_the_graph_and_saves_alike(folder: Path, tmp_path: Path) -> None:
    bigbigan.load(folder).save(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in folder.iterdir()} > {"encoder.graph.json", "encoder.safetensors"}
    model = bigbigan.load(folder)
    with torch.no_grad():
        model.encoder.constants.c1_bias.add_(1)
    model.save(tmp_path / "again")  # over what is there
    assert digest(bigbigan.load(tmp_path / "again").encoder) != digest(bigbigan.load(folder).encoder)


def test_the_command_line_fuses_and_a_graph_stays_plain(folder: Path) -> None:
    plain, fused = bigbigan.load(folder), bigbigan.load(folder, fuse=True)
    assert type(fused.encoder) is GraphEncoder
    assert torch.equal(plain.generate(2, seed=0), fused.generate(2, seed=0))
    assert fused.fuse() is fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    model, exact = bigbigan.load(folder, dtype=dtype), bigbigan.load(folder)
    out = model.generate(exact.sample_latents(3, seed=0))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact.generate(3, seed=0), atol=0.05, rtol=0)
    assert model.encode(exact.generate(3, seed=0, upsample=True), seed=0).z_sample.dtype == dtype


def test_gradients_hooks_and_copies(folder: Path) -> None:
    network = bigbigan.load(folder).generator
    seen: list[torch.Size] = []
    handle = network.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    z = torch.randn(2, Z, requires_grad=True)
    network(z).square().sum().backward()
    handle.remove()
    assert seen == [(2, 3, SIZE, SIZE)] and z.grad is not None and z.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    twin = copy.deepcopy(network)
    twin.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(twin(z), network(z))


@pytest.mark.parametrize("part", ["generator", "encoder", "discriminator"])
def test_torch_export_has_a_free_batch_size(folder: Path, part: str) -> None:
    model = bigbigan.load(folder)
    program = export_program(model, part).module()
    for size in (1, 4):
        inputs = list(part_inputs(model, part, size).values())
        wanted = model.part(part)(*inputs)
        found = program(*inputs)
        first = wanted if part == "generator" else next(iter(vars(wanted).values()))
        torch.testing.assert_close(found[0], first)


def test_onnx(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    reports = export_onnx(bigbigan.load(folder), tmp_path)  # with a max-pool padded on one side
    assert [report.part for report in reports] == ["generator", "encoder", "discriminator"]
    assert max(report.difference for report in reports) < 1e-5


def test_push_and_load_from_the_hub(folder: Path, tmp_path: Path) -> None:
    with FakeHub() as server:
        names = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
        for arguments in (["push", str(folder), "org/mine"], ["generate", "org/mine", "-o", str(tmp_path / "a.png")]):
            command = [sys.executable, "-m", "bigbigan", *arguments]
            done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        repository = server.repositories["org/mine"]
        files = repository.commits[repository.refs["main"]]
    assert {"encoder.graph.json", "encoder.safetensors"} < set(files)
    assert b"Graph networks: generator, encoder, discriminator" in files["README.md"]
    cached = {path.name for path in tmp_path.rglob("snapshots/*/*")}
    assert cached == {"config.json", "generator.graph.json", "generator.safetensors"}


def test_what_a_graph_network_cannot_do_is_one_sentence(folder: Path) -> None:
    model = bigbigan.load(folder)
    with pytest.raises(ValueError, match="cannot be made with random weights or trained by a recipe"):
        bigbigan.create_model(model.config)
    with pytest.raises(ValueError, match=r"x is \[1, 3, 32, 32\].*takes \[N, 3, 16, 16\] and no other size"):
        model.encoder(torch.zeros(1, 3, 32, 32))


# ---- the file


Change = Callable[[dict[str, Any]], None]


def changed(folder: Path, tmp_path: Path, change: Change, part: str = "encoder") -> Path:
    """A copy whose graph was changed, with the digest put right."""
    made = Path(shutil.copytree(folder, tmp_path / "changed"))
    path, config = made / f"{part}.graph.json", json.loads((made / "config.json").read_text())
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    config["architecture"][part]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (made / "config.json").write_text(json.dumps(config))
    return made


def put(index: int, **fields: Any) -> Change:
    return lambda document: document["operations"][index].update(fields)


def attribute(index: int, **fields: Any) -> Change:
    return lambda document: document["operations"][index]["attributes"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(2, op="eval"), "'eval', which is not an operation"),
        (put(2, op="__class__"), "is not an operation"),
        (put(2, inputs=[2]), "refers to '2'"),
        (put(2, inputs=[9]), "refers to '9'"),
        (put(2, inputs=["../x"]), "refers to '../x'"),
        (put(2, inputs=[True]), "refers to 'True'"),
        (put(2, inputs=[0, 1]), "has 2 inputs"),
        (put(2, attributes={}), "has attributes"),
        (put(2, extra=1), "should have op, inputs"),
        (attribute(2, axes=[2, 99]), "not 0 to 7"),
        (attribute(2, keep=1), "not true or false"),
        (attribute(0, stride=[0, 0]), "not 1 to 4096"),
        (attribute(0, stride=[1]), "not a list of 2 to 2"),
        (attribute(0, groups=2), "does not fit its inputs"),
        (attribute(4, axis=3), "does not fit its inputs"),
        (put(0, inputs=["x", "c0_conv", "c0_conv"]), "a vector has shape"),
        (put(5, op="logical_not"), "output 'bn_crelu_feat'"),
        (put(8, op="logical_not"), "takes numbers"),
        (put(3, op="gather", attributes={"axis": 1, "indices": [5]}), "gather takes index 5 of 5"),
        (lambda d: d["constants"].update(c0_conv=[5, 3, 1 << 24, 1 << 24]), "values"),
        (lambda d: d["constants"].update(c0_conv=[5, 3, -1, 3]), "has shape"),
        (lambda d: d["constants"].update({"c0.x/../y": [1]}), "not the name of a constant"),
        (lambda d: d["constants"].update(forward=[1]), "not the name of a constant"),
        (lambda d: d["constants"].update(c9_more=[1]), "missing: constants.c9_more"),
        (lambda d: d["inputs"].update(x=[3, 9, 9]), "does not fit config.json"),
        (lambda d: d["inputs"].pop("noise"), "refers to 'noise'"),
        (lambda d: d["outputs"].pop("z_mean"), "outputs are"),
        (lambda d: d["outputs"].update(z_mean=2), r"output 'z_mean' is \[2, 5\]"),
        (lambda d: d["outputs"].update(z_mean=77), "refers to '77'"),
        (lambda d: d.update(format="bigbigan-graph/2"), "format"),
        (lambda d: d.update(operations=d["operations"] * 10_000), "a list of 1 to"),
        (lambda d: d.update(operations=[]), "a list of 1 to"),
        (
            lambda d: d["operations"].append({"op": "expand", "inputs": [0], "attributes": {"shape": [1 << 20] * 8}}),
            "does",
        ),
        (
            lambda d: d["operations"].extend(
                {
                    "op": "pad",
                    "inputs": [i],
                    "attributes": {"margins": [[0, 0], [0, 0], [0, 9000], [0, 9000]], "value": 0.0},
                }
                for i in (0,)
            ),
            "too large",
        ),
    ],
)
def test_hostile_graphs_are_refused_before_anything_is_allocated(
    folder: Path, tmp_path: Path, change: Change, message: str
) -> None:
    made = changed(folder, tmp_path, change)
    with pytest.raises((ConfigError, WeightsError), match=message):
        bigbigan.load(made, parts=("encoder",))


def test_damaged_and_missing_graphs(folder: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(folder, tmp_path / "m"))
    path = made / "encoder.graph.json"
    data = path.read_bytes()
    for content, message in (
        (data[:-3], "damaged, or belongs to another model"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b" " * (graphs.MAX_GRAPH_BYTES + 1), "is larger than"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            bigbigan.load(made)
        assert bigbigan.load(made, parts=("generator",)).parts == ("generator",)
    path.unlink()
    with pytest.raises(ConfigError, match=r"encoder.graph.json is missing"):
        bigbigan.load(made)


def test_an_output_that_needs_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    made = changed(folder, tmp_path, put(0, inputs=["image", "c0_seed"]), part="generator")
    with pytest.raises(ConfigError, match="output 'default' depends on 'image'"):
        bigbigan.load(made)


def test_a_graph_survives_its_text() -> None:
    for graph in (generator_graph(), encoder_graph(), discriminator_graph()):
        again = parse_graph(graph.text(), "x")
        assert again == graph and again.sha256 == graph.sha256
    with pytest.raises(ConfigError, match="noise and output disagree"):
        config = GraphEncoderConfig(16, 3, Z, "0" * 64, output="deterministic", num_features=FEATURES)
        check_graph(encoder_graph(), config, "x")


def test_a_model_whose_graph_is_not_its_configurations_is_not_saved(tmp_path: Path) -> None:
    model = make()
    model.config = replace(model.config, encoder=replace(model.config.encoder, sha256="0" * 64))
    with pytest.raises(ConfigError, match="not the one of its configuration"):
        model.save(tmp_path / "x")


def test_mutated_folders_give_documented_errors_or_outputs() -> None:
    result = run_children("tests.attacks.fuzz_graph", [], 400)
    assert not result.findings, result
    assert result.outcomes["refused"] > 100 and result.outcomes.total() == 400


# ---- operations


def test_noise_of_other_distributions() -> None:
    x = torch.linspace(-3, 3, 13)
    stats = pytest.importorskip("scipy.stats")
    uniform = stats.norm.cdf(x.numpy().astype(np.float64))
    np.testing.assert_allclose(standard_uniform(x), uniform, atol=1e-6)
    np.testing.assert_allclose(truncated_normal(x), stats.truncnorm.ppf(uniform, -2, 2), atol=1e-5)


def test_every_operation_names_its_attributes() -> None:
    """None looks anything up in torch: the table is closed."""
    assert len(OPERATIONS) > 70
    for name, kind in OPERATIONS.items():
        assert callable(kind.run) and 1 <= kind.fewest <= kind.most, name
    x = torch.randn(2, 3, 4, 4)
    context = Context(2, torch.float32)
    torch.testing.assert_close(OPERATIONS["affine"].run(context, x, torch.arange(3.0), torch.ones(3)),
                               x * torch.arange(3.0)[:, None, None] + 1)  # fmt: skip
    assert OPERATIONS["round_to"].run(context, torch.tensor(1.001), dtype="bfloat16") == 1.0
    padded = OPERATIONS["pad"].run(
        context, x, margins=[[0, 0], [1, 0], [0, 2], [0, 0]], value=-3.4e38
    )  # fmt: skip
    assert padded.shape == (2, 4, 6, 4)
