"""Tables over all models, from what is saved of each: two declarative lists, `PER_MODEL` and `OVERALL`.

Titles, notes and sections are in `texts.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.benchmark.recommend import ABLATIONS, ranked_by
from memlens.errors import ResultError
from memlens.files import json_text, parsed_json
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, median_estimate, share_estimate
from memlens.results.statistics.training import training_events, training_table
from memlens.studies.comparative.analyze import frequency, layers, rates
from memlens.studies.comparative.analyze.domains import domain_table, structural_gap, structural_share
from memlens.studies.comparative.analyze.heads import HeadEffects, head_overlap, head_table, rank_agreement
from memlens.studies.comparative.analyze.profiles import FamilyTest, Profiles, family_test
from memlens.studies.comparative.findings import TEXTS, Judged, claim_table, judge_all, signature_table
from memlens.studies.comparative.options import CONTROL, IMPORTANCES, ComparativeOptions
from memlens.studies.comparative.store import SavedModel

Rows = pd.DataFrame | list[dict[str, Any]] | dict[str, Any]

_EMPTY = pd.DataFrame(columns=["model", "family"])


# ---- of one model ----------------------------------------------------------------------------------------


def _scores(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Shares of sequences with M = 0, between and 1, and at either end with Wilson's interval."""
    m = rates.score_of(model.recall.table)
    parts = {"at_0": (m == 0).mean(), "between": ((m > 0) & (m < 1)).mean(), "at_1": (m == 1).mean()}
    return {**parts, **share_estimate((m == 0) | (m == 1)).row("at_ends")}


def _compression(model: SavedModel, options: ComparativeOptions) -> Rows:
    """How far prompts of memorized sequences can be cut.

    `ratio` is the mean of the fewest prompt tokens that work over all prompt tokens, `stable_ratio` the same
    for the fewest above which every length works, and `up_to_half` the share of sequences that need half of
    the prompt or less.
    """
    data = model.result("compression").data
    ratio = data["compression_ratio"].dropna("sequence")
    stable = data.get("stable_compression_ratio")
    return {
        **mean_estimate(ratio, seed=options.seed).row("ratio"),
        "median": median_estimate(ratio.values, seed=options.seed).value,
        "stable_ratio": np.nan if stable is None else float(stable.mean()),
        **share_estimate(ratio <= 0.5).row("up_to_half", prefix="half_", n=None),
    }


def _structural(model: SavedModel, options: ComparativeOptions) -> Rows:
    """Mean rate of structural domains minus that of the others, and the structural share of the memorized."""
    table = model.recall.table
    hits, labels = table["exact_match"].to_numpy(float), table["domain"].to_numpy(str)
    share = structural_share(hits, labels, options).row("structural_share", prefix="share_", n=None)
    return {**structural_gap(hits, labels, options).row("gap"), **share, "n_params": model.size}


def _buckets(model: SavedModel, options: ComparativeOptions) -> tuple[Result, np.ndarray, int]:
    m = rates.score_of(model.recall.table)
    return model.result("frequency"), frequency.bucket_labels(m, options.half_width), options.seed


def _thresholds(model: SavedModel, options: ComparativeOptions) -> Rows:
    found, table = frequency.mean_log_frequencies(model.result("frequency")), model.recall.table
    labels = table["domain"].to_numpy()
    return frequency.frequency_threshold(found, rates.score_of(table), labels, options.unmemorized_below)


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
    groups = {"all": events}
    if "copies" in data.coords:
        groups |= {str(copies): part for copies, part in events.groupby(data["copies"].values)}
    rows = []
    for name, part in groups.items():
        ever = part.loc[part["first"].notna()]
        again = ever.loc[ever["forgotten"] > 0]
        rows.append(
            {
                "copies": name, "n": len(part), "ever": len(ever), "median_first": ever["first"].median(),
                **share_estimate(ever["forgotten"] > 0).row("ever_forgotten", n=None),
                "relearned": share_estimate(again["relearned"] > 0).value,
                "kept": share_estimate(ever["last"]).value,
            }
        )  # fmt: skip
    return rows


