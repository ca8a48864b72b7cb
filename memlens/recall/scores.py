"""`RecallScores`: one row per sequence, and the sets that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from memlens.errors import EmptySetError, FileFormatError, OptionError, SequenceError
from memlens.forward.metrics import BUILT_IN, METRICS
from memlens.recall.columns import COLUMNS, LABELS, SCORE_COLUMNS, sequence_coords
from memlens.recall.matching import Matching, match_controls
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_recall
from memlens.results.readings import read_recall
from memlens.results.statistics.intervals import is_binary, mean_interval
from memlens.sequences.parquet import read_parquet, write_parquet
from memlens.sequences.set import Attr, SequenceSet

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from memlens.results.result import Result


GROUPS = ("copies", "domain")
"""Columns by which rates are given where the table has them."""

_SUMMARIZED = (*BUILT_IN, *(name for name, column in COLUMNS.items() if column.summarized))

# Decided by what is counted, not by the values: a mean that happens to be 0 everywhere is not a proportion.
_PROPORTIONS = (
    *(name for name in BUILT_IN if METRICS[name].proportion),
    *(name for name, column in COLUMNS.items() if column.proportion),
)


def summarize(table: pd.DataFrame, *, level: float, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return one row for each metric of all sequences and of each value of each column of `GROUPS`.

    Values that are not finite (a log-probability of minus infinity) are left out of the mean; `n` counts the
    others.
    """
    options = {"level": level, "n_resamples": n_resamples, "seed": seed}
    parts = [_summary(table, "all", "all", options)]
    for column in GROUPS:
        if column in table:
            parts += [
                _summary(part, column, value, options) for value, part in table.groupby(column, sort=True)
            ]
    return pd.concat(parts, ignore_index=True)


def _summary(table: pd.DataFrame, by: str, group: object, options: dict[str, Any]) -> pd.DataFrame:
    names = [name for name in _SUMMARIZED if name in table]
    values = table[names].to_numpy(dtype=float)
    array = xr.DataArray(np.where(np.isfinite(values), values, np.nan), dims=("sequence", "metric"))
    binary = [i for i, n in enumerate(names) if n in _PROPORTIONS and is_binary(values[:, i])]
    others = [i for i in range(len(names)) if i not in binary]
    methods = [(rows, method) for rows, method in ((binary, "wilson"), (others, "bootstrap")) if rows]
    # All metrics of a kind at once: they share their resamples.
    columns = [_intervals(array[:, rows], rows, method, options) for rows, method in methods]
    found = pd.concat(columns).sort_index()
    found.insert(0, "metric", names)
    found.insert(0, "group", pd.Series([group] * len(names), dtype=object))
    found.insert(0, "by", by)
    return found


def _intervals(values: xr.DataArray, index: list[int], method: str, options: dict[str, Any]) -> pd.DataFrame:
    interval = mean_interval(values, method=method, **options)
    mean, low, high = interval.values
    columns = {"mean": mean, "low": low, "high": high, "n": interval["n"].values, "method": method}
    return pd.DataFrame(columns, index=index)


