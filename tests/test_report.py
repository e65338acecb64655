"""Records, and the document of them: what may share a table, what it says, and what is no record."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bigbigan import create_model
from bigbigan.cli import main
from bigbigan.evaluation.features import digest
from bigbigan.evaluation.plots import draw_group
from bigbigan.evaluation.report import group_records, make_record, read_record, record_text

matplotlib = pytest.importorskip("matplotlib")


def a_record(accuracy: float = 0.5, *, data: str = "d" * 64, name: str = "linear", **protocol: Any) -> dict[str, Any]:
    rows = [
        {
            "representation": "model",
            "feature": "avepool_feat",
            "accuracy": accuracy,
            "top5": None,
            "per_class": {"a": 1},
        },
        {"representation": "raw|pixels", "feature": "pixels", "accuracy": 0.25, "top5": 0.9},
    ]
    facts = {"test": {"digest": data, "images": 10_000}}
    return make_record(None, {"name": name, "holdout": 9, **protocol}, results=rows, data=facts)


def save(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(record_text(record), encoding="utf-8")
    return path


def report(*arguments: object) -> str:
    output = Path(str(arguments[0])).parent / "report" / "report.md"
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    return [[[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in t.splitlines()] for t in found]


def test_a_record_says_what_was_measured() -> None:
    model = create_model("bigbigan-tiny", parts=("encoder",), seed=1)
    record = make_record(model, {"name": "p", "seed": 3}, results=[{"accuracy": 1.0}], data={"test": {"digest": "x"}})
    assert record["model"]["encoder_digest"] == digest(model.encoder) and record["model"]["name"] == "bigbigan-tiny"
    assert set(record["versions"]) >= {"bigbigan", "torch", "python", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])


def test_versions_are_of_what_is_imported_and_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may be blocked (None), or bear no version."""
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.0", raising=False)
    versions = make_record(None, {"name": "p"}, results=[], data={})["versions"]
    assert versions["transformers"] == "5.0" and "PIL" in versions and not {"timm", "torch_fidelity"} & set(versions)


