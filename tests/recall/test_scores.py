from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from statsmodels.stats.proportion import proportion_confint

from memlens.errors import EmptySetError, FileFormatError, OptionError, SequenceError
from memlens.forward.metrics import BUILT_IN
from memlens.recall.matching import mean_log_frequency
from memlens.recall.scores import TABLE_SUFFIXES, RecallScores, table_suffix
from memlens.sequences.parquet import write_parquet
from memlens.sequences.set import SequenceSet


def made_up(n: int = 60, *, seed: int = 0, memorized: float = 0.3, **columns: Any) -> RecallScores:
    """Scores of ragged sequences; memorized ones are longer and made of more frequent tokens."""
    rng = np.random.default_rng(seed)
    is_memorized = np.arange(n) < round(memorized * n)
    rows = [
        np.minimum(rng.geometric(rng.uniform(0.2 if m else 0.05, 0.4), rng.integers(9 if m else 6, 14)), 40)
        for m in is_memorized
    ]
    score = np.where(is_memorized, 1.0, rng.choice([0.0, 0.25, 0.75], n))
    table = pd.DataFrame({"id": [f"s{i}" for i in range(n)], **columns})
    seqs = SequenceSet.from_tokens(rows, 4, table=table, attrs={"name": "made up"})
    scores = {name: rng.normal(size=n) for name in BUILT_IN} | {
        "exact_match": (score == 1).astype(int),
        "near_tie": np.zeros(n, bool),
        "memorization_score": score,
        "generated": pd.Series([row[4:].tolist() for row in rows], dtype=object),
    }
    return RecallScores(seqs.table.assign(**scores), seqs, {"model": "made/up", "generate": True})


def test_scores_without_settings_have_none_of_their_own() -> None:
    whole = made_up()
    bare = RecallScores(whole.table, whole.sequences)
    assert bare.attrs == {}
    assert bare.memorized().ids == whole.memorized().ids


def test_memorized_and_unmemorized_are_chosen_by_threshold() -> None:
    recall = made_up()
    score = recall.table["memorization_score"]
    assert recall.memorized().ids == recall.table["id"][score == 1].tolist()
    assert recall.memorized(0.7).ids == recall.table["id"][score >= 0.7].tolist()
    assert recall.unmemorized().ids == recall.table["id"][score < 0.5].tolist()
    assert recall.unmemorized(0.2).ids == recall.table["id"][score < 0.2].tolist()
    assert recall.memorized().table["memorization_score"].tolist() == [1.0] * 18
    assert recall.memorized(0.7).attrs["memorized_threshold"] == 0.7
    assert recall.unmemorized().attrs["criterion"] == "memorization_score"
    for bad in (0, 1.5):
        with pytest.raises(OptionError, match=f"threshold={bad}"):
            recall.memorized(bad)
        with pytest.raises(OptionError, match=f"threshold={bad}"):
            recall.unmemorized(bad)


def test_controls_are_unmemorized_distinct_and_matched_in_length() -> None:
    recall = made_up(200, memorized=0.15)
    memorized, controls = recall.memorized(), recall.matched_controls()
    assert len(controls) == len(memorized)
    assert len(set(controls.ids)) == len(controls)
    assert set(controls.ids) <= set(recall.unmemorized().ids)
    assert controls.table["matched_to"].tolist() == memorized.ids
    assert controls.table["length_difference"].tolist() == (controls.lengths - memorized.lengths).tolist()
    before = abs(recall.balance()["before"])
    after = abs(recall.balance()["after"])
    assert before["length"] > 0.5
    assert after["length"] < 0.15
    assert before["frequency"] > 0.5
    assert after["frequency"] < before["frequency"] / 2


def test_the_assignment_is_the_best_there_is() -> None:
    recall = made_up(9, seed=3, memorized=1 / 3)
    from itertools import permutations

    memorized, pool, controls = recall.memorized(), recall.unmemorized(), recall.matched_controls()
    counts = np.bincount(recall.sequences.tokens.numpy()[recall.sequences.mask.numpy()])
    ours, theirs = (mean_log_frequency(s, counts) for s in (memorized, pool))

    def cost(choice: tuple[int, ...]) -> tuple[int, float]:
        lengths = sum(abs(int(memorized.lengths[i] - pool.lengths[j])) for i, j in enumerate(choice))
        return lengths, round(sum(abs(ours[i] - theirs[j]) for i, j in enumerate(choice)), 9)

    best = min(cost(choice) for choice in permutations(range(len(pool)), len(memorized)))
    chosen = tuple(pool.ids.index(name) for name in controls.ids)
    assert cost(chosen) == best


