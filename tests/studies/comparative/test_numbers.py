"""Rates, fits, domains, frequency, training, noise and layers: each number against one made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from memlens.errors import ColumnError, ResultError
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.training import training_events, training_table
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.analyze.domains import (
    domain_agreement,
    domain_table,
    structural_gap,
    structural_share,
)
from memlens.studies.comparative.analyze.frequency import (
    boundary_gap,
    boundary_table,
    bucket_labels,
    frequency_by_offset,
    frequency_threshold,
    mean_log_frequencies,
    token_frequencies,
    youden,
)
from memlens.studies.comparative.analyze.layers import (
    burst,
    crossing,
    depth_curve,
    noise_table,
    recovery_gaps,
    recovery_table,
    structural_change,
)
from memlens.studies.comparative.analyze.rates import (
    copies_table,
    depth_table,
    join_steps,
    rate_row,
    score_spread,
    size_fits,
    smaller_beats_larger,
)
from memlens.studies.comparative.figures import FIGURES
from memlens.studies.comparative.findings import (
    CLAIMS,
    RULES,
    TEXTS,
    VERDICTS,
    by_null,
    claim_table,
    judge,
    judge_all,
    over_models,
    signature_table,
)
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.tables import OVERALL, PER_MODEL

# ---- rate and size ---------------------------------------------------------------------------------------


def test_rate_has_wilson_s_interval() -> None:
    hits = [1] * 7 + [0] * 43
    row = rate_row(pd.DataFrame({"exact_match": hits, "matching_prefix": hits, "target_accuracy": 0.5}))
    low, high = proportion_confint(7, 50, method="wilson")
    assert (row["rate"], row["n"], row["memorized"]) == (0.14, 50, 7)
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_score_spread_counts_every_sequence_once() -> None:
    scores = np.array([0, 0, 1 / 32, 0.1, 0.5, 31 / 32, 1, 1, 1])
    spread = score_spread(pd.DataFrame({"memorization_score": scores}), bins=4)
    assert spread["n"].sum() == len(scores)
    assert spread.set_index("part").loc["1", "n"] == 3
    assert spread["n"].tolist() == [2, 2, 0, 1, 1, 3]
    assert spread["share"].sum() == pytest.approx(1)
    with pytest.raises(ColumnError, match="neither M"):
        score_spread(pd.DataFrame({"exact_match": [1]}))


def test_depth_is_the_share_whose_run_is_long_enough() -> None:
    table = pd.DataFrame({"matching_prefix": [0, 3, 5, 8]})
    found = depth_table(table, np.array([8, 8, 5, 8])).set_index("k")
    assert found.loc[1, "rate"] == 0.75
    assert found.loc[4, "rate"] == 0.5
    assert found.loc[6, "n"] == 3  # the sequence of five targets has no sixth
    assert found.loc[8, "rate"] == pytest.approx(1 / 3)
    assert found["rate"].is_monotonic_decreasing


def models(rates: dict[str, list[float]], n: int = 100_000) -> pd.DataFrame:
    rows = [
        {
            "model": f"{family}{i}",
            "family": family,
            "n_params": 10 ** (6 + i),
            "n": n,
            "memorized": round(r * n),
        }
        for family, values in rates.items()
        for i, r in enumerate(values)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(rate=frame["memorized"] / frame["n"])


def test_size_fits_are_scipy_s_regression_and_find_a_planted_slope() -> None:
    table = models({"a": [0.10, 0.21, 0.29], "b": [0.05, 0.14, 0.26], "c": [0.4, 0.5]})
    fits = size_fits(table, options=ComparativeOptions(n_resamples=200)).set_index(["family", "reading"])
    for family in ("a", "b"):
        part = table[table["family"] == family]
        by_hand: Any = stats.linregress(np.log10(part["n_params"]), part["rate"])
        row = fits.loc[(family, "rate")]
        assert row["slope"] == pytest.approx(by_hand.slope)
        assert row["r2"] == pytest.approx(by_hand.rvalue**2)
        half = stats.t.ppf(0.975, 1) * by_hand.stderr
        assert (row["low"], row["high"]) == pytest.approx((by_hand.slope - half, by_hand.slope + half))
        assert row["boot_low"] < row["slope"] < row["boot_high"]
        log = fits.loc[(family, "log10 rate")]
        assert log["slope"] == pytest.approx(
            stats.linregress(np.log10(part["n_params"]), np.log10(part["rate"])).slope  # pyright: ignore
        )
    assert ("c", "rate") not in fits.index  # two sizes make no fit of their own
    joint = fits.loc[("all families", "rate")]
    x = np.log10(table["n_params"]) - np.log10(table["n_params"]).groupby(table["family"]).transform("mean")
    y = table["rate"] - table["rate"].groupby(table["family"]).transform("mean")
    assert joint["slope"] == pytest.approx((x * y).sum() / (x * x).sum())
    assert joint["sizes"] == 3


def test_size_fits_leave_zero_rates_out_of_the_logarithm_and_say_so() -> None:
    fits = size_fits(
        models({"a": [0.0, 0.01, 0.1, 0.2]}, n=1000), options=ComparativeOptions(n_resamples=100)
    ).set_index("reading")
    assert fits.loc["rate", "left_out"] == 0
    assert fits.loc["log10 rate", "left_out"] == 1
    assert fits.loc["log10 rate", "sizes"] == 3
    assert np.isfinite(fits.loc["log10 rate", ["slope", "boot_low"]].astype(float)).all()
    nothing = size_fits(models({"a": [0.0, 0.0, 0.0]}), options=ComparativeOptions(n_resamples=50)).set_index(
        "reading"
    )
    assert nothing.loc["rate", "slope"] == pytest.approx(0)
    assert np.isnan(nothing.loc["log10 rate", "slope"])


def test_size_fits_of_another_column() -> None:
    table = models({"a": [0.1, 0.2, 0.3]}).assign(depth=[3.0, 5.0, 7.0])
    row = size_fits(table, "depth").iloc[0]
    assert row["slope"] == pytest.approx(2.0)
    assert row["r2"] == pytest.approx(1.0)


# ---- domains ---------------------------------------------------------------------------------------------


def test_domain_shares_are_of_the_sample_and_of_an_equal_one() -> None:
    table = pd.DataFrame(
        {"domain": ["code"] * 10 + ["web"] * 40, "exact_match": [1] * 5 + [0] * 5 + [1] * 10 + [0] * 30}
    )
    found = domain_table(table).set_index("domain")
    assert found.loc["code", "rate"] == 0.5
    assert found.loc["code", "share"] == pytest.approx(5 / 15)
    assert found.loc["code", "equal_share"] == pytest.approx(0.5 / 0.75)
    assert found["structural"].to_dict() == {"code": True, "web": False}
    low, high = proportion_confint(10, 15, method="wilson")
    assert (found.loc["web", "share_low"], found.loc["web", "share_high"]) == pytest.approx((low, high))
    hits, labels = table["exact_match"].to_numpy(float), table["domain"].to_numpy(str)
    share, gap = structural_share(hits, labels), structural_gap(hits, labels)
    assert share.value == pytest.approx(0.5 / 0.75)
    assert share.low < share.value < share.high
    assert gap.value == pytest.approx(0.25)
    assert np.isnan(structural_gap(hits, np.array(["web"] * 50)).value)


def test_nothing_memorized_has_no_shares() -> None:
    table = pd.DataFrame({"domain": ["code", "web"], "exact_match": [0, 0]})
    assert domain_table(table)["equal_share"].isna().all()
    assert np.isnan(structural_share(np.zeros(2), np.array(["code", "web"])).value)


def test_domain_agreement_is_the_mean_rank_correlation() -> None:
    rates = np.random.default_rng(0).random((4, 6))
    by_hand = [stats.spearmanr(rates[i], rates[j]).statistic for i in range(4) for j in range(i)]  # pyright: ignore
    found = domain_agreement(rates)
    assert found["value"] == pytest.approx(np.mean(by_hand))
    assert found["p_above"] > 0.05
    assert domain_agreement(np.arange(6) + rates * 0.1)["p_above"] < 0.01
    assert np.isnan(domain_agreement(rates[:, :2])["value"])


# ---- frequency -------------------------------------------------------------------------------------------


@pytest.fixture
def frequent() -> tuple[Result, np.ndarray, np.ndarray]:
    """Ragged sequences; token i stands 10 i times in the corpus."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 50, n).tolist() for n in rng.integers(8, 13, 60)]
    seqs = SequenceSet.from_tokens(rows, rng.integers(3, 6, 60))
    counts = 10 * np.arange(50)
    scores = rng.choice([0.0, 0.25, 0.5, 1.0], 60)
    return token_frequencies(seqs, counts, "a corpus"), counts, scores


