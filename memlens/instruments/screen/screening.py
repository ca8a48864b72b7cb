"""Screen by gradients, verify exactly where an estimate is large, and say what was missed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.forward.metrics import MetricLike, metric_names
from memlens.instruments.screen.instruments import INSTRUMENTS, Screen, screen_of
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation, share_interval, standard_interval
from memlens.results.statistics.intervals import bootstrap_means, mean_interval
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import sweep

if TYPE_CHECKING:
    import plotly.graph_objects as go


RANK_BY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "magnitude": np.abs,
    "decrease": np.negative,
    "increase": np.positive,
}
"""What sites are ranked by: the size of the metric's mean change, or how far it falls or rises."""
Site = tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class Screening:
    """What a screen chose, what the exact sweep then gave, and how well they agree.

    Attributes:
        table: One row a verified site: its labels, `chosen` ("screened" or "random"), `estimate` and `exact`
            (mean change of the metric over sequences, each with `_low` and `_high`), `rank_estimate` (among
            all sites, 1 is the first) and `n` (sequences that have the site); greatest exact effect first.
        agreement: `value`, `low`, `high` and `n_sites` of Spearman's rank correlation of estimated and exact
            effects (on the screened sites, on the random ones and, where all were verified, on all), of the
            recall of the exact top k, and of the share of the rest above the screened median. See
            `screen_then_verify`.
        estimate: The gradients' result, with every site.
        exact: The sweep's result; sites that were not verified are NaN or absent.
        metric: What was estimated and compared.
        n_sites: How many sites there are.
        top_k: How many the screen chose.
    """

    table: pd.DataFrame
    agreement: pd.DataFrame
    estimate: Result
    exact: Result
    metric: str
    n_sites: int
    top_k: int

    def plot(self, **options: Any) -> go.Figure:
        """Return the figure: each verified site's exact effect against its estimate."""
        from memlens.results.plots.heads import plot_screening

        return plot_screening(self.table, self.agreement, self.metric, self.estimate.data.attrs, **options)

    def __repr__(self) -> str:
        recall = self.agreement.loc["recall of exact top k"]
        return (
            f"<Screening of {self.n_sites} sites by {self.metric}: {len(self.table)} verified, "
            f"recall of the exact top {self.top_k} {recall['value']:.2f} "
            f"[{recall['low']:.2f}, {recall['high']:.2f}]>"
        )


