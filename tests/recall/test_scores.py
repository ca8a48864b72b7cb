from __future__ import annotations

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
from memlens.recall.scores import RecallScores
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
        "generated": pd.Series([row[4:] for row in rows], dtype=object),
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
