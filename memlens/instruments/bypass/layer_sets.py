"""Layers bypassed together: which set removes the most recitation for the least loss of ability?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.choices import BypassMode
from memlens.errors import EmptySetError, OptionError, UnfinishedError, check_option
from memlens.forward.exclusive import computes
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.bypass import attention_bypasses
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.results.groups import layers_label, quartiles, take_half
from memlens.results.kinds import register_kind
from memlens.results.plots.tasks import plot_sets
from memlens.results.readings import read_sets
from memlens.results.result import Result
from memlens.results.statistics.tradeoff import OVER, Tradeoff, edit_tradeoff, on_frontier, tasks_above_chance
from memlens.sequences.set import SequenceSet
from memlens.store.sharing import Part
from memlens.sweeps.run import sweep

Layers = tuple[int, ...]
"""A set of layers, in order."""


@dataclass(frozen=True, eq=False)
class LayerSetSearch:
    """The effects of bypassing sets of layers, chosen on one half of the data and scored on the other.

    Attributes:
        recall: Kind "bypass_sets": exact match, target accuracy and target log-probability
            `(sequence, layers)` of all sequences, both halves.
        accuracy: Kind "task_accuracy" `(sequence, layers)`: the questions of all tasks.
        sets: Layers by their label, in the order of the results.
        table: One row per set: `layers` (its label), `size`, `kinds` (the searches that tried it),
            `selectivity_chosen` (on the choosing half), and on the scoring half the columns of
            `Tradeoff.table`.
        best: The label that each kind of search chose ("single layer", "suffix", "quartile", "greedy",
            "exact", "any").
        choosing: The trade-off on the choosing half.
        scoring: The trade-off on the scoring half.
        settings: All parameters.
    """

    recall: Result
    accuracy: Result
    sets: Mapping[str, Layers]
    table: pd.DataFrame
    best: Mapping[str, str]
    choosing: Tradeoff
    scoring: Tradeoff
    settings: Mapping[str, Any]

    def best_table(self) -> pd.DataFrame:
        """Return the choice of each kind of search, with its score on the half that it did not see.

        `random_mean` is the mean selectivity, on the scoring half, of the other sets of the same size that no
        search chose, and `random_share` the share of these sets with the same or a higher selectivity; NaN
        if there are none.
        """
        table = self.table.set_index("layers")
        unbiased = self._of_kind("random", "every set", "single layer")
        found = []
        for kind, label in self.best.items():
            row = table.loc[label]
            same = unbiased & (table["size"] == row["size"]) & (table.index != label)
            others = table.loc[same, "selectivity"]
            found.append(
                {
                    "search": kind,
                    "layers": label,
                    **row.drop("kinds").to_dict(),
                    "random_sets": len(others),
                    "random_mean": others.mean(skipna=False),
                    "random_share": (others >= row["selectivity"]).mean(),
                }
            )
        return pd.DataFrame(found)

    def _of_kind(self, *names: str) -> np.ndarray:
        """Which sets a search of one of these kinds tried."""
        return self.table["kinds"].map(lambda kinds: bool(set(names) & set(kinds.split(", ")))).to_numpy(bool)

    def areas(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return the area under the frontier of each family of sets, on the scoring half.

        Only the sets that are on the frontier of their family on the choosing half count, so that no set is
        favored by the noise in its score.

        Returns:
            Columns `family`, `sets` (tried), `on_frontier`, `area`, `low`, `high`; see `frontier_area`.
        """
        families = {name: self._of_kind(name) for name in ("single layer", "suffix", "prefix", "random")}
        families["any set"] = np.ones(len(self.table), dtype=bool)
        rows = []
        for name, member in families.items():
            if member.any():
                places = np.flatnonzero(member)
                kept = places[on_frontier(self.choosing.take(places))]
                rows.append((name, len(places), len(kept), *self.scoring.take(kept).area(level=level)))
        return pd.DataFrame(rows, columns=["family", "sets", "on_frontier", "area", "low", "high"])


_METRICS = ("exact_match", "target_accuracy", "target_logprob")


