"""The model folder: what is written comes back bit for bit; whatever is damaged or hostile is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bigbigan import integrity
from bigbigan.config import (
    MAX_CONFIG_BYTES,
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
    ModelInfo,
    PreprocessConfig,
)
from bigbigan.factory import load_folder
from bigbigan.integrity import WeightsError
from bigbigan.model import BigBiGAN
from bigbigan.modelcard import model_card
from bigbigan.modelfolder import read_config, save_folder
from bigbigan.schema import ConfigError, to_dict

MLP = MLPConfig(width=16, layers=2)
TINY = BigBiGANConfig(
    GeneratorConfig(32, base_channels=4, z_chunks=(4, 4, 4, 4), shared_dim=8, attention_resolution=0, upsample_size=64),
    EncoderConfig(32, depths=(1, 1), base_channels=8, block="basic", stem="small", z_dim=16, head=MLP),
    DiscriminatorConfig(32, base_channels=4, z_dim=16, attention_resolution=0, z_mlp=MLP, joint_mlp=MLP),
    PreprocessConfig(32),
)
INFO = ModelInfo(
    "tiny", "cc-by-4.0", "made for tests", {"fid": {"value": 12.5, "images": 1000}, "command": "a | b <c>"}
)


def tiny_model(seed: int = 0, parts: tuple[str, ...] | None = None) -> BigBiGAN:
    model = BigBiGAN(TINY, parts, INFO).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.uniform_(0.1, 1.0, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def card_of(model: BigBiGAN) -> str:
    return model_card(model.config, model.info, model.plain_states())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def replace_weights(folder: Path, part: str, data: bytes) -> None:
    """As whoever publishes a folder could: with the digest that belongs to the bytes."""
    (folder / f"{part}.safetensors").write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit_config(folder, lambda document: document["files"].update({part: entry}))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: str, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + payload


# What is written


def test_round_trip_is_bit_exact_and_behaves_alike(saved: Path) -> None:
    model, again = tiny_model(), load_folder(saved)
    assert_same(model, again)
    assert again.config == TINY and again.info == INFO and again.parts == ("generator", "encoder", "discriminator")
    assert not again.training and not again.encoder.training and all(p.requires_grad for p in again.parameters())
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.generate(z), again.generate(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_dtype_unless_told(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    model.save(tmp_path / "half")
    assert_same(model, load_folder(tmp_path / "half"))
    assert load_folder(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_the_safetensors_library_reads_the_files(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved / "encoder.safetensors")
    state = tiny_model().encoder.state_dict()
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)
    with safetensors.safe_open(saved / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["license"] == "cc-by-4.0"
    assert json.loads(metadata["config"]) == to_dict(TINY.encoder)


def test_parts_load_alone(folder: Path) -> None:
    (folder / "generator.safetensors").unlink()
    (folder / "discriminator.safetensors").write_bytes(b"broken")
    model = load_folder(folder, parts=("encoder",))
    assert model.parts == ("encoder",) and model.generator is None
    assert_same(model.encoder, tiny_model().encoder)


def test_a_model_with_one_part_saves_that_part(tmp_path: Path) -> None:
    tiny_model(parts=("encoder",)).save(tmp_path / "e")
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"config.json", "README.md", "encoder.safetensors"}
    assert load_folder(tmp_path / "e").parts == ("encoder",)
    with pytest.raises(ValueError, match="has no generator; it has encoder"):
        load_folder(tmp_path / "e", parts=("generator",))
    with pytest.raises(ValueError, match="unknown part 'decoder'"):
        load_folder(tmp_path / "e", parts=("decoder",))


def test_bytes_are_reproducible_in_another_process(saved: Path, tmp_path: Path) -> None:
    # Another process has another hash seed, which is what shuffles unordered maps.
    code = f"from test_modelfolder import *; tiny_model().save({str(tmp_path / 'again')!r})"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "123",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert digests(saved) == digests(tmp_path / "again")


def test_loading_leaves_the_global_random_state_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    load_folder(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_training_a_loaded_model_does_not_write_into_its_file(folder: Path) -> None:
    before = digests(folder)
    model = load_folder(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert digests(folder) == before


def test_weights_in_memory_outlive_their_file(folder: Path) -> None:
    """Mapped ones would change, or end the process; so do it in a process of its own."""
    script = (
        "import sys, bigbigan; from pathlib import Path; folder = Path(sys.argv[1]);"
        "model = bigbigan.load(folder, mmap=False); before = model.generate(2, seed=0);"
        "[open(path, 'r+b').truncate(100) for path in folder.glob('*.safetensors')];"
        "assert (model.generate(2, seed=0) == before).all()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saving_onto_the_folder_one_was_loaded_from(folder: Path) -> None:
    model = load_folder(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save(folder)
    again = load_folder(folder).state_dict()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_card_has_metadata_and_facts_in_escaped_cells(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert card == card_of(tiny_model())
    head = card.split("---")[1].strip().splitlines()
    assert {"library_name: bigbigan", "license: cc-by-4.0", "pipeline_tag: unconditional-image-generation"} <= set(head)
    assert "| fid.value | 12.5 |" in card and "| command | a \\| b &lt;c> |" in card
    size = (saved / "encoder.safetensors").stat().st_size
    assert f"`encoder.safetensors` | {sum(t.numel() for t in tiny_model().encoder.state_dict().values()):,} |" in card
    assert size > 0
    unusual = tiny_model(parts=("encoder",))
    rows = [{"output": "encode.z_mean", "relative": 1e-6}, {"output": "a|b", "relative": 2e-6}]
    unusual.info = ModelInfo(
        license='My "own": license', provenance={"differences": rows, "note": [{"a": 1}, {"b": 2}]}
    )
    table = "### differences\n\n| output | relative |\n| --- | --- |\n| encode.z_mean | 1e-06 |\n| a\\|b | 2e-06 |\n"
    assert table in card_of(unusual) and '| note | [{"a": 1}, {"b": 2}] |' in card_of(unusual)
    assert 'license: other\nlicense_name: "My \\"own\\": license"\npipeline_tag: image-feature' in card_of(unusual)


# What is refused when saving


def test_weights_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.encoder.latent.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"encoder: latent.weight has 1 NaN"):
        model.save(tmp_path / "m")
    model = tiny_model()
    model.generator.double()
    with pytest.raises(WeightsError, match="generator has weights of float64"):
        model.save(tmp_path / "m")
    model = tiny_model()
    model.generator = type(model.generator)(TINY.generator, spectral_norm=True)
    with pytest.raises(WeightsError, match="generator is not in its plain inference form"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({"a": float("nan")}, "not JSON compliant"),
        ({"a": {1, 2}}, "not JSON serializable"),
        ({"a": "x" * MAX_CONFIG_BYTES}, "larger than"),
        ({"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}, "nested deeper"),
        ({"a": "\ud800"}, "surrogates"),
    ],
)
def test_descriptions_that_could_not_be_read_back_are_not_saved(tmp_path: Path, provenance: Any, reason: str) -> None:
    model = tiny_model(parts=("encoder",))
    model.info = ModelInfo("m", provenance=provenance)
    with pytest.raises(ConfigError, match=reason):
        save_folder(tmp_path / "m", model.config, model.info, model.plain_states(), card="card")
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_folders_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    model = tiny_model()
    (folder / "thesis.tex").write_text("years of work")
    before = digests(folder)
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        model.save(folder)
    assert digests(folder) == before
    other = tmp_path / "transformers"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="not of a bigbigan model"):
        model.save(other)
    with pytest.raises(FileExistsError, match="is a file"):
        model.save(other / "config.json")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    load_folder(tmp_path / "empty")


class Steps:
    """Fails at the k-th call of the functions that touch the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, kill: bool = False):
        self.calls, self.fail_at, self.kill = 0, fail_at, kill
        for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (Path, "open"), (Path, "write_text")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))
        monkeypatch.setattr(tempfile, "mkdtemp", self.wrap(tempfile.mkdtemp))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at and self.kill:
                os._exit(9)
            if self.calls == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return wrapped


