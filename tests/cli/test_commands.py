"""The command line, as a user calls it."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens import cli


def call(*args: str) -> tuple[int, str, str]:
    """Run the command as `main` does, in this process."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    out, err = StringIO(), StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["memlens", *args])
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_help_names_every_command_with_an_example() -> None:
    shown = call("--help")[1]
    for name in ("demo", "score", "run", "report", "models", "plan", "generate", "zoo"):
        assert name in shown
    for command in (
        ["demo"],
        ["score"],
        ["run", "localize"],
        ["report"],
        ["plan"],
        ["models"],
        ["zoo", "train"],
    ):
        assert "Example: memlens" in call(*command, "--help")[1]


def test_models_lists_families_and_zoo() -> None:
    code, out, _ = call("models")
    assert code == 0
    for name in (
        "EleutherAI/pythia-12b",
        "openlm-research/open_llama_7b",
        "bigcode/starcoder2-3b",
        "zoo/pythia-s",
    ):
        assert name in out


def test_score_writes_a_table(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    code, out, _ = call("score", "-m", "zoo/pythia-s", "-s", "zoo", "--limit", "12", "--out", str(file), "-q")
    assert code == 0
    table = pd.read_parquet(file)
    assert len(table) == 12
    assert {"exact_match", "memorization_score", "target_logprob", "copies"} <= set(table.columns)
    assert "exact_match" in out


def test_a_source_is_scored_in_portions(tmp_path: Path, recited: tuple[str, str]) -> None:
    folder, rows = recited
    found = []
    for extra in ((), ("--portion", "10")):
        base = ("score", "-m", folder, "-s", rows, "--prefix-len", "8", "--out", str(tmp_path / "t.parquet"))
        code, out, err = call(*base, *extra, "-q", "--json")
        assert code == 0, err
        found.append(json.loads(out))
    assert [("sequences" in each) for each in found] == [True, False]
    for one, other in zip(*(each["summary"] for each in found), strict=True):
        assert one["n"] == other["n"]
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-4)
    code, out, _ = call(*base, "--portion", "10", "-q")
    assert code == 0
    assert "recalled best" in out
    code, _, err = call(*base[:-1], str(tmp_path / "t.csv"), "--portion", "10", "-q")
    assert code == 2
    assert ".parquet" in err


def test_the_suffix_decides_in_which_format_score_writes(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text('One text of a line, with a comma.\n\nAnother text, quoted "here".\n')
    base = (
        "score",
        "-m",
        "zoo/pythia-s",
        "-s",
        str(tmp_path / "texts.txt"),
        "--prefix-len",
        "4",
        "-q",
        "--no-generate",
    )
    tables = {}
    for suffix in (".parquet", ".csv", ".jsonl"):
        code, out, err = call(*base, "--metrics", "none", "--out", str(tmp_path / f"t{suffix}"))
        assert code == 0, err
        assert "recalled best" in out
        read = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".jsonl": partial(pd.read_json, lines=True)}
        tables[suffix] = read[suffix](tmp_path / f"t{suffix}")
    first = tables[".parquet"]
    assert first["text"].tolist() == ["One text of a line, with a comma.", 'Another text, quoted "here".']
    for suffix in (".csv", ".jsonl"):
        for name in ("text", "exact_match", "prefix_len"):
            assert tables[suffix][name].tolist() == first[name].tolist()
        np.testing.assert_allclose(tables[suffix]["target_logprob"], first["target_logprob"], rtol=1e-6)
    assert (
        json.loads(tables[".csv"]["tokens"][1]) == tables[".jsonl"]["tokens"][1] == list(first["tokens"][1])
    )
    code, _, err = call(*base, "--out", str(tmp_path / "t.xlsx"))
    assert code == 2
    assert "ends in '.xlsx': a table is written as .parquet, .csv, .jsonl" in " ".join(err.split())