@computes
def search_layer_sets(
    model: Any,
    sequences: SequenceSet,
    tasks: Sequence[ChoiceTask],
    *,
    mode: BypassMode = "identity",
    over: str = "max",
    greedy_size: int = 4,
    exact_layers: int = 7,
    exact_pool: int = 5,
    n_random: int = 8,
    n_resamples: int = 2000,
    seed: int = 0,
    out: str | Path | None = None,
    part: Part | None = None,
    **options: Any,
) -> LayerSetSearch:
    r"""Bypass sets of layers together and search for the one with the best selectivity.

    The search tries every single layer, every suffix and prefix of the layers, and their quartiles. The
    greedy search starts with the most selective layer and adds the layer that makes the set most selective,
    up to `greedy_size` layers. The exact search tries every set of layers if there are few of them, and
    otherwise every set of the `exact_pool` most selective single layers. The sequences, and the questions of
    each task, are divided into two halves: everything is chosen on the first and scored on the second.
    Random sets of the chosen sizes serve for comparison.

    Args:
        model: A TransformerLens model.
        sequences: Memorized sequences.
        tasks: The abilities that the model should keep.
        mode: "identity" or "zero"; see `bypass_attention`.
        over: Whether the cost is the largest ("max") or the "mean" loss over tasks; see `Tradeoff`.
        greedy_size: Number of layers in the last set of the greedy search.
        exact_layers: Models with at most this many layers are searched over every set of layers.
        exact_pool: Number of layers in the exact search of deeper models.
        n_random: Random sets of each size that a search reached.
        n_resamples: Resamples of the bootstraps.
        seed: Seed of the halves, the random sets and the bootstraps.
        out: A folder that keeps finished parts, as for `sweep`; one for each round of the search.
        part: Only a share of the first round's parts, as for `sweep`. Later rounds follow from the first:
            whoever finds it done does them alone.
        options: Further options of `sweep`.

    Returns:
        See `LayerSetSearch`; `.best_table()` and `.areas()` are its findings.

    Raises:
        EmptySetError: Fewer than four sequences, or no tasks.
        OptionError: An unknown mode or `over`, or a size below 1.
        ResultError: The model recites nothing, or is not above chance on any task.
        UnfinishedError: With `part`: this share is done, and parts of others are missing.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> some = ml.load_sequences("zoo", model)[::5]
        >>> seqs = ml.score_recall(model, some, generate=False, progress=False).memorized()
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=20)
        >>> small = {"exact_layers": 1, "exact_pool": 2, "progress": False}
        >>> found = ml.bypass.search_layer_sets(model, seqs, tasks, **small)
        >>> sorted(found.best)
        ['any', 'exact', 'greedy', 'quartile', 'single layer', 'suffix']
    """
    check_option("over", over, OVER)
    if min(greedy_size, exact_pool) < 1 or n_random < 0:
        raise OptionError(
            f"greedy_size={greedy_size}, exact_pool={exact_pool}, n_random={n_random}: "
            "give sizes of at least 1, and at least 0 random sets."
        )
    if len(sequences) < 4 or not tasks:
        raise EmptySetError(
            f"{len(sequences)} sequences and {len(tasks)} tasks: give at least four sequences and one task."
        )
    n_layers = Trunk(model).n_layers
    search = _Search(model, n_layers, sequences, tasks, mode, over, seed, out, options, part)
    for kind, some in named_layer_sets(n_layers).items():
        search.plan(kind, some)
    everything = n_layers <= exact_layers
    if everything:
        search.plan("every set", _subsets(range(n_layers)))
    search.round()
    if not everything:
        pool = sorted(search.ranked("single layer")[:exact_pool], key=lambda layers: layers[0])
        search.plan("exact", _subsets(layer for layers in pool for layer in layers))
    search.greedy(min(greedy_size, n_layers))
    search.round()
    search.random(n_random)
    search.round()
    settings = {
        "mode": mode, "over": over, "greedy_size": greedy_size,
        "exact": "every set" if everything else f"sets of the best {exact_pool} single layers",
        "n_random": n_random, "tasks": search.counted, "n_resamples": n_resamples, "seed": seed,
    }  # fmt: skip
    return search.done(settings, n_resamples)


def named_layer_sets(n_layers: int) -> dict[str, list[Layers]]:
    """Return the single layers, suffixes, prefixes and quartiles of the layers.

    >>> named_layer_sets(4)["suffix"]
    [(0, 1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    """
    every = tuple(range(n_layers))
    return {
        "single layer": [(layer,) for layer in every],
        "suffix": [every[layer:] for layer in every],
        "prefix": [every[: layer + 1] for layer in every],
        "quartile": [tuple(part) for part in quartiles(n_layers)],
    }


