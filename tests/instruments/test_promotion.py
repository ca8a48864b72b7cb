"""Promotion of groups on hand-made curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import memlens as ml
from memlens.errors import OptionError, ResultError


def decoding(rank: list, probability: list | None = None, **coords: list) -> ml.Result:
    """A residual decoding of given ranks `[seq, layer, target]` of the predicted token."""
    ranks = np.array(rank, dtype=float)
    probs = np.full(ranks.shape, 0.5) if probability is None else np.array(probability, dtype=float)
    dims = ("sequence", "layer", "target")
    names = {"predicted_rank": ranks, "predicted_probability": probs, "rank": ranks + 1, "probability": probs}
    data = xr.Dataset({name: (dims, values) for name, values in names.items()})
    data = data.assign_coords(
        layer=range(ranks.shape[1]), sequence=[f"s{i}" for i in range(len(ranks))]
    ).assign_coords({name: ("sequence", values) for name, values in coords.items()})
    return ml.Result.create(data, kind="residual_decoding")


def values(table: pd.DataFrame, group: str = "all") -> pd.Series:
    plain = table[(table["group"] == group) & table["layer"].isna()]
    return plain.set_index("quantity")["value"]


def curve(*ranks: float) -> list[list[float]]:
    return [[rank] for rank in ranks]


def test_every_number_by_hand() -> None:
    rank = [curve(50, 3, 0, 0, 0), curve(20, 0, 4, 0, 0), curve(10, 11, 12, 9, 0)]
    prob = [curve(0, 0.1, 0.2, 0.4, 0.8), curve(0, 0.3, 0.1, 0.3, 0.6), curve(0, 0, 0, 0.1, 0.5)]
    table = ml.lens.promotion_summary(decoding(rank, prob))
    found = values(table)
    assert found["boundary"] == 3  # at layer 2 one of three is on top, at layer 3 two
    assert found["boundary_depth"] == 0.75
    assert found["promoted"] == 1
    assert found["first_promotion"] == pytest.approx((2 + 1 + 4) / 3)
    assert found["near_promotion"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["stable_promotion"] == pytest.approx((2 + 3 + 4) / 3)
    assert found["stable_depth"] == pytest.approx((2 + 3 + 4) / 12)
    assert found["boost"] == pytest.approx((0.6 + 0.3 + 0) / 3)
    assert found["promotion_share"] == pytest.approx((0.25 + 0.5 + 1) / 3)
    by_layer = table[table["quantity"] == "geometric_mean_rank"].set_index("layer")["value"]
    assert by_layer.index.tolist() == [0, 1, 2, 3, 4]
    assert by_layer[0] == pytest.approx((51 * 21 * 11) ** (1 / 3))
    assert by_layer[4] == 1
    assert (table["n"] == 3).all()
    assert values(ml.lens.promotion_summary(decoding(rank, prob), near=3))["near_promotion"] == pytest.approx(
        (1 + 1 + 4) / 3
    )


def test_the_median_of_an_even_number_needs_more_than_half() -> None:
    """The median of (0, 0, 2, 2) is 1, and that of (0, 0, 0, 2) is 0."""
    rank = [curve(0, 0, 0), curve(0, 0, 0), curve(2, 0, 0), curve(2, 2, 0)]
    assert values(ml.lens.promotion_summary(decoding(rank)))["boundary"] == 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranks = rng.integers(0, 3, (int(rng.integers(2, 9)), 6, 2)).astype(float)
        on_top = [i for i in range(6) if np.median(ranks[:, i]) == 0]
        found = values(ml.lens.promotion_summary(decoding(ranks.tolist()), n_resamples=10))["boundary"]
        assert found == on_top[0] if on_top else np.isnan(found)


def test_the_interval_of_the_boundary_is_over_sequences() -> None:
    """Twenty sequences, half of them early: a resample is early or late by chance: the interval has both."""
    early, late = [[0.0] * 4] * 5, [[3.0] * 4] * 4 + [[0.0] * 4]
    mixed = ml.lens.promotion_summary(decoding([early] * 10 + [late] * 10)).set_index("quantity")
    assert mixed.loc["boundary", ["low", "value", "high"]].tolist() == [0, 4, 4]
    sure = ml.lens.promotion_summary(decoding([early] * 19 + [late])).set_index("quantity")
    assert sure.loc["boundary", ["low", "value", "high"]].tolist() == [0, 0, 0]
    again = ml.lens.promotion_summary(decoding([early] * 10 + [late] * 10)).set_index("quantity")
    assert mixed.equals(again)


def test_what_is_never_reached_is_nan() -> None:
    found = ml.lens.promotion_summary(decoding([curve(0, 5), curve(7, 5)])).set_index("quantity")
    assert found.loc[["boundary", "stable_promotion", "boost"], "value"].isna().all()
    assert found.loc["promoted", "value"] == 0
    assert found.loc["first_promotion", "value"] == 0
    one = ml.lens.promotion_summary(decoding([curve(3, 0)])).set_index("quantity").loc["boundary"]
    assert one["value"] == 1
    assert np.isnan(one["low"])


def test_groups_tokens_and_ragged_targets() -> None:
    rank = [[[4, 0], [0, 0]], [[4, np.nan], [4, np.nan]], [[0, 0], [0, 0]]]
    result = decoding(rank, domain=["a", "a", "b"])
    table = ml.lens.promotion_summary(result, group="domain")
    assert table.groupby("group", sort=False)["n"].first().to_dict() == {"a": 2, "b": 1}
    a = values(table, "a")
    assert a["boundary"] == 1  # two of the three targets that exist
    assert a["promoted"] == 0.5  # the mean of sequences, not of targets
    assert values(table, "b")["boundary"] == 0
    assert np.isnan(values(ml.lens.promotion_summary(result, token="target"))["boundary"])
    with pytest.raises(ResultError, match="no 'copies'"):
        ml.lens.promotion_summary(result, group="copies")
    with pytest.raises(OptionError, match="token='last'"):
        ml.lens.promotion_summary(result, token="last")
    other = ml.Result.create(result.data, kind="recall")
    with pytest.raises(ResultError, match="recall result has no promotion"):
        ml.lens.promotion_summary(other)


def test_the_summary_of_a_decoding_is_that_of_its_own_variables() -> None:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.load_sequences("zoo", model)[:6]
    for streams in (("resid_post",), ("resid_post", "mlp_out")):
        decoded = ml.decode_residual(model, seqs, streams=streams, progress=False)
        found = values(ml.lens.promotion_summary(decoded, n_resamples=10))
        for name in ("first_promotion", "near_promotion", "stable_promotion", "boost", "promotion_share"):
            assert found[name] == pytest.approx(float(decoded[name].mean("target").mean()), rel=1e-5)


def test_near_promotion_counts_rank_ten() -> None:
    rank = torch.tensor([[11.0, 10.0, 11.0, 0.0]]).T
    out = ml.lens.promotion_layers(rank, torch.ones(4, 1))
    assert out["near_promotion"].item() == 1
    assert ml.lens.promotion_layers(rank, torch.ones(4, 1), near=9)["near_promotion"].item() == 3