def test_frequencies_stand_at_their_place_from_the_boundary() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3, 4], [4, 3]], [3, 1])
    result = token_frequencies(seqs, np.array([0, 1, 2, 3, 4]), "x")
    values = result["per_million"]
    assert values["offset"].values.tolist() == [-3, -2, -1, 0]
    assert values.values[0] == pytest.approx(np.array([1, 2, 3, 4]) * 1e5)
    assert np.isnan(values.values[1, :2]).all()
    assert values.values[1, 2:] == pytest.approx([4e5, 3e5])
    with pytest.raises(ResultError, match="token id 4 has no count"):
        token_frequencies(seqs, np.array([1, 1]), "x")


def test_frequency_tables_by_hand(frequent: Any) -> None:
    result, _, scores = frequent
    buckets = bucket_labels(scores)
    values, offsets = result["per_million"].values, result["per_million"]["offset"].values
    by_offset = frequency_by_offset(result, buckets).set_index(["bucket", "offset"])
    assert by_offset.loc[("M = 1", 0), "mean"] == pytest.approx(values[scores == 1][:, offsets == 0].mean())
    table = boundary_table(result, buckets).set_index("bucket")
    own = values[scores == 0]
    change = own[:, offsets == 0][:, 0] - np.nanmean(own[:, offsets < 0], axis=1)
    assert table.loc["M = 0", "change"] == pytest.approx(change.mean(), rel=1e-5)
    assert table.loc["M = 0", "low"] < change.mean() < table.loc["M = 0", "high"]
    gap = boundary_gap(result, buckets)
    assert gap.value == pytest.approx(table.loc["M = 1", "change"] - table.loc["M = 0", "change"], rel=1e-5)
    assert np.isnan(boundary_gap(result, np.full(60, "M = 1", dtype=object)).value)


