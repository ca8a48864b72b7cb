"""Screening by gradients, with exact verification where estimates are large, and what the screen missed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.forward.exclusive import computes
from memlens.forward.metrics import MetricLike, metric_names
from memlens.forward.trunk import Trunk
from memlens.instruments.screen.instruments import INSTRUMENTS, Screen, screen_of
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation, share_interval, standard_interval
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import FEWEST, check_level, mean_interval
from memlens.results.statistics.racing import RANK_BY
from memlens.results.statistics.resampling import bootstrap_means
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import in_dtype
from memlens.sweeps.run import sweep

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LOG = logging.getLogger(__name__)

Site = tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class Screening:
    """The choice of a screen, the results of the exact sweep, and their agreement.

    Attributes:
        table: One row per verified site: its labels, `chosen` ("screened" or "random"), `estimate` and
            `exact` (mean change of the metric over sequences, each with `_low` and `_high`), `rank_estimate`
            (among all sites, starting with 1) and `n` (sequences that have the site); largest exact effect
            first.
        agreement: `value`, `low`, `high` and `n_sites` of each statistic of `screen_then_verify`. Rank
            correlations are given on the screened sites, on the random ones, and on all if all were verified.
        estimate: The result of the gradients, or that of the sweep in bfloat16, with every site.
        exact: The result of the sweep; sites that were not verified are NaN or absent.
        metric: The metric that was estimated and compared.
        n_sites: Number of sites.
        top_k: Number of sites that the screen chose.
    """

    table: pd.DataFrame
    agreement: pd.DataFrame
    estimate: Result
    exact: Result
    metric: str
    n_sites: int
    top_k: int

    def plot(self, **options: Any) -> go.Figure:
        """Return a figure of the exact effects of the verified sites against their estimates."""
        from memlens.results.plots.heads import plot_screening

        return plot_screening(self.table, self.agreement, self.metric, self.estimate.data.attrs, **options)

    def __repr__(self) -> str:
        recall = Estimate.from_row(self.agreement.loc["recall of exact top k"].to_dict(), n=None)
        return (
            f"<Screening of {self.n_sites} sites by {self.metric}: {len(self.table)} verified, "
            f"recall of the exact top {self.top_k} {recall}>"
        )


@computes
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
    direction: str | None = None,
    mode: str = "zero",
    donor: Any = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | str | None = None,
    reference: SequenceSet | None = None,
    method: str = "integrated_gradients",
    path: str = "site",
    steps: int = 8,
    precision: str = "float32",
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Screening:
    r"""Estimate the effect of every site by gradients, and run the exact sweep where effects are large.

    All sites are ranked by their estimated mean effect over the sequences. The exact sweep runs on the first
    `top_k` sites, and on `n_random` sites drawn uniformly from the rest, which show what the screen missed.

    The agreement of estimates and exact effects is reported with intervals:

    - *rank correlation*: Spearman's, of mean estimated and mean exact effects over sites. It is lower on the
      screened sites alone than on all of them, since these differ less. The interval is the value ± the
      standard error of a bootstrap over sequences, times the normal quantile;
    - *recall of the exact top k*: the share of the `top_k` truly largest sites that the screen chose. Each
      random site represents an equal part of the rest. The interval is computed in the same way and, unless
      every site was verified, widened to the interval of Clopper and Pearson for the share of the rest that
      belongs to the top; it is wide if there are few random sites;
    - *share of the rest above the screened median*: the share of the random sites with at least the median
      effect of the screened ones, with the interval of Clopper and Pearson.

    With ``precision="bfloat16"`` the screen is no estimate by gradients: every site is run exactly, with
    weights and activations rounded to bfloat16, and the sites that are chosen are run again as the model is.
    It suits any metric, and models whose matrix products are faster in bfloat16; where they are not, a
    warning says so. The agreement is reported in the same way.

    The screened set counts as given. Integrated gradients are the default because the gradient at a recalled
    continuation is small (see `attribute_ablation`); "attribution_patching" needs one pass only.

    The instruments are listed below; the registry `memlens.instruments.INSTRUMENTS` also has those of other
    packages:

    - "patching": `attribute_gradients` against `patch_activations`, with `site`, `over`, `direction`;
    - "head_ablation": `attribute_ablation` against `ablate_heads`, with `mode`, `reference`;
    - "mlp_ablation": `attribute_ablation` against `ablate_mlps`, with the same options;
    - "neuron_ablation": the same for single neurons of all MLPs;
    - "neuron_patching": patching of single neurons, with `direction`.

    Args:
        model: A TransformerLens model.
        clean: The recalled sequences.
        corrupt: The same targets after another prefix; for the two patching instruments only.
        instrument: One of the above.
        top_k: Number of sites that the screen chooses.
        n_random: Number of further sites to verify, drawn from the rest.
        verify: "screened", or "all" to verify every site, which makes the agreement exact.
        rank_by: "magnitude" of the mean effect, or "decrease" or "increase" of the metric.
        site: For "patching", "resid_pre" by default.
        over: For "patching", as for `patch_activations`.
        direction: For patching, as for `patch_activations`.
        mode: For ablation, as for `ablate_heads`.
        donor: Another model of the same shape: for patching, instead of `corrupt` or beside it; for ablation,
            with mode "donor".
        layers: All by default.
        positions: For "patching", token positions; for ablation, as for `ablate_heads`.
        reference: For ablation, as for `ablate_heads`.
        method: As for `attribute_gradients`.
        path: As for `attribute_gradients`.
        steps: As for `attribute_gradients`.
        precision: "float32", or "bfloat16" for an exact screen in that precision, without `method`, `path`
            and `steps`. The weights are then in memory twice.
        metrics: As for `sweep`; the first one is estimated and compared, and must have a gradient (with
            bfloat16 it need not).
        level: Coverage of all intervals.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the random sites, the bootstrap, and "resample".
        batch_size: Sequences at a time, for gradients and sweep.
        progress: Show progress bars.
        options: Further options of `sweep`.

    Raises:
        OptionError: An unknown option, or a first metric without a gradient; or bfloat16 for weights that
            have 16 bits already, or for an instrument of another package that does not list its sites.
        SequenceError: The two sets do not fit, or `corrupt` is missing or not used.
        DonorError: The donor does not fit the model.
        SiteError: A layer, a position or a site that does not exist.
        EmptySetError: There is no site to screen.

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
    check_option("precision", precision, ("float32", "bfloat16"))
    for name, number, least in (("top_k", top_k, 1), ("n_random", n_random, 0)):
        if not isinstance(number, int) or number < least:
            raise OptionError(f"{name}={number!r} is not a number of sites: give {least} or more.")
    check_level(level)
    metric = metric_names(metrics)[0]
    tool = screen_of(
        instrument, model, clean, corrupt, site=site, over=over, direction=direction, mode=mode,
        layers=layers, positions=positions, reference=reference, path=path, seed=seed,
        donor=donor,
    )  # fmt: skip
    if precision == "bfloat16":
        if (method, path, steps) != ("integrated_gradients", "site", 8):
            raise OptionError(
                'method, path and steps belong to gradients, which precision="bfloat16" does without: leave '
                "them out."
            )
        limits = {name: options[name] for name in ("engine", "memory_budget") if name in options}
        estimate = _in_bfloat16(
            instrument, tool, model, donor, metrics[0], batch_size=batch_size, progress=progress, **limits
        )
    else:
        estimate = tool.estimate(
            metric=metrics[0], method=method, steps=steps, batch_size=batch_size, progress=progress
        )
    effects = estimate.effect(metric)
    dims = [str(d) for d in effects.dims[1:]]
    stacked = effects.transpose("sequence", *dims).stack(site=dims)
    stacked = stacked.isel(site=np.flatnonzero(np.isfinite(stacked.values).any(0)))
    score = RANK_BY[rank_by]
    ranked = np.argsort(-score(np.nanmean(stacked.values, axis=0)), kind="stable")
    if not len(ranked):
        raise EmptySetError("there is no site to screen: give at least one layer and position.")
    top_k = min(top_k, len(ranked))
    rest = np.random.default_rng(seed).permutation(ranked[top_k:])
    chosen = np.concatenate([ranked[:top_k], rest[:n_random] if verify == "screened" else rest])
    sites: list[Site] = [tuple(stacked["site"].values[i]) for i in chosen]
    cells = [dict(zip(dims, (int(str(v)) for v in site), strict=True)) for site in sites]
    swept = sweep(
        model, tool.base, tool.interventions(cells), metrics, kind=INSTRUMENTS[instrument].kind,
        settings=tool.settings, batch_size=batch_size, progress=progress, **options,
    )  # fmt: skip
    exact = tool.finish(swept, metrics)
    data = Verified(
        stacked.values[:, chosen], _at(exact.effect(metric), dims, sites).values,
        np.arange(len(chosen)) < top_k, len(ranked), score,
    )  # fmt: skip
    bootstrap = {"level": level, "n_resamples": n_resamples, "seed": seed}
    table = _table(data, dims, sites, np.argsort(ranked)[chosen] + 1, **bootstrap)
    agreement = agreement_table(data, **bootstrap)
    return Screening(table, agreement, estimate, exact, metric, len(ranked), top_k)


