from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from memlens.errors import ResultError
from memlens.report.from_directory import report_from_directory
from memlens.report.model import EXPLORER_FORMAT, FigureRequest, Finding
from memlens.report.run_directory import RunDirectory, save_run
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.results.storage import load_result
from tests.report import synthetic

FINDING = Finding(
    "Heads", "One head matters.", np.float64(-1.5), -2.0, -1.0, "nats", np.int64(48), "controls: 0"
)


def test_everything_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", title="T", settings={"seed": 1})
    run.add_result("heads", synthetic.head_ablation())
    run.add_table("recall", pd.DataFrame({"id": ["a"]}))
    run.add_finding(FINDING)
    stored = json.loads((run.path / "run.json").read_text())
    assert stored["finished"] is False
    assert stored["findings"][0]["estimate"] == -1.5
    assert load_result(run.path / "heads.nc").data.identical(synthetic_saved(run.path))
    text = report_from_directory(run.path).read_text()
    assert "This run is not finished" in text
    assert "One head matters." in text


def synthetic_saved(path: Path) -> object:
    return load_result(path / "heads.nc").data


def _strict(file: Path) -> Any:
    """Read a file as a strict JSON parser does: Python's own accepts NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{file.name} holds {name}, which is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_files_are_strict_json_where_numbers_are_not_finite(tmp_path: Path) -> None:
    nan, inf = float("nan"), np.float32("inf")
    run = RunDirectory(tmp_path, title="T", settings={"tolerance": inf, "layers": np.array([1.0, nan])})
    run.add_finding(Finding("One", "One sequence.", 0.5, nan, np.float64(nan), "nats", np.int64(1)))
    run.add_section("s", "A section")
    run.add_figure("line", go.Figure(go.Scatter(x=[1, nan], y=np.array([inf, 2.0]))), section="s")
    payload = {"format": EXPLORER_FORMAT, "numbers": [nan, (np.float32(nan), 1)]}
    run.add_explorer("look", payload, section="s")
    page = run.finish().read_text(encoding="utf-8")
    stored = _strict(tmp_path / "run.json")
    assert stored["findings"][0] == {
        "title": "One", "statement": "One sequence.", "estimate": 0.5, "low": None, "high": None,
        "unit": "nats", "n": 1, "control": None, "plain": "", "beside": "", "over": "sequences",
    }  # fmt: skip
    assert stored["settings"] == {"tolerance": None, "layers": [1.0, None]}
    _strict(tmp_path / "line.plotly.json")
    assert _strict(tmp_path / "look.explorer.json")["numbers"] == [None, [None, 1]]
    for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        (tmp_path / "block.json").write_text(text, encoding="utf-8")
        _strict(tmp_path / "block.json")
    assert "0.5 nats, n = 1 (too few sequences for an interval)" in page


def test_failure_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_result("heads", synthetic.head_ablation())
    run.add_result("recall", synthetic.recall())
    (tmp_path / "heads.nc").write_bytes(b"damaged")
    run.add_failure("neurons", ValueError("no layer 12"))
    text = run.finish().read_text()
    assert "heads.nc is damaged" in text
    assert "no layer 12" in text
    assert "What the model recalls" in text
    assert "not finished" not in text


def test_reopened_folder_goes_on(tmp_path: Path) -> None:
    RunDirectory(tmp_path, title="First", settings={"a": 1}).add_finding(FINDING)
    run = RunDirectory(tmp_path, settings={"b": 2})
    run.add_finding(Finding("Heads", "Two heads matter."))
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["title"] == "First"
    assert stored["settings"] == {"a": 1, "b": 2}
    assert [entry["statement"] for entry in stored["findings"]] == ["Two heads matter."]


def test_folder_without_run_json_is_shown_from_its_files(tmp_path: Path) -> None:
    synthetic.sweep().save(tmp_path / "my_sweep.nc")
    pd.DataFrame({"id": ["only-this-id"]}).to_parquet(tmp_path / "recall.parquet")
    text = report_from_directory(tmp_path).read_text()
    assert "My sweep" in text
    assert "only-this-id" in text


def test_save_run_and_a_report_elsewhere(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", [FINDING], {"seed": 0}, {"bypass": synthetic.attention_bypass()})
    report = report_from_directory(path, tmp_path / "other.html")
    assert report == tmp_path / "other.html"
    assert "Each layer in turn" in report.read_text()


def test_figure_requests_are_followed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, title="T", settings={})
    asked = [
        FigureRequest({"sequence": "seq-003"}, "My own words.", "small print"),
        FigureRequest({"group": "domain"}),
    ]
    run.add_result("decode", synthetic.residual_decoding(), figures=asked)
    text = run.finish().read_text()
    assert "My own words." in text
    assert text.count("<figure>") == 2


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", title="T", settings={})
    assert run.add_result("../../out", synthetic.recall()).parent == tmp_path / "run"
    assert "What the model recalls" in run.finish().read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no results"), ("{", "is damaged"), ('{"format": "other"}', "another version")],
)
def test_bad_folders_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResultError, match=message):
        report_from_directory(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="is not a folder"):
        report_from_directory(tmp_path / "nothing")


@pytest.mark.parametrize("name", list(synthetic.ALL))
def test_every_kind_has_a_reading(name: str) -> None:
    said = reading(synthetic.ALL[name]())
    assert said.endswith(".")
    assert "nan" not in said


def test_reading_names_the_worst_head() -> None:
    result = synthetic.head_ablation()
    mean = result.effect("target_logprob").mean("sequence")
    layer, head = np.unravel_index(int(mean.argmin()), mean.shape)
    said = reading(result)
    assert f"layer {layer}, head {head}" in said
    assert f"{float(mean.min()):.3g} nats" in said
    ranks = reading(result, "target_rank")
    worst = result.effect("target_rank").mean("sequence")
    layer, head = np.unravel_index(int(worst.argmax()), worst.shape)
    assert f"layer {layer}, head {head}" in ranks


def test_reading_of_decoding_names_the_layer_from_which_the_rank_stays_low() -> None:
    result = synthetic.residual_decoding()
    ranks = np.array([0.0, 9, 9, 9, 0, 0, 0, 0])  # on top early on, but it does not stay there
    result.data["rank"][:] = ranks[None, :, None]
    assert "rank is below 2 from layer 4 on" in reading(result)


def test_reading_says_so_when_nothing_is_shown_to_matter() -> None:
    result = synthetic.attention_bypass()
    noise = np.random.default_rng(0).normal(0, 1, result["target_logprob"].shape)
    result.data["target_logprob"][:] = (
        result["target_logprob_baseline"].values[:, None] + noise - noise.mean(0)
    )
    assert "includes 0" in reading(result)
    assert "includes 0" not in reading(synthetic.attention_bypass())


def test_unknown_kind_has_no_reading() -> None:
    result = synthetic.recall()
    assert reading(Result(result.data.assign_attrs(kind="new"))) == ""