def test_youden_is_the_best_of_all_cuts() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(size=80).round(1)
    label = rng.random(80) < 1 / (1 + np.exp(-2 * score))
    cut, sensitivity, specificity = youden(score, label)
    every = [(score[label] >= c).mean() + (score[~label] < c).mean() for c in np.unique(score)]
    assert sensitivity + specificity == pytest.approx(max(every))
    assert (score[label] >= cut).mean() == pytest.approx(sensitivity)


def test_frequency_threshold_turns_round_and_looks_inside_domains() -> None:
    frequency = np.array([1.0, 1.1, 1.3, 3.0, 3.1, 3.35])
    scores = np.array([1.0, 1.0, 0.2, 0.0, 0.0, 1.0])
    labels = np.array(["a", "a", "a", "b", "b", "b"])
    found = frequency_threshold(frequency, scores, labels).set_index("comparison")
    assert not found.loc["all", "more_frequent"]
    assert found.loc["all", "area"] < 0.5
    assert found.loc["all", "threshold"] == pytest.approx(1.1)
    assert (found.loc["all", "sensitivity"], found.loc["all", "specificity"]) == pytest.approx((2 / 3, 1.0))
    inside = np.concatenate([part - part.mean() for part in (frequency[:3], frequency[3:])])
    pairs = [(inside[i] > inside[j]) + 0.5 * (inside[i] == inside[j]) for i in (0, 1, 5) for j in (2, 3, 4)]
    assert found.loc["inside domains", "area"] == pytest.approx(np.mean(pairs))
    assert frequency_threshold(frequency, np.ones(6), labels).empty


