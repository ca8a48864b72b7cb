"""Overlap of important heads and profiles over depth: against the paper's random overlap and by hand."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.spatial.distance import cosine

from memlens.errors import OptionError, ResultError
from memlens.studies.comparative.analyze.heads import (
    NULLS,
    HeadEffects,
    expected_jaccard,
    head_overlap,
    head_table,
    jaccard,
    mean_pairwise,
    rank_agreement,
    set_size,
    top_set,
    universal_share,
)
from memlens.studies.comparative.analyze.profiles import (
    cluster,
    family_test,
    layer_profile,
    on_grid,
    similarity_matrix,
)
from memlens.studies.comparative.options import ComparativeOptions


def effects(importance: np.ndarray, domains: list[str], **options: Any) -> HeadEffects:
    array = xr.DataArray(importance, dims=("sequence", "layer", "head"))
    return HeadEffects(array, np.array(domains), ComparativeOptions(**options))


# ---- the random overlap ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "reported", "simulated"), [(42 * 32, 0.1114, 0.1113), (16 * 16, 0.1139, 0.1140)]
)
def test_random_overlap_is_the_one_reported_for_the_paper(
    heads: int, reported: float, simulated: float
) -> None:
    """A reader notes 11.14 % for StarCoder-7B and 11.39 % for OLMo2-1B: top 20 %, rounded up, Jaccard."""
    k = set_size(heads, 0.2)
    exact = expected_jaccard(heads, k)
    assert exact == pytest.approx(reported, abs=5e-5)
    assert exact == pytest.approx(simulated, abs=2e-4)
    both = np.random.default_rng(0).hypergeometric(k, heads - k, k, size=40_000)
    assert (both / (2 * k - both)).mean() == pytest.approx(exact, abs=3e-4)
    rounded_down = expected_jaccard(heads, int(0.2 * heads))
    assert abs(rounded_down - reported) > 2e-4


def test_expected_jaccard_is_the_mean_over_all_pairs_of_subsets() -> None:
    n, k = 7, 3
    values = [
        len(set(a) & set(b)) / len(set(a) | set(b))
        for a in combinations(range(n), k)
        for b in combinations(range(n), k)
    ]
    assert expected_jaccard(n, k) == pytest.approx(np.mean(values), abs=1e-12)
    assert expected_jaccard(5, 5) == pytest.approx(1.0)
    with pytest.raises(OptionError, match="subsets of 6"):
        expected_jaccard(5, 6)


def test_top_set_has_the_largest_and_the_size_asked_for() -> None:
    values = np.random.default_rng(0).normal(size=(4, 30))
    chosen = top_set(values, 0.2)
    assert (chosen.sum(1) == 6).all()
    for row, mask in zip(values, chosen, strict=True):
        assert row[mask].min() > row[~mask].max()
    with pytest.raises(OptionError, match="top_fraction=1"):
        set_size(10, 1.0)


# ---- overlap with nulls ----------------------------------------------------------------------------------


def planted(specific: bool, n: int = 30, seed: int = 0) -> HeadEffects:
    """Three domains whose important heads are the same (or each domain's own), with noise."""
    rng = np.random.default_rng(seed)
    importance = rng.normal(0, 0.5, (3 * n, 5, 8))
    for d in range(3):
        layer = d if specific else 2
        importance[d * n : (d + 1) * n, layer, :] += 2.0
    return effects(importance, [name for name in "abc" for _ in range(n)])


def test_overlap_tells_shared_from_domain_specific_heads() -> None:
    shared, own = (
        head_overlap(
            planted(specific), ComparativeOptions(n_permutations=199, n_splits=20, n_resamples=100)
        ).set_index(["statistic", "null"])
        for specific in (False, True)
    )
    across = ("across domains", "heads anywhere")
    assert shared.loc[across, "value"] == 1.0
    assert shared.loc[across, "p_above"] == pytest.approx(1 / 200)
    assert own.loc[across, "value"] == 0.0
    assert shared.loc[("universal", "heads anywhere"), "value"] == pytest.approx(8 / 40)
    assert own.loc[("universal", "heads anywhere"), "value"] == 0.0
    # Inside a domain both are stable; only the domains' own heads make inside and across differ.
    gap = ("inside minus across", "domain labels shuffled")
    assert shared.loc[gap, "value"] == pytest.approx(0.0, abs=0.02)
    assert own.loc[gap, "value"] > 0.9
    assert own.loc[gap, "p_above"] <= 0.02
    labels = ("across domains", "domain labels shuffled")
    assert own.loc[labels, "p_below"] <= 0.05
    assert shared.loc[labels, "p_below"] > 0.05
    # Whole layers are important, so shuffling heads inside their layers changes nothing.
    layers = ("across domains", "heads inside their layers")
    assert shared.loc[layers, "null_mean"] == pytest.approx(1.0)
    assert shared.loc[layers, "p_above"] == 1.0


def test_overlap_statistics_equal_those_computed_by_hand() -> None:
    some = planted(True, n=9, seed=3)
    table = head_overlap(some, ComparativeOptions(n_permutations=199, n_splits=4, n_resamples=50))
    means = {d: some.table[rows].mean(0) for d, rows in zip(some.domains, some.rows, strict=True)}
    sets = {d: set(np.argsort(-m)[:8]) for d, m in means.items()}
    pairs = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in combinations(some.domains, 2)]
    by = table.set_index(["statistic", "null"])
    assert by.loc[("across domains", "heads anywhere"), "value"] == pytest.approx(np.mean(pairs))
    in_all = set.intersection(*sets.values())
    assert by.loc[("universal", "heads anywhere"), "value"] == pytest.approx(len(in_all) / 40)
    assert by.loc[("universal", "heads anywhere"), "exact"] == pytest.approx(0.2**3)
    assert set(table["null"]) == set(NULLS)
    exact = by.loc[("across domains", "heads anywhere")]
    assert exact["exact"] == pytest.approx(expected_jaccard(40, 8))
    assert exact["null_mean"] == pytest.approx(exact["exact"], abs=0.02)
    assert ((table["p_above"] > 0) & (table["p_above"] <= 1)).all()
    assert some.universal() == sorted((int(h) // 8, int(h) % 8) for h in in_all)


def test_random_effects_overlap_as_chance_says() -> None:
    rng = np.random.default_rng(1)
    some = effects(rng.normal(size=(200, 6, 8)), ["a", "b"] * 100)
    row = head_overlap(some, ComparativeOptions(n_permutations=199, n_splits=5, n_resamples=50)).iloc[0]
    assert row["null_low"] - 0.1 <= row["value"] <= row["null_high"] + 0.1
    assert row["p_above"] > 0.01


def test_small_domains_are_left_out_and_one_domain_has_no_overlap() -> None:
    some = effects(np.ones((5, 2, 2)), ["a", "a", "a", "a", "b"])
    assert some.domains == ["a"]
    assert head_overlap(some).empty
    none = effects(np.ones((2, 2, 2)), ["a", "b"])
    assert none.sets().shape == (0, 4)
    assert none.pairs().empty
    assert len(head_table(none)) == 4
    with pytest.raises(ResultError, match="no sequences"):
        effects(np.ones((0, 2, 2)), [])


def test_halves_are_disjoint_and_stay_inside_their_domain() -> None:
    importance = np.zeros((8, 1, 8))
    importance[np.arange(8), 0, np.arange(8)] = 1.0  # sequence i speaks for head i alone
    some = effects(importance, ["a"] * 4 + ["b"] * 4, top_fraction=0.25, min_per_domain=2)
    first, second = some.halves(20, np.random.default_rng(0))
    assert not (first & second).any()
    assert not first[:, 0, 4:].any()
    assert not first[:, 1, :4].any()
    assert (first.sum(-1) == 2).all()


def test_head_table_ranks_by_the_mean_over_sequences() -> None:
    some = planted(True)
    table = head_table(some)
    assert table["importance"].is_monotonic_decreasing
    first = table.iloc[0]
    place = int(first["layer"]) * 8 + int(first["head"])
    assert first["importance"] == pytest.approx(some.table[:, place].mean())
    assert table["sets"].sum() == 3 * 8
    assert table.loc[table["sets"] == 3].shape[0] == len(some.universal())


def test_rank_agreement_sees_order_and_nothing_else() -> None:
    a = xr.DataArray(np.random.default_rng(0).normal(size=(5, 2, 4)), dims=("sequence", "layer", "head"))
    assert rank_agreement(a, 3 * a + 1) == pytest.approx(1.0)
    assert rank_agreement(a, -a) == pytest.approx(-1.0)
    assert np.isnan(rank_agreement(a, 0 * a))


def test_jaccard_and_universal_share_of_stacks() -> None:
    sets = np.random.default_rng(0).random((6, 4, 20)) < 0.3
    assert mean_pairwise(sets)[2] == pytest.approx(
        np.mean([jaccard(sets[2, i], sets[2, j]) for i, j in combinations(range(4), 2)])
    )
    assert universal_share(sets)[1] == sets[1].all(0).mean()


# ---- profiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sum", "count", "mean"])
def test_profiles_sum_to_one_and_follow_the_layer_that_matters(kind: str) -> None:
    importance = np.random.default_rng(0).random((6, 4)) * 0.1
    importance[3] += 1.0
    profile = layer_profile(importance, kind=kind)
    assert profile.sum() == pytest.approx(1.0)
    assert profile.argmax() == 3
    assert layer_profile(-importance, kind="sum").tolist() == [1 / 6] * 6
    assert on_grid(profile, 100).sum() == pytest.approx(1.0)
    with pytest.raises(OptionError):
        layer_profile(importance, kind="median")


def test_a_model_of_doubled_layers_has_the_same_profile() -> None:
    small = np.array([0.1, 0.6, 0.3])
    large = np.repeat(small, 2) / 2
    grids = np.stack([on_grid(small, 60), on_grid(large, 60)])
    assert similarity_matrix(grids)[0, 1] > 0.98
    assert on_grid(small, 3) == pytest.approx(small)


def test_similarity_is_scipy_s_cosine_and_numpy_s_correlation() -> None:
    profiles = np.random.default_rng(0).random((4, 12))
    found = similarity_matrix(profiles)
    assert found[1, 3] == pytest.approx(1 - cosine(profiles[1], profiles[3]))
    assert similarity_matrix(profiles, "pearson") == pytest.approx(np.corrcoef(profiles))


def families(separate: float, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Three families of three models: a profile of the family, with noise."""
    rng = np.random.default_rng(seed)
    base = rng.random((3, 20))
    profiles = np.repeat(base, 3, axis=0) * separate + rng.random((9, 20)) * (1 - separate)
    names = [f"m{i}" for i in range(9)]
    return similarity_matrix(profiles), names, [f for f in "xyz" for _ in range(3)]


def test_families_are_told_from_profiles_only_where_they_differ() -> None:
    clear = family_test(*families(0.9), ComparativeOptions(n_permutations=499))
    rows = clear.table.set_index("statistic")
    assert rows.loc["accuracy", "value"] == 1.0
    assert rows.loc["difference", "p"] < 0.02
    assert (clear.predicted["family"] == clear.predicted["predicted"]).all()
    # Shuffled labels: the chance level of three families of three stays under a half.
    assert rows.loc["accuracy", "null_mean"] < 0.5
    none = family_test(*families(0.0), ComparativeOptions(n_permutations=499)).table.set_index("statistic")
    assert none.loc["difference", "p"] > 0.05


def test_family_numbers_by_hand() -> None:
    similarity = np.array([[1, 0.9, 0.2, 0.6], [0.9, 1, 0.1, 0.3], [0.2, 0.1, 1, 0.5], [0.6, 0.3, 0.5, 1]])
    found = family_test(similarity, list("abcd"), ["x", "x", "y", "y"], ComparativeOptions(n_permutations=9))
    rows = found.table.set_index("statistic")
    assert rows.loc["within", "value"] == pytest.approx((0.9 + 0.5) / 2)
    assert rows.loc["across", "value"] == pytest.approx((0.2 + 0.6 + 0.1 + 0.3) / 4)
    assert rows.loc["within", "n"] == 2
    assert found.predicted["predicted"].tolist() == ["x", "x", "y", "y"]
    alone = family_test(
        similarity[:3, :3], list("abc"), ["x", "x", "y"], ComparativeOptions(n_permutations=9)
    )
    assert alone.predicted["model"].tolist() == ["a", "b"]
    with pytest.raises(ResultError, match="2 models"):
        family_test(similarity[:2, :2], list("ab"), ["x", "y"])


def test_clustering_joins_the_most_alike_first() -> None:
    similarity, names, _ = families(0.95)
    merges, order = cluster(similarity)
    first = {names[int(i)] for i in merges[0, :2]}
    upper = np.triu(similarity, 1)
    assert first == {names[i] for i in np.unravel_index(upper.argmax(), upper.shape)}
    assert sorted(order) == list(range(9))
    # Families stand together in the order of the leaves.
    assert len(pd.unique(pd.Series(["xyz"[i // 3] for i in order]))) == 3
    groups = ["xyz"[i // 3] for i in order]
    assert sum(a != b for a, b in pairwise(groups)) == 2
