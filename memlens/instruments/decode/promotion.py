"""Promotion and boosting: the layers at which a prediction reaches the top, per token and per group.

An early promotion does not distinguish recall from a confident guess: compare with controls that are matched
on the final probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.errors import ResultError, check_option
from memlens.results.result import Result
from memlens.results.statistics.intervals import FEWEST, mean_interval, rows_by_group
from memlens.results.statistics.resampling import resampled_sums

NEAR_RANK = 10
"""Largest zero-based rank that counts as near the top."""

_COLUMNS = ["group", "quantity", "layer", "value", "low", "high", "n"]
_MEANS = ("first_promotion", "near_promotion", "stable_promotion", "boost", "promotion_share")


def promotion_layers(
    rank: Float[Tensor, "*batch layer target"],
    probability: Float[Tensor, "*batch layer target"],
    near: int = NEAR_RANK,
) -> dict[str, Float[Tensor, "*batch target"]]:
    """Return where a token is promoted to the top, and by how much its probability is boosted after that.

    Args:
        rank: Zero-based rank of the token at each layer; NaN if there is no target.
        probability: Its probability at each layer.
        near: Largest rank that counts as near the top.

    Returns:
        `first_promotion`, the first layer of rank 0; `near_promotion`, the first layer of rank `near` or
        less; `stable_promotion`, the first layer from which the rank stays 0; `boost`, the final probability
        minus that at `stable_promotion`; `promotion_share`, the ratio of the latter to the former. NaN if
        there is no such layer.

    >>> rank = torch.tensor([5.0, 0.0, 2.0, 0.0, 0.0])[:, None]
    >>> out = promotion_layers(rank, torch.tensor([0.0, 0.2, 0.1, 0.4, 0.8])[:, None])
    >>> out["first_promotion"].item(), out["stable_promotion"].item(), round(out["boost"].item(), 2)
    (1.0, 3.0, 0.4)
    """
    top: Bool[Tensor, "*batch layer target"] = rank == 0
    stays = top.flip(-2).int().cumprod(-2).flip(-2).bool()
    stable = _first(stays)
    at = probability.gather(-2, stable.nan_to_num(0).long()[..., None, :])[..., 0, :]
    last = probability[..., -1, :]
    missing = stable.isnan()
    return {
        "first_promotion": _first(top),
        "near_promotion": _first(rank <= near),
        "stable_promotion": stable,
        "boost": (last - at).masked_fill(missing, torch.nan),
        "promotion_share": (at / last).masked_fill(missing, torch.nan),
    }


def promotion_summary(
    result: Result,
    *,
    group: str | None = None,
    token: str = "predicted",
    near: int = NEAR_RANK,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Summarize the two phases of a residual decoding over sequences, with intervals.

    Args:
        result: Result of `decode_residual`; of several streams, the first is used.
        group: A coordinate along `sequence`, such as `domain`; each group is summarized separately.
        token: "predicted" (the token that the model finally predicts) or "target".
        near: Largest rank that counts as near the top.
        level: Coverage of the intervals.
        n_resamples: Resamples of the bootstrap over sequences; a sequence's targets stay together.
        seed: Seed of the bootstrap.

    Returns:
        Columns `group`, `quantity`, `layer`, `value`, `low`, `high`, `n` (sequences):

        - `boundary`, the first layer at which the median rank over all targets is 0, and `boundary_depth`,
          the same divided by the number of layers minus 1. NaN if there is no such layer (for an end of the
          interval: if the bootstrap quantile has none);
        - `promoted`, the share of targets whose token stays at rank 0 from some layer on (always 1 for the
          predicted token, except for ties);
        - the means of `first_promotion`, `near_promotion`, `stable_promotion`, `boost` and `promotion_share`
          (see `promotion_layers`) over the targets that have them, and `stable_depth`, which is
          `stable_promotion` divided by the number of layers minus 1;
        - `geometric_mean_rank` at each `layer`: :math:`\exp(\mathrm{mean}\,\ln(1 + \mathrm{rank}))`, which is
          1 if all tokens are at the top. In a large vocabulary, the mean rank is dominated by few outliers.

    Raises:
        ResultError: The result is not a residual decoding, or does not have the group.
        OptionError: Another token.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> decoded = ml.decode_residual(model, ml.load_sequences("zoo", model)[:4], progress=False)
        >>> table = ml.lens.promotion_summary(decoded).set_index("quantity")
        >>> float(table.loc["promoted", "value"])
        1.0
    """
    if result.kind != "residual_decoding":
        raise ResultError(f"a {result.kind} result has no promotion: give that of decode_residual.")
    check_option("token", token, ("predicted", "target"))
    prefix = "predicted_" if token == "predicted" else ""
    rank, probability = (_first_stream(result[f"{prefix}{name}"]) for name in ("rank", "probability"))
    options = {"level": level, "n_resamples": n_resamples, "seed": seed}
    layers = rank["layer"].values
    groups = rows_by_group(result[group]) if group else {"all": np.arange(len(rank))}
    parts = [
        {"group": str(label), "n": len(rows), **row}
        for label, rows in groups.items()
        for row in _summary(rank.values[rows], probability.values[rows], layers, near, options)
    ]
    return pd.DataFrame(parts, columns=_COLUMNS)