def test_mean_log_frequencies(frequent: Any) -> None:
    result = frequent[0]
    values = result["per_million"].values
    assert mean_log_frequencies(result) == pytest.approx(np.nanmean(np.log10(1 + values), axis=1))


# ---- training --------------------------------------------------------------------------------------------


def test_training_events_follow_each_sequence() -> None:
    hits = np.array([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=bool)
    events = training_events(hits, np.array([10, 20, 30, 40]))
    assert events["first"].tolist()[:2] == [30, 10]
    assert np.isnan(events["first"][2])
    assert events["forgotten"].tolist() == [0, 2, 0, 0, 1]
    assert events["relearned"].tolist() == [0, 1, 0, 0, 0]
    assert events["last"].tolist() == [True, False, False, True, False]
    table = training_table(hits, np.array([10, 20, 30, 40])).set_index("step")
    assert table["rate"].tolist() == [0.4, 0.4, 0.6, 0.4]
    assert table["new"].tolist() == [2, 1, 1, 0]
    assert table["forgotten"].tolist() == [0, 1, 1, 1]
    assert table["relearned"].tolist() == [0, 0, 1, 0]


def test_join_steps_wants_one_set_of_sequences() -> None:
    def table(ids: list[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {"id": ids, "exact_match": 1, "matching_prefix": 2, "target_accuracy": 1.0, "copies": 3}
        )

    joined = join_steps({20: table(["a", "b"]), 10: table(["a", "b"]).assign(exact_match=[0, 1])})
    assert joined["step"].values.tolist() == [10, 20]
    assert joined["exact_match"].values.tolist() == [[0, 1], [1, 1]]
    with pytest.raises(ResultError, match="different sequences"):
        join_steps({1: table(["a"]), 2: table(["b"])})
    with pytest.raises(ResultError, match="no checkpoints"):
        join_steps({})
    assert copies_table(pd.DataFrame({"exact_match": [1]})).empty


# ---- noise -----------------------------------------------------------------------------------------------


def noisy(n: int = 40, draws: int = 2) -> Result:
    rng = np.random.default_rng(0)
    shape = (n, 3, draws)
    dims = ("sequence", "alpha", "draw")
    arrays = {
        "exact_match": (dims, (rng.random(shape) < np.array([0.8, 0.5, 0.2])[None, :, None]).astype(float)),
        "target_accuracy": (dims, rng.random(shape)),
        "matching_prefix": (dims, rng.integers(0, 9, shape).astype(float)),
        "recovery": (dims, rng.normal(size=shape)),
        "similarity_at_noise": (dims, rng.random(shape)),
    }
    coords = {
        "sequence": [f"s{i}" for i in range(n)],
        "alpha": [0.0, 0.1, 0.5],
        "domain": ("sequence", ["code", "web"] * (n // 2)),
        "n_targets": ("sequence", [8] * n),
        "group": ("sequence", ["memorized"] * (n // 2) + ["matched control"] * (n // 2)),
    }
    return Result.create(xr.Dataset(arrays, coords), kind="residual_perturbation")


def test_noise_tables_by_hand() -> None:
    result = noisy()
    table = noise_table(result, options=ComparativeOptions(n_resamples=200)).set_index("alpha")
    hits = result["exact_match"].values
    assert table.loc[0.5, "rate"] == pytest.approx(hits[:, 2].mean())
    assert table.loc[0.5, "low"] < table.loc[0.5, "rate"] < table.loc[0.5, "high"]
    code = np.arange(40) % 2 == 0
    rates = hits[:, 1].mean(1)[code].mean(), hits[:, 1].mean(1)[~code].mean()
    assert table.loc[0.1, "structural"] == pytest.approx(rates[0] / sum(rates))
    assert table.loc[0.1, "leading"] == pytest.approx(result["matching_prefix"].values[:, 1].mean() / 8)
    right = result["target_accuracy"].values[:, 2]
    assert table.loc[0.5, "below_half"] == pytest.approx((right < 0.5).mean())
    change = structural_change(result, options=ComparativeOptions(n_resamples=200))
    assert change.value == pytest.approx(table.loc[0.5, "structural"] - table.loc[0.0, "structural"])
    assert change.low < change.value < change.high


def test_recovery_and_its_gap_within_pairs() -> None:
    result = noisy()
    recovery = result["recovery"].mean("draw").values
    table = recovery_table(result).set_index(["group", "alpha"])
    assert table.loc[("memorized", 0.5), "recovery"] == pytest.approx(recovery[:20, 2].mean())
    matched = np.array([f"s{i}" for i in reversed(range(20))])
    gap = recovery_gaps(result, matched).set_index("alpha").loc[0.5]
    assert gap["gap"] == pytest.approx((recovery[:20, 2][::-1] - recovery[20:, 2]).mean())
    assert gap["pairs"] == 20
    assert gap["low"] < gap["gap"] < gap["high"]
    assert recovery_gaps(result, matched[:1]).empty


# ---- layers ----------------------------------------------------------------------------------------------


def test_burst_and_crossing_of_planted_curves() -> None:
    rng = np.random.default_rng(0)
    mean = np.array([0.05, 0.1, 0.15, 0.7, 0.9])
    values = mean + rng.normal(0, 0.05, (30, 5))
    found, over = burst(values), crossing(values)
    assert (found.value, found.low, found.high) == (0.8, 0.8, 0.8)
    assert (over.value, over.low, over.high) == (0.8, 0.8, 0.8)
    assert np.isnan(crossing(values * 0.1).value)
    curve = depth_curve(values)
    assert curve["mean"].to_numpy() == pytest.approx(values.mean(0))
    assert curve["depth"].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ((curve["low"] < curve["mean"]) & (curve["mean"] < curve["high"])).all()


# ---- claims ----------------------------------------------------------------------------------------------


def test_every_claim_names_a_table_and_a_rule() -> None:
    assert {claim.rule for claim in CLAIMS.values()} == {*RULES, "signature"}
    assert {claim.table for claim in CLAIMS.values()} <= {*PER_MODEL, *OVERALL}
    assert set(TEXTS["tables"]) == {*PER_MODEL, *OVERALL}
    assert set(TEXTS["figures"]) == set(FIGURES)
    known = ("the abstract", "quoted by a reader", "a reader's note", "the same authors' earlier code")
    assert all(claim.known_from.startswith(known) for claim in CLAIMS.values())
    judged = judge_all({"rates": models({"a": [0.1]})}, {}, None)
    assert {item.verdict for item in judged} == {"not tested"}
    assert list(claim_table(judged)["claim"]) == [claim.statement for claim in CLAIMS.values()]


def test_verdicts_by_interval_and_by_null() -> None:
    assert judge(Estimate(1, 0.5, 2, 3), 1, against=0.4) == "holds"
    assert judge(Estimate(1, 0.5, 2, 3), 1, against=0.6) == "undecided"
    assert judge(Estimate(1, 0.5, 2, 3), 1, against=3) == "does not hold"
    assert judge(Estimate(1, 0.5, 2, 3), -1, against=3) == "holds"
    assert judge(Estimate(1, np.nan, np.nan, 3), 1) == "undecided"
    assert [by_null(p) for p in (0.05, 0.06, 0.98, np.nan)] == [
        "holds",
        "undecided",
        "does not hold",
        "undecided",
    ]


def test_over_models_is_student_s_interval() -> None:
    values = [0.3, 0.5, 0.1, 0.4]
    found = over_models([Estimate(v, v - 1, v + 1, 9) for v in values])
    by_hand: Any = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high))
    two = over_models([Estimate(1, 0, 2, 5), Estimate(3, 2, 6, 5)])
    assert (two.value, two.known, two.n) == (2, False, 2)
    assert str(two) == "2 (no interval: n = 2)"
    assert over_models([Estimate(1, 0, 2, 5)]) == Estimate(1, 0, 2, 5)


def test_claims_are_judged_from_tables() -> None:
    tables = {
        "rates": models({"a": [0.10, 0.20, 0.305], "b": [0.4, 0.5, 0.605]}),
        "compression": pd.DataFrame(
            {"model": ["m"], "family": ["a"], "n": [9], "ratio": [0.4], "low": [0.3], "high": [0.5],
             "up_to_half": [0.2], "half_low": [0.1], "half_high": [0.3]}
        ),
    }  # fmt: skip
    tables["size_fits"] = size_fits(tables["rates"], options=ComparativeOptions(n_resamples=50))
    judged = {item.claim: item for item in judge_all(tables, {}, None)}
    assert judged["size"].verdict == "holds"
    assert judged["size"].estimate.value == pytest.approx(0.1025)
    assert judged["families"].verdict == "holds"  # the smallest of b recalls more than the largest of a
    assert judged["compressible"].verdict == "holds"
    assert judged["half"].verdict == "does not hold"
    assert judged["burst"].verdict == "not tested"
    assert {item.verdict for item in judged.values()} <= set(VERDICTS)


def test_frequency_pattern_is_compared_over_places() -> None:
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=12)
    rows = [
        (f"{family}1", family, bucket, offset, 100 + (bucket == "M = 1") * (pattern[offset] + shift))
        for family, shift in (("a", 0.0), ("b", 5.0))
        for bucket in ("M = 1", "M = 0")
        for offset in range(12)
    ]
    table = pd.DataFrame(rows, columns=["model", "family", "bucket", "offset", "mean"])
    judged = {i.claim: i for i in judge_all({"rates": models({"a": [0.1]}), "frequency": table}, {}, None)}
    assert judged["frequency_shared"].estimate.value == pytest.approx(1.0)
    assert judged["frequency_shared"].verdict == "holds"
    one = judge_all({"rates": models({"a": [0.1]}), "frequency": table[table["family"] == "a"]}, {}, None)
    assert {i.claim: i.verdict for i in one}["frequency_shared"] == "not tested"


def test_generations_of_olmo_are_compared_with_other_families() -> None:
    names = ["o1", "o2", "p", "q"]
    frame = pd.DataFrame({"model": names, "family": ["olmo1", "olmo2", "pythia", "gpt-neo"]})
    values = np.array([[1, 0.9, 0.2, 0.3], [0.9, 1, 0.1, 0.4], [0.2, 0.1, 1, 0.8], [0.3, 0.4, 0.8, 1]])
    pairs = pd.DataFrame(values, columns=names).assign(model=names)
    row = signature_table(frame, pairs).iloc[-1]
    assert row["order"] == "as noted"
    others = np.mean([0.2, 0.1, 0.3, 0.4, 0.8])
    assert f"pairs of generations 0.9, other pairs across families {others:.3g}" in row["here"]
    without = signature_table(frame[frame["family"] != "olmo2"], pairs).iloc[-1]
    assert without["order"] == "family is not here"


def test_smaller_beats_larger_compares_across_families_only() -> None:
    pairs = smaller_beats_larger(models({"a": [0.1, 0.2], "b": [0.15, 0.05]}, n=1000))
    assert set(zip(pairs["smaller"], pairs["larger"], strict=True)) == {("a0", "b1"), ("b0", "a1")}
    row = pairs.set_index("smaller").loc["a0"]
    z = (0.1 - 0.05) / np.sqrt(0.075 * 0.925 * 2 / 1000)
    assert row["p"] == pytest.approx(stats.norm.sf(z))
    assert (pairs["p_corrected"] >= pairs["p"] - 1e-12).all()


def test_signature_table_compares_orders_only() -> None:
    frame = pd.DataFrame(
        {"model": ["x", "y", "z"], "family": ["starcoder", "olmo1", "pythia"], "rate": [0.3, 0.1, 0.2]}
    )
    found = signature_table(frame).set_index(["family", "noted"])["order"].to_dict()
    assert found["starcoder", "has the highest rate"] == "as noted"
    assert found["olmo1", "has the lowest rate"] == "as noted"
    assert set(signature_table(frame.assign(rate=[0.1, 0.3, 0.2]))["order"]) == {"otherwise"}
    assert set(signature_table(frame[frame["family"] == "pythia"])["order"]) == {"family is not here"}