def test_controls_report_their_balance() -> None:
    recall = made_up(120)
    controls, balance = recall.matched_controls(), recall.balance()
    assert list(balance.index) == ["length", "prefix_len", "frequency"]
    for covariate in balance.index:
        assert controls.attrs[f"smd_before_{covariate}"] == balance.loc[covariate, "before"]
        assert controls.attrs[f"smd_after_{covariate}"] == balance.loc[covariate, "after"]
    ours, pool = recall.memorized().lengths.numpy(), recall.unmemorized().lengths.numpy()
    spread = np.sqrt((ours.var() + pool.var()) / 2)
    assert balance.loc["length", "before"] == pytest.approx((ours.mean() - pool.mean()) / spread)
    assert balance.loc["length", "after"] == pytest.approx(
        (ours.mean() - controls.lengths.numpy().mean()) / spread
    )
    assert balance.loc["prefix_len", "before"] == 0


def test_several_controls_each_and_too_few() -> None:
    recall = made_up(100, memorized=0.1)
    controls = recall.matched_controls(n_per=3)
    assert controls.table["matched_to"].value_counts().to_dict() == dict.fromkeys(recall.memorized().ids, 3)
    assert len(set(controls.ids)) == 30
    few = made_up(20, memorized=0.7)
    n_pool = len(few.unmemorized())
    controls = few.matched_controls()
    assert sorted(controls.ids) == sorted(few.unmemorized().ids)
    assert controls.attrs["n_unmatched"] == 14 - n_pool > 0
    with pytest.raises(OptionError, match="n_per=0"):
        few.matched_controls(0)


def test_blocks_do_not_share_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlens.recall.matching._BLOCK", 7)
    recall = made_up(150, memorized=0.2)
    controls = recall.matched_controls(seed=1)
    assert controls.table["matched_to"].tolist() == recall.memorized().ids
    assert len(set(controls.ids)) == 30
    assert recall.matched_controls(seed=1).ids == controls.ids
    assert recall.matched_controls(seed=2).ids != controls.ids


