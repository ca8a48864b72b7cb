"""The report on what is recalled: rate and size, compression, domains and frequency, training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ResultError
from memlens.figures.models import curves_by_family, model_dots, shares_by_model, similarity_map, sizes
from memlens.results.statistics.estimates import Estimate
from memlens.studies.comparative.analyze.profiles import FamilyTest, cluster, family_test
from memlens.studies.comparative.analyze.rates import size_fits
from memlens.studies.comparative.measure import CONTROL, MEMORIZED
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.report import tables as inside
from memlens.studies.comparative.report import tables as of_heads
from memlens.studies.comparative.report import tables as over
from memlens.studies.comparative.report.claims import RULE
from memlens.studies.comparative.report.evidence import smaller_beats_larger
from memlens.studies.comparative.report.judging import as_finding, claim_table, judge_all, signature_table
from memlens.studies.comparative.store import SavedModel
from memlens.studies.running import StudyDirectory


class Sections:
    """Makes tables and figures of the report from what is saved of the models, and keeps the tables.

    Args:
        models: The models, in the order of the report.
        folder: Of the study.
        options: Of the study.

    Attributes:
        tables: What was made so far, by name, all models.
    """

    models: list[SavedModel]
    folder: StudyDirectory
    options: ComparativeOptions

    def __init__(
        self, models: Sequence[SavedModel], folder: StudyDirectory, options: ComparativeOptions
    ) -> None:
        self.models, self.folder, self.options = list(models), folder, options
        self.tables: dict[str, pd.DataFrame] = {}

    @property
    def members(self) -> list[SavedModel]:
        """The models that stand for their families: all but controls."""
        return [model for model in self.models if not model.control]

    def without_controls(self) -> dict[str, pd.DataFrame]:
        """Return the tables without the rows of control models."""
        controls = {model.label for model in self.models if model.control}
        return {
            name: table.loc[~table["model"].isin(list(controls))] if "model" in table else table
            for name, table in self.tables.items()
        }

    def keep(self, name: str, table: pd.DataFrame, title: str, section: str, note: str = "") -> pd.DataFrame:
        """Save a table, show it in a section unless it is empty, and return it."""
        self.tables[name] = table
        if len(table):
            self.folder.add_table(name, table, title=title, section=section, note=note)
        return table

    def rates(self) -> None:
        """Part 1: rate and size."""
        folder = self.folder
        chances: dict[str, Any] = {"n_resamples": self.options.n_resamples, "seed": self.options.seed}
        table = self.keep(
            "rates", over.rates(self.models), "Rate of every model (Wilson's intervals)", "rates"
        )
        series = table.loc[~table["control"]]
        if len(series):
            folder.add_figure("rate_and_size", sizes(series), section="rates", reading=_read_rates(series))
        note = (
            "In the reading log10 rate a model that recalls nothing has no place and is left out. Intervals "
            "of least squares are Student's over sizes; the bootstrap redraws sequences and knows nothing of "
            "how models of one size differ."
        )
        self.keep("size_fits", size_fits(series, **chances), "Fits on log10 of the parameters", "rates", note)
        depth = size_fits(series, column="depth", **chances)
        self.keep("depth_fits", depth, "The same of the mean leading run of right tokens", "rates")
        self.keep(
            "pairs", smaller_beats_larger(series), "Smaller against larger models of other families", "rates"
        )
        self._spread()
        self._depth()

    def _spread(self) -> None:
        folder = self.folder
        spread = self.keep("score_spread", over.spreads(self.models), "How M spreads", "rates")
        self.keep("scores", over.scores(self.models), "M at its ends", "rates")
        whole = spread.groupby(["model", "part"], sort=False, as_index=False).agg({"share": "sum"})
        folder.add_figure(
            "scores",
            shares_by_model(
                whole.assign(part="M " + whole["part"].replace({"0": "= 0", "1": "= 1"})),
                "part",
                title="Memorization score M",
            ),
            section="rates",
            reading="M is the share of the greedy continuation's tokens that are right.",
        )

    def _depth(self) -> None:
        depths = self.keep("depth", over.depths(self.models), "Rate against continuation length", "rates")
        self.folder.add_figure(
            "depth",
            curves_by_family(
                depths.rename(columns={"rate": "mean"}),
                "k",
                title="Depth of memorization",
                x_title="tokens of the continuation",
                y_title="share recalled exactly",
            ),
            section="rates",
            reading="The share of sequences whose first k continuation tokens are all right.",
        )

    def compression(self) -> None:
        """Part 2: how far prompts can be cut."""
        table = self.keep(
            "compression",
            over.compressions(self.models, self.options.seed),
            "Compression of prompts",
            "compression",
            f"method: {self.options.compression}; of memorized sequences, at most "
            f"{self.options.max_compressed}",
        )
        if not len(table):
            self.say("compression", "No model has memorized sequences to compress.")
            return
        means = table.groupby("family").agg(
            models=("model", "size"), ratio=("ratio", "mean"), up_to_half=("up_to_half", "mean")
        )
        self.keep("compression_by_family", means.reset_index(), "By family (mean over models)", "compression")
        figure = model_dots(
            table.rename(columns={"ratio": "mean"}),
            x_title="fewest prompt tokens / prompt tokens",
            title="How much of the prompt is enough",
        )
        self.folder.add_figure(
            "compression",
            figure,
            section="compression",
            reading="The mean share of the prompt from which the whole continuation is still recalled.",
        )

    def domains(self) -> None:
        """Part 3: domains and token frequency."""
        folder, options = self.folder, self.options
        table = self.keep(
            "domains",
            over.domains(self.models, options.structural),
            "Rates within domains, and shares of the memorized",
            "domains",
            "share is of this sample, in which a domain has n sequences; equal_share is what the rates give "
            "for equally many sequences of every domain.",
        )
        known = table.loc[table["equal_share"].notna()]
        if len(known):
            folder.add_figure(
                "domain_shares",
                shares_by_model(
                    known,
                    "domain",
                    "equal_share",
                    title="What is memorized",
                    subtitle="shares among the memorized, for an equal sample of every domain",
                ),
                section="domains",
                reading="The rate of each domain over the sum of all rates.",
            )
        both = self.keep(
            "structural", over.structurals(self.models, options), "Structural and free text", "domains"
        )
        fits = both.loc[
            both["structural_share"].notna()
            & ~both["model"].isin([m.label for m in self.models if m.control])
        ]
        if np.isfinite(both["gap"].to_numpy(float)).any():
            self.keep(
                "structural_fits",
                size_fits(fits, column="structural_share"),
                "Structural share on log10 of the parameters",
                "domains",
            )

    def frequency(self) -> None:
        """Part 3, second half: token frequency."""
        folder, options = self.folder, self.options
        curves = self.keep(
            "frequency", over.frequencies(self.models, options), "Token frequency by place", "frequency"
        )
        if not len(curves):
            self.say("frequency", "No token frequencies were measured.")
            return
        folder.add_figure(
            "frequency",
            curves_by_family(
                largest_of_families(curves, self.models),
                "offset",
                dash="bucket",
                title="Token frequency by place",
                subtitle="the largest model of each family",
                x_title="place (0: first continuation token)",
                y_title="occurrences in a million",
            ),
            section="frequency",
            reading="The mean frequency, in the training corpus, of the tokens at each place.",
        )
        self.keep(
            "boundary",
            over.boundaries(self.models, options),
            "Frequency at the boundary",
            "frequency",
            "change: first continuation token minus mean of the prefix, in occurrences in a million",
        )
        self.keep(
            "boundary_gaps",
            over.boundary_gaps(self.models, options),
            "Change at the boundary, M = 1 minus M = 0",
            "frequency",
        )
        self.keep(
            "thresholds",
            over.thresholds(self.models, options),
            "The frequency that parts memorized from unmemorized",
            "frequency",
            "threshold: mean log10(1 + occurrences in a million) over a sequence's tokens, by Youden's "
            "index; chosen and measured on the same sequences.",
        )

    def training(self) -> None:
        """Part 4: copies and training time."""
        folder = self.folder
        table = self.keep(
            "copies", over.copies(self.models), "Rate by copies in the training corpus", "training"
        )
        if len(table):
            seen = table.loc[table["copies"] > 0].rename(columns={"rate": "mean"})
            folder.add_figure(
                "copies",
                curves_by_family(
                    seen,
                    "copies",
                    log_x=True,
                    title="Copies and recall",
                    x_title="copies in the training corpus",
                    y_title="share recalled exactly",
                ),
                section="training",
                reading="Sequences that were never planted (0 copies) are in the table only.",
            )
        steps = self.keep(
            "training",
            over.steps(self.models),
            "Over training",
            "training",
            "forgotten: recalled at the checkpoint before and not at this one",
        )
        if not len(steps):
            self.say("training", "No checkpoints over training were given: name them with the models.")
            return
        folder.add_figure(
            "training",
            curves_by_family(
                steps.rename(columns={"rate": "mean"}),
                "step",
                title="Recall over training",
                x_title="training step",
                y_title="share recalled exactly",
            ),
            section="training",
            reading="The share of sequences recalled at each checkpoint.",
        )
        self.keep(
            "training_events",
            over.event_table(self.models),
            "When sequences are first memorized, and forgotten",
            "training",
            "only the given checkpoints are seen",
        )

    def say(self, section: str, words: str) -> None:
        """Say in a section why it is empty."""
        self.folder.add_table(
            f"{section}_note", pd.DataFrame({"note": [words]}), title="Not here", section=section
        )


def _read_rates(series: pd.DataFrame) -> str:
    most, least = series.loc[series["rate"].idxmax()], series.loc[series["rate"].idxmin()]
    return (
        f"{most['model']} recalls most ({most['rate']:.3g} [{most['low']:.3g}, {most['high']:.3g}]), "
        f"{least['model']} least ({least['rate']:.3g} [{least['low']:.3g}, {least['high']:.3g}])."
    )


def largest_of_families(table: pd.DataFrame, models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rows of each family's largest model."""
    size = {model.label: int(model.facts["n_params"]) * (not model.control) for model in models}
    sizes_of: Any = pd.Series([float(size[str(name)]) for name in table["model"]], index=table.index)
    return table.loc[np.asarray(sizes_of == sizes_of.groupby(table["family"]).transform("max"))]


