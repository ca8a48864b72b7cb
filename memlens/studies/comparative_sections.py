"""The report on what is recalled: rate and size, compression, domains and frequency, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.figures import curves_by_family, model_dots, shares_by_model, sizes
from memlens.studies import comparative_tables as over
from memlens.studies.comparative_evidence import smaller_beats_larger
from memlens.studies.comparative_options import ComparativeOptions
from memlens.studies.comparative_rates import size_fits
from memlens.studies.comparative_store import SavedModel
from memlens.studies.running import StudyDirectory

__all__ = ["Sections", "largest_of_families"]


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
