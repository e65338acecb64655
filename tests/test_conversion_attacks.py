"""Damaged and hostile input of the converter, a small selection: `attacks/README.md` has the long forms."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks.harness import ROOT, run_children
from attacks.hostile_pth import make

from weights_conversion import download
from weights_conversion.biggan_pth import read_checkpoint
from weights_conversion.errors import ConversionError

HANDFUL = ["linked_variables", "restore_from_elsewhere", "tar_symlink_out"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


# ---- modules


def test_damaged_modules_are_read_right_or_refused() -> None:
    pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
    result = run_children("tests.attacks.fuzz_module", ["--kind", "small"], 300)
    assert not result.findings, result
    assert sum(n for name, n in result.outcomes.items() if "refused" in name) > 100 and result.outcomes.total() == 300


@pytest.mark.parametrize("names", [HANDFUL, pytest.param([], marks=pytest.mark.slow)], ids=["handful", "all"])
def test_hostile_modules_open_and_start_nothing(names: list[str]) -> None:
    pytest.importorskip("tensorflow", reason="pip install -e '.[convert]'")
    done = run("-m", "tests.attacks.audit", *names)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    code = f"""
import os, socket, subprocess, sys
from pathlib import Path
from tests.attacks.watch import Watch
inside, outside = Path({str(tmp_path)!r}, "in"), Path({str(tmp_path)!r}, "out")
inside.mkdir()
outside.mkdir()
(outside / "secret").write_text("x")
(inside / "link").symlink_to(outside / "secret")
with Watch([], [inside]) as seen:
    (inside / "a").write_text("x")
    (inside / "a").rename(inside / "b")
assert not seen.events, seen.events
acts = [lambda: (inside / "link").read_text(), lambda: (outside / "a").write_text("x"), socket.socket,
        lambda: (inside / "b").rename(outside / "c"), lambda: subprocess.run(["true"]), lambda: os.system("true")]
for number, act in enumerate(acts):
    with Watch([], [inside]) as seen:
        act()
    assert seen.events, number
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


# ---- third-party checkpoints


def test_damaged_checkpoints_are_read_right_or_refused() -> None:
    result = run_children("tests.attacks.fuzz_pth", [], 100)
    assert not result.findings, result
    assert result.outcomes.total() == 100


def test_hostile_checkpoints_do_nothing(tmp_path: Path) -> None:
    done = run("-m", "tests.attacks.hostile_pth", "--batch", str(tmp_path))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) >= 30
    for name, answer in answers.items():
        assert not answer.startswith(("READ", "RAISED", "DID")), (name, answer)
        assert "\n" not in answer and "False" not in answer, (name, answer)
    assert "posix.system, which is code" in answers["os_system"] and "compressed" in answers["zip_bomb"]
    assert "checksum of its part" in answers["flipped_number"]  # of which torch.load tells nothing
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("_marker")]


@pytest.mark.slow
def test_hostile_checkpoints_do_nothing_by_the_way_of_a_user() -> None:
    done = run("-m", "tests.attacks.hostile_pth")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [("web_page", "web page"), ("git_lfs_pointer", "git lfs pull"), ("safetensors_inside", "is a safetensors file")],
)
def test_other_files_named_pth(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(make(name, tmp_path)[0])


# ---- downloads

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server on this machine; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)
            self.close_connection = True

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def reply(body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Connection", "close")  # or a client might send its next request into the closing one
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Transfer_Encoding" not in headers:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


GOOD = download.GZIP + bytes(3000)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (reply(GOOD, length=5000), OSError, "broke off after 3002 of 5000 bytes"),
        (reply(b"1000\r\n" + GOOD, Transfer_Encoding="chunked"), OSError, "broke off"),
        (reply(b""), OSError, "broke off after 0"),
        (reply(b"", status=404), OSError, "404"),
        (reply(b"", status=302, Location="http://127.0.0.1:9/module"), ConversionError, "not encrypted"),
        (reply(b"", status=302, Location="file:///etc/passwd"), OSError, "not allowed"),
        (reply(b"<!DOCTYPE html>", Content_Type="text/html"), ConversionError, "no .tar.gz but text/html"),
        (reply(GOOD * 4), ConversionError, "more than 10000 bytes"),
        (reply(GOOD, length=1 << 40), ConversionError, "more than 10000 bytes"),
        (lambda handler: None, OSError, "broke off after 0 bytes"),
    ],
    ids=[
        "short",
        "short chunk",
        "empty",
        "404",
        "redirect",
        "redirect to a file",
        "html",
        "large",
        "said large",
        "mute",
    ],
)
def test_failed_downloads_say_why(
    answer: Answer, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_TOTAL_BYTES", 10_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(answer) as url, pytest.raises(error, match=message) as caught:
        download._fetch(f"{url}/module.tar.gz", tmp_path / "module.tar.gz")
    assert isinstance(caught.value, error) and "\n" not in str(caught.value)


def test_downloads_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(reply(GOOD)) as url:
        download._fetch(f"{url}/module.tar.gz", tmp_path / "module.tar.gz")
    assert (tmp_path / "module.tar.gz").read_bytes() == GOOD


def test_silent_server_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    asked = threading.Event()
    with serving(lambda handler: asked.wait(30) and None) as url:
        with pytest.raises(OSError, match="timed out"):
            download._fetch(url, tmp_path / "module.tar.gz")
        asked.set()


FILES = {
    "saved_model.pb": b"graph",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": b"d",
}


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points the real client, without credentials, to an address."""
    pytest.importorskip("kagglehub")
    from kagglesdk import kaggle_env

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    return lambda url: monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, url)


def kaggle_answer(short: str = "") -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        wanted = ("deepmind", "bigbigan", "resnet50", 1)
        assert tuple(asked[k] for k in ("ownerSlug", "modelSlug", "instanceSlug", "versionNumber")) == wanted
        if "ListModelInstanceVersionFiles" in handler.path:
            body = json.dumps({"files": [{"name": name} for name in FILES], "nextPageToken": ""}).encode()
            reply(body, Content_Type="application/json")(handler)
        else:
            body = FILES[asked["path"]]
            reply(body, length=len(body) + 5 * (asked["path"] == short))(handler)

    return answer


def test_the_kaggle_client_gets_a_module_and_keeps_it(kaggle: Callable[[str], None], tmp_path: Path) -> None:
    with serving(kaggle_answer()) as url:
        kaggle(url)
        folder = download._from_kaggle("bigbigan-resnet50")
    assert folder == tmp_path / "cache/models/deepmind/bigbigan/tensorFlow1/resnet50/1"
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == FILES
    assert download._from_kaggle("bigbigan-resnet50") == folder  # the server is gone


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(b"", status=404), "404"),
        (reply(b"", status=403), "403"),
        (reply(b"<html>", Content_Type="text/html"), ": "),
        (kaggle_answer(short="saved_model.pb"), "IncompleteRead|Connection broken"),
    ],
    ids=["404", "403", "html", "short"],
)
def test_the_kaggle_clients_errors_are_one(answer: Answer, message: str, kaggle: Callable[[str], None]) -> None:
    with serving(answer) as url:
        kaggle(url)
        with pytest.raises(OSError, match=message):
            download._from_kaggle("bigbigan-resnet50")


def test_the_kaggle_client_without_a_network(kaggle: Callable[[str], None]) -> None:
    kaggle("http://127.0.0.1:9")
    with pytest.raises(OSError, match="ConnectionError"):
        download._from_kaggle("bigbigan-resnet50")
