"""`memlens recall`, and what short strings of one's own meet on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.errors import EmptySetError
from memlens.studies.bypass.command import BypassSources
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.registry import Call, ModelChoice
from tests.cli.test_commands import call
from tests.cli.test_output import asked


@pytest.fixture(scope="module")
def lines(recited: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recited rows in a file that has their prefix length itself."""
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    rows = np.load(recited[1]).tolist()
    path.write_text("".join(json.dumps({"tokens": row, "prefix_len": 8}) + "\n" for row in rows))
    return str(path)


def test_a_curve_is_that_of_python_and_is_written_as_asked(
    recited: tuple[str, str], lines: str, tmp_path: Path
) -> None:
    table, figure = tmp_path / "curve.csv", tmp_path / "curve.html"
    files = ("--out", str(table), "--figure", str(figure))
    told = asked("recall", "curve", recited[0], "-s", lines, "--prefix-lengths", "4,8", *files, "-q")
    model = ml.load_model(recited[0])
    curve = ml.recall.extraction_curve(model, ml.load_sequences(lines, model), [4, 8], progress=False)
    means = curve["exact_match"].mean("sequence").values
    assert [row["tokens of context"] for row in told["lengths"]] == [4, 8]
    assert [row["extracted"] for row in told["lengths"]] == pytest.approx(means)
    assert told["lengths"][1]["extracted"] == 0.5  # the first half is recited
    written = pd.read_csv(table)
    assert written.groupby("prefix_len")["exact_match"].mean().to_numpy() == pytest.approx(means)
    assert "plotly" in figure.read_text(encoding="utf-8")


def test_compression_lists_the_shortest_prompts_first(
    recited: tuple[str, str], lines: str, tmp_path: Path
) -> None:
    base = ("recall", "compress", recited[0], "-s", lines, "-q")
    told = asked(*base, "--out", str(tmp_path / "c.nc"))
    kept = ml.load_result(tmp_path / "c.nc")
    assert [row["recalled"] for row in told["sequences"]] == kept["recalled"].values.tolist()
    fewest = [row["fewest_tokens"] for row in told["sequences"] if row["recalled"]]
    assert fewest == kept["fewest_tokens"].dropna("sequence").values.tolist()
    code, out, _ = call(*base)
    assert code == 0
    assert "Fewest tokens of prefix: 12 of 12 recalled sequences" in out
    assert "12 of 24 sequences are recalled from their whole prefix" in out


def test_counterfactual_recall_is_the_difference_to_the_twin(
    recited: tuple[str, str], lines: str, tiny_folder: Any, tmp_path: Path
) -> None:
    out, twin = tmp_path / "twins.jsonl", str(tiny_folder("gpt_neox"))  # of the same tokenizer
    base = ("recall", "counterfactual", recited[0], "-s", lines, "-q")
    told = asked(*base, "--clean", twin, "--no-generate", "--out", str(out))
    summary = {row["metric"]: row for row in told["summary"]}
    exact = summary["exact_match"]
    assert exact["model"] == 0.5
    assert exact["difference"] == pytest.approx(exact["model"] - exact["twin"])
    assert exact["low"] <= exact["difference"] <= exact["high"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 24
    assert {"exact_match", "exact_match_clean", "exact_match_counterfactual"} <= set(rows[0])
    code, _, err = call(*base, "--clean", recited[0])
    assert code == 2
    assert "is the model itself: give a twin" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("curve", "--prefix-lengths", "4,x"), "--prefix-lengths '4,x': give whole numbers"),
        (("curve", "--prefix-lengths", "400"), "--prefix-lengths [400]: no prefix has 400 tokens"),
        (("curve", "--out", "x.txt"), "x.txt ends in '.txt'"),
        (("compress", "--figure", "x.png"), "a figure is written as .html"),
        (("compress", "--budget", "0"), "--budget 0: allow at least one"),
        (("compress", "--method", "keep"), 'Invalid value "keep" for --method'),
        (("curve", "--prefix-len", "14"), "choose a smaller --prefix-len, or leave them out with --on-short"),
        (("curve", "--text-column", "words"), "no column 'words'"),
    ],
)
def test_errors_name_what_is_typed(
    recited: tuple[str, str], lines: str, args: tuple[str, ...], message: str
) -> None:
    code, _, err = call("recall", args[0], recited[0], "-s", lines, *args[1:])
    assert code == 2
    assert message in err
    assert "prefix_len" not in err


def test_the_bypass_study_takes_short_strings_with_their_own_prefixes(
    recited: tuple[str, str], lines: str, tmp_path: Path
) -> None:
    call_of = Call(ModelChoice(model=recited[0]), BypassOptions(), tmp_path, progress=False)
    found = BypassSources(memorized=Path(lines), tasks="none").read(call_of)["sequences"]
    assert len(found) == 12
    assert set(found.prefix_len.tolist()) == {8}
    with pytest.raises(EmptySetError, match=r"recalls 0 of 24 sequences whole, and 4 are needed"):
        BypassSources(memorized=Path(lines), prefix_len=1, tasks="none").read(call_of)
    code, _, err = call("run", "bypass", recited[0], "--corpus", lines, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "has 14 tokens, and 64 are needed: give --prefix-len 7 and --suffix-len 7" in err
