"""Tables over all models, from what is saved of each: one declarative list, `TABLES`.

A table is either made model by model from one saved part, with the columns `model` and `family` in front, or
from the tables before it. Titles and notes are in `texts.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.errors import ResultError
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, median_estimate, share_estimate
from memlens.results.statistics.intervals import bootstrap_means
from memlens.studies.comparative.analyze.domains import domain_table, structural_gap, structural_share
from memlens.studies.comparative.analyze.frequency import (
    boundary_gap,
    boundary_table,
    bucket_labels,
    frequency_by_offset,
    frequency_threshold,
    mean_log_frequencies,
)
from memlens.studies.comparative.analyze.heads import HeadEffects, head_overlap, head_table, rank_agreement
from memlens.studies.comparative.analyze.layers import (
    burst,
    crossing,
    depth_curve,
    group_values,
    noise_table,
    over_draws,
    recovery_gap,
    recovery_table,
    structural_change,
)
from memlens.studies.comparative.analyze.profiles import (
    FamilyTest,
    family_test,
    layer_profile,
    on_grid,
    similarity_matrix,
)
from memlens.studies.comparative.analyze.rates import (
    copies_table,
    depth_of,
    depth_table,
    rate_row,
    score_of,
    score_spread,
    size_fits,
    smaller_beats_larger,
    training_events,
    training_table,
)
from memlens.studies.comparative.findings import claim_table, judge_all, signature_table
from memlens.studies.comparative.measure import CONTROL, MEMORIZED
from memlens.studies.comparative.options import IMPORTANCES, ComparativeOptions
from memlens.studies.comparative.store import SavedModel

Rows = pd.DataFrame | list[dict[str, Any]] | dict[str, Any]

_EMPTY = pd.DataFrame(columns=["model", "family"])
_PROFILE_DRAWS = 200


def _chances(options: ComparativeOptions) -> dict[str, Any]:
    return {"n_resamples": options.n_resamples, "seed": options.seed}


# ---- what is recalled ------------------------------------------------------------------------------------


def _rates(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Rate of a model, its mean M, and the mean length of the correct leading run (`depth`)."""
    table = model.recall.table
    depth = mean_estimate(_array(depth_of(table).astype(float)))
    facts = {"n_params": int(model.facts["n_params"]), "control": model.control, **rate_row(table)}
    return {**facts, "mean_m": score_of(table).mean(), **depth.row("depth", prefix="depth_", n=None)}