def test_token_counts_of_a_corpus_take_the_place_of_the_set_s_own() -> None:
    rows = [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    seqs = SequenceSet.from_tokens(rows, 1)
    table = seqs.table.assign(exact_match=[1, 0, 0], memorization_score=[1.0, 0.0, 0.0])
    recall = RecallScores(table, seqs)
    assert recall.matched_controls(token_counts=[0, 50, 1, 60]).ids == ["2"]
    assert recall.matched_controls(token_counts=[0, 50, 60, 1]).ids == ["1"]
    with pytest.raises(SequenceError, match=r"shape \(3,\), .* id 3"):
        recall.matched_controls(token_counts=[1, 2, 3])


def test_no_memorized_or_no_unmemorized_sequences() -> None:
    recall = made_up(memorized=0)
    with pytest.raises(EmptySetError, match=r"no sequence is memorized at threshold=1\.0 .*is 0\.75"):
        recall.matched_controls()
    with pytest.raises(EmptySetError, match=r"no sequence scores below 0\.5"):
        made_up(memorized=1).matched_controls()
    assert len(recall.memorized()) == 0


def test_summary_gives_rates_with_wilson_intervals_by_group() -> None:
    copies = [1, 2, 4] * 20
    recall = made_up(60, copies=copies, domain=["code", "prose"] * 30)
    summary = recall.summary()
    assert set(summary["by"]) == {"all", "copies", "domain"}
    rates = summary[summary["metric"] == "exact_match"].set_index(["by", "group"])
    assert set(rates["method"]) == {"wilson"}
    for by, group, rows in [
        ("all", "all", recall.table),
        ("copies", 4, recall.table[recall.table["copies"] == 4]),
        ("domain", "code", recall.table[recall.table["domain"] == "code"]),
    ]:
        hits, n = int(rows["exact_match"].sum()), len(rows)
        low, high = proportion_confint(hits, n, method="wilson")
        found = rates.loc[(by, group)]
        assert (found["mean"], found["n"]) == (pytest.approx(hits / n), n)
        assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    means = summary[(summary["metric"] == "memorization_score") & (summary["by"] == "all")].iloc[0]
    assert means["method"] == "bootstrap"
    spread = recall.table["memorization_score"].std() / np.sqrt(60)
    assert means["high"] - means["low"] == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_saved_scores_come_back(tmp_path: Path) -> None:
    recall = made_up(domain=["a"] * 60)
    again = RecallScores.load(recall.save(tmp_path / "recall.parquet"))
    pd.testing.assert_frame_equal(again.table, recall.table)
    pd.testing.assert_frame_equal(again.sequences.table, recall.sequences.table)
    assert again.sequences.rows() == recall.sequences.rows()
    assert dict(again.sequences.attrs) == dict(recall.sequences.attrs)
    assert dict(again.attrs) == dict(recall.attrs)
    path = recall.sequences.to_parquet(tmp_path / "set.parquet")
    with pytest.raises(FileFormatError, match="contains no recall scores"):
        RecallScores.load(path)


def test_the_result_carries_metrics_groups_and_settings() -> None:
    recall = made_up(domain=["a", "b"] * 30, copies=range(60))
    result = recall.to_result()
    assert result.kind == "recall"
    assert result["memorization_score"].values.tolist() == recall.table["memorization_score"].tolist()
    assert result.data["sequence"].values.tolist() == recall.table["id"].tolist()
    assert result.data["domain"].values.tolist() == ["a", "b"] * 30
    assert result.data["copies"].values.tolist() == list(range(60))
    assert result.settings["criterion"] == "memorization_score"
    assert result.settings["sequences"] == {"name": "made up"}
    assert result.data.attrs["model"] == "made/up"
    assert isinstance(recall.plot(), go.Figure)


def test_a_table_of_another_length_is_refused() -> None:
    recall = made_up()
    with pytest.raises(SequenceError, match="3 rows for 60 sequences"):
        RecallScores(recall.table.head(3), recall.sequences)


def test_representation_escapes_text() -> None:
    recall = made_up(text=["<script>"] * 60)
    assert repr(recall) == "RecallScores(60 sequences, 18 recalled exactly by made/up)"
    assert "<script>" not in recall._repr_html_()


def test_tables_for_other_programs_hold_every_column_and_the_tokens(tmp_path: Path) -> None:
    recall = made_up(5, text=['a "b",\nc', "é", "", "d", "e"], copies=[1, 2, 3, 4, 5])
    columns = [*recall.table, "tokens", "prefix_len"]
    rows, prefix_len = recall.sequences.rows(), recall.sequences.prefix_len.tolist()

    lines = recall.save(tmp_path / "recall.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    objects = [json.loads(line) for line in lines]
    assert [list(found) for found in objects] == [columns] * 5
    assert [found["tokens"] for found in objects] == rows
    assert [found["prefix_len"] for found in objects] == prefix_len
    generated = [list(ids) for ids in recall.table["generated"]]
    assert [found["generated"] for found in objects] == generated
    for name in ("id", "text", "copies", "memorization_score", "exact_match", "near_tie"):
        assert [found[name] for found in objects] == recall.table[name].tolist(), name
    assert pd.read_json(recall.save(tmp_path / "again.jsonl"), lines=True).shape == (5, len(columns))

    cells = pd.read_csv(recall.save(tmp_path / "recall.CSV"), keep_default_na=False)
    assert list(cells) == columns
    for name in ("id", "text", "copies", "memorization_score", "exact_match", "near_tie"):
        assert cells[name].tolist() == recall.table[name].tolist(), name
    assert [json.loads(cell) for cell in cells["tokens"]] == rows
    assert [json.loads(cell) for cell in cells["generated"]] == generated


@pytest.mark.parametrize("name", ["scores.xlsx", "scores", "parquet", "scores.csv.gz"])
def test_another_suffix_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in .*: a table is written as \.parquet, \.csv, \.jsonl"):
        made_up(3).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_saving_gives_the_path_and_keeps_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall = made_up(4)
    for suffix in TABLE_SUFFIXES:
        path = recall.save(str(tmp_path / f"a{suffix}"))
        assert path == tmp_path / f"a{suffix}"
        assert path.is_file()
        assert table_suffix(str(path).upper()) == suffix
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recall.save("~/b.jsonl") == tmp_path / "b.jsonl"


def test_a_file_without_the_deciding_column_or_with_text_for_numbers_is_refused(tmp_path: Path) -> None:
    recall = made_up(4)
    bad = {
        "no criterion": recall.table.drop(columns=["memorization_score", "target_accuracy"]),
        "text": recall.table.assign(margin=["wide"] * 4),
    }
    for name, table in bad.items():
        path = tmp_path / f"{name}.parquet"
        write_parquet(recall.sequences.with_table(table), path, recall={"model": "m"})
        with pytest.raises(FileFormatError, match=f"{name}.parquet"):
            RecallScores.load(path)


def test_documented_defaults_of_controls_and_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlens.recall.matching._BLOCK", 7)  # blocks are drawn by the seed
    recall = made_up(150, memorized=0.2, copies=[1, 2, 3] * 50)
    documented: dict[str, Any] = {"n_per": 1, "seed": 0, "threshold": 1.0, "below": 0.5}
    documented["token_counts"] = np.bincount(recall.sequences.tokens[recall.sequences.mask])
    controls = recall.matched_controls()
    assert controls.ids == recall.matched_controls(**documented).ids
    pd.testing.assert_frame_equal(recall.balance(), recall.balance(**documented))
    wanted = {"matching_seed": 0, "n_unmatched": 0, "memorized_threshold": 1.0, "unmemorized_threshold": 0.5}
    assert {name: controls.attrs[name] for name in wanted} == wanted
    for change in ({"n_per": 2}, {"seed": 1}, {"threshold": 0.7}, {"below": 0.2}):
        other = recall.matched_controls(**{**documented, **change})
        assert other.ids != controls.ids, change
        table = recall.balance(**change)
        assert not table.equals(recall.balance()), change
        smd = {f"smd_{when}_{c}": table.loc[c, when] for when in table for c in table.index}
        assert {name: other.attrs[name] for name in smd} == pytest.approx(smd)
    assert recall.matched_controls(seed=3, threshold=0.7, below=0.2).attrs.items() >= {
        "matching_seed": 3, "memorized_threshold": 0.7, "unmemorized_threshold": 0.2
    }.items()  # fmt: skip
    summary = recall.summary()
    pd.testing.assert_frame_equal(summary, recall.summary(level=0.95, n_resamples=2000, seed=0))
    for change in ({"level": 0.9}, {"n_resamples": 2001}, {"seed": 1}):
        assert not summary.equals(recall.summary(**change)), change


def test_a_mean_leaves_out_what_is_not_finite_and_says_how_many_are_left() -> None:
    recall = made_up(8, copies=[1, 2] * 4)
    values = np.array([-1.0, -np.inf, -2.0, np.nan, -3.0, np.inf, -4.0, -5.0])
    table = recall.table.assign(sample_logprob=values, recollected=[0, 1] * 4, trivial=[0.5] * 8)
    found = (
        RecallScores(table, recall.sequences).summary(n_resamples=100).set_index(["metric", "by", "group"])
    )
    assert found["n"].dtype.kind == "i"
    for by, group, n, mean in (("all", "all", 5, -3.0), ("copies", 1, 4, -2.5), ("copies", 2, 1, -5.0)):
        row = found.loc[("sample_logprob", by, group)]
        assert (row["n"], row["mean"], row["method"]) == (n, mean, "bootstrap")
        assert n == 1 or row["low"] <= mean <= row["high"]
    assert found.loc[("recollected", "copies", 2), ["mean", "method"]].tolist() == [1, "wilson"]
    assert found.loc[("trivial", "all", "all"), "method"] == "bootstrap"  # not 0 or 1, so no proportion
    assert list(RecallScores(table, recall.sequences).summary(n_resamples=9)) == [
        "by", "group", "metric", "mean", "low", "high", "n", "method"
    ]  # fmt: skip


def test_the_page_shows_the_first_five_and_the_columns_to_look_at() -> None:
    recall = made_up(7, text=[f"t{i}" for i in range(7)], domain=["d"] * 7, secret=["hidden"] * 7)
    page = recall._repr_html_()
    assert page.startswith("<p><b>RecallScores(7 sequences, 2 recalled exactly by made/up)</b></p><table")
    assert page.count("<tr") == 1 + 5
    assert page.index(">id<") < page.index(">text<") < page.index(">domain<") < page.index(">exact_match<")
    assert "hidden" not in page
    assert "s4" in page
    assert "s5" not in page
    nameless = RecallScores(recall.table, recall.sequences)
    assert repr(nameless) == "RecallScores(7 sequences, 2 recalled exactly by a model)"


def test_refusals_say_what_the_scores_are() -> None:
    recall = made_up(memorized=0)
    with pytest.raises(EmptySetError, match=r"the highest memorization_score is 0\.75, the lowest 0\.00"):
        recall.balance()
    with pytest.raises(EmptySetError, match=r"below 0\.5 \(the highest .* is 1\.00, the lowest 1\.00\)"):
        made_up(memorized=1).balance()
    whole = made_up(20)
    largest = int(whole.sequences.tokens.max())
    with pytest.raises(SequenceError, match="give one count for each id of the vocabulary"):
        whole.matched_controls(token_counts=np.ones((2, largest + 1)))
    with pytest.raises(SequenceError, match=f"contain the token id {largest}"):
        whole.matched_controls(token_counts=np.ones(largest))
    assert len(whole.matched_controls(token_counts=np.ones(largest + 1)))