@dataclass
class _Search:
    """The sets that were tried so far, and their effects."""

    model: Any
    n_layers: int
    sequences: SequenceSet
    tasks: Sequence[ChoiceTask]
    mode: BypassMode
    over: str
    seed: int
    out: str | Path | None
    options: Mapping[str, Any]
    part: Part | None = None  # of the first round
    kinds: dict[Layers, list[str]] = field(default_factory=dict)
    tried: list[Layers] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)  # of recall and of the tasks, all rounds joined
    counted: list[str] = field(default_factory=list)
    rounds: int = 0

    def plan(self, kind: str, sets: Iterable[Layers]) -> None:
        """Add sets to try in the next round."""
        for layers in sets:
            names = self.kinds.setdefault(layers, [])
            if kind not in names:
                names.append(kind)

    def round(self) -> None:
        """Try the sets that were planned and not tried yet."""
        new = [layers for layers in self.kinds if layers not in self.tried]
        if not new:
            return
        edits = attention_bypasses(self.model, layers=new, mode=self.mode)
        folders = [
            None if self.out is None else Path(self.out) / f"{name}_{self.rounds}"
            for name in ("recall", "tasks")
        ]
        recite = partial(
            sweep, self.model, self.sequences, edits, _METRICS, kind="bypass_sets",
            settings={"mode": self.mode}, out=folders[0], **self.options,
        )  # fmt: skip
        answer = partial(evaluate_tasks, self.model, self.tasks, edits, out=folders[1], **self.options)
        if self.part is None or self.rounds:
            found = [recite(), answer()]
        else:
            found = _shared([recite, answer], self.part)
        pairs = zip(self.results, found, strict=True) if self.results else ()
        self.results = [_joined(*pair) for pair in pairs] or found
        self.counted = self.counted or tasks_above_chance(found[1])
        self.tried += new
        self.rounds += 1

    def tradeoff(self, part: int, n_resamples: int) -> Tradeoff:
        """Return the trade-off of all tried sets on one half."""
        recall, accuracy = self.results
        return edit_tradeoff(
            take_half(recall, part, self.seed), take_half(accuracy, part, self.seed, within="task"),
            over=self.over, tasks=self.counted or None, n_resamples=n_resamples, seed=self.seed,
        )  # fmt: skip

    def ranked(self, kind: str | None = None) -> list[Layers]:
        """Return the tried sets of a kind, starting with the most selective on the choosing half."""
        scores = self.tradeoff(0, 1).selectivity
        order = np.argsort(-scores, kind="stable")
        return [self.tried[i] for i in order if kind is None or kind in self.kinds[self.tried[i]]]

    def greedy(self, size: int) -> None:
        """Add one layer at a time, the best one each time."""
        best = self.ranked("single layer")[0]
        self.plan("greedy", [best])
        while len(best) < size:
            wider = [tuple(sorted((*best, layer))) for layer in range(self.n_layers) if layer not in best]
            self.plan("greedy step", wider)
            self.round()
            best = next(layers for layers in self.ranked() if layers in wider)
            self.plan("greedy", [best])

    def random(self, n: int) -> None:
        """Plan random sets of the sizes that the searches chose."""
        rng = np.random.default_rng(self.seed)
        for size in sorted({len(layers) for layers in self._best().values()}):
            for _ in range(n):
                drawn = rng.choice(self.n_layers, size, replace=False)
                self.plan("random", [tuple(sorted(drawn.tolist()))])

    def _best(self) -> dict[str, Layers]:
        """The most selective set of each kind of search, on the choosing half."""
        order = self.ranked()
        searches = {name: {name} for name in ("single layer", "suffix", "quartile", "greedy")}
        searches["exact"] = {"exact", "every set"}
        best = {
            name: next(layers for layers in order if kinds & set(self.kinds[layers]))
            for name, kinds in searches.items()
        }
        return {**best, "any": order[0]}

    def done(self, settings: Mapping[str, Any], n_resamples: int) -> LayerSetSearch:
        choosing, scoring = (self.tradeoff(part, n_resamples) for part in (0, 1))
        labels = [layers_label(layers) for layers in self.tried]
        table = pd.DataFrame(
            {
                "layers": labels,
                "size": [len(layers) for layers in self.tried],
                "kinds": [", ".join(self.kinds[layers]) for layers in self.tried],
                "selectivity_chosen": choosing.selectivity,
            }
        ).join(scoring.table().drop(columns="layers"))
        best = {name: layers_label(layers) for name, layers in self._best().items()}
        sets = dict(zip(labels, self.tried, strict=True))
        recall, accuracy = self.results
        return LayerSetSearch(recall, accuracy, sets, table, best, choosing, scoring, dict(settings))


def _subsets(layers: Iterable[int]) -> list[Layers]:
    """Return every non-empty set of the layers, small ones first."""
    every = sorted(layers)
    return [some for size in range(1, len(every) + 1) for some in combinations(every, size)]


def _shared(works: Sequence[Callable[..., Result]], part: Part) -> list[Result]:
    """Do a share of several sweeps; all are tried before one that lacks parts of others raises."""
    found: list[Result] = []
    errors: list[UnfinishedError] = []
    for work in works:
        try:
            found.append(work(part=part))
        except UnfinishedError as error:
            errors.append(error)
    if errors:
        missing = [name for error in errors for name in error.missing]
        raise UnfinishedError("\n".join(map(str, errors)), missing)
    return found


def _joined(first: Result, second: Result) -> Result:
    """Join two results of the same sequences along `layers`; the baseline is the first's."""
    names = [name for name in first.data.data_vars if "layers" in first[str(name)].dims]
    parts = [result.data[names] for result in (first, second)]
    joined = xr.concat(parts, "layers", combine_attrs="override", coords="minimal", compat="override")
    return Result(joined.assign({n: v for n, v in first.data.data_vars.items() if n not in names}))


register_kind("bypass_sets", plot=plot_sets, reading=read_sets, cites=(("menta2025", "attention bypass"),))