def test_a_failed_save_leaves_the_old_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before, new = digests(folder), tiny_model(seed=1)
    failures = 0
    for k in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, k)
            try:
                new.save(folder)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
                assert digests(folder) == before, k
            else:
                break
        assert {path.name for path in tmp_path.iterdir()} == {"tiny"}, k
    assert failures > 20
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}
    assert_same(load_folder(folder), new)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_loses_neither_model(saved: Path, folder: Path, tmp_path: Path) -> None:
    before, new = digests(folder), tiny_model(seed=1)
    new.save(tmp_path / "new")
    after, outcomes = digests(tmp_path / "new"), set()
    for k in range(1, 60):
        if (pid := os.fork()) == 0:
            Steps(pytest.MonkeyPatch(), k, kill=True)
            new.save(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if folder.exists():
            outcomes.add("old" if digests(folder) == before else "new")
            assert digests(folder) in (before, after), k
        else:  # killed between the two renames: the message says where the model is
            outcomes.add("aside")
            assert digests(tmp_path / ".tiny.previous") == before
            with pytest.raises(FileNotFoundError, match=r"rename .*tiny\.previous to tiny"):
                load_folder(folder)
        new.save(folder)  # the next save goes through, whatever the kill left
        assert digests(folder) == after and not (tmp_path / ".tiny.previous").exists()
        if status == 0:
            break
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
    assert outcomes == {"old", "aside", "new"} and status == 0


# What is refused when loading: weights


def broken_weights(kind: str, data: bytes) -> bytes:
    header, payload = split(data)
    name = "latent.bias"
    text = json.dumps(header)
    if kind == "missing":
        tensors = safetensors.torch.load(data)
        return safetensors.torch.save({k: v for k, v in tensors.items() if not k.startswith("latent")})
    if kind == "extra":
        return safetensors.torch.save({**safetensors.torch.load(data), "extra.weight": torch.zeros(2)})
    if kind == "prefix":
        return safetensors.torch.save({f"module.{k}": v for k, v in safetensors.torch.load(data).items()})
    if kind in ("shape", "int8", "float64", "mixed", "nan", "inf"):
        tensors = safetensors.torch.load(data)
        tensors[name] = {
            "shape": tensors[name][:-1],
            "int8": tensors[name].to(torch.int8),
            "float64": tensors[name].double(),
            "mixed": tensors[name].half(),
            "nan": tensors[name] * float("nan"),
            "inf": tensors[name] / 0,
        }[kind]
        return safetensors.torch.save(tensors)
    return {
        "truncated": data[:-4],
        "trailing": data + b"\0\0\0\0",
        "empty": b"",
        "tiny": b"\x01",
        "header longer than file": struct.pack("<Q", len(data)) + data[8:],
        "header of 2**60": struct.pack("<Q", 1 << 60) + data[8:],
        "header of 0": struct.pack("<Q", 0) + data[8:],
        "no json": join("x" * 80, payload),
        "no utf-8": struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
        "list": join("[]", payload),
        "deep": join("[" * 100_000, b""),
        "duplicate keys": join(text[:-1] + f', "{name}": {json.dumps(header[name])}' + "}", payload),
        "duplicate fields": join(text.replace('"dtype": "F32"', '"dtype": "F16", "dtype": "F32"', 1), payload),
        "overlap": join(
            json.dumps({**header, name: header["latent.weight"] | {"shape": header[name]["shape"]}}), payload
        ),
        "negative": join(json.dumps({**header, name: header[name] | {"shape": [-32]}}), payload),
        "bool": join(json.dumps({**header, name: header[name] | {"shape": [True]}}), payload),
        "huge shape": join(json.dumps({**header, name: header[name] | {"shape": [1 << 62, 1 << 62]}}), payload),
        "metadata": join(json.dumps({**header, "__metadata__": {"a": 1}}), payload),
        "field": join(json.dumps({**header, name: header[name] | {"file": "/etc/passwd"}}), payload),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n",
        "html": b"\n <!DOCTYPE html><html>",
        "pickle": b"PK\x03\x04" + bytes(100),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "2 missing: latent.weight, latent.bias"),
        ("extra", "1 unexpected: extra.weight"),
        ("prefix", "5, …|prefix 'module'"),
        ("shape", r"1 of another shape: latent.bias \(31,\) instead of \(32,\)"),
        ("int8", "'latent.bias' has dtype I8; weights are F32, F16, BF16"),
        ("float64", "dtype F64"),
        ("mixed", "mixes dtypes: float16, float32"),
        ("nan", "latent.bias has 32 NaN"),
        ("inf", "latent.bias has 32 NaN or infinite values out of 32"),
        ("truncated", "not fully covered|InvalidOffset|no well-formed"),
        ("trailing", "no well-formed"),
        ("empty", "0 bytes"),
        ("tiny", "no safetensors file: 1 bytes"),
        ("header longer than file", "header of"),
        ("header of 2**60", "header of 1152921504606846976 bytes"),
        ("header of 0", "header of 0 bytes"),
        ("no json", "Expecting value"),
        ("no utf-8", "can't decode"),
        ("list", "not an object"),
        ("deep", "nested deeper"),
        ("duplicate keys", "duplicate key 'latent.bias'"),
        ("duplicate fields", "duplicate key 'dtype'"),
        ("overlap", "no well-formed"),
        ("negative", "has shape"),
        ("bool", "has shape"),
        ("huge shape", "no well-formed"),
        ("metadata", "__metadata__"),
        ("field", "is not {dtype, shape, data_offsets}"),
        ("lfs", "is a Git-LFS pointer.*git lfs pull"),
        ("html", "is an HTML page"),
        ("pickle", "no safetensors file"),
    ],
)
def test_broken_weights_are_refused_even_with_a_matching_digest(folder: Path, kind: str, reason: str) -> None:
    data = (folder / "encoder.safetensors").read_bytes()
    broken = broken_weights(kind, data)
    if broken:
        replace_weights(folder, "encoder", broken)
    else:
        (folder / "encoder.safetensors").write_bytes(broken)
    with pytest.raises(WeightsError, match=reason) as caught:
        load_folder(folder)
    assert "encoder.safetensors" in str(caught.value) and len(str(caught.value)) < 1500


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    path = folder / "encoder.safetensors"
    data, rng = path.read_bytes(), random.Random(0)
    for position in [0, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(100))]:
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :])
        with pytest.raises(WeightsError):
            load_folder(folder, parts=("encoder",))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WeightsError, match="sha256"):
        load_folder(folder, parts=("encoder",))
    path.write_bytes(data)
    load_folder(folder, parts=("encoder",))