def test_a_records_text_is_strict_json() -> None:
    text = record_text({"results": [{"a": math.nan, "b": [math.inf, 1.5], "c": "é", "d": {1: (True, None)}}]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(text, parse_constant=refuse)
    assert read == {"results": [{"a": None, "b": [None, 1.5], "c": "é", "d": {"1": [True, None]}}]}


def test_records_of_the_same_protocol_and_data_share_a_table(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.json", a_record(0.5, seed=0)), save(tmp_path / "two.json", a_record(0.75, seed=1))
    text = report(one, two)
    (table,) = tables(text)
    assert table[0] == ["Representation", "Feature", "Record", "Top-1 %", "Top-5 %"]
    assert table[2:4] == [
        ["model", "avepool_feat", "one.json", "50.00", "-"],
        ["raw\\|pixels", "pixels", "one.json", "25.00", "90.00"],
    ]
    assert [row[2:4] for row in table[4:]] == [["two.json", "75.00"], ["two.json", "25.00"]]
    assert "Protocol: holdout: 9." in text and "test dddddddddddd (10,000 images)" in text
    assert "- one.json: seed 0; " in text and "torch" in text
    (picture,) = (tmp_path / "report").glob("*.png")
    assert f"![linear]({picture.name})" in text and Image.open(picture).size[0] > 500
    (alone,) = tables(report(one))
    assert "Record" not in alone[0]


@pytest.mark.parametrize("other", [{"data": "e" * 64}, {"holdout": 8}, {"name": "knn"}])
def test_other_data_or_settings_never_share_a_table(tmp_path: Path, other: dict[str, Any]) -> None:
    one, two = save(tmp_path / "one.json", a_record(0.5)), save(tmp_path / "two.json", a_record(0.75, **other))
    text = report(one, two)
    assert [table[2][2] for table in tables(text)] == ["50.00", "75.00"]
    assert ("(1 of 2: other data or settings)" in text) == ("name" not in other)
    assert len(list((tmp_path / "report").glob("*.png"))) == 2


def test_older_records_with_one_result_are_read(tmp_path: Path) -> None:
    record = a_record()
    record["results"] = record["results"][0]
    del record["date"]
    assert read_record(save(tmp_path / "old.json", record))["results"][0]["accuracy"] == 0.5
    assert "50.00" in report(tmp_path / "old.json")


def test_deviations_stand_beside_their_figures(tmp_path: Path) -> None:
    row = {"samples": "a", "num_samples": 1000, "FID": 12.3456, "KID": 0.00123, "KID, std": 0.0004}
    record = make_record(None, {"name": "generation"}, results=[row], data={"reference": {"digest": "x", "images": 5}})
    (table,) = tables(report(save(tmp_path / "g.json", record)))
    assert table[0] == ["Samples", "Num samples", "FID", "KID"]
    assert table[2] == ["a", "1,000", "12.35", "0.00123 ± 0.0004"]


def test_records_state_their_columns_and_plot() -> None:
    """By their protocol; of a protocol that is not ours, texts and numbers as they come."""
    rows = [{"representation": "m", "k": k, "num_features": 9, "accuracy": 0.1 * k} for k in (1, 5)]
    table = make_record(None, {"name": "knn"}, results=rows, data={})["table"]
    assert [column["label"] for column in table["columns"]] == ["Representation", "Width", "k", "Top-1 %"]
    assert table["plot"] == {"y": "accuracy", "x": ["k", "images_seen"], "series": ["representation"]}
    mine = make_record(None, {"name": "mine"}, results=[{"who": "me", "n": 5, "loss": 3.0}], data={})["table"]
    assert [(c["label"], c["format"]) for c in mine["columns"]] == [("Who", "text"), ("N", "count"), ("Loss", "number")]
    assert mine["plot"] == {"y": "loss", "x": ["images_seen"], "series": ["who"]}
    assert make_record(None, {"name": "mine"}, results=[{"n": 5}], data={})["table"]["plot"] is None


def test_a_record_is_shown_as_it_says(tmp_path: Path) -> None:
    record = a_record()
    record["table"] = {
        "columns": [
            {"key": "feature", "label": "What", "format": "text"},
            {"key": "accuracy", "label": "Right", "format": "number"},
        ],
        "plot": None,
    }
    text = report(save(tmp_path / "a.json", record))
    assert tables(text)[0] == [["What", "Right"], ["---", "---"], ["avepool_feat", "0.5"], ["pixels", "0.25"]]
    assert "![" not in text


def test_records_without_a_description_get_that_of_their_protocol(tmp_path: Path) -> None:
    record = a_record()
    stated = report(save(tmp_path / "a.json", record))
    del record["table"]
    assert report(save(tmp_path / "a.json", record)) == stated


def test_lines_and_bars_have_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbigan.evaluation import plots

    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    rows = [
        {"representation": name, "k": k, "accuracy": base + k / 100}
        for name, base in (("a", 0.5), ("b", 0.2))
        for k in (5, 1)
    ]
    rows.append({"representation": "level", "accuracy": 0.9})
    (group,) = group_records({"r": make_record(None, {"name": "knn"}, results=rows, data={})})
    assert plots.draw_group(group, tmp_path / "x.png")
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].get_lines()}
    assert [list(map(float, lines[name])) for name in ("a", "b", "level")] == [
        pytest.approx([51, 55]), pytest.approx([21, 25]), pytest.approx([90, 90]),
    ]  # fmt: skip
    (group,) = group_records({"r": a_record()})
    assert plots.draw_group(group, tmp_path / "x.png")
    assert [bar.get_width() for bar in drawn[1].patches] == [50, 25]
    assert [label.get_text() for label in drawn[1].get_yticklabels()] == ["model", "raw|pixels"]


def test_models_that_have_seen_different_numbers_of_images_are_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("bigbigan.evaluation.plots._draw_bars", lambda path, *what: drawn.append(what))
    rows = [{"samples": name, "images_seen": seen, "FID": seen / 100} for name, seen in (("a", 400), ("b", 300))]
    records = {str(row["samples"]): make_record(None, {"name": "generation"}, results=[row], data={}) for row in rows}
    (group,) = group_records(records)
    assert draw_group(group, tmp_path / "x.png")
    assert drawn == [("FID", ["a", "b"], [4.0, 3.0])]


def make_run(folder: Path, *lines: dict[str, Any], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def test_snapshots_of_a_run_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("bigbigan.evaluation.plots._draw_lines", lambda path, *what: drawn.update({"what": what}))
    records = {}
    for seen, accuracy in ((200, 0.75), (100, 0.5)):
        model = create_model("bigbigan-tiny", parts=("encoder",))
        model.info = replace(model.info, provenance={"num_images": seen})
        rows = [
            {"representation": model.info.name, "accuracy": accuracy},
            {"representation": "raw pixels", "accuracy": 0.25},
        ]
        records[f"{seen}.json"] = make_record(model, {"name": "knn"}, results=rows, data={"test": {"digest": "x"}})
    (group,) = group_records(records)
    assert draw_group(group, tmp_path / "curve.png")
    title, swept, series = drawn["what"]
    assert (title, swept) == ("Top-1 %", "images seen")
    assert series == {"bigbigan-tiny": [(200, 75.0), (100, 50.0)], "raw pixels": [(None, 25.0), (None, 25.0)]}


def test_runs_are_drawn_over_images_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"num_images": 8, "loss_d": 2.0, "score_x_real": 1.0},
        {"num_images": 8, "linear_avepool_feat": 0.5, "pixel_l1": 0.3},
    ]
    more = [{"num_images": 16, "loss_d": 1.0, "score_x_real": 0.0}, {"num_images": 16, "linear_avepool_feat": 0.25}]
    run = make_run(tmp_path / "runs" / "a", *lines, *more, end='{"num_images": 24, "lo')  # a run that writes just now
    text = report(run)
    assert "| a | 16 | 50.00 at 8 |" in text and "![training runs](report-runs.png)" in text
    picture = Image.open(tmp_path / "runs" / "report" / "report-runs.png")
    assert picture.size[0] > 900 and len(set(picture.convert("L").tobytes())) > 50
    from bigbigan.evaluation import plots

    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes))
    report(run, make_run(tmp_path / "runs" / "b", *lines))
    titles = {axes.get_title("left"): axes for axes in drawn[0]}
    assert list(titles) == ["Held-out accuracy", "Reconstruction error", "Losses"]
    found = {line.get_label(): line.get_xydata().tolist() for line in titles["Losses"].get_lines()}
    assert found == {"a: loss_d": [[8, 2], [16, 1]], "b: loss_d": [[8, 2]]}
    (first, second) = titles["Held-out accuracy"].get_lines()
    assert first.get_xydata().tolist() == [[8, 50], [16, 25]] and len(second.get_xydata()) == 1


