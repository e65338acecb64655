"""Names and downloads: the real client against a local Hub with scripted faults, in processes of their own.

The client reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so each environment takes a new process. They are
forked from a server process that has imported torch already, but not the client.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import HTML, FakeHub, Fault
from test_modelfolder import assert_same, tiny_model

import bigbigan
from bigbigan import Encoder, hub, presets
from bigbigan.factory import load_folder
from bigbigan.schema import ConfigError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(CONTEXT, "set_forkserver_preload"):
    CONTEXT.set_forkserver_preload(["bigbigan.hub", "pytest"])  # what takes long; not the client


# Processes

network = {"off": False}
connections: list[tuple[str, str]] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no connection while the network is off."""
    if network["off"] and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        connections.append((event, str(arguments)))
        raise OSError("no network in this case")


def child(
    pipe: Connection, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("HF_", "HUGGING", "BIGBIGAN_HUB")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(variables)
    torch.set_num_threads(1)
    time.sleep = lambda seconds: None  # the client waits whole seconds between attempts
    sys.addaudithook(watch)
    pipe.send(function(*arguments))


def run(variables: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process with these environment variables."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=child, args=(writer, variables, function, arguments))
    process.start()
    writer.close()
    try:
        assert reader.poll(120), "the process hangs"
        return reader.recv()
    finally:
        process.kill()
        process.join()


def attempt(name: str, without_network: bool = False, **options: Any) -> dict[str, Any]:
    """The outcome of `load` as data."""
    network["off"] = without_network
    connections.clear()
    try:
        model = bigbigan.load(name, **options)
        outcome = {"digest": digest(model), "parts": model.parts}
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
    finally:
        network["off"] = False
    return outcome | {"connections": list(connections)}


def attempts(*names: str) -> list[dict[str, Any]]:
    return [attempt(name) for name in names]


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_model(parts=("generator", "encoder")).save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Any]:
    return {"digest": digest(load_folder(saved, verify=False)), "parts": ("generator", "encoder"), "connections": []}


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIGBIGAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BIGBIGAN_HUB_ORG", raising=False)
    return tmp_path / "home"


def environment(tmp_path: Path, url: str, **variables: str) -> dict[str, str]:
    return {
        "BIGBIGAN_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # Xet is a second protocol with its own servers; the fake has the plain one only
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **variables,
    }


def assert_cache_is_sound(cache: Path, unfinished: Iterable[str] = ()) -> None:
    """No leftovers, and every blob has the content that its name says.

    Older clients keep the part of an `unfinished` file that they got, to go on from there.
    """
    for leftover in (*cache.rglob("*.incomplete"), *cache.rglob("*.tmp")):
        assert leftover.relative_to(cache).parts[0].removeprefix("models--org--") in unfinished, leftover
    for blob in cache.glob("models--*/blobs/*"):
        if blob.name.endswith(".incomplete"):
            continue
        content = blob.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        assert blob.name in (hashlib.sha256(content).hexdigest(), git), blob
    for pointer in cache.glob("models--*/snapshots/*/*"):
        assert pointer.exists(), f"{pointer} leads nowhere"


# Names


def test_embedded_default_needs_nothing(saved: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_embedded", lambda: saved)
    monkeypatch.setattr("socket.socket.connect", None)
    for name in (None, "bigbigan-fashion-mnist-32", "BigBiGAN_fashion_mnist_32"):
        assert_same(bigbigan.load(name), tiny_model(parts=("generator", "encoder")))
    assert not home.exists()
    with pytest.raises(ValueError, match="embedded model has no revisions"):
        bigbigan.load(revision="main")


def test_folders_come_before_names(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for name in (saved, str(saved), "tiny", "./tiny", "~/tiny"):
        assert bigbigan.load(name, parts=("encoder",)).parts == ("encoder",)
    (tmp_path / "bigbigan-tiny").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("bigbigan-tiny") == Path("bigbigan-tiny")
    for name in ("./nowhere", "/no/where", "~/nowhere", "a/b/c", "org/name/", Path("nowhere")):
        with pytest.raises(FileNotFoundError, match="no folder"):
            bigbigan.load(name)
    with pytest.raises(ValueError, match="has no revisions"):
        bigbigan.load(saved, revision="main")


def test_preset_names_lead_to_a_local_conversion_or_to_advice(saved: Path, home: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        bigbigan.load("bigbigan_resnet50")
    for advice in (
        "pip install 'bigbigan[convert]' && bigbigan convert bigbigan-resnet50",
        "load('org/bigbigan-resnet50')",
        "BIGBIGAN_HUB_ORG",
        str(home / "models"),
    ):
        assert advice in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"create_model\('bigbigan-small-g-32'\)"):
        bigbigan.load("bigbigan-small-g-32")
    (home / "models").mkdir(parents=True)
    (home / "models" / "bigbigan-resnet50").symlink_to(saved)
    assert bigbigan.load("bigbigan_resnet50", parts="encoder").parts == ("encoder",)
    assert hub.has_weights("bigbigan_resnet50") and not hub.has_weights("bigbigan-revnet50x4")
    with pytest.raises(ValueError, match=r"did you mean bigbigan-resnet50.*'org/name'"):
        bigbigan.load("bigbigan-resnet5")
    with pytest.raises(ValueError, match="do not agree"):
        bigbigan.load("org/name@main", revision="other")


def test_cache_dir_honours_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HOME" in os.environ
    monkeypatch.delenv("BIGBIGAN_HOME")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == Path("/h/.cache/bigbigan")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub.cache_dir() == Path("/x/bigbigan")
    monkeypatch.setenv("BIGBIGAN_HOME", "~/b")
    assert hub.cache_dir() == Path("/h/b")


# Downloads


def cold_and_warm(commit: str, elsewhere: str) -> dict[str, Any]:
    out = {
        "cold": attempt("org/tiny", parts=("encoder",)),
        "rest": attempt("org/tiny"),
        "warm": attempt("org/tiny"),
        "pinned": attempt("org/tiny", revision=commit, without_network=True),
        "at": attempt(f"org/tiny@{commit}", without_network=True),
        "local": attempt("org/tiny", local_files_only=True, without_network=True),
        "elsewhere": attempt("org/tiny", local_files_only=True, without_network=True, cache_dir=elsewhere),
    }
    os.environ["BIGBIGAN_HUB_ORG"] = "named"
    return out | {"organization": attempt("bigbigan_resnet50", parts=("encoder",))}


def without_network(*names: str) -> list[dict[str, Any]]:
    return [attempt(name, without_network=True) for name in names]


def test_cold_warm_pinned_and_offline(server: FakeHub, saved: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    commit = server.add("org/tiny", saved)
    server.add("named/bigbigan-resnet50", saved)
    out = run(environment(tmp_path, server.url), cold_and_warm, commit, str(tmp_path / "other"))
    encoder = {**expected, "digest": digest(load_folder(saved, parts=("encoder",))), "parts": ("encoder",)}
    assert out["cold"] == encoder and out["organization"] == encoder
    assert out["rest"] == out["warm"] == out["pinned"] == out["at"] == out["local"] == expected
    assert out["elsewhere"]["error"] == "DownloadError" and out["elsewhere"]["connections"] == []
    assert "local_files_only" in out["elsewhere"]["message"]
    asked = [path.rpartition("/")[2] for method, path in server.asked("org/tiny") if method == "GET"]
    assert sorted(asked) == ["config.json", "encoder.safetensors", "generator.safetensors"]  # each once, in all
    heads = [path for method, path in server.asked("org/tiny") if method == "HEAD"]
    assert sum(path.endswith("main/config.json") for path in heads) == 3  # one request a load: has `main` moved?
    assert len(heads) == 5
    assert_cache_is_sound(tmp_path / "hf" / "hub")

    server.requests.clear()
    (again,) = run(environment(tmp_path, server.url), without_network, f"org/tiny@{commit}")
    assert again == expected and server.requests == []

    warm, cold = run(environment(tmp_path, server.url, HF_HUB_OFFLINE="1"), without_network, "org/tiny", "org/unknown")
    assert warm == expected and server.requests == []
    assert cold["error"] == "DownloadError" and cold["connections"] == []
    assert "config.json of org/unknown at revision main is not in the cache" in cold["message"]
    assert "HF_HUB_OFFLINE" in cold["message"]

    nobody = "http://127.0.0.1:9"
    warm, cold = run(environment(tmp_path, nobody), attempts, "org/tiny", "org/unknown")
    assert warm == expected
    assert (
        cold["error"] == "DownloadError"
        and nobody in cold["message"]
        and re.search("Connect(ion)?Error", cold["message"])
    )


def load_while_the_branch_moves(url: str) -> list[dict[str, Any]]:
    import huggingface_hub

    real = huggingface_hub.hf_hub_download

    def moving(**options: Any) -> str:
        path = real(**options)
        if options["filename"] == "config.json":
            urllib.request.urlopen(f"{url}/move", data=b"").read()
        return path

    huggingface_hub.hf_hub_download = moving
    return attempts("org/tiny", "org/tiny")


def test_a_moved_branch_never_mixes_two_commits(server: FakeHub, saved: Path, tmp_path: Path) -> None:
    server.add("org/tiny", saved)
    other = tmp_path / "other"
    tiny_model(seed=1, parts=("generator", "encoder")).save(other)
    files = {path.name: path.read_bytes() for path in other.iterdir()}
    server.actions["/move"] = lambda: server.repositories["org/tiny"].commit(files)
    first, second = run(environment(tmp_path, server.url), load_while_the_branch_moves, server.url)
    assert first["digest"] == digest(load_folder(saved, verify=False))
    assert second["digest"] == digest(load_folder(other, verify=False))


def three_times(name: str) -> list[dict[str, Any]]:
    return attempts(name, name, name)


def test_a_branch_that_moves_within_one_download_spoils_one_load_only(
    server: FakeHub, saved: Path, tmp_path: Path
) -> None:
    """The client asks what the branch holds, then for its content: a push between the two mixes them in its cache."""
    pinned = server.add("org/tiny", saved)
    other = tmp_path / "other"
    tiny_model(seed=1, parts=("generator", "encoder")).save(other)
    files = {path.name: path.read_bytes() for path in other.iterdir()}

    # Weights are asked for by commit.
    server.after["HEAD", "/org/tiny/resolve/main/config.json"] = lambda: server.repositories["org/tiny"].commit(files)
    first, second, third = run(environment(tmp_path, server.url), three_times, "org/tiny")
    assert first["error"] == "WeightsError" and "load again" in first["message"]
    assert second["digest"] == third["digest"] == digest(load_folder(other, verify=False))
    (old,) = run(environment(tmp_path, server.url), attempts, f"org/tiny@{pinned}")
    assert old["digest"] == digest(load_folder(saved, verify=False))


# Fault or content of the repository -> error, words of its message; None: it loads all the same
FAULTS: dict[str, tuple[list[Fault], dict[str, bytes | None], str | None, str]] = {
    "503-get": ([Fault("503", times=2)], {}, None, ""),
    "503-head": ([Fault("503", method="HEAD", times=2)], {}, None, ""),
    "503-head-config": ([Fault("503", "config.json", "HEAD", times=2)], {}, None, ""),
    "500-for-ever": ([Fault("500")], {}, "DownloadError", "500.*Check the connection"),
    "502-head-for-ever": ([Fault("502", "config.json", "HEAD")], {}, "DownloadError", "502"),
    "429": ([Fault("429", times=2)], {}, None, ""),
    "cut": ([Fault("cut", times=1)], {}, None, ""),
    "cut-then-no-range": ([Fault("cut", times=1), Fault("no-range", times=1)], {}, None, ""),
    "drop": ([Fault("drop", times=1)], {}, None, ""),
    "drop-for-ever": ([Fault("drop")], {}, "DownloadError", "RemoteProtocolError|RemoteDisconnected"),
    "reset": ([Fault("reset", times=1)], {}, None, ""),
    "reset-for-ever": ([Fault("reset")], {}, "DownloadError", "Error.*Check the connection"),
    "short": ([Fault("short", times=1)], {}, None, ""),
    "short-for-ever": ([Fault("short")], {}, "DownloadError", "should be of size"),
    "long": ([Fault("long")], {}, "DownloadError", "should be of size"),
    "html": ([Fault("html")], {}, "DownloadError", "should be of size"),
    "html-config": ([Fault("html", "config.json")], {}, "DownloadError", "should be of size"),
    "flip": ([Fault("flip", times=1)], {}, "WeightsError", "has sha256 .*removed from the cache: load again"),
    "flip-config": ([Fault("flip", "config.json", times=1)], {}, "ConfigError", "removed from the cache: load again"),
    "404": ([Fault("404", "config.json", "HEAD")], {}, "DownloadError", "404"),
    "pointer": ([], {"encoder": POINTER}, "WeightsError", "Git-LFS pointer.*git lfs pull"),
    "page": ([], {"encoder": HTML}, "WeightsError", "HTML page.*proxies"),
    "page-config": ([], {"config": HTML}, "ConfigError", "HTML page.*proxies"),
    "pointer-config": ([], {"config": POINTER}, "ConfigError", "Git-LFS pointer"),
    "no-weights": (
        [],
        {"encoder": None},
        "DownloadError",
        "config.json lists this file, but the repository lacks it",
    ),
    "no-config": ([], {"config": None}, "DownloadError", "not a bigbigan model folder"),
}
HEALS = {name for name, (faults, _, error, _) in FAULTS.items() if error and faults and faults[0].times < 1000}


def meet_faults(names: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {name: attempts(f"org/{name}", f"org/{name}") for name in names}
    out["revision"] = attempt("org/flip", revision="v9")
    out["pull request"] = attempt("org/flip@refs/pr/7")
    out["name"] = attempt("org/a--b")
    out["parts"] = attempt("org/flip", parts=("discriminator",))
    return out


def test_faults_give_one_error_and_no_bad_file(
    server: FakeHub, saved: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    for name, (faults, replaced, _, _) in FAULTS.items():
        server.add(f"org/{name}", saved, *(dataclasses.replace(fault) for fault in faults), **replaced)
    server.add("org/gated", saved)
    server.repositories["org/gated"].gated = True
    out = run(environment(tmp_path, server.url), meet_faults, [*FAULTS, "gated", "missing"])
    for name, (_, _, error, words) in FAULTS.items():
        first, second = out[name]
        if error is None:
            assert first == second == expected, (name, first)
            continue
        assert first.get("error") == error and re.search(words, first["message"]), (name, first)
        assert f"org/{name}" in first["message"] or f"org--{name}" in first["message"], (name, first)
        assert first["cause"] != "NoneType"
        if name in HEALS:
            assert second == expected, (name, second)
        else:
            assert second["error"] == error
    for name, words in {"gated": "ask for it at http.*/org/gated", "missing": "no such repository.*token="}.items():
        assert out[name][0]["error"] == "DownloadError" and re.search(words, out[name][0]["message"]), out[name]
    assert out["revision"]["error"] == "DownloadError" and "no such revision" in out["revision"]["message"]
    assert "org/flip at revision refs/pr/7: the repository has no such revision" in out["pull request"]["message"]
    assert out["name"]["error"] == "HFValidationError"
    assert out["parts"]["error"] == "ValueError"
    assert "org/flip has no discriminator; it has generator, encoder" in out["parts"]["message"]
    assert_cache_is_sound(tmp_path / "hf" / "hub", unfinished=FAULTS.keys() - HEALS)


def test_a_captive_portal_is_recognised(tmp_path: Path, server: FakeHub) -> None:
    server.portal = True
    (out,) = run(environment(tmp_path, server.url), attempts, "org/tiny")
    assert out["error"] == "DownloadError" and "proxy" in out["message"] and "HF_ENDPOINT" in out["message"]


def load_registered(commit: str, forged: str, sha256: dict[str, str]) -> list[dict[str, Any]]:
    def register(repo_id: str, revision: str) -> None:
        entry = presets.HubEntry(repo_id, revision, sha256)
        presets.PRESETS["bigbigan-resnet50"] = dataclasses.replace(presets.PRESETS["bigbigan-resnet50"], hub=entry)

    register("org/tiny", commit)
    out = attempts("bigbigan-resnet50")
    out.append(attempt("bigbigan-resnet50", without_network=True))
    out.append(attempt("bigbigan-resnet50", revision="main"))
    register("org/forged", forged)
    return [*out, attempt("bigbigan-resnet50")]


def test_registered_presets_are_pinned_by_commit_and_digest(server: FakeHub, saved: Path, tmp_path: Path) -> None:
    good = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.glob("*.safetensors")}
    commit = server.add("org/tiny", saved)
    forged = tmp_path / "forged"
    tiny_model(seed=5, parts=("generator", "encoder")).save(forged)
    forged_commit = server.add("org/forged", forged)
    server.repositories["org/tiny"].commit({"config.json": b"a later commit"})
    out = run(environment(tmp_path, server.url), load_registered, commit, forged_commit, good)
    first, second, other, refused = out
    assert first == second and first["digest"] == digest(load_folder(saved, verify=False))
    assert other["error"] == "ConfigError"  # a revision that the user names is not held to the pins
    assert refused["error"] == "WeightsError" and "not the registered generator" in refused["message"]


def load_in_eight_processes() -> list[dict[str, Any]]:
    importlib.import_module("huggingface_hub.file_download")  # once, before the processes part
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(8)]
    processes = [context.Process(target=send_attempt, args=(writer,)) for _, writer in pipes]
    for process in processes:
        process.start()
    return [reader.recv() for reader, _ in pipes if reader.poll(100)]


def send_attempt(pipe: Connection) -> None:
    pipe.send(attempt("org/tiny"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_processes_on_a_cold_cache(
    server: FakeHub, saved: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    server.add("org/tiny", saved, Fault("cut", times=2), Fault("503", "generator.safetensors", times=2))
    assert run(environment(tmp_path, server.url), load_in_eight_processes) == [expected] * 8
    cache = tmp_path / "hf" / "hub"
    assert_cache_is_sound(cache)
    assert len(list(cache.glob("models--org--tiny/blobs/*"))) == 3


# Uploads


def push(folder: str) -> list[Any]:
    model, encoder = bigbigan.load(folder), bigbigan.load(folder, parts=("encoder",))
    out: list[Any] = [model.push_to_hub("org/mine", token="hf_x", private=True), model.push_to_hub("org/mine")]
    out += [attempt("org/mine"), encoder.push_to_hub("org/mine"), attempt("org/mine")]
    try:
        encoder.push_to_hub("org/mine", revision="nowhere")
    except hub.UploadError as error:
        out.append(str(error))
    return out


def test_push_then_load(server: FakeHub, saved: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    *urls, whole, url, encoder, error = run(environment(tmp_path, server.url), push, str(saved))
    assert {*urls, url} == {f"{server.url}/org/mine"}
    assert whole == expected and encoder["parts"] == ("encoder",)
    repository = server.repositories["org/mine"]
    assert len(repository.commits) == 3  # made empty, whole, encoder; pushing the same again changes nothing
    files = repository.commits[repository.refs["main"]]
    assert set(files) == {".gitattributes", "README.md", "config.json", "encoder.safetensors"}
    assert b'load("org/mine")' in files["README.md"]
    assert "org/mine at revision nowhere" in error and "token may write" in error


def test_presets_name_no_repository_without_its_commit_and_digests() -> None:
    for preset in presets.PRESETS.values():
        if preset.hub is not None:
            assert hub.COMMIT.fullmatch(preset.hub.revision)
            assert set(preset.hub.sha256) <= set(preset.config.parts)


def test_a_model_folder_wins_over_every_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`export run -o bigbigan-fashion-mnist-32`, then the same name in load, parts, and all commands."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "bigbigan")
    for name in ("bigbigan-fashion-mnist-32", "bigbigan-resnet50", "bigan-mnist-mlp"):
        (tmp_path / name).symlink_to(saved)
        caplog.clear()
        assert hub.resolve(name) == Path(name)
        assert caplog.messages == [f"{name}: the folder of that name here, not the model that `bigbigan list` shows"]
        assert bigbigan.load(name).config == bigbigan.load(saved).config
        assert Encoder.from_pretrained(name).config == bigbigan.load(saved).config.encoder
    with pytest.raises(ValueError, match="the folder bigbigan-fashion-mnist-32 has no revisions"):
        bigbigan.load("bigbigan-fashion-mnist-32", revision="main")


def test_a_folder_without_a_model_hides_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigbigan-fashion-mnist-32").mkdir()
    assert bigbigan.load("bigbigan-fashion-mnist-32").info.name == "bigbigan-fashion-mnist-32"
    assert "the folder of that name here holds no model, so the named model is meant" in caplog.text
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine is no model folder"):
        bigbigan.load("mine")


def test_a_revision_is_named_behind_the_at() -> None:
    with pytest.raises(ValueError, match="org/name@ names no revision behind the @; give a branch"):
        bigbigan.load("org/name@")