def _in_bfloat16(
    instrument: str, tool: Screen, model: Any, donor: Any, metric: MetricLike, **options: Any
) -> Result:
    """Return the exact result of every site in bfloat16."""
    trunk = Trunk(model)
    if trunk.dtype.itemsize <= torch.bfloat16.itemsize:
        raise OptionError(
            f'precision="bfloat16" saves nothing: the weights are {trunk.dtype} already. Run the instrument '
            "itself, or screen by gradients."
        )
    if tool.cells is None:
        raise OptionError(
            f'instrument={instrument!r} does not list its sites, which precision="bfloat16" needs: screen by '
            "gradients, or give its Screen cells=."
        )
    share = bfloat16_time(model)
    if share > 1:
        _LOG.warning(
            "matrix products of this model's shape take %.1f times as long in bfloat16 as in %s on this "
            "device: the screen will not be faster than the exact sweep", share, trunk.dtype,
        )  # fmt: skip
    with ExitStack() as stack:
        for each in (model, *(() if donor is None else (donor,))):
            stack.enter_context(in_dtype(each, torch.bfloat16, narrow=True))
        swept = sweep(
            model, tool.base, tool.interventions(tool.cells()), [metric], kind=INSTRUMENTS[instrument].kind,
            settings={**tool.settings, "precision": "bfloat16"}, check_dtype=False, **options,
        )  # fmt: skip
        return tool.finish(swept, [metric])