def _first_stream(array: xr.DataArray) -> xr.DataArray:
    array = array.isel(stream=0) if "stream" in array.dims else array
    return array.transpose("sequence", "layer", "target")


def _summary(
    rank: Float[np.ndarray, "seq layer target"],
    probability: Float[np.ndarray, "seq layer target"],
    layers: np.ndarray,
    near: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    deepest = max(1, len(layers) - 1)
    boundary = _boundary(rank, **options)
    yield _row("boundary", boundary)
    yield _row("boundary_depth", boundary / deepest)
    phases = promotion_layers(torch.from_numpy(rank), torch.from_numpy(probability), near)
    stable = phases["stable_promotion"].numpy()
    there = np.isfinite(rank[:, -1])
    yield _row("promoted", _mean(np.where(there, np.isfinite(stable), np.nan), **options))
    for name in _MEANS:
        yield _row(name, _mean(phases[name].numpy(), **options))
    yield _row("stable_depth", _mean(stable / deepest, **options))
    for i, layer in enumerate(layers):
        yield _row("geometric_mean_rank", np.exp(_mean(np.log1p(rank[:, i]), **options)), int(layer))


def _row(quantity: str, interval: np.ndarray, layer: int | None = None) -> dict[str, Any]:
    value, low, high = (float(x) for x in interval)
    where = np.nan if layer is None else layer
    return {"quantity": quantity, "layer": where, "value": value, "low": low, "high": high}


def _mean(
    values: Float[np.ndarray, "seq target"], *, level: float, n_resamples: int, seed: int
) -> Float[np.ndarray, "3"]:
    """Mean, low and high over sequences of the means within each."""
    if not np.isfinite(values).any():
        return np.full(3, np.nan)
    array = xr.DataArray(values.astype(float), dims=("sequence", "target")).mean("target")
    found = mean_interval(array, level=level, method="bootstrap", n_resamples=n_resamples, seed=seed)
    return found.values


def _boundary(
    rank: Float[np.ndarray, "seq layer target"], *, level: float, n_resamples: int, seed: int
) -> Float[np.ndarray, "3"]:
    """First layer of median rank 0, with its percentile interval over sequences.

    The median of ranks is 0 exactly if more than half of them are 0, so counts are enough.
    """
    on_top, there = (rank == 0).sum(-1), np.isfinite(rank).sum(-1)  # [seq, layer]
    n = len(rank)
    value = _first_majority(on_top.sum(0, keepdims=True), there.sum(0, keepdims=True))[0]
    tails = [(1 - level) / 2, (1 + level) / 2]
    resampled = _first_majority(*resampled_sums([on_top, there], n_resamples, seed))
    low, high = np.quantile(resampled, tails, method="inverted_cdf") if n >= FEWEST else (np.inf, np.inf)
    found = np.array([value, low, high], dtype=float)
    return np.where(np.isfinite(found), found, np.nan)


def _first_majority(on_top: np.ndarray, there: np.ndarray) -> Float[np.ndarray, " draw"]:
    """First layer at which more than half of the targets are at the top; infinity if none."""
    reached = 2 * on_top > there
    return np.where(reached.any(1), reached.argmax(1), np.inf)


def _first(flags: Bool[Tensor, "*batch layer target"]) -> Float[Tensor, "*batch target"]:
    index: Int[Tensor, "*batch target"] = flags.int().argmax(-2)
    return torch.where(flags.any(-2), index.float(), torch.nan)
