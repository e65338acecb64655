"""From a checkpoint of others to a model on the Hub, by the command line alone, as real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import home, run  # noqa: F401 (a fixture for every test here)
from fake_hub import FakeHub
from test_biggan_pth import checkpoint, write

from bigbigan import load


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    process = run(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out.strip(), err


def test_convert_push_and_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(checkpoint(), tmp_path / "G.pth")
    assert call("convert", source, "-o", tmp_path / "model", "--name", "mine")[0] == str(tmp_path / "model")
    with FakeHub() as server:
        for name, value in (("HF_ENDPOINT", server.url), ("HF_HOME", str(tmp_path)), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        url, _ = call("push", tmp_path / "model", "org/mine", "--license", "mit", "--private")
        assert url == f"{server.url}/org/mine"
        card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        assert "license: other" in card and "G.pth" in card
        described = json.loads(call("info", "org/mine", "--json")[0])
        assert (described["name"], described["license"]) == ("mine", "mit")
        call("generate", "org/mine", "-n", "4", "-o", tmp_path / "a.png")
    call("generate", tmp_path / "model", "-n", "4", "-o", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert load(tmp_path / "model").info.license.startswith("unknown")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "bad.pth", "-o", "out"], 1, "refused: bad.pth cannot be read"),
        (["convert", "bad.pth"], 2, "needs -o FOLDER"),
        (["convert", "none.pth", "-o", "out"], 2, "there is no file none.pth"),
        (["convert", "no-such-model"], 2, "nor one of bigbigan-resnet50"),
        (["push", "nowhere", "org/mine"], 2, "nowhere"),
    ],
)
def test_what_cannot_be_converted_or_pushed(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no archive")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    process = run(*arguments, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code and message in err, err
    assert len(err.strip().splitlines()) == (2 if code == 1 else 1)  # with what to do next
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth"]