def bfloat16_time(model: Any, *, rows: int = 256, repeats: int = 5) -> float:
    """Return the time of a matrix product in bfloat16 over that in the model's own precision, measured.

    The product is that of an MLP's input, for some positions: above 1 the device has no fast instructions for
    bfloat16, or the model is too small for them. The least of some repeats counts, by turns.

    Args:
        model: A TransformerLens model.
        rows: Number of positions.
        repeats: Number of products of each kind.
    """
    weight, cfg = next(model.parameters()), model.cfg
    shapes = (rows, cfg.d_model), (cfg.d_model, getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
    pairs = [
        [torch.ones(shape, device=weight.device, dtype=dtype) for shape in shapes]
        for dtype in (torch.bfloat16, weight.dtype)
    ]
    least = [math.inf, math.inf]
    for _ in range(1 + repeats):
        for i, (a, b) in enumerate(pairs):
            start = time.perf_counter()
            (a @ b).sum().item()  # waits for the device
            least[i] = min(least[i], time.perf_counter() - start)
    return least[0] / least[1]


def _at(effects: xr.DataArray, dims: Sequence[str], sites: Sequence[Site]) -> xr.DataArray:
    """The effects at some sites, `[sequence, site]`."""
    labels = {d: xr.DataArray([s[i] for s in sites], dims="site") for i, d in enumerate(dims)}
    return effects.sel(labels).transpose("sequence", "site")


def _table(
    data: Verified,
    dims: Sequence[str],
    sites: Sequence[Site],
    ranks: np.ndarray,
    **bootstrap: Any,
) -> pd.DataFrame:
    table = pd.DataFrame(list(sites), columns=list(dims))
    table["chosen"] = np.where(data.screened, "screened", "random")
    for name in ("estimate", "exact"):
        array = xr.DataArray(getattr(data, name), dims=("sequence", "site"))
        found = mean_interval(array, method="bootstrap", **bootstrap)
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
        estimate: Estimated effects; NaN if a sequence lacks the site.
        exact: Exact effects.
        screened: True for the sites that the screen chose, False for random ones of the rest.
        n_sites: Number of sites, verified or not.
        score: Maps effects to the score by which sites are ranked, largest first.
    """

    estimate: Float[np.ndarray, "sequence site"]
    exact: Float[np.ndarray, "sequence site"]
    screened: Bool[np.ndarray, " site"]
    n_sites: int
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def n_rest(self) -> int:
        """Number of sites that the screen left out."""
        return self.n_sites - int(self.screened.sum())


def recall_of_top(
    score: Float[np.ndarray, "*resample site"], screened: Bool[np.ndarray, " site"], n_rest: int
) -> tuple[Float[np.ndarray, "*resample"], Int[np.ndarray, "*resample"]]:
    r"""Return the share of the exact top :math:`k` that a screen of :math:`k` sites found.

    Each of the :math:`r` random sites represents ``n_rest / r`` sites of the rest. Sites are counted from the
    largest exact score down until their number reaches :math:`k`; the share of screened sites among them is
    the recall. It is exact if every site was verified.

    Returns:
        The recall (NaN if no site of the rest was verified), and the number of random sites in the top.

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
    """Return the statistics of `screen_then_verify` with their intervals."""
    means = [np.nanmean(x, axis=0) for x in (data.estimate, data.exact)]
    samples = [bootstrap_means(x, n_resamples, seed) for x in (data.estimate, data.exact)]
    n = len(data.estimate)
    k, rest, drawn = int(data.screened.sum()), data.n_rest, int((~data.screened).sum())
    rows: dict[str, tuple[float, float, float, int]] = {}
    groups = {"screened": data.screened, "random": ~data.screened}
    if rest == drawn:
        groups["all sites"] = np.ones(len(data.screened), bool)
    for name, part in groups.items():
        if part.any():
            value = float(rank_correlation(means[0][part], means[1][part]))
            spread = rank_correlation(samples[0][:, part], samples[1][:, part])
            low, high = standard_interval(value, spread, level, -1.0, n)
            rows[f"rank correlation, {name}"] = value, low, high, int(part.sum())
    value, missed = recall_of_top(data.score(means[1]), data.screened, rest)
    spread, _ = recall_of_top(data.score(samples[1]), data.screened, rest)
    low, high = standard_interval(float(value), spread, level, 0.0, n)
    if n >= FEWEST and 0 < drawn < rest:
        least, most = share_interval(int(missed), drawn, level)
        low = np.fmin(low, max(0.0, 1 - most * rest / k))
        high = np.fmax(high, max(0.0, 1 - least * rest / k))
    rows["recall of exact top k"] = float(value), float(low), float(high), len(data.screened)
    if drawn:
        typical = np.nanmedian(data.score(means[1])[data.screened])
        above = int((data.score(means[1])[~data.screened] >= typical).sum())
        share = above / drawn
        low, high = share_interval(above, drawn, level) if drawn < rest else (share, share)
        low, high = (low, high) if drawn >= FEWEST or drawn == rest else (np.nan, np.nan)
        rows["share of the rest above the screened median"] = share, low, high, drawn
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n_sites"])
