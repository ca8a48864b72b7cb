"""`RecallScores`: one row per sequence, and the sets that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from memlens.errors import EmptySetError, FileFormatError, OptionError, SequenceError
from memlens.files import expanded, json_text, parsing, replacing
from memlens.forward.metrics import BUILT_IN, METRICS
from memlens.recall.columns import COLUMNS, LABELS, SCORE_COLUMNS, sequence_coords
from memlens.recall.matching import Matching, match_controls
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_recall
from memlens.results.readings import read_recall
from memlens.results.statistics.intervals import is_binary, mean_interval
from memlens.sequences.parquet import read_columns, read_parquet, write_parquet
from memlens.sequences.set import Attr, SequenceSet

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from memlens.results.result import Result


TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl")
GROUPS = ("copies", "domain")
"""Columns by which rates are given if the table has them."""

_SUMMARIZED = (*BUILT_IN, *(name for name, column in COLUMNS.items() if column.summarized))

# Decided by the column, not by its values: a mean that happens to be 0 everywhere is not a proportion.
_PROPORTIONS = (
    *(name for name in BUILT_IN if METRICS[name].proportion),
    *(name for name, column in COLUMNS.items() if column.proportion),
)


def _summary(table: pd.DataFrame, by: str, group: object, options: dict[str, Any]) -> pd.DataFrame:
    """Return one row per metric; values that are not finite are excluded, and `n` counts the others."""
    names = [name for name in _SUMMARIZED if name in table]
    values = table[names].to_numpy(dtype=float)
    array = xr.DataArray(np.where(np.isfinite(values), values, np.nan), dims=("sequence", "metric"))
    binary = np.array([n in _PROPORTIONS and is_binary(values[:, i]) for i, n in enumerate(names)])
    found = pd.DataFrame({"by": by, "group": pd.Series([group] * len(names), dtype=object), "metric": names})
    # All metrics of a kind at once: they share their resamples.
    for rows, method in ((np.flatnonzero(binary), "wilson"), (np.flatnonzero(~binary), "bootstrap")):
        if len(rows):
            interval = mean_interval(array[:, rows], method=method, **options)
            found.loc[rows, ["mean", "low", "high"]] = interval.values.T
            found.loc[rows, "n"] = interval["n"].values
            found.loc[rows, "method"] = method
    return found.astype({"n": int})


def criterion_of(table: pd.DataFrame) -> str:
    """Return the column of a table of scores that decides what is memorized: `RecallScores.criterion`."""
    return "memorization_score" if "memorization_score" in table else "target_accuracy"


def read_scores(path: str | Path) -> pd.DataFrame:
    """Return the ids, groups and numbers of a file of scores, without its texts and tokens."""
    return read_columns(path, ("id", *GROUPS, *BUILT_IN, *COLUMNS))


def summarized(table: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Return the means of a table of scores with their intervals; see `RecallScores.summary`."""
    parts = [_summary(table, "all", "all", options)]
    for column in (name for name in GROUPS if name in table):
        groups = table.groupby(column, sort=True)
        parts += [_summary(part, column, value, options) for value, part in groups]
    return pd.concat(parts, ignore_index=True)


class _MatchingOptions(TypedDict, total=False):
    seed: int
    threshold: float
    below: float
    token_counts: Int[np.ndarray, "vocab"] | Sequence[int] | None


def table_suffix(path: str | Path) -> str:
    """Return the suffix of a table that is to be written.

    Raises:
        OptionError: It is not one of `TABLE_SUFFIXES`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise OptionError(f"{path} ends in {suffix!r}: a table is written as {', '.join(TABLE_SUFFIXES)}.")
    return suffix


def write_table(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table in the format of the suffix: `.parquet`, or `.csv` or `.jsonl` with lists as JSON.

    Raises:
        OptionError: Another suffix.
        WriteError: The file cannot be written.
    """
    suffix = table_suffix(path)
    with replacing(path) as part:
        if suffix == ".parquet":
            frame.to_parquet(part, index=False)
        elif suffix == ".csv":
            cells = frame.map(lambda value: json_text(value) if isinstance(value, list | dict) else value)
            cells.to_csv(part, index=False)
        else:
            lines = (json_text(row) + "\n" for row in frame.to_dict("records"))
            part.write_text("".join(lines), encoding="utf-8")
    return expanded(path)


