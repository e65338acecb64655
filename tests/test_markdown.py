"""What records, file names and model folders hold is shown as it is, and never becomes markup or HTML."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import home, one_thread  # noqa: F401 (fixtures for every test here)

from bigbigan import create_model
from bigbigan.cli import main
from bigbigan.evaluation.plots import draw_group, draw_runs
from bigbigan.evaluation.report import group_records
from bigbigan.markdown import code, escape, table
from bigbigan.modelcard import model_card

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`rm -rf`",
    "``two``",
    "line\nbreak\r\n\n# heading",
    "[link](javascript:alert(1))",
    "![picture](http://example.com/x.png)",
    "[ref]: http://example.com",
    "[ref][other]",
    "**bold** and __strong__ and _slanted_ and *this*",
    "back\\slash \\| \\` \\<b>",
    "# heading",
    "## x",
    "> quotation",
    "- item",
    "+ item",
    "1. item",
    "[x] done",
    "---",
    "===",
    "~~gone~~",
    "&lt;b&gt; &amp; &#60; AT&T",
    "\x1b[31mred\x1b[0m \x07",
    "<!-- comment",
    "</td></tr></table><script>",
    "<a href='javascript:alert(1)'>",
    "<http://example.com>",
    "a\u202eb",
]
TAGS = {"p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "h1", "h2", "h3", "code", "pre", "hr"}
ESCAPED = re.compile(r"[^\x20-\x7e]")


def renderer() -> Any:
    markdown = pytest.importorskip("markdown_it")
    return markdown.MarkdownIt("commonmark").enable(["table", "strikethrough"])


def words(text: str) -> str:
    """As it should be read: white space folded, and nothing that a terminal or a browser would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def rendered_text(rendered: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", rendered))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_text_reads_as_it_was(text: str) -> None:
    render = renderer().render
    for form, tags in (
        (f"{escape(text)}\n", {"p"}),
        (f"- {escape(text)}\n", {"ul", "li"}),
        (code(text), {"p", "code"}),
    ):
        rendered = render(form)
        assert set(re.findall(r"</?(\w+)", rendered)) == tags, rendered
        assert rendered_text(rendered).strip() == words(text)
    rendered = render("\n".join(table(["a", text], [[text, "b"], ["c", text]])))
    cells = [rendered_text(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", rendered)]
    assert cells == ["a", words(text), words(text), "b", "c", words(text)]


def test_a_lone_dash_and_numbers_stay_plain() -> None:
    for plain in ("-", "-4.7e-06", "12,000 ± 3", "avepool_feat, BN+CReLU", "FID (rows)", "hf:org/name@main",
                  '[{"a": 1}, {"b": 2}]', "[0.1, 1.0]", "pca:64", "train[:50000]", "2 x 2", "C & A"):  # fmt: skip
        assert escape(plain) == plain


def record(text: str) -> dict[str, Any]:
    return {
        "protocol": {"name": text, text: text, "seed": 0, "list": [text, {text: text}]},
        "model": {"name": text, "source": text, text: text},
        "data": {text: {"digest": text, "images": text}, "test": {"digest": "f" * 64, "images": 3}},
        "results": [{"representation": text, text: text, "accuracy": 0.5, f"{text} score": 1.5}],
        "versions": {text: text},
        "date": text,
        "command": text,
    }


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_reports_show_foreign_records_as_text(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    name = re.sub(r"[/\0]", "_", text)[:60]
    (tmp_path / f"{name}.json").write_text(json.dumps(record(text)))
    (tmp_path / "other.json").write_text(json.dumps(record(f"{text} more")))
    output = tmp_path / "out" / "report.md"
    output.parent.mkdir()
    assert main(["report", str(tmp_path / f"{name}.json"), str(tmp_path / "other.json"), "-o", str(output)]) == 0
    rendered = renderer().render(output.read_text())
    assert set(re.findall(r"</?(\w+)", rendered)) <= TAGS | {"img"}
    assert rendered_text(rendered).count(words(text)) >= 10
    pictures = re.findall(r'<img src="([^"]*)"', rendered)
    assert sorted(pictures) == sorted(path.name for path in output.parent.glob("*.png"))
    assert not list(tmp_path.glob("*.png"))  # a protocol called ../x leads nowhere else


def test_names_of_protocols_lead_out_of_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "out").mkdir()
    for name in ("../evil", "/tmp/evil", "a/b", ".."):
        (tmp_path / "r.json").write_text(json.dumps(record(name)))
        assert main(["report", str(tmp_path / "r.json"), "-o", str(tmp_path / "out" / "report.md")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.json"]
    assert all(path.name.startswith("report") for path in (tmp_path / "out").iterdir())


def test_documents_with_odd_names_show_their_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "r.json").write_text(json.dumps(record("knn")))
    output = tmp_path / "my (first) [report] 100%é.md"
    for _ in range(2):  # the second finds its own plot
        assert main(["report", str(tmp_path / "r.json"), "-o", str(output)]) == 0
    (address,) = re.findall(r'<img src="([^"]*)"', renderer().render(output.read_text()))
    from urllib.parse import unquote

    assert (tmp_path / unquote(address)).is_file()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_model_cards_show_foreign_facts_as_text(text: str) -> None:
    model = create_model("bigbigan-tiny", parts=("generator",))
    provenance = {text: text, "nested": {text: [text]}, "table": [{text: text, "b": 1}]}
    info = dataclasses.replace(model.info, name=text, source=text, license=text, provenance=provenance)
    states = {"generator": model.generator.state_dict()}
    card = model_card(model.config, info, states, text).split("---\n", 2)[2]
    rendered = renderer().render(card)
    assert set(re.findall(r"</?(\w+)", rendered)) <= TAGS | {"strong", "a"}
    assert set(re.findall(r'(?:href|src)="([^"]*)"', rendered)) == {"https://arxiv.org/abs/1907.02544"}
    assert rendered_text(rendered).count(words(text)) >= 6


def test_plots_draw_foreign_texts_as_they_are(tmp_path: Path) -> None:
    """`$` opens formulas, which fail where they are none; what begins with `_` would leave the legend."""
    pytest.importorskip("matplotlib")
    for number, text in enumerate(("$x^{", "$\\badcommand$", "_hidden", *HOSTILE)):
        records = {
            name: {
                **record("knn"),
                "results": [{"representation": text + name, "k": k, "accuracy": 0.5} for k in (1, 2)],
            }
            for name in ("a", "b")
        }
        assert draw_group(group_records(records)[0], tmp_path / f"{number}.png")
        bars = {**record("mine"), "results": [{"representation": f"{text} {i}", f"{text} s": 0.1} for i in (1, 2)]}
        assert draw_group(group_records({"a": bars})[0], tmp_path / f"bars-{number}.png")
    draw_runs({text: [{"num_images": 1, "loss_d": 1.0}] for text in ("$x^{", "_y")}, tmp_path / "runs.png")
