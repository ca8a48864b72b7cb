"""Counterfactual memorization: recall of a model minus recall of its twin that never saw the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.errors import OptionError, check_option
from memlens.forward.exclusive import computes
from memlens.models.provenance import describe
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.results.statistics.intervals import mean_interval
from memlens.sequences.set import Attr, SequenceSet

METRICS = ("target_accuracy", "exact_match", "memorization_score", "target_logprob")


@dataclass(frozen=True, eq=False)
class CounterfactualScores:
    """How much of each sequence's recall is due to having seen it.

    Attributes:
        table: One row per sequence: the set's own columns, and three for each metric: `<metric>` (of the
            model), `<metric>_clean` (of the twin) and `<metric>_counterfactual` (the former minus the
            latter). The metrics are `target_accuracy` (the paper's), `exact_match`, `memorization_score` and
            `target_logprob`.
        trained: The scores of the model.
        clean: The scores of the twin.
        attrs: The model's facts, and `clean_model`.
    """

    table: pd.DataFrame
    trained: RecallScores
    clean: RecallScores
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def means(
        self,
        by: str = "copies",
        *,
        metric: str = "target_accuracy",
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return means over sequences, one row per value of a column, with bootstrap intervals.

        Args:
            by: A column of the table, such as "copies" or "domain".
            metric: One of the table's metrics.
            level: Coverage of the intervals, which are those of the counterfactual difference: both models
                are measured on the same sequences, so sequences are resampled with both their values.
            n_resamples: Number of bootstrap resamples.
            seed: Seed of the bootstrap.

        Returns:
            Columns `by`'s name, `n` (sequences), `trained`, `clean`, `counterfactual`, `low`, `high`.

        Raises:
            OptionError: There is no such column or metric.
        """
        check_option("by", by, [str(name) for name in self.table])
        check_option("metric", metric, [name for name in METRICS if name in self.table])
        groups = self.table.groupby(by, sort=True)
        columns = {"trained": metric, "clean": f"{metric}_clean", "counterfactual": _difference(metric)}
        means = groups.agg(n=(metric, "size"), **{name: (c, "mean") for name, c in columns.items()})
        options: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
        parts = [part.to_numpy(dtype=float) for _, part in groups[_difference(metric)]]
        arrays = [xr.DataArray(values, dims="sequence") for values in parts]
        bounds = [mean_interval(array, method="bootstrap", **options).values for array in arrays]
        _, low, high = np.array(bounds).T
        return means.assign(low=low, high=high).reset_index()

    def __repr__(self) -> str:
        mean = self.table[_difference("target_accuracy")].mean()
        return (
            f"CounterfactualScores({len(self)} sequences, {self.attrs.get('model', 'a model')} minus "
            f"{self.attrs.get('clean_model', 'its twin')}: {mean:+.2f} of the tokens)"
        )


@computes
def counterfactual_memorization(
    model: Any,
    clean: Any,
    sequences: SequenceSet,
    *,
    generate: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> CounterfactualScores:
    """Measure a model's recall minus that of a model trained the same way without the sequences.

    ``mem(x) = M(model, x) - M(clean, x)``, where M is the share of the continuation's tokens that are
    predicted, given all tokens before them (`target_accuracy`); other metrics of `score_recall` are compared
    in the same way. What any model of the language predicts cancels out. The definition averages over many
    models of both kinds; here there is one of each, so a single sequence's value is noisy: rely on means over
    sequences.

    Args:
        model: A TransformerLens model.
        clean: Its twin, trained without the sequences, such as "zoo/pythia-s-clean" for "zoo/pythia-s".
        sequences: The sequences to score.
        generate: Decode, for `memorization_score` (M of greedy decoding).
        batch_size: As for `score_recall`.
        progress: Show progress bars.

    Returns:
        The differences, in the order of the set.

    Raises:
        OptionError: Model and twin are the same model.
        EmptySetError, VocabularyError, SequenceError, NonFiniteError: As for `score_recall`.

    Source: arXiv 2112.12938, definition 2.1 (M: the per-token accuracy); using one model per side is ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> twin = ml.load_model("zoo/pythia-xs")  # for want of a clean one: a smaller model
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> found = counterfactual_memorization(model, twin, seqs, generate=False, progress=False)
        >>> bool((found.table["target_accuracy_counterfactual"].abs() <= 1).all())
        True
    """
    if model is clean:
        raise OptionError("model and clean are the same model: give the twin that never saw the sequences.")
    options: dict[str, Any] = {"generate": generate, "batch_size": batch_size, "progress": progress}
    with_text = score_recall(model, sequences, metrics=(), **options)
    without = score_recall(clean, sequences, metrics=(), **options)
    table = with_text.sequences.table
    for metric in (name for name in METRICS if name in with_text.table):
        seen, unseen = (scores.table[metric].to_numpy(dtype=float) for scores in (with_text, without))
        columns = {metric: seen, f"{metric}_clean": unseen, _difference(metric): seen - unseen}
        table = table.assign(**columns)
    attrs = {**with_text.attrs, "clean_model": str(describe(clean)["model"])}
    return CounterfactualScores(table, with_text, without, attrs)


def _difference(metric: str) -> str:
    return f"{metric}_counterfactual"