def test_a_missing_or_odd_file_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"encoder.safetensors is missing.*has generator, discriminator"):
        load_folder(folder)
    os.mkfifo(folder / "encoder.safetensors")
    with pytest.raises(WeightsError, match="not a regular file"):
        load_folder(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config.json \(it has: tiny\)"):
        load_folder(tmp_path)


def test_the_file_itself_tells_what_it_was_written_for(folder: Path) -> None:
    edit_config(folder, lambda d: d["architecture"]["encoder"].update(base_channels=16))
    with pytest.raises(WeightsError, match=r"written with base_channels 8, config\.json says 16"):
        load_folder(folder)
    shutil.copy(folder / "generator.safetensors", folder / "encoder.safetensors")
    with pytest.raises(WeightsError, match=r"\d+ missing: .*, …; \d+ unexpected: .*The file holds a model's generator"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: d["architecture"]["generator"].update(bn_eps=0.0003),
            "generator.*bn_eps 0.0001, config.json says 0.0003",
        ),
        (
            lambda d: d["architecture"]["encoder"].update(last_relu=False),
            "encoder.*last_relu true, config.json says false",
        ),
        (
            lambda d: d["architecture"]["encoder"].update(shortcut="raw"),
            "encoder.*shortcut preactivated, config.json says raw",
        ),
        (lambda d: d["architecture"]["preprocess"].update(filter="box"), "filter bicubic, config.json says box"),
    ],
)
def test_a_changed_config_is_noticed_though_all_shapes_fit(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit_config(folder, change)
    with pytest.raises(WeightsError, match=f"{words}.*Restore config.json, or save the model again"):
        load_folder(folder)


def test_a_configuration_in_a_file_is_completed_and_may_be_absent(folder: Path) -> None:
    header, payload = split((folder / "encoder.safetensors").read_bytes())
    saved = json.loads(header["__metadata__"]["config"])
    for text in (json.dumps({k: v for k, v in saved.items() if k != "bn_eps"}), "resnet50", "", None):
        header["__metadata__"].pop("config", None)
        if text is not None:
            header["__metadata__"]["config"] = text
        replace_weights(folder, "encoder", join(json.dumps(header), payload))
        load_folder(folder)  # the encoder's bn_eps is the default
    header["__metadata__"]["config"] = json.dumps(saved | {"invented": 1})
    replace_weights(folder, "encoder", join(json.dumps(header), payload))
    with pytest.raises(WeightsError, match="invented 1, config.json says None"):
        load_folder(folder)


def test_float16_overflow_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    model = tiny_model(parts=("encoder",))
    model.encoder.feature_norm.running_var.fill_(1e6)
    model.save(tmp_path / "m")
    with pytest.raises(WeightsError, match=r"feature_norm.running_var as float16 \(use torch.bfloat16\)"):
        load_folder(tmp_path / "m", dtype=torch.float16)
    load_folder(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="floating"):
        load_folder(tmp_path / "m", dtype=torch.int8)


# What is refused when loading: config.json


def set_to(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_to("format", value="bigbigan-model/2"), "upgrade bigbigan"),
        (set_to("format", value="bert"), "not of a bigbigan model"),
        (set_to("auto_map", value={"AutoModel": "evil.py"}), "unknown fields: auto_map"),
        (set_to("architecture", "encoder", "target", value="os.system"), "encoder has unknown fields: target"),
        (set_to("architecture", "generator", "base_channels", value=10**9), "base_channels is 1000000000"),
        (set_to("architecture", "generator", "base_channels", value="4"), "base_channels is '4'"),
        (set_to("architecture", "generator", "base_channels", value=True), "base_channels is 'True'"),
        (set_to("architecture", "encoder", "depths", value=[10**9]), "depths"),
        (set_to("files", value={}), "files is empty"),
        (set_to("files", "encoder", "path", value="/etc/passwd"), "files.encoder has unknown fields: path"),
        (set_to("files", "encoder", "sha256", value="../" * 21 + "a"), "sha256"),
        (set_to("files", "encoder", "size", value=-1), "size -1"),
        (set_to("files", "../evil", value={}), r"files names \.\./evil"),
        (set_to("architecture", "encoder", value=None), "files names encoder, which the architecture lacks"),
        (set_to("provenance", value=[1]), "provenance"),
        (set_to("license", value="x" * 5000), "license is longer"),
        (lambda document: document.pop("license"), "lacks fields: license"),
    ],
)
def test_config_has_a_closed_schema(folder: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    edit_config(folder, change)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_folder(folder)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "its format is 'None'"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "decode"),
        (b'{"format": NaN}', "NaN is not a finite number"),
        (b'{"format": 1e999}', "1e999 is not a finite number"),
        (b'{"format": -Infinity}', "not a finite number"),
        (b'{"format": "a", "format": "bigbigan-model/1"}', "duplicate key 'format'"),
        (b"[" * 60_000, "nested deeper"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper"),
        (b'{"format": "\\ud800"}', "surrogates"),
        (b'{"a": ' + b"1" * 5000 + b"}", "integer"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than 65536"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"<html>", "HTML page"),
    ],
)
def test_config_is_strict_json(folder: Path, text: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=reason):
        read_config(folder)