class InnerSections(Sections):
    """The parts on what is recalled, and on what goes on inside."""

    signature: Estimate | None = None
    tests: dict[str, FamilyTest]

    def noise(self) -> None:
        """Part 5: perturbation and recovery."""
        options, folder = self.options, self.folder
        table = self.keep(
            "noise",
            inside.noises(self.models, options),
            "Recall under noise",
            "noise",
            "leading: share of the continuation that is right from its start, which M is at least; accuracy, "
            "below_half, between and all_right are teacher-forced, which M is mostly below between its ends; "
            "all_right is exact.",
        )
        if len(table):
            curves = table.rename(columns={"rate": "mean"})
            folder.add_figure(
                "noise",
                curves_by_family(
                    curves,
                    "alpha",
                    title="Rate under noise",
                    x_title="strength of the noise",
                    y_title="share recalled exactly",
                ),
                section="noise",
                reading="Relative Gaussian noise in the residual at the prompt.",
            )
            self.keep(
                "structural_noise",
                inside.structural_changes(self.models, options),
                "Structural share under the strongest noise minus without",
                "noise",
            )
        recovery = self.keep(
            "recovery",
            inside.recoveries(self.models, options.seed),
            "Similarity regained",
            "noise",
            "R = similarity after the last block - right after the noise",
        )
        if not len(recovery):
            self.say("noise", "No model has enough memorized sequences to measure recovery on.")
            return
        self.keep(
            "recovery_gaps",
            inside.gaps(self.models, options.seed),
            "Memorized minus matched controls",
            "noise",
        )
        strongest = max(options.alphas)
        curves = self.keep(
            "similarity", inside.similarities(self.models, strongest, options), "Similarity by layer", "noise"
        )
        shown = curves.loc[curves["group"].isin([MEMORIZED, CONTROL])]
        folder.add_figure(
            "similarity",
            curves_by_family(
                largest_of_families(shown, self.models),
                "depth",
                dash="group",
                title="Recovery from noise",
                subtitle=f"alpha = {strongest:g}; the largest model of each family",
                x_title="relative depth",
                y_title="similarity to the clean residual",
            ),
            section="noise",
            reading="A line that rises takes the noise out again.",
        )

    def layers(self) -> None:
        """Part 6: decoding middle layers."""
        options, folder = self.options, self.folder
        curves = self.keep(
            "decoding", inside.decodings(self.models, options), "Decoding probability by layer", "layers"
        )
        if not len(curves):
            self.say("layers", "No model has enough memorized sequences to decode.")
            return
        self.keep(
            "bursts",
            inside.bursts(self.models, options),
            "Where the probability of the true token bursts",
            "layers",
            "burst: relative depth of the block with the largest rise; crossing: of the first above 1/2",
        )
        shown = curves.loc[(curves["token"] == "true") & curves["group"].isin([MEMORIZED, CONTROL])]
        folder.add_figure(
            "decoding",
            curves_by_family(
                shown,
                "depth",
                dash="group",
                title="Decoding middle layers",
                subtitle="logit lens, probability of the true token",
                x_title="relative depth",
                y_title="mean probability",
            ),
            section="layers",
            reading="Solid: memorized sequences; dotted: matched controls.",
        )

    def heads(self) -> None:
        """Part 7: heads."""
        options, folder = self.options, self.folder
        table = self.keep(
            "head_overlap",
            of_heads.overlaps(self.models, options),
            "How far important heads are shared",
            "heads",
            "Every statistic beside its nulls; exact is the mean of two (or all) independent random sets.",
        )
        self.keep(
            "heads",
            of_heads.heads(self.models, options),
            "The most important heads",
            "heads",
            f"importance: loss of {options.importance} when the head is replaced ({options.head_mode}); "
            "sets: domains in whose set it is",
        )
        self.keep(
            "importance_agreement",
            of_heads.importance_agreement(self.models, options),
            "Does another metric rank heads alike?",
            "heads",
        )
        if not len(table):
            self.say("heads", "No model has two domains with enough memorized sequences to compare heads.")
            return
        self.keep(
            "head_pairs", of_heads.head_pairs(self.models, options), "Overlap of every two domains", "heads"
        )
        self.keep(
            "universal_heads",
            of_heads.universal_heads(self.models, options),
            "Heads important in every domain",
            "heads",
        )
        chosen = table[
            (table["null"] == "heads anywhere")
            & table["statistic"].isin(["across domains", "inside a domain"])
        ]
        dots = chosen.assign(mean=chosen["value"], kind=chosen["statistic"])
        folder.add_figure(
            "head_overlap",
            model_dots(
                dots, x_title="Jaccard overlap", reference="exact", title="Overlap of important heads"
            ),
            section="heads",
            reading="Inside a domain: of two halves of its sequences. Gray: what random sets give.",
        )

    def signatures(self) -> None:
        """Part 8: profiles over depth, and whether they give the family away."""
        options = self.options
        self.tests = {}
        for part in ("heads", "heads_untrained"):
            found = of_heads.profiles_of(self.members, options, part)
            name = "families" if part == "heads" else "untrained"
            if part == "heads":
                self._profiles(found)
            try:
                self.tests[name] = family_test(
                    found.similarity,
                    found.labels,
                    found.families,
                    n_permutations=options.n_permutations,
                    seed=options.seed,
                )
            except ResultError as error:
                if part == "heads":
                    self.say("signatures", str(error))
                continue
            title = "Can the family be told from the profile?" + (
                " (untrained twins)" if name == "untrained" else ""
            )
            self.keep(
                f"family_test_{name}",
                self.tests[name].table,
                title,
                "signatures",
                "null: family labels shuffled",
            )
            if part == "heads":
                self.signature = found.within_minus_across()
                self.keep("family_predicted", self.tests[name].predicted, "Left out one by one", "signatures")

    def _profiles(self, found: of_heads.Profiles) -> None:
        if not len(found.by_layer):
            return
        folder = self.folder
        self.keep(
            "profiles",
            found.by_layer,
            "Importance by layer",
            "signatures",
            f"profile: {self.options.profile}; sums to 1",
        )
        folder.add_figure(
            "profiles",
            curves_by_family(
                found.by_layer,
                "depth",
                title="Where important heads stand",
                x_title="relative depth",
                y_title="share of importance",
            ),
            section="signatures",
            reading="Each model's profile sums to 1 over its own layers.",
        )
        if len(found.labels) < 2:
            return
        pairs = pd.DataFrame(found.similarity, columns=found.labels)
        self.keep(
            "profile_similarity",
            pairs.assign(model=found.labels).loc[:, ["model", *found.labels]],
            "Similarity of all pairs",
            "signatures",
        )
        merges, order = cluster(found.similarity, self.options.linkage)
        folder.add_figure(
            "profile_similarity",
            similarity_map(
                found.similarity,
                found.labels,
                merges,
                order,
                title="How alike profiles are",
                subtitle=f"{self.options.similarity} of profiles; clustering: {self.options.linkage} linkage",
            ),
            section="signatures",
            reading="Bright: alike. Above: which models are joined first.",
        )