def test_folders_of_records_and_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a"):
        save(tmp_path / f"{name}.json", a_record())
    assert main(["report", str(tmp_path), "--title", "Mine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Mine\n") and out.index("a.json") < out.index("b.json") and "![" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", '{"protocol": {"na', "cut.json is no JSON"),
        ("other.json", '{"a": 1}', "other.json is no record of `bigbigan evaluate`: protocol, data, results, versions"),
        ("list.json", "[]", "list.json is no record"),
        ("rows.json", json.dumps(a_record() | {"results": [1]}), "rows.json is no record .*: results"),
        ("name.json", json.dumps(a_record() | {"protocol": {}}), "name.json is no record .*: protocol.name"),
        (
            "table.json",
            json.dumps(a_record() | {"table": {"columns": [{"key": 1}]}}),
            "table.json is no record .*: table",
        ),
        ("data.json", json.dumps(a_record() | {"data": {"test": 1}}), "data.json is no record .*: data"),
        ("bytes.json", b"\xff\xfe", "bytes.json is no JSON"),
        ("run/metrics.jsonl", '{"num_images": 1}\n{"a": 2}\n', "metrics.jsonl line 2 is no log entry"),
        ("empty/metrics.jsonl", "", "metrics.jsonl holds nothing yet"),
        ("folder/a.txt", "", "folder holds neither records"),
    ],
)
def test_what_is_no_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    given = path if path.suffix == ".json" else path.parent
    assert main(["report", str(given), "-o", str(tmp_path / "report.md")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.md").exists()


def test_the_document_never_lands_on_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.json", a_record())
    for output, message in ((path, "cannot write '.json'"), (tmp_path, "is a folder")):
        assert main(["report", str(path), "-o", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err