def test_a_config_of_a_huge_network_is_refused_before_memory_is_taken(folder: Path) -> None:
    mlp = {"width": 65536, "layers": 64}
    edit_config(folder, lambda d: d["architecture"]["discriminator"]["z_mlp"].update(mlp))  # 1 TB of weights
    with pytest.raises(
        WeightsError, match=r"126 missing: .*; 7 of another shape: .*z_mlp.width 16, config.json says 65536"
    ):
        load_folder(folder)


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(max(len(out), 1)), rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.randrange(1, 64)] = b""
        elif kind == 2:
            out[at:at] = rng.choice((b"{", b"]", b'"', b"null", b"1e999", b"-1", b"\xff", b"[" * 2000, b"9" * 30))
        elif kind == 3:
            out[at : at + 1] = bytes([rng.choice(b'0123456789-{}[]",: \0')])
        elif kind == 4:
            start = rng.randrange(max(len(out), 1))
            out[at:at] = out[start : start + rng.randrange(1, 200)]
        else:
            del out[at + 1 :]
    return bytes(out)


@pytest.mark.parametrize("count", [1500, pytest.param(30_000, marks=pytest.mark.slow)])
def test_mutated_folders_give_the_documented_errors_only(tmp_path: Path, count: int) -> None:
    for name in ("config", "weights"):
        tiny_model(parts=("encoder",)).save(tmp_path / name)
    config = (tmp_path / "config" / "config.json").read_bytes()
    weights = (tmp_path / "weights" / "encoder.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(weights[:8], "little")
    rng, refused = random.Random(7), 0
    for i in range(count):
        name = ("config", "weights")[i % 2]
        if name == "config":
            (tmp_path / name / "config.json").write_bytes(mutate(config, rng))
        else:  # the header, with the digest that belongs to it, so that nothing is left to the digest
            replace_weights(tmp_path / name, "encoder", mutate(weights[:header_end], rng) + weights[header_end:])
        try:
            load_folder(tmp_path / name, remember=False)
        except (ConfigError, WeightsError):
            refused += 1
    assert refused > 0.85 * count


# What was checked before


def test_files_are_checked_once_until_they_change(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "CLOCK_TICK_NS", 0)
    checked: list[str] = []
    check = integrity.check_finite
    monkeypatch.setattr(
        integrity, "check_finite", lambda t, name, where: (checked.append(where.name), check(t, name, where))
    )
    load_folder(folder)
    assert set(checked) == {"generator.safetensors", "encoder.safetensors", "discriminator.safetensors"}
    checked.clear()
    load_folder(folder)
    assert not checked
    load_folder(folder, remember=False)
    assert checked
    checked.clear()
    path = folder / "encoder.safetensors"
    times = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same name, size, inode and modification time
    with pytest.raises(WeightsError, match="sha256"):
        load_folder(folder)
    assert [entry.name for entry in home.iterdir()] == ["verified.json"]


def test_a_file_that_changed_just_now_is_not_remembered(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "CLOCK_TICK_NS", 10**18)
    load_folder(folder)
    assert not home.exists()


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{", b"[" * 10**5, b'{"a": 1}'])
def test_a_damaged_memory_costs_time_only(folder: Path, home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "verified.json").write_bytes(content)
    load_folder(folder)


def test_an_unwritable_memory_costs_time_only(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "CLOCK_TICK_NS", 0)
    home.write_text("a file where the folder should be")
    load_folder(folder)
    monkeypatch.setenv("BIGBIGAN_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    load_folder(folder)