@dataclass(frozen=True, eq=False)
class RecallScores:
    """How well a model recalled each sequence of a set.

    Attributes:
        table: One row per sequence: the set's own columns and `SCORE_COLUMNS` (see `score_recall`).
        sequences: The set that was scored, in the same order.
        attrs: The model's facts and the settings.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:3]
        >>> recall = ml.score_recall(model, seqs, generate=False, progress=False)
        >>> len(recall), recall.criterion
        (3, 'target_accuracy')
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

        Both are 1 for exact matches only. Below 1 they differ: the latter, teacher-forced, is more generous.
        """
        return criterion_of(self.table)

    def memorized(self, threshold: float = 1.0) -> SequenceSet:
        """Return the sequences whose score is at least `threshold`; by default 1 (exact matches).

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

        With the default 0.5, mostly recalled sequences are in neither set.

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
        difference, where one token of difference in prefix or continuation length outweighs any difference
        in frequency. Frequency is the mean over a sequence's tokens of ``log(1 + count)``.

        Args:
            n_per: Controls per memorized sequence.
            seed: Decides between equally good controls.
            threshold: As for `memorized`.
            below: As the threshold of `unmemorized`.
            token_counts: How often each token id occurs in the training corpus; by default counted in the
                scored set.

        Returns:
            The controls, in the order of the memorized sequences; their table also has `matched_to` (an id),
            `length_difference` (tokens) and `frequency_difference`. The attributes have the standardized mean
            differences before and after matching (`smd_before_length`, …, see `balance`) and `n_unmatched`,
            the number of controls that were wanted and not found.

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

    def balance(self, n_per: int = 1, **options: Unpack[_MatchingOptions]) -> pd.DataFrame:
        """Return how well `matched_controls` matches, which has the same arguments.

        The standardized mean difference of a covariate is (mean of the memorized - mean of the controls) /
        (pooled standard deviation of the memorized and all unmemorized); under 0.1 in size is commonly
        called balanced.

        Returns:
            One row per covariate (`length`, `prefix_len`, `frequency`), columns `before` (against all
            unmemorized sequences) and `after` (against the controls).
        """
        return self._matching(n_per, **options).balance

    def summary(self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Return means over sequences with their confidence intervals.

        Shares of sequences (0/1 values) have Wilson's interval, other means the percentile bootstrap over
        sequences. Rows are for all sequences, then for each value of `copies` and of `domain` if the table
        has them. Values that are not finite (a log-probability of minus infinity) are excluded.

        Returns:
            Columns `by` ("all", "copies" or "domain"), `group`, `metric`, `mean`, `low`, `high`, `n`,
            `method`.
        """
        return summarized(self.table, level=level, n_resamples=n_resamples, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Write scores and sequences to one file, in the format of its suffix.

        Args:
            path: `.parquet`, which `load` reads back without loss; or for other programs `.csv` or `.jsonl`
                (one object per line), with lists as JSON.

        Raises:
            OptionError: Another suffix.
            WriteError: The file cannot be written.

        Example:
            >>> import memlens as ml, tempfile
            >>> model = ml.load_model("zoo/pythia-s")
            >>> recall = ml.score_recall(model, ml.load_sequences("zoo", model)[:2], progress=False)
            >>> pd.read_csv(recall.save(f"{tempfile.mkdtemp()}/recall.csv"))["exact_match"].tolist()
            [0, 0]
        """
        if table_suffix(path) == ".parquet":
            whole = self.sequences.with_table(self.table)
            return write_parquet(whole, path, recall=dict(self.attrs))
        frame = self.table.assign(tokens=self.sequences.rows(), prefix_len=self.sequences.prefix_len.numpy())
        return write_table(frame, path)

    @classmethod
    def load(cls, path: str | Path) -> RecallScores:
        """Read what `save` wrote.

        Raises:
            FileFormatError: The file contains no recall scores.
        """
        whole, settings = read_parquet(path)
        if "recall" not in settings:
            raise FileFormatError(f"{path} contains no recall scores: write them with RecallScores.save")
        bare = whole.table.drop(columns=list(SCORE_COLUMNS), errors="ignore")
        with parsing(path):
            scores = cls(whole.table, whole.with_table(bare), {**settings["recall"]})
            whole.table[[n for n in (*BUILT_IN, *COLUMNS) if n in whole.table]].to_numpy(dtype=float)
            scores.table[scores.criterion]
        return scores

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

    def _matching(
        self,
        n_per: int,
        seed: int = 0,
        threshold: float = 1.0,
        below: float = 0.5,
        token_counts: Int[np.ndarray, "vocab"] | Sequence[int] | None = None,
    ) -> Matching:
        if n_per < 1:
            raise OptionError(f"n_per={n_per}: give at least one control per memorized sequence")
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
                f"token_counts has shape {counts.shape}, but the sequences contain the token id {largest}: "
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