def test_score_s_metrics_are_chosen_and_recorded(tmp_path: Path) -> None:
    base = ("score", "-m", "zoo/pythia-s", "-s", "zoo", "--limit", "6", "-q", "--no-generate", "--out")
    code, out, _ = call(*base, str(tmp_path / "all.parquet"))
    assert code == 0
    everything = ml.RecallScores.load(tmp_path / "all.parquet")
    assert {"nll", "min_k_plus_plus", "zlib_ratio", "np_discoverable", "trivial"} <= set(everything.table)
    assert "min_k_plus_plus" in out
    options = ("--metrics", "sampling", "--temperature", "0.5", "--top-k", "7", "--n-samples", "9")
    code, out, _ = call(*base, str(tmp_path / "some.parquet"), *options)
    assert code == 0
    some = ml.RecallScores.load(tmp_path / "some.parquet")
    assert "nll" not in some.table
    assert [some.attrs[k] for k in ("metrics", "temperature", "top_k", "n_samples")] == [
        "sampling",
        0.5,
        7,
        9,
    ]
    assert not some.table["sample_logprob"].equals(everything.table["sample_logprob"])
    code, out, _ = call(*base, str(tmp_path / "none.parquet"), "--metrics", "none")
    assert code == 0
    assert "trivial" not in out


def test_localize_on_a_checkpoint_folder_and_report(recited: tuple[str, str], tmp_path: Path) -> None:
    """Any folder and any file: a tiny random model 'recalls' what it generates itself."""
    model, rows = recited
    out = tmp_path / "run"
    code, shown, _ = call(
        "run", "localize", "-m", model, "-s", rows, "--prefix-len", "8",
        "--out", str(out), "--max-patched", "3", "-q",
    )  # fmt: skip
    assert code == 0
    assert "recalls 12 of 24 sequences exactly" in shown
    assert f"report: {out / 'report.html'}" in shown
    (out / "report.html").unlink()
    code, shown, _ = call("report", str(out))
    assert code == 0
    assert (out / "report.html").stat().st_size < 8e6


def test_plan_names_each_analysis(tiny_folder: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 100, (4, 12)))
    code, out, _ = call(
        "plan", "-m", str(tiny_folder("gpt_neox")), "-s", str(tmp_path / "rows.npy"), "--prefix-len", "6"
    )
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines() if "│" in line]
    assert rows[:2] == [["ablate each head", "4", "12"], ["bypass each layer", "4", "3"]]
    assert "together about" in out


def test_plan_for_another_device(tiny_folder: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 100, (4, 12)))
    what = ["-m", str(tiny_folder("gpt_neox")), "-s", str(tmp_path / "rows.npy"), "--prefix-len", "6"]
    code, out, _ = call("run", "localize", *what, "--plan", "--on", "H100-SXM", "--json")
    assert code == 0
    plan = json.loads(out)
    assert "steps" not in plan  # nothing runs here
    assert plan["on"]["memory"] == 80e9
    for row in plan["works"]:
        operators = plan["operators"][row["work"]]
        assert row["fits"]
        assert row["seconds"] == pytest.approx(sum(each["seconds"] for each in operators))
        assert sum(each["flops"] for each in operators) == pytest.approx(row["gflop"] * 1e9)
    code, out, _ = call("plan", *what, "--on", "a100-40gb")
    assert code == 0
    assert "Not counted: launches of kernels" in out
    assert call("run", "localize", *what, "--on", "h200")[0] == 2  # not without --plan


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["score", "-m", "zoo/pythia-z", "-s", "zoo"], "Did you mean 'zoo/pythia-s'"),
        (["score", "-m", "zoo/pythia-s", "-s", "missing.npy"], "missing.npy"),
        (["score", "-m", "zoo/pythia-s", "-s", "zoo", "--metrics", "samplin"], "Did you mean 'sampling'"),
        (["score", "-m", "zoo/pythia-s", "-s", "zoo", "--top-p", "0"], "--top-p 0"),
        (
            ["run", "localize", "-m", "zoo/pythia-s", "-s", "zoo", "--out", "x", "--backend", "hook"],
            "--backend 'hook'",
        ),
        (["zoo", "train", "pythia-xxl"], "pythia-xxl"),
    ],
)
def test_foreseen_errors_are_one_line(args: list[str], words: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*args)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_option_values_are_found_before_the_model_runs(tmp_path: Path) -> None:
    code, _, err = call(
        "run",
        "localize",
        "-m",
        "zoo/pythia-s",
        "-s",
        "zoo",
        "--out",
        str(tmp_path / "x"),
        "--head-mode",
        "zro",
        "-q",
    )
    assert code == 2
    assert "'zero'" in err
    assert not (tmp_path / "x").exists()