def _recovery_gaps(model: SavedModel, options: ComparativeOptions) -> Rows:
    matched = model.groups.loc[model.groups["group"] == CONTROL, "matched_to"].to_numpy()
    return layers.recovery_gaps(model.result("recovery"), matched, options.seed)


def importance(model: SavedModel, metric: str, part: str = "heads") -> xr.DataArray:
    """Return what each sequence loses when each head is ablated: positive where the head helped."""
    return -model.result(part).effect(metric)


def effects_of(model: SavedModel, options: ComparativeOptions) -> HeadEffects:
    """Return a model's saved head ablation as `HeadEffects`."""
    losses = importance(model, options.importance)
    return HeadEffects(losses, losses["domain"].values, options)


def _head_overlap(model: SavedModel, options: ComparativeOptions) -> Rows:
    effects = effects_of(model, options)
    found = head_overlap(effects, options)
    return found.assign(heads=effects.n_heads, k=effects.k, domains=len(effects.domains))


def _importance_agreement(model: SavedModel, options: ComparativeOptions) -> Rows:
    """How far importance by the chosen metric ranks heads as importance by the other metrics does."""
    first = importance(model, options.importance)
    same = {"importance": options.importance, "n": first.sizes["sequence"]}
    return [
        {"other": other, "spearman": rank_agreement(first, importance(model, other)), **same}
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


PER_MODEL: dict[str, tuple[str, Callable[[SavedModel, ComparativeOptions], Rows]]] = {
    "rates": (
        "recall", lambda m, o: {"n_params": m.size, "control": m.control, **rates.rate_row(m.recall.table)},
    ),
    "score_spread": ("recall", lambda m, o: rates.score_spread(m.recall.table)),
    "scores": ("recall", _scores),
    "depth": (
        "recall",
        lambda m, o: rates.depth_table(m.recall.table, m.recall.sequences.n_targets.numpy()),
    ),
    "compression": ("compression", _compression),
    "domains": ("recall", lambda m, o: domain_table(m.recall.table, o.structural)),
    "structural": ("recall", _structural),
    "frequency": ("frequency", lambda m, o: frequency.frequency_by_offset(*_buckets(m, o))),
    "boundary": ("frequency", lambda m, o: frequency.boundary_table(*_buckets(m, o))),
    "boundary_gaps": ("frequency", lambda m, o: frequency.boundary_gap(*_buckets(m, o)).row("gap")),
    "thresholds": ("frequency", _thresholds),
    "copies": ("recall", lambda m, o: rates.copies_table(m.recall.table)),
    "training": ("training", lambda m, o: training_table(*_hits(m))),
    "training_events": ("training", _training_events),
    "noise": ("noise", lambda m, o: layers.noise_table(m.result("noise"), o)),
    "structural_noise": (
        "noise", lambda m, o: layers.structural_change(m.result("noise"), o).row("change"),
    ),
    "recovery": ("recovery", lambda m, o: layers.recovery_table(m.result("recovery"), o.seed)),
    "recovery_gaps": ("recovery", _recovery_gaps),
    "similarity": ("recovery", lambda m, o: layers.similarity_table(m.result("recovery"), o)),
    "decoding": ("decoding", lambda m, o: layers.decoding_table(m.result("decoding"), o)),
    "bursts": ("decoding", lambda m, o: layers.burst_table(m.result("decoding"), o)),
    "head_overlap": ("heads", _head_overlap),
    "heads": ("heads", lambda m, o: head_table(effects_of(m, o)).head(8)),
    "importance_agreement": ("heads", _importance_agreement),
    "head_pairs": ("heads", lambda m, o: effects_of(m, o).pairs()),
    "universal_heads": ("heads", _universal_heads),
}  # fmt: skip
"""Tables made model by model: the saved part that they need, and what makes one model's rows."""


# ---- over all models -------------------------------------------------------------------------------------


class Made:
    """The saved models of a study, and what was made of them so far.

    Args:
        models: The models, in the order of the report.
        options: Of the study.

    Attributes:
        tables: What was made so far, by name, with all models.
        why_no_test: Why profiles could not be tested for families.
    """

    models: list[SavedModel]
    options: ComparativeOptions
    tables: dict[str, pd.DataFrame]
    why_no_test: str

    def __init__(self, models: Sequence[SavedModel], options: ComparativeOptions) -> None:
        self.models, self.options = list(models), options
        self.tables, self.why_no_test = {}, ""

    def make(self, name: str) -> pd.DataFrame:
        """Make a table; empty where no model has what it needs."""
        if name in OVERALL:
            self.tables[name] = OVERALL[name](self)
            return self.tables[name]
        part, make = PER_MODEL[name]
        frames = []
        for model in self.models:
            if model.has(part):
                found = make(model, self.options)
                frame = pd.DataFrame([found] if isinstance(found, dict) else found)
                if len(frame):
                    own = {"model": model.label, "family": model.family}
                    frames.append(pd.concat([pd.DataFrame(own, index=frame.index), frame], axis=1))
        self.tables[name] = pd.concat(frames, ignore_index=True) if frames else _EMPTY
        return self.tables[name]

    def table(self, name: str) -> pd.DataFrame:
        """Return a table; one that was not made is empty."""
        return self.tables.get(name, _EMPTY)

    def series(self, name: str) -> pd.DataFrame:
        """Return a table without the rows of control models."""
        table, members = self.table(name), [model.label for model in self.members]
        return table.loc[table["model"].isin(members)] if "model" in table else table

    @property
    def members(self) -> list[SavedModel]:
        """The models that represent their families: all but controls."""
        return [model for model in self.models if not model.control]

    @property
    def strongest(self) -> float:
        """The largest strength of the noise."""
        return max(self.options.alphas)

    @property
    def ranked(self) -> str:
        """How heads are ranked, and what the localization benchmark found of that."""
        note = ranked_by(ABLATIONS[self.options.head_mode], "head")
        if self.options.importance != "target_logprob":
            note += f" There it was the loss of target_logprob, not of {self.options.importance}."
        return note

    @property
    def extremes(self) -> str:
        """The reading of the rates: which model recalls most, and which least."""
        if not (rows := self.series("rates").to_dict("records")):
            return ""
        most, least = (choose(rows, key=lambda row: row["rate"]) for choose in (max, min))
        return (
            f"{most['model']} recalls most ({Estimate.from_row(most, 'rate')}), "
            f"{least['model']} least ({Estimate.from_row(least, 'rate')})."
        )

    def profiles_of(self, part: str) -> Profiles:
        """Return the members' profiles, of "heads" or of "heads_untrained": twins with random weights."""
        chosen = [m for m in self.members if m.has("heads") and (m.path / f"{part}.nc").exists()]
        losses = {model.label: importance(model, self.options.importance, part) for model in chosen}
        return Profiles.of(losses, {model.label: model.family for model in chosen}, self.options)

    @cached_property
    def profiles(self) -> Profiles:
        """The profiles of the models."""
        return self.profiles_of("heads")

    @cached_property
    def tests(self) -> dict[str, FamilyTest]:
        """Whether profiles give the family away: of "families", and of "untrained" twins."""
        found = {}
        for name in ("families", "untrained"):
            own = self.profiles if name == "families" else self.profiles_of("heads_untrained")
            try:
                found[name] = family_test(own.similarity, own.models, own.families, self.options)
            except ResultError as error:
                self.why_no_test = self.why_no_test or str(error)
        return found

    @cached_property
    def judged(self) -> list[Judged]:
        """The paper's claims, judged by the tables."""
        signature = self.profiles.within_minus_across() if "families" in self.tests else None
        return judge_all({name: self.series(name) for name in self.tables}, self.tests, signature)


def _compression_by_family(made: Made) -> pd.DataFrame:
    table = made.table("compression")
    if not len(table):
        return table
    columns = {"models": ("model", "size"), "ratio": ("ratio", "mean"), "up_to_half": ("up_to_half", "mean")}
    return table.groupby("family").agg(**columns).reset_index()


def _structural_fits(made: Made) -> pd.DataFrame:
    if not np.isfinite(made.table("structural")["gap"].to_numpy(float)).any():
        return _EMPTY
    known = made.series("structural").dropna(subset="structural_share")
    return rates.size_fits(known, "structural_share", made.options)


def _profile_similarity(made: Made) -> pd.DataFrame:
    labels = made.profiles.models
    if len(labels) < 2:
        return _EMPTY
    pairs = pd.DataFrame(made.profiles.similarity, columns=labels)
    return pairs.assign(model=labels).loc[:, ["model", *labels]]


def _tested(test: str, table: str) -> Callable[[Made], pd.DataFrame]:
    return lambda made: getattr(made.tests[test], table) if test in made.tests else _EMPTY


def _summary(made: Made) -> pd.DataFrame:
    """One row per model, with the main columns of each part."""
    table: Any = made.table("rates").drop(columns=["depth_low", "depth_high"])
    facts = [
        {
            "model": model.label, "corpus": model.facts["corpus"], "layers": model.facts["n_layers"],
            "heads": model.facts["n_layers"] * model.facts["n_heads"],
        }
        for model in made.models
    ]  # fmt: skip
    table = table.merge(pd.DataFrame(facts), on="model")
    sources: dict[str, Any] = {**made.tables, "noise_left": _noise_left(made.table("noise"))}
    for words in TEXTS["overview"]:
        found, columns = sources.get(words["table"], _EMPTY), words["columns"]
        if len(found):
            found = found.query(words["rows"]) if "rows" in words else found
            found = found[["model", *columns]].rename(columns=columns)
            table = table.merge(found, on="model", how="left")
    if len(similar := made.table("profile_similarity")):
        families = table.set_index("model")["family"]
        pairs: Any = similar.melt("model", var_name="other").query("model != other")
        pairs = pairs[pairs["model"].map(families) == pairs["other"].map(families)]
        table["family_similarity"] = table["model"].map(pairs.groupby("model")["value"].mean())
    return table


def _noise_left(noise: Any) -> Any:
    """The rate under the strongest noise over the rate without noise."""
    if not len(noise):
        return noise
    found = noise.pivot(index="model", columns="alpha", values="rate")
    left = found[found.columns.max()] / found[0.0].where(found[0.0] > 0)
    return left.rename("noise_left").reset_index()


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
                now = parsed_json(json_text(getattr(made.options, name, value)))
                if value != now:
                    rows.append((model.label, part, name, str(value), str(now)))
    return pd.DataFrame(rows, columns=["model", "measure", "option", "measured_with", "this_run"])


OVERALL: dict[str, Callable[[Made], pd.DataFrame]] = {
    "size_fits": lambda made: rates.size_fits(made.series("rates"), options=made.options),
    "depth_fits": lambda made: rates.size_fits(made.series("rates"), "depth", made.options),
    "pairs": lambda made: rates.smaller_beats_larger(made.series("rates")),
    "compression_by_family": _compression_by_family,
    "structural_fits": _structural_fits,
    "profiles": lambda made: made.profiles.by_layer,
    "profile_similarity": _profile_similarity,
    "family_test_families": _tested("families", "table"),
    "family_predicted": _tested("families", "predicted"),
    "family_test_untrained": _tested("untrained", "table"),
    "models": _summary,
    "signature_notes": _signature_notes,
    "other_options": _other_options,
    "claims": lambda made: claim_table(made.judged),
}
"""Tables made from all models, or from the tables before them."""