def _scores(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Shares of sequences with M = 0, between and 1, and at either end with Wilson's interval."""
    m = score_of(model.recall.table)
    parts = {"at_0": (m == 0).mean(), "between": ((m > 0) & (m < 1)).mean(), "at_1": (m == 1).mean()}
    return {**parts, **share_estimate((m == 0) | (m == 1)).row("at_ends")}


def _compression(model: SavedModel, options: ComparativeOptions) -> Rows:
    """How far prompts of memorized sequences can be cut.

    `ratio` is the mean of the fewest prompt tokens that work over all prompt tokens, `stable_ratio` the same
    for the fewest from which on every length works, and `up_to_half` the share of sequences that need half of
    the prompt or less.
    """
    result = model.result("compression")
    ratio = result["compression_ratio"].values
    ratio = ratio[np.isfinite(ratio)]
    stable = result.data.get("stable_compression_ratio")
    return {
        **mean_estimate(_array(ratio), seed=options.seed).row("ratio"),
        "median": median_estimate(ratio, seed=options.seed).value,
        "stable_ratio": np.nan if stable is None else float(stable.mean()),
        **share_estimate(ratio <= 0.5).row("up_to_half", prefix="half_", n=None),
    }


def _structural(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Mean rate of structural domains minus that of the others, and the structural share of the memorized."""
    table = model.recall.table
    hits, labels = table["exact_match"].to_numpy(float), table["domain"].to_numpy(str)
    gap, share = (
        measure(hits, labels, options.structural, **_chances(options))
        for measure in (structural_gap, structural_share)
    )
    more = share.row("structural_share", prefix="share_", n=None)
    return {**gap.row("gap"), **more, "n": len(hits), "n_params": int(model.facts["n_params"])}


def _buckets(model: SavedModel, options: ComparativeOptions) -> tuple[Result, np.ndarray]:
    m = score_of(model.recall.table)
    return model.result("frequency"), bucket_labels(m, half_width=options.half_width)


def _boundary(model: SavedModel, options: ComparativeOptions) -> Rows:
    result, buckets = _buckets(model, options)
    found = boundary_table(result, buckets, seed=options.seed)
    return found.assign(counted_in=result.settings["counted_in"])


def _thresholds(model: SavedModel, options: ComparativeOptions) -> Rows:
    frequency, table = mean_log_frequencies(model.result("frequency")), model.recall.table
    labels = table["domain"].to_numpy()
    return frequency_threshold(frequency, score_of(table), labels, below=options.unmemorized_below)


def _hits(model: SavedModel) -> tuple[np.ndarray, np.ndarray]:
    data = model.result("training").data["exact_match"].transpose("sequence", "step")
    return data.values == 1, data["step"].values


def _training_events(model: SavedModel, options: ComparativeOptions) -> Rows:
    """When sequences are first memorized and whether they are forgotten, by number of copies where known.

    Columns `copies` ("all", or the number), `n`, `ever`, `median_first` (step, of those that ever are),
    `ever_forgotten` (share of those, with Wilson's interval), `relearned` (share of the forgotten), `kept`
    (share of those ever memorized that are at the last step).
    """
    events, data = training_events(*_hits(model)), model.result("training").data
    groups: list[tuple[object, Any]] = [("all", events)]
    if "copies" in data.coords:
        values = data["copies"].values
        groups += [(str(value), events.loc[values == value]) for value in np.unique(values)]
    rows = []
    for name, part in groups:
        ever = part.loc[part["first"].notna()]
        again = ever[ever["forgotten"] > 0]
        rows.append(
            {
                "copies": name, "n": len(part), "ever": len(ever), "median_first": ever["first"].median(),
                **share_estimate(ever["forgotten"] > 0).row("ever_forgotten", n=None),
                "relearned": share_estimate(again["relearned"] > 0).value,
                "kept": share_estimate(ever["last"]).value,
            }
        )  # fmt: skip
    return rows


def _array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims="sequence")


# ---- noise and layers ------------------------------------------------------------------------------------


def _recovery_gaps(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Similarity that memorized sequences recover minus that of their matched controls."""
    result, groups = model.result("recovery"), model.groups
    matched = groups.loc[groups["group"] == CONTROL, "matched_to"].to_numpy()
    if len(matched) < 2:
        return []
    gap = partial(recovery_gap, result, ours=MEMORIZED, theirs=CONTROL, matched=matched, seed=options.seed)
    return [{"alpha": a, **gap(alpha=a).row("gap", n="pairs")} for a in result["alpha"].values.tolist()]


def _groups(result: Result) -> list[str]:
    return list(dict.fromkeys(result["group"].values.astype(str).tolist()))


def _similarity(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Similarity to the clean residual after each layer, at the strongest noise."""
    result = model.result("recovery")
    data = over_draws(result["similarity"]).sel(alpha=max(options.alphas)).transpose("sequence", "layer")
    labels, layers = result["group"].values.astype(str), data["layer"].values
    depth = (layers + 1) / int(model.facts["n_layers"])
    return pd.concat(
        [
            depth_curve(data.values[labels == group], **_chances(options)).assign(
                group=group, layer=layers, depth=depth
            )
            for group in _groups(result)
        ],
        ignore_index=True,
    )


def _decoding(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Decoding probability after each layer, of the "true" token and of the one "predicted" at the end."""
    result, frames = model.result("decoding"), []
    for group in _groups(result):
        for token, metric in (("true", "probability"), ("predicted", "predicted_probability")):
            curve = depth_curve(group_values(result, metric, group), **_chances(options))
            frames.append(curve.assign(group=group, token=token))
    return pd.concat(frames, ignore_index=True)


def _bursts(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Where the decoding probability of the true token bursts, and where its mean passes 1/2.

    `burst`: relative depth of the layer with the largest rise; `crossing`: relative depth after which the
    mean is above 1/2; `before_last`: mean probability after the next-to-last layer; `late_share`: share of
    the whole rise that comes in the later half of the layers.
    """
    result, rows = model.result("decoding"), []
    for group in _groups(result):
        values = group_values(result, "probability", group)
        curve = depth_curve(values, **_chances(options))
        means, last = curve["mean"].to_numpy(), curve.iloc[max(len(curve) - 2, 0)]
        rise = means[-1] - means[0]
        rows.append(
            {
                "group": group,
                **burst(values, **_chances(options)).row("burst"),
                **crossing(values, **_chances(options)).row("crossing", prefix="crossing_", n=None),
                **Estimate.from_row(last, "mean").row("before_last", prefix="before_", n=None),
                "late_share": (means[-1] - means[(len(means) - 1) // 2]) / rise if rise > 0 else np.nan,
            }
        )
    return rows


# ---- heads -----------------------------------------------------------------------------------------------


def importance(result: Result, metric: str) -> xr.DataArray:
    """Return what each sequence loses when each head is ablated: positive where the head helped."""
    return -result.effect(metric)


def effects_of(model: SavedModel, options: ComparativeOptions) -> HeadEffects:
    """Return a model's saved head ablation as `HeadEffects`."""
    result = model.result("heads")
    effects, labels = importance(result, options.importance), result["domain"].values
    return HeadEffects(effects, labels, fraction=options.top_fraction, least=options.min_per_domain)


def _head_overlap(model: SavedModel, options: ComparativeOptions) -> Rows:
    effects = effects_of(model, options)
    found = head_overlap(
        effects, n_permutations=options.n_permutations, n_splits=options.n_splits, **_chances(options)
    )
    return found.assign(heads=effects.n_heads, k=effects.k, domains=len(effects.domains))


def _importance_agreement(model: SavedModel, options: ComparativeOptions) -> Rows:
    """How far importance by the chosen metric ranks heads as importance by the other metrics does."""
    result = model.result("heads")
    first = importance(result, options.importance)
    same = {"importance": options.importance, "n": result.data.sizes["sequence"]}
    return [
        {"other": other, "spearman": rank_agreement(first, importance(result, other)), **same}
        for other in IMPORTANCES
        if other != options.importance
    ]


def _universal_heads(model: SavedModel, options: ComparativeOptions) -> Rows:
    """The heads that are important in every domain, and how many are expected by chance.

    The expectation is all heads times (k / heads) to the power of the number of domains.
    """
    effects = effects_of(model, options)
    n, k, domains = effects.n_heads, effects.k, len(effects.domains)
    if domains < 2:
        return []
    found = effects.universal()
    which = ", ".join(f"L{layer}H{head}" for layer, head in found)
    numbers = {"heads": n, "k": k, "domains": domains, "universal": len(found)}
    return {**numbers, "by_chance": n * (k / n) ** domains, "which": which}


# ---- profiles --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Profiles:
    """The depth profiles of several models.

    Attributes:
        models: The models.
        by_layer: Each model's own layers: `model`, `family`, `layer`, `depth`, `mean`, `low`, `high`.
        similarity: Of all pairs.
        drawn: The same under bootstrap resamples of every model's sequences.
    """

    models: list[SavedModel]
    by_layer: pd.DataFrame
    similarity: Float[np.ndarray, "model model"]
    drawn: Float[np.ndarray, "draw model model"]

    @property
    def labels(self) -> list[str]:
        """Names of the models."""
        return [model.label for model in self.models]

    @property
    def families(self) -> list[str]:
        """Families of the models."""
        return [model.family for model in self.models]

    def within_minus_across(self) -> Estimate | None:
        """Return the mean similarity of pairs within families minus that of pairs across.

        The interval is the basic bootstrap's over sequences, because resampled profiles are less similar than
        the sample's. None without pairs of both kinds.
        """
        upper = np.triu_indices(len(self.models), 1)
        codes = pd.factorize(np.array(self.families, dtype=object))[0]
        same = codes[upper[0]] == codes[upper[1]]
        if not same.any() or same.all():
            return None
        pairs = self.drawn[:, upper[0], upper[1]]
        value = float(self.similarity[upper][same].mean() - self.similarity[upper][~same].mean())
        low, high = np.percentile(pairs[:, same].mean(1) - pairs[:, ~same].mean(1), [2.5, 97.5]).tolist()
        return Estimate(value, 2 * value - high, 2 * value - low, len(self.models))


def profiles_of(models: Sequence[SavedModel], options: ComparativeOptions, part: str = "heads") -> Profiles:
    """Return how important heads are spread over depth in every model, and how similar the models are.

    Args:
        models: The models; those without saved heads are left out.
        options: Of the study.
        part: "heads", or "heads_untrained" for the twins of random weights.
    """
    chosen = [model for model in models if model.has("heads") and (model.path / f"{part}.nc").exists()]
    kinds: dict[str, Any] = {"kind": options.profile, "fraction": options.top_fraction}
    frames, grids = [], []
    for i, model in enumerate(chosen):
        losses = importance(model.result(part), options.importance).transpose("sequence", "layer", "head")
        values = losses.values
        means = bootstrap_means(values.reshape(len(values), -1), _PROFILE_DRAWS, options.seed + i)
        profile = layer_profile(values.mean(0), **kinds)
        samples = layer_profile(means.reshape(-1, *values.shape[1:]), **kinds)
        low, high = np.percentile(samples, [2.5, 97.5], axis=0)
        layers = np.arange(len(profile))
        columns = {"layer": layers, "depth": (layers + 0.5) / len(layers), "mean": profile}
        frame = pd.DataFrame({"model": model.label, "family": model.family, **columns})
        frames.append(frame.assign(low=low, high=high))
        grids.append(np.stack([on_grid(row, options.profile_bins) for row in (profile, *samples)]))
    if not chosen:
        return Profiles([], _EMPTY, np.zeros((0, 0)), np.zeros((0, 0, 0)))
    every = [similarity_matrix(np.stack(rows), options.similarity) for rows in zip(*grids, strict=True)]
    return Profiles(chosen, pd.concat(frames, ignore_index=True), every[0], np.array(every[1:]))


# ---- the study -------------------------------------------------------------------------------------------


class Made:
    """The saved models of a study, and what was made of them so far.

    Args:
        models: The models, in the order of the report.
        options: Of the study.

    Attributes:
        tables: What was made so far, by name, with all models.
    """

    models: list[SavedModel]
    options: ComparativeOptions
    why_no_test: str

    def __init__(self, models: Sequence[SavedModel], options: ComparativeOptions) -> None:
        self.models, self.options = list(models), options
        self.tables: dict[str, pd.DataFrame] = {}
        self.why_no_test = ""

    @property
    def members(self) -> list[SavedModel]:
        """The models that represent their families: all but controls."""
        return [model for model in self.models if not model.control]

    @property
    def strongest(self) -> float:
        """The largest strength of the noise."""
        return max(self.options.alphas)

    def table(self, name: str) -> pd.DataFrame:
        """Return a table; one that was not made is empty."""
        return self.tables.get(name, _EMPTY)

    def series(self, name: str) -> pd.DataFrame:
        """Return a table without the rows of control models."""
        table, members = self.table(name), [model.label for model in self.members]
        return table.loc[table["model"].isin(members)] if "model" in table else table

    @property
    def extremes(self) -> str:
        """The reading of the rates: which model recalls most, and which least."""
        rows = self.series("rates").to_dict("records")
        most, least = (choose(rows, key=lambda row: row["rate"]) for choose in (max, min))
        return (
            f"{most['model']} recalls most ({Estimate.from_row(most, 'rate')}), "
            f"{least['model']} least ({Estimate.from_row(least, 'rate')})."
        )

    @cached_property
    def profiles(self) -> Profiles:
        """The profiles of the models."""
        return profiles_of(self.members, self.options)

    @cached_property
    def tests(self) -> dict[str, FamilyTest]:
        """Whether profiles give the family away: of "families", and of "untrained" twins."""
        found = {}
        for name in ("families", "untrained"):
            twins = name == "untrained"
            own = profiles_of(self.members, self.options, "heads_untrained") if twins else self.profiles
            chances = {"n_permutations": self.options.n_permutations, "seed": self.options.seed}
            try:
                found[name] = family_test(own.similarity, own.labels, own.families, **chances)
            except ResultError as error:
                self.why_no_test = self.why_no_test or str(error)
        return found


def _compression_by_family(made: Made) -> pd.DataFrame:
    table = made.table("compression")
    if not len(table):
        return table
    columns = {"models": ("model", "size"), "ratio": ("ratio", "mean"), "up_to_half": ("up_to_half", "mean")}
    return table.groupby("family").agg(**columns).reset_index()


def _structural_fits(made: Made) -> pd.DataFrame:
    table = made.series("structural")
    if not np.isfinite(made.table("structural")["gap"].to_numpy(float)).any():
        return _EMPTY
    return size_fits(
        table.loc[table["structural_share"].notna()], column="structural_share", **_chances(made.options)
    )


def _profile_similarity(made: Made) -> pd.DataFrame:
    labels = made.profiles.labels
    if len(labels) < 2:
        return _EMPTY
    pairs = pd.DataFrame(made.profiles.similarity, columns=labels)
    return pairs.assign(model=labels).loc[:, ["model", *labels]]


def _family_test(name: str, made: Made) -> pd.DataFrame:
    return made.tests[name].table if name in made.tests else _EMPTY


def _summary(made: Made) -> pd.DataFrame:
    """One row per model, with the main columns of each part."""
    table = made.table("rates").drop(columns=["depth_low", "depth_high"])
    facts = [
        {
            "model": model.label, "corpus": model.facts["corpus"], "layers": model.facts["n_layers"],
            "heads": model.facts["n_layers"] * model.facts["n_heads"],
        }
        for model in made.models
    ]  # fmt: skip
    table = table.merge(pd.DataFrame(facts), on="model")
    for name, columns in _SUMMARY.items():
        if len(found := made.table(name)):
            table = table.merge(columns(found), on="model", how="left")
    families: Any = dict(zip(table["model"], table["family"], strict=True))
    if len(similar := made.table("profile_similarity")):
        pairs = similar.melt("model", var_name="other").query("model != other")
        same = pairs["model"].map(families) == pairs["other"].map(families)
        means: Any = pairs.assign(value=pairs["value"].where(same)).groupby("model")["value"].mean()
        table = table.merge(means.rename("family_similarity").reset_index(), on="model", how="left")
    return table


def _noise_left(noise: Any) -> pd.DataFrame:
    """The rate under the strongest noise over the rate without noise."""
    rates = noise.pivot(index="model", columns="alpha", values="rate")
    left = rates[rates.columns.max()] / rates[0.0].where(rates[0.0] > 0)
    return left.rename("noise_left").reset_index()


def _overlaps(overlap: Any) -> pd.DataFrame:
    rows = overlap[overlap["null"] == "heads anywhere"]
    wide = rows.pivot(index="model", columns="statistic", values="value")
    names = {"across domains": "head_overlap", "inside a domain": "head_overlap_inside"}
    names["universal"] = "universal_heads"
    return wide[list(names)].rename(columns=names).reset_index()


def _renamed(table: Any, **names: str) -> pd.DataFrame:
    return table[["model", *names]].rename(columns=names)


_SUMMARY: dict[str, Callable[[Any], pd.DataFrame]] = {
    "scores": lambda t: _renamed(t, at_ends="m_at_ends"),
    "compression": lambda t: _renamed(t, ratio="compression_ratio"),
    "structural": lambda t: _renamed(t, structural_share="structural_share"),
    "thresholds": lambda t: _renamed(t[t["comparison"] == "all"], area="frequency_area"),
    "noise": _noise_left,
    "recovery_gaps": lambda t: _renamed(t[t["alpha"] == t["alpha"].max()], gap="recovery_gap"),
    "bursts": lambda t: t.loc[t["group"] == MEMORIZED, ["model", "burst", "crossing", "before_last"]],
    "head_overlap": _overlaps,
}
"""The columns of the summary, by table."""


def _signature_notes(made: Made) -> pd.DataFrame:
    if "families" not in made.tests:
        return _EMPTY
    return signature_table(made.series("models"), made.tables.get("profile_similarity"))


def _other_options(made: Made) -> pd.DataFrame:
    """Which saved measures were made with other options than this run's."""
    rows = []
    for model in made.models:
        for part, saved in model.parts.items():
            for name, value in saved.get("options", {}).items():
                now = json.loads(json.dumps(getattr(made.options, name, value)))
                if value != now:
                    rows.append((model.label, part, name, str(value), str(now)))
    return pd.DataFrame(rows, columns=["model", "measure", "option", "measured_with", "this_run"])


def judged(made: Made) -> list[Any]:
    """Return the paper's claims, judged by the tables."""
    signature = made.profiles.within_minus_across() if "families" in made.tests else None
    return judge_all({name: made.series(name) for name in made.tables}, made.tests, signature)


# ---- the list --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of the report.

    Attributes:
        name: Of its file, and of its words in `texts.yaml`.
        section: Where it is shown.
        make: Makes the rows of one model, given the model and the options; without a part makes the whole
            table, given `Made`.
        part: The saved part that the rows are made from.
    """

    name: str
    section: str
    make: Callable[..., Rows]
    part: str = ""

    def of(self, made: Made) -> pd.DataFrame:
        """Return the table; empty where no model has what it needs."""
        if not self.part:
            return pd.DataFrame(self.make(made))
        frames = []
        for model in made.models:
            if model.has(self.part):
                found = self.make(model, made.options)
                frame = pd.DataFrame([found] if isinstance(found, dict) else found)
                if len(frame):
                    own = {"model": model.label, "family": model.family}
                    rest = frame.drop(columns=list(own), errors="ignore")
                    frames.append(pd.concat([pd.DataFrame(own, index=frame.index), rest], axis=1))
        return pd.concat(frames, ignore_index=True) if frames else _EMPTY


TABLES: tuple[Table, ...] = (
    Table("rates", "rates", _rates, "recall"),
    Table("size_fits", "rates", lambda made: size_fits(made.series("rates"), **_chances(made.options))),
    Table(
        "depth_fits", "rates",
        lambda made: size_fits(made.series("rates"), column="depth", **_chances(made.options)),
    ),
    Table("pairs", "rates", lambda made: smaller_beats_larger(made.series("rates"))),
    Table("score_spread", "rates", lambda m, o: score_spread(m.recall.table), "recall"),
    Table("scores", "rates", _scores, "recall"),
    Table(
        "depth", "rates",
        lambda m, o: depth_table(m.recall.table, m.recall.sequences.n_targets.numpy()), "recall",
    ),
    Table("compression", "compression", _compression, "compression"),
    Table("compression_by_family", "compression", _compression_by_family),
    Table("domains", "domains", lambda m, o: domain_table(m.recall.table, o.structural), "recall"),
    Table("structural", "domains", _structural, "recall"),
    Table("structural_fits", "domains", _structural_fits),
    Table(
        "frequency", "frequency", lambda m, o: frequency_by_offset(*_buckets(m, o), seed=o.seed), "frequency"
    ),
    Table("boundary", "frequency", _boundary, "frequency"),
    Table(
        "boundary_gaps", "frequency",
        lambda m, o: boundary_gap(*_buckets(m, o), seed=o.seed).row("gap"), "frequency",
    ),
    Table("thresholds", "frequency", _thresholds, "frequency"),
    Table("copies", "training", lambda m, o: copies_table(m.recall.table), "recall"),
    Table("training", "training", lambda m, o: training_table(*_hits(m)), "training"),
    Table("training_events", "training", _training_events, "training"),
    Table(
        "noise", "noise", lambda m, o: noise_table(m.result("noise"), o.structural, **_chances(o)), "noise"
    ),
    Table(
        "structural_noise", "noise",
        lambda m, o: structural_change(m.result("noise"), o.structural, **_chances(o)).row("change"), "noise",
    ),
    Table("recovery", "noise", lambda m, o: recovery_table(m.result("recovery"), seed=o.seed), "recovery"),
    Table("recovery_gaps", "noise", _recovery_gaps, "recovery"),
    Table("similarity", "noise", _similarity, "recovery"),
    Table("decoding", "layers", _decoding, "decoding"),
    Table("bursts", "layers", _bursts, "decoding"),
    Table("head_overlap", "heads", _head_overlap, "heads"),
    Table("heads", "heads", lambda m, o: head_table(effects_of(m, o)).head(8), "heads"),
    Table("importance_agreement", "heads", _importance_agreement, "heads"),
    Table("head_pairs", "heads", lambda m, o: effects_of(m, o).pairs(), "heads"),
    Table("universal_heads", "heads", _universal_heads, "heads"),
    Table("profiles", "signatures", lambda made: made.profiles.by_layer),
    Table("profile_similarity", "signatures", _profile_similarity),
    Table("family_test_families", "signatures", partial(_family_test, "families")),
    Table(
        "family_predicted", "signatures",
        lambda made: made.tests["families"].predicted if "families" in made.tests else _EMPTY,
    ),
    Table("family_test_untrained", "signatures", partial(_family_test, "untrained")),
    Table("models", "models", _summary),
    Table("signature_notes", "signatures", _signature_notes),
    Table("other_options", "models", _other_options),
    Table("claims", "claims", lambda made: claim_table(judged(made))),
)  # fmt: skip
"""All tables, in the order in which they are made."""