@dataclass(frozen=True, eq=False)
class RecallScores:
    """How well a model recalled each sequence of a set.

    Attributes:
        table: One row per sequence: the set's own columns and `SCORE_COLUMNS` (see `score_recall`).
        sequences: The set that was scored, in the same order.
        attrs: The model's facts and the settings.
    """

    table: pd.DataFrame
    sequences: SequenceSet
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.table) != len(self.sequences):
            raise SequenceError(
                f"the table has {len(self.table)} rows for {len(self.sequences)} sequences: score again"
            )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def criterion(self) -> str:
        """The column that decides what is memorized: `memorization_score`, or without it `target_accuracy`.

        Both are 1 for exact matches and for nothing else. Below 1 they differ: the second is teacher-forced,
        so it is the more generous.
        """
        return "memorization_score" if "memorization_score" in self.table else "target_accuracy"

    def memorized(self, threshold: float = 1.0) -> SequenceSet:
        """Return the sequences whose score is at least `threshold`; 1 (exact matches) by default.

        The set's table has the score columns; the set may be empty.

        Args:
            threshold: Share of the continuation's tokens, in (0, 1].

        Raises:
            OptionError: A threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise OptionError(f"threshold={threshold} is not in (0, 1]: 1 asks for an exact match")
        return self._chosen(self._score >= threshold, memorized_threshold=threshold)

    def unmemorized(self, threshold: float = 0.5) -> SequenceSet:
        """Return the sequences whose score is below `threshold`.

        The default 0.5 leaves out sequences recalled in large part: they are in neither set.

        Raises:
            OptionError: A threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise OptionError(
                f"threshold={threshold} is not in (0, 1]: 0.5 asks for under half of the tokens"
            )
        return self._chosen(self._score < threshold, unmemorized_threshold=threshold)

    def matched_controls(
        self,
        n_per: int = 1,
        *,
        seed: int = 0,
        threshold: float = 1.0,
        below: float = 0.5,
        token_counts: Int[np.ndarray, "vocab"] | Sequence[int] | None = None,
    ) -> SequenceSet:
        """Return unmemorized sequences that match the memorized ones in length and token frequency.

        Every memorized sequence gets `n_per` controls, none used twice: the assignment with the least total
        difference, in which a token of difference in prefix or continuation length outweighs any difference
        of frequency. Frequency is the mean over a sequence's tokens of ``log(1 + count)``.

        Args:
            n_per: Controls for each memorized sequence.
            seed: Decides between equally good controls.
            threshold: As for `memorized`.
            below: As for `unmemorized`.
            token_counts: How often each token id occurs in the training corpus; by default it is counted in
                the scored set.

        Returns:
            The controls, in the order of the memorized sequences; their table also has `matched_to` (an id),
            `length_difference` (tokens) and `frequency_difference`. The attributes hold the standardized
            mean differences before and after matching (`smd_before_length`, …, see `balance`) and
            `n_unmatched`, the controls that were wanted and could not be had.

        Raises:
            EmptySetError: There are no memorized or no unmemorized sequences.
            OptionError: `n_per` is below 1 or a threshold is out of range.
        """
        matching = self._matching(n_per, seed, threshold, below, token_counts)
        attrs: dict[str, Attr] = {"matching_seed": seed, "n_unmatched": matching.n_unmatched}
        for when, differences in matching.balance.to_dict().items():
            attrs |= {f"smd_{when}_{covariate}": float(smd) for covariate, smd in differences.items()}
        controls = matching.controls
        return controls.with_attrs(**attrs, memorized_threshold=threshold, unmemorized_threshold=below)

    def balance(
        self,
        n_per: int = 1,
        *,
        seed: int = 0,
        threshold: float = 1.0,
        below: float = 0.5,
        token_counts: Int[np.ndarray, "vocab"] | Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """Return how well `matched_controls` (of the same arguments) matches.

        The standardized mean difference of a covariate is (mean of the memorized - mean of the controls) /
        (pooled standard deviation of the memorized and all unmemorized); under 0.1 in size is commonly
        called balanced.

        Returns:
            One row a covariate (`length`, `prefix_len`, `frequency`), columns `before` (against all
            unmemorized sequences) and `after` (against the controls).
        """
        return self._matching(n_per, seed, threshold, below, token_counts).balance

    def summary(self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Return means over sequences with their confidence intervals.

        Shares of sequences (0/1 values) have Wilson's interval, other means the percentile bootstrap over
        sequences. All sequences, then each value of `copies` and of `domain` where the table has them.

        Returns:
            Columns `by` ("all", "copies" or "domain"), `group`, `metric`, `mean`, `low`, `high`, `n`,
            `method`.
        """
        return summarize(self.table, level=level, n_resamples=n_resamples, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Write scores and sequences to one parquet file that `load` reads back without loss."""
        whole = self.sequences.with_table(self.table)
        return write_parquet(whole, path, recall=dict(self.attrs))

    @classmethod
    def load(cls, path: str | Path) -> RecallScores:
        """Read what `save` wrote.

        Raises:
            FileFormatError: The file holds no recall scores.
        """
        whole, settings = read_parquet(path)
        if "recall" not in settings:
            raise FileFormatError(f"{path} holds no recall scores: write them with RecallScores.save")
        bare = whole.table.drop(columns=list(SCORE_COLUMNS), errors="ignore")
        return cls(whole.table, whole.with_table(bare), settings["recall"])

    def to_result(self) -> Result:
        """Return the metrics as a `Result` of kind "recall": dimension `sequence`, groups as coordinates."""
        from memlens.results.result import Result

        arrays = {
            name: ("sequence", self.table[name].to_numpy(dtype=float), LABELS.get(name, {}))
            for name in (*BUILT_IN, *COLUMNS)
            if name in self.table
        }
        coords = sequence_coords(self.table)
        settings = {"sequences": dict(self.sequences.attrs), "criterion": self.criterion, **self.attrs}
        return Result.create(xr.Dataset(arrays, coords), kind="recall", settings=settings, **self.attrs)

    def plot(self, metric: str | None = None, **options: Any) -> go.Figure:
        """Return the figure of `to_result()`: recall against copies, and the histogram of the score."""
        return self.to_result().plot(metric, **options)

    @property
    def _score(self) -> np.ndarray:
        return self.table[self.criterion].to_numpy(dtype=float)

    def _chosen(self, rows: np.ndarray, **attrs: Attr) -> SequenceSet:
        scored = self.sequences.with_table(self.table)
        return scored[rows].with_attrs(criterion=self.criterion, **attrs)

    def _matching(self, n_per: int, seed: int, threshold: float, below: float, token_counts: Any) -> Matching:
        if n_per < 1:
            raise OptionError(f"n_per={n_per}: ask for at least one control a memorized sequence")
        memorized, pool = self.memorized(threshold), self.unmemorized(below)
        best = f"the highest {self.criterion} is {self._score.max():.2f}, the lowest {self._score.min():.2f}"
        if not len(memorized):
            raise EmptySetError(
                f"no sequence is memorized at threshold={threshold} ({best}): lower threshold"
            )
        if not len(pool):
            raise EmptySetError(f"no sequence scores below {below} ({best}): score unmemorized ones too")
        seqs, largest = self.sequences, int(self.sequences.tokens.max())
        found = seqs.tokens.numpy()[seqs.mask.numpy()]
        counts = np.bincount(found) if token_counts is None else np.asarray(token_counts)
        if counts.ndim != 1 or len(counts) <= largest:
            raise SequenceError(
                f"token_counts has shape {counts.shape}, but the sequences hold the token id {largest}: "
                "give one count for each id of the vocabulary"
            )
        return match_controls(memorized, pool, counts, n_per=n_per, seed=seed)

    def __repr__(self) -> str:
        n_exact = int(self.table["exact_match"].to_numpy().sum())
        model = self.attrs.get("model", "a model")
        return f"RecallScores({len(self)} sequences, {n_exact} recalled exactly by {model})"

    def _repr_html_(self) -> str:
        scored = [c for c in ("id", "text", "domain", "copies", *SCORE_COLUMNS) if c in self.table]
        head = self.table[scored].head(5).to_html(escape=True, index=False)
        return f"<p><b>{escape(repr(self))}</b></p>{head}"


register_kind("recall", plot=plot_recall, reading=read_recall)
