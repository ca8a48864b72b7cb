"""Blocks bypassed together: which set takes the most recitation for the least ability?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.choices import BypassMode
from memlens.errors import EmptySetError, OptionError, check_option
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
from memlens.sweeps.run import sweep

Layers = tuple[int, ...]
"""A set of blocks, in order."""


@dataclass(frozen=True, eq=False)
class LayerSetSearch:
    """What bypassing sets of blocks did: chosen on one half of the data, scored on the other.

    Attributes:
        recall: Kind "bypass_sets": exact match, target accuracy and target log-probability
            `(sequence, layers)` of all sequences, both halves.
        accuracy: Kind "task_accuracy" `(sequence, layers)`: the questions of all tasks.
        sets: Layers by their label, in the order of the results.
        table: One row for each set: `layers` (its label), `size`, `kinds` (how it came to be tried),
            `selectivity_chosen` (on the choosing half), and on the scoring half the columns of
            `Tradeoff.table`.
        best: The label that each kind of search chose ("single block", "suffix", "quartile", "greedy",
            "exact", "any").
        choosing: The trade-off on the choosing half.
        scoring: The trade-off on the scoring half.
        settings: Every parameter.
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
        """Return what each kind of search chose, with its score on the half that it did not see.

        Beside it `random_mean` and `random_share`: the mean selectivity, on the scoring half, of the other
        sets of the same size that were not chosen by any search, and the share of them that do as well or
        better (NaN where there is none).
        """
        rows = self.table.set_index("layers")
        found = []
        for kind, label in self.best.items():
            row = rows.loc[label]
            others = self._random_of(int(row["size"]), label)
            found.append(
                {
                    "search": kind,
                    "layers": label,
                    **row.drop("kinds").to_dict(),
                    "random_sets": len(others),
                    "random_mean": float(np.mean(others)) if len(others) else np.nan,
                    "random_share": float(np.mean(others >= row["selectivity"])) if len(others) else np.nan,
                }
            )
        return pd.DataFrame(found)

    def _random_of(self, size: int, label: str) -> np.ndarray:
        table = self.table
        kinds = table["kinds"].str.split(", ")
        unbiased = kinds.map(lambda names: bool({"random", "every set", "single block"} & set(names)))
        same = (table["size"] == size) & unbiased & (table["layers"] != label)
        return table.loc[same, "selectivity"].to_numpy(float)

    def areas(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return the area under the frontier of some families of sets, on the scoring half.

        Of each family only the sets count that are on its frontier on the choosing half, so that no set is
        favored for the noise that it is scored with.

        Returns:
            Columns `family`, `sets` (tried), `on_frontier`, `area`, `low`, `high`; see `frontier_area`.
        """
        kinds = self.table["kinds"].str.split(", ")
        families = {
            name: kinds.map(lambda names, name=name: name in names).to_numpy(bool)
            for name in ("single block", "suffix", "prefix", "random")
        }
        families["any set"] = np.ones(len(kinds), dtype=bool)
        rows = []
        for name, member in families.items():
            if not member.any():
                continue
            places = np.flatnonzero(member)
            kept = places[on_frontier(self.choosing.take(places))]
            area = self.scoring.take(kept).area(level=level)
            rows.append((name, int(member.sum()), len(kept), *area))
        return pd.DataFrame(rows, columns=["family", "sets", "on_frontier", "area", "low", "high"])


_METRICS = ("exact_match", "target_accuracy", "target_logprob")


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
    **options: Any,
) -> LayerSetSearch:
    r"""Bypass sets of blocks together and search for the one with the best selectivity.

    Tried are every single block, every suffix and prefix of the stack, its quartiles; greedy: from the most
    selective block on, the block is added that makes the set most selective, up to `greedy_size` blocks; and
    exact: every set of the layers where these are few, else every set of the `exact_pool` most selective
    single blocks. Sequences, and the questions of each task, are cut in two halves: everything is chosen on
    the first and scored on the second. Random sets of the chosen sizes are the control.

    Args:
        model: A TransformerLens model.
        sequences: Memorized sequences.
        tasks: What the model should still be able to do.
        mode: "identity" or "zero"; see `bypass_attention`.
        over: The cost is the largest ("max") or the "mean" loss over tasks; see `Tradeoff`.
        greedy_size: Blocks of the greedy search's last set.
        exact_layers: A model with at most this many layers is searched exactly, over all sets of layers.
        exact_pool: Blocks of the exact search in deeper models.
        n_random: Random sets of each size that a search came to.
        n_resamples: Of the bootstraps.
        seed: Of the halves, the random sets and the bootstraps.
        out: A folder that keeps finished parts, as for `sweep`; one for each round of the search.
        options: Further options of `sweep`.

    Returns:
        See `LayerSetSearch`; `.best_table()` and `.areas()` are its findings.

    Raises:
        EmptySetError: Fewer than four sequences, or no tasks.
        OptionError: An unknown mode or `over`, or a size below 1.
        ResultError: The model recites nothing, or is above chance on no task.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> some = ml.load_sequences("zoo", model)[::5]
        >>> seqs = ml.score_recall(model, some, generate=False, progress=False).memorized()
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=20)
        >>> small = {"exact_layers": 1, "exact_pool": 2, "progress": False}
        >>> found = ml.bypass.search_layer_sets(model, seqs, tasks, **small)
        >>> sorted(found.best)
        ['any', 'exact', 'greedy', 'quartile', 'single block', 'suffix']
    """
    check_option("over", over, OVER)
    if min(greedy_size, exact_pool) < 1 or n_random < 0:
        raise OptionError(
            f"greedy_size={greedy_size}, exact_pool={exact_pool}, n_random={n_random}: "
            "give sizes of 1 or more, and 0 or more random sets."
        )
    if len(sequences) < 4 or not tasks:
        raise EmptySetError(
            f"{len(sequences)} sequences and {len(tasks)} tasks: halves need four sequences and a task."
        )
    search = _Search(model, sequences, tasks, mode, over, n_resamples, seed, out, options)
    n_layers = Trunk(model).n_layers
    for kind, some in named_layer_sets(n_layers).items():
        search.plan(kind, some)
    everything = n_layers <= exact_layers
    if everything:
        search.plan("every set", _subsets(range(n_layers)))
    search.round()
    if not everything:
        pool = sorted(search.ranked("single block")[:exact_pool], key=lambda layers: layers[0])
        search.plan("exact", _subsets(layer for layers in pool for layer in layers))
    search.greedy(min(greedy_size, n_layers), n_layers)
    search.round()
    search.random(n_random, n_layers)
    search.round()
    settings = {
        "mode": mode, "over": over, "greedy_size": greedy_size,
        "exact": "every set" if everything else f"sets of the best {exact_pool} single blocks",
        "n_random": n_random, "tasks": search.counted, "n_resamples": n_resamples, "seed": seed,
    }  # fmt: skip
    return search.done(settings)


def named_layer_sets(n_layers: int) -> dict[str, list[Layers]]:
    """Return the single blocks, suffixes, prefixes and quartiles of a stack.

    >>> named_layer_sets(4)["suffix"]
    [(0, 1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    """
    every = tuple(range(n_layers))
    return {
        "single block": [(layer,) for layer in every],
        "suffix": [every[layer:] for layer in every],
        "prefix": [every[: layer + 1] for layer in every],
        "quartile": [tuple(part) for part in quartiles(n_layers)],
    }


class _Search:
    """The sets that were tried so far, and what they did."""

    def __init__(
        self,
        model: Any,
        sequences: SequenceSet,
        tasks: Sequence[ChoiceTask],
        mode: BypassMode,
        over: str,
        n_resamples: int,
        seed: int,
        out: str | Path | None,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.sequences, self.tasks, self.over = model, sequences, tasks, over
        self.mode: BypassMode = mode
        self.n_resamples, self.seed, self.out, self.options = n_resamples, seed, out, dict(options)
        self.kinds: dict[Layers, list[str]] = {}
        self.tried: list[Layers] = []
        self.recall: Result | None = None
        self.accuracy: Result | None = None
        self.counted: list[str] = []
        self.rounds = 0

    def plan(self, kind: str, sets: Iterable[Layers]) -> None:
        """Note sets to try in the next round."""
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
        places = {
            name: None if self.out is None else Path(self.out) / f"{name}_{self.rounds}"
            for name in ("recall", "tasks")
        }
        recall = sweep(
            self.model, self.sequences, edits, _METRICS, kind="bypass_sets",
            settings={"mode": self.mode}, out=places["recall"], **self.options,
        )  # fmt: skip
        accuracy = evaluate_tasks(self.model, self.tasks, edits, out=places["tasks"], **self.options)
        self.recall = recall if self.recall is None else _joined(self.recall, recall)
        self.accuracy = accuracy if self.accuracy is None else _joined(self.accuracy, accuracy)
        self.counted = self.counted or tasks_above_chance(accuracy)
        self.tried += new
        self.rounds += 1

    def tradeoff(self, part: int, n_resamples: int) -> Tradeoff:
        """Return the trade-off of all tried sets on one half."""
        assert self.recall is not None
        assert self.accuracy is not None
        return edit_tradeoff(
            take_half(self.recall, part, self.seed), take_half(self.accuracy, part, self.seed, within="task"),
            over=self.over, tasks=self.counted or None, n_resamples=n_resamples, seed=self.seed,
        )  # fmt: skip

    def ranked(self, kind: str | None = None) -> list[Layers]:
        """Return the tried sets of a kind, the most selective on the choosing half first."""
        scores = self.tradeoff(0, 1).selectivity
        order = np.argsort(-scores, kind="stable")
        return [self.tried[i] for i in order if kind is None or kind in self.kinds[self.tried[i]]]

    def greedy(self, size: int, n_layers: int) -> None:
        """Add one block at a time, each time the best one."""
        best = self.ranked("single block")[0]
        self.plan("greedy", [best])
        while len(best) < size:
            wider = [tuple(sorted((*best, layer))) for layer in range(n_layers) if layer not in best]
            self.plan("greedy step", wider)
            self.round()
            best = next(layers for layers in self.ranked() if layers in wider)
            self.plan("greedy", [best])

    def random(self, n: int, n_layers: int) -> None:
        """Plan random sets of the sizes that the searches chose."""
        rng = np.random.default_rng(self.seed)
        chosen = self._best().values()
        for size in sorted({len(layers) for layers in chosen}):
            for _ in range(n):
                drawn = rng.choice(n_layers, size, replace=False)
                self.plan("random", [tuple(sorted(drawn.tolist()))])

    def _best(self) -> dict[str, Layers]:
        exact = "every set" if any("every set" in names for names in self.kinds.values()) else "exact"
        searches = {name: name for name in ("single block", "suffix", "quartile", "greedy")} | {
            "exact": exact
        }
        order = self.ranked()
        found = {
            name: next(layers for layers in order if kind in self.kinds[layers])
            for name, kind in searches.items()
        }
        return {**found, "any": order[0]}

    def done(self, settings: Mapping[str, Any]) -> LayerSetSearch:
        choosing, scoring = (self.tradeoff(part, self.n_resamples) for part in (0, 1))
        labels = [layers_label(layers) for layers in self.tried]
        table = pd.DataFrame(
            {
                "layers": labels,
                "size": [len(layers) for layers in self.tried],
                "kinds": [", ".join(self.kinds[layers]) for layers in self.tried],
                "selectivity_chosen": choosing.selectivity,
            }
        ).join(scoring.table().drop(columns="layers"))
        assert self.recall is not None
        assert self.accuracy is not None
        best = {name: layers_label(layers) for name, layers in self._best().items()}
        sets = dict(zip(labels, self.tried, strict=True))
        return LayerSetSearch(
            self.recall, self.accuracy, sets, table, best, choosing, scoring, dict(settings)
        )


def _subsets(layers: Iterable[int]) -> list[Layers]:
    """Return every set of the layers but the empty one, small ones first."""
    every = sorted(layers)
    return list(chain.from_iterable(combinations(every, size) for size in range(1, len(every) + 1)))


def _joined(first: Result, second: Result) -> Result:
    """Join two results of the same sequences along `layers`; the baseline is the first's."""
    names = [name for name in first.data.data_vars if "layers" in first[str(name)].dims]
    parts = [result.data[names] for result in (first, second)]
    joined = xr.concat(parts, "layers", combine_attrs="override", coords="minimal", compat="override")
    return Result(joined.assign({n: v for n, v in first.data.data_vars.items() if n not in names}))


register_kind("bypass_sets", plot=plot_sets, reading=read_sets, cites=(("menta2025", "attention bypass"),))