def screen_then_verify(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet | None = None,
    *,
    instrument: str = "patching",
    top_k: int = 20,
    n_random: int = 20,
    verify: str = "screened",
    rank_by: str = "magnitude",
    site: str | None = None,
    over: str | None = None,
    direction: str = "denoising",
    mode: str = "zero",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | str | None = None,
    reference: SequenceSet | None = None,
    method: str = "integrated_gradients",
    path: str = "site",
    steps: int = 8,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Screening:
    r"""Estimate every site's effect by gradients, run the exact sweep on the largest, report the agreement.

    All sites are ranked by their estimated mean effect over the sequences. The exact sweep runs on the first
    `top_k` of them, and on `n_random` drawn evenly from the rest, which show what the screen missed.

    Every agreement comes with an interval:

    - *rank correlation*: Spearman's, of mean estimated and mean exact effects over sites. On the screened
      sites alone it is lower than on all of them, since these differ less. The interval is the value plus and
      minus the standard error of a bootstrap over sequences, times the normal quantile;
    - *recall of the exact top k*: the share of the `top_k` truly largest sites that the screen chose. The
      random sites stand for the rest: each counts as many as it was drawn from. The interval is the same,
      widened (unless every site was verified) to Clopper and Pearson's for the share of the rest that belongs
      to the top: with few random sites it is wide, as it should be;
    - *share of the rest above the screened median*: how many of the random sites are at least as large as the
      typical screened one, with Clopper and Pearson's interval.

    All of them take the screened set as given. Gradients at a run that recalls are small (see
    `attribute_ablation`): hence integrated gradients are the default; "attribution_patching" needs one pass.

    Instruments, and what they are compared with (the registry `memlens.instruments.INSTRUMENTS` has those
    of other packages too):

    - "patching": `attribute_gradients` against `patch_activations`, with `site`, `over`, `direction`;
    - "head_ablation": `attribute_ablation` against `ablate_heads`, with `mode`, `reference`;
    - "neuron_ablation": the same for single neurons of all MLPs;
    - "neuron_patching": single neurons moved between the runs, with `direction`.

    Args:
        model: A TransformerLens model.
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix; for the two patching instruments only.
        instrument: One of the above.
        top_k: Sites the screen chooses.
        n_random: Further sites to verify, drawn from the rest.
        verify: "screened", or "all" to verify every site (then the agreement is exact).
        rank_by: "magnitude" of the mean effect, or "decrease" or "increase" of the metric.
        site: For "patching", "resid_pre" by default.
        over: For "patching", as for `patch_activations`.
        direction: For patching, as for `patch_activations`.
        mode: For ablation, as for `ablate_heads`.
        layers: All by default.
        positions: For "patching" token positions; for ablation one of `ablate_heads`' names.
        reference: For ablation, as for `ablate_heads`.
        method: As for `attribute_gradients`.
        path: As for `attribute_gradients`.
        steps: As for `attribute_gradients`.
        metrics: As for `sweep`; the first one is estimated and compared, and must have a gradient.
        level: Coverage of all intervals.
        n_resamples: Resamples of the bootstrap.
        seed: For the random sites, the bootstrap, and "resample".
        batch_size: Sequences at a time, in both halves.
        progress: Show bars.
        options: Further options of `sweep`.

    Raises:
        OptionError: An unknown option, or a first metric without a gradient.
        SequenceError: The two sets do not fit, or one is missing or too many.
        SiteError: A layer, a position or a site that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> found = ml.screen_then_verify(
        ...     model, ml.load_sequences("zoo", model)[:4], instrument="head_ablation", top_k=6, n_random=4,
        ...     progress=False,
        ... )
        >>> len(found.table), found.n_sites
        (10, 48)
    """  # fmt: skip
    check_option("verify", verify, ("screened", "all"))
    check_option("rank_by", rank_by, list(RANK_BY))
    for name, number, least in (("top_k", top_k, 1), ("n_random", n_random, 0)):
        if not isinstance(number, int) or number < least:
            raise OptionError(f"{name}={number!r} is not a number of sites: give {least} or more.")
    if not 0 < level < 1:
        raise OptionError(f"level={level!r} is not a coverage: give a number between 0 and 1, such as 0.95.")
    metric = metric_names(metrics)[0]
    tool = screen_of(
        instrument, model, clean, corrupt, site=site, over=over, direction=direction, mode=mode,
        layers=layers, positions=positions, reference=reference, path=path, seed=seed,
    )  # fmt: skip
    estimate = tool.estimate(
        metric=metrics[0], method=method, steps=steps, batch_size=batch_size, progress=progress
    )
    effects = estimate.effect(metric)
    dims = [str(d) for d in effects.dims[1:]]
    stacked = effects.transpose("sequence", *dims).stack(site=dims)
    stacked = stacked.isel(site=np.flatnonzero(np.isfinite(stacked.values).any(0)))
    score = RANK_BY[rank_by]
    ranked = np.argsort(-score(np.nanmean(stacked.values, axis=0)), kind="stable")
    chosen, top_k = _chosen(ranked, top_k, n_random if verify == "screened" else len(ranked), seed)
    sites: list[Site] = [tuple(stacked["site"].values[i]) for i in chosen]
    exact = _verify(
        INSTRUMENTS[instrument].kind, tool, model, dims, sites, metrics, batch_size, progress, options
    )
    data = Verified(
        stacked.values[:, chosen], _at(exact.effect(metric), dims, sites).values,
        np.arange(len(chosen)) < top_k, len(ranked), score,
    )  # fmt: skip
    return Screening(
        _table(data, dims, sites, np.argsort(ranked)[chosen] + 1, level, n_resamples, seed),
        agreement_table(data, level=level, n_resamples=n_resamples, seed=seed), estimate, exact, metric,
        len(ranked), top_k,
    )  # fmt: skip


def _chosen(ranked: np.ndarray, top_k: int, n_random: int, seed: int) -> tuple[np.ndarray, int]:
    """The first `top_k` of a ranking and some of the rest, and how many the first are."""
    if not len(ranked):
        raise EmptySetError("there is no site to screen: give at least one layer and position.")
    first, rest = ranked[:top_k], ranked[top_k:]
    some = np.random.default_rng(seed).permutation(rest)[:n_random]
    return np.concatenate([first, some]), len(first)


def _verify(
    kind: str,
    tool: Screen,
    model: Any,
    dims: Sequence[str],
    sites: Sequence[Site],
    metrics: Sequence[MetricLike],
    batch_size: int | None,
    progress: bool,
    options: dict[str, Any],
) -> Result:
    cells = [dict(zip(dims, (int(str(v)) for v in site), strict=True)) for site in sites]
    result = sweep(
        model, tool.base, tool.interventions(cells), metrics, kind=kind, settings=tool.settings,
        batch_size=batch_size, progress=progress, **options,
    )  # fmt: skip
    return tool.finish(result, metrics)


def _at(effects: xr.DataArray, dims: Sequence[str], sites: Sequence[Site]) -> xr.DataArray:
    """The effects at some sites, `[sequence, site]`."""
    labels = {d: xr.DataArray([s[i] for s in sites], dims="site") for i, d in enumerate(dims)}
    return effects.sel(labels).transpose("sequence", "site")


def _table(
    data: Verified,
    dims: Sequence[str],
    sites: Sequence[Site],
    ranks: np.ndarray,
    level: float,
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    table = pd.DataFrame(list(sites), columns=list(dims))
    table["chosen"] = np.where(data.screened, "screened", "random")
    for name in ("estimate", "exact"):
        array = xr.DataArray(getattr(data, name), dims=("sequence", "site"))
        found = mean_interval(array, level=level, n_resamples=n_resamples, seed=seed, method="bootstrap")
        for part, tail in (("mean", ""), ("low", "_low"), ("high", "_high")):
            table[name + tail] = found.sel(statistic=part).values
        table["n"] = found["n"].values
    table["rank_estimate"] = ranks
    order = np.argsort(-data.score(table["exact"].to_numpy()), kind="stable")
    return table.iloc[order].reset_index(drop=True)


@dataclass(frozen=True)
class Verified:
    """Sites with both an estimate and an exact effect, one value per sequence.

    Attributes:
        estimate: Estimated effects; NaN where a sequence lacks the site.
        exact: Exact effects.
        screened: True for the sites the screen chose, False for random ones of the rest.
        n_sites: How many sites there are, verified or not.
        score: From effects to what sites are ranked by, greatest first.
    """

    estimate: Float[np.ndarray, "sequence site"]
    exact: Float[np.ndarray, "sequence site"]
    screened: Bool[np.ndarray, " site"]
    n_sites: int
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def n_rest(self) -> int:
        """How many sites the screen left out."""
        return self.n_sites - int(self.screened.sum())


def recall_of_top(
    score: Float[np.ndarray, "*resample site"], screened: Bool[np.ndarray, " site"], n_rest: int
) -> tuple[Float[np.ndarray, "*resample"], Int[np.ndarray, "*resample"]]:
    r"""Return the share of the exact top :math:`k` that a screen of :math:`k` sites caught.

    Each of the :math:`r` random sites stands for ``n_rest / r`` sites of the rest. Sites are counted from the
    greatest exact score down until they amount to :math:`k`; the share of the screened ones is the recall.
    With every site verified that is exact.

    Returns:
        The recall (NaN where nothing of a rest was verified), and how many random sites are in the top.

    >>> score, screened = np.array([9.0, 1.0, 5.0, 0.0]), np.array([True, True, False, False])
    >>> recall_of_top(score, screened, 2)[0].item()
    0.5
    """
    k, sampled = int(screened.sum()), int((~screened).sum())
    if n_rest and not sampled:
        return np.full(score.shape[:-1], np.nan), np.zeros(score.shape[:-1], int)
    weight = np.where(screened, 1.0, n_rest / max(1, sampled))
    order = np.argsort(-np.where(np.isfinite(score), score, -np.inf), axis=-1, kind="stable")
    weight, own = weight[order], screened[order]
    room = np.clip(k - (np.cumsum(weight, -1) - weight), 0, weight)
    return (room * own).sum(-1) / k, ((room > 1e-9) & ~own).sum(-1)


def agreement_table(data: Verified, *, level: float, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return each statistic with its interval; see `memlens.screen_then_verify`."""
    means = [np.nanmean(x, axis=0) for x in (data.estimate, data.exact)]
    samples = [bootstrap_means(x, n_resamples, seed) for x in (data.estimate, data.exact)]
    if len(data.estimate) < 2:
        samples = [np.full_like(x, np.nan) for x in samples]  # one sequence tells nothing of the spread
    k, rest, drawn = int(data.screened.sum()), data.n_rest, int((~data.screened).sum())
    rows: dict[str, tuple[float, float, float, int]] = {}
    groups = {"screened": data.screened, "random": ~data.screened}
    if rest == drawn:
        groups["all sites"] = np.ones(len(data.screened), bool)
    for name, part in groups.items():
        if part.any():
            value = float(rank_correlation(means[0][part], means[1][part]))
            spread = rank_correlation(samples[0][:, part], samples[1][:, part])
            rows[f"rank correlation, {name}"] = (
                value,
                *standard_interval(value, spread, level, -1.0),
                int(part.sum()),
            )
    value, missed = recall_of_top(data.score(means[1]), data.screened, rest)
    spread, _ = recall_of_top(data.score(samples[1]), data.screened, rest)
    low, high = standard_interval(float(value), spread, level, 0.0)
    if 0 < drawn < rest:
        least, most = share_interval(int(missed), drawn, level)
        low = np.fmin(low, max(0.0, 1 - most * rest / k))
        high = np.fmax(high, max(0.0, 1 - least * rest / k))
    rows["recall of exact top k"] = float(value), float(low), float(high), len(data.screened)
    if drawn:
        typical = np.nanmedian(data.score(means[1])[data.screened])
        above = int((data.score(means[1])[~data.screened] >= typical).sum())
        share = above / drawn
        low, high = share_interval(above, drawn, level) if drawn < rest else (share, share)
        rows["share of the rest above the screened median"] = share, low, high, drawn
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n_sites"])