class Report(InnerSections):
    """All parts of the report, and what sums them up."""

    def summary(self) -> None:
        """Part 9: the row of each model; then the paper's findings, judged."""
        table = self.tables["rates"].drop(columns=["depth_low", "depth_high"])
        facts = pd.DataFrame(
            [
                {
                    "model": m.label,
                    "corpus": m.facts["corpus"],
                    "layers": m.facts["n_layers"],
                    "heads": m.facts["n_layers"] * m.facts["n_heads"],
                }
                for m in self.models
            ]
        )
        table = table.merge(facts, on="model")
        for frame in self._columns():
            table = table.merge(frame, on="model", how="left")
        self.keep("models", table, "Every model", "models")
        if "families" in self.tests:
            self.keep(
                "signature_notes",
                signature_table(table.loc[~table["control"]], self.tables.get("profile_similarity")),
                "What is noted of single families, beside the order here",
                "signatures",
                "Noted by a reader of the full text; most and least are our reading. No test: where a trait "
                "comes from a family's data, models of one toy corpus cannot show it.",
            )

    def other_options(self) -> None:
        """Say which saved measures were made with other options than this run's."""
        rows = []
        for model in self.models:
            for part, made in model.parts.items():
                for name, value in made.get("options", {}).items():
                    now = json.loads(json.dumps(getattr(self.options, name, value)))
                    if value != now:
                        rows.append((model.label, part, name, str(value), str(now)))
        columns = ["model", "measure", "option", "measured_with", "this_run"]
        self.keep(
            "other_options",
            pd.DataFrame(rows, columns=columns),
            "Measures that were saved with other options",
            "models",
            "Models with other options than the rest are not to be compared with them in these measures.",
        )

    def _columns(self) -> list[pd.DataFrame]:
        """One column or more of each part, a row a model."""
        tables: Mapping[str, Any] = self.tables
        found: list[pd.DataFrame] = []
        for name, column, new in (
            ("scores", "at_ends", "m_at_ends"),
            ("compression", "ratio", "compression_ratio"),
            ("structural", "structural_share", "structural_share"),
        ):
            if len(tables.get(name, ())):
                found.append(pd.DataFrame({"model": tables[name]["model"], new: tables[name][column]}))
        areas = tables.get("thresholds", pd.DataFrame())
        if len(areas):
            rows = areas.loc[areas["comparison"] == "all"]
            found.append(pd.DataFrame({"model": rows["model"], "frequency_area": rows["area"]}))
        noise = tables.get("noise", pd.DataFrame())
        if len(noise):
            rates = noise.pivot(index="model", columns="alpha", values="rate")
            left = rates[rates.columns.max()] / rates[0.0].where(rates[0.0] > 0)
            found.append(pd.DataFrame({"model": left.index, "noise_left": left.to_numpy()}))
        gaps = tables.get("recovery_gaps", pd.DataFrame())
        if len(gaps):
            rows = gaps.loc[gaps["alpha"] == gaps["alpha"].max()]
            found.append(pd.DataFrame({"model": rows["model"], "recovery_gap": rows["gap"]}))
        bursts = tables.get("bursts", pd.DataFrame())
        if len(bursts):
            found.append(
                bursts.loc[bursts["group"] == MEMORIZED, ["model", "burst", "crossing", "before_last"]]
            )
        return found + self._head_columns()

    def _head_columns(self) -> list[pd.DataFrame]:
        overlap: Any = self.tables.get("head_overlap", pd.DataFrame())
        found: list[pd.DataFrame] = []
        if len(overlap):
            wide = overlap[overlap["null"] == "heads anywhere"].pivot(
                index="model", columns="statistic", values="value"
            )
            names = {
                "across domains": "head_overlap",
                "inside a domain": "head_overlap_inside",
                "universal": "universal_heads",
            }
            found.append(wide[list(names)].rename(columns=names).reset_index())
        similar = self.tables.get("profile_similarity", pd.DataFrame())
        if len(similar):
            labels = similar["model"].tolist()
            families = {model.label: model.family for model in self.models}
            values = similar[labels].to_numpy()
            rows = []
            for i, label in enumerate(labels):
                own = [j for j, other in enumerate(labels) if j != i and families[other] == families[label]]
                rows.append((label, values[i, own].mean() if own else np.nan))
            found.append(pd.DataFrame(rows, columns=["model", "family_similarity"]))
        return found

    def claims(self) -> None:
        """The paper's directional findings, judged by the tables."""
        judged = judge_all(self.without_controls(), self.tests, self.signature)
        self.keep(
            "claims", claim_table(judged), "The paper's findings, and what was found here", "claims", RULE
        )
        for item in judged:
            self.folder.find(as_finding(item))
