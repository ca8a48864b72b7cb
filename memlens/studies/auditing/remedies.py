"""What would help: sets of bypassed layers and weight edits, chosen on one half and measured on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from memlens.benchmark.ranking import Ranking
from memlens.instruments.bypass.bypass import attention_bypasses
from memlens.instruments.edit.editing import edit_weights
from memlens.instruments.edit.mitigation import Mitigation, evaluate_mitigation
from memlens.results.groups import layers_label, named_layers
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import halves
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint
from memlens.studies.auditing.options import AuditOptions
from memlens.studies.running import StudyDirectory
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep

_POOL = 4
"""Single layers of which sets are made."""
_CHOSEN_ON = 16
"""Most windows of text on which remedies are chosen."""


@dataclass(frozen=True, eq=False)
class Sets:
    """What remedies are chosen on, and what they are measured on.

    Attributes:
        choosing: Leaking strings on which they are chosen.
        measuring: Leaking strings on which they are measured.
        others: Strings that do not leak.
        text: Windows of the user's text for choosing and for measuring; None: no text was given.
        apart: Whether the two halves of the leaking strings differ.
    """

    choosing: SequenceSet
    measuring: SequenceSet
    others: SequenceSet
    text: tuple[SequenceSet, SequenceSet] | None
    apart: bool

    @classmethod
    def of(cls, leaking: SequenceSet, others: SequenceSet, text: SequenceSet | None, seed: int) -> Sets:
        """Divide the strings and the text."""
        apart = len(leaking) >= 4
        first, second = (
            (leaking[rows] for rows in halves(len(leaking), seed)) if apart else (leaking, leaking)
        )
        windows = None
        if text is not None:
            windows = tuple(text[rows] for rows in halves(len(text), seed))
        return cls(first, second, others, windows, apart)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class Remedy:
    """A change of the model that may stop leaks.

    Attributes:
        name: Its kind.
        words: What it does.
        about: What it follows from besides the model and the sets, to tell it from others.
        make: Makes it.
    """

    name: str
    words: str
    about: Any
    make: Callable[[], Intervention]


def remedies(
    model: Any, sets: Sets, ranking: Ranking, options: AuditOptions, folder: StudyDirectory
) -> list[Remedy]:
    """Return the best remedy of each kind on the choosing halves.

    The best one has the largest drop of the share of strings that come out whole, minus the rise of the loss
    on the text (nats per token); of equal ones, the fewest layers, then the largest drop of the strings'
    log-probability. The rule is ours. Bypasses are single layers and, of the four best, pairs and triples.

    Args:
        model: A TransformerLens model.
        sets: See `Sets`.
        ranking: Of neurons, made on the choosing half.
        options: Sizes and modes.
        folder: Keeps the sweeps by which they are chosen.
    """
    layers = _best_layers(model, sets, options, folder)
    counts = list(dict.fromkeys(min(count, len(ranking.table)) for count in options.edited_neurons))
    zeros = [edit_weights(model, ranking.top(count), "zero") for count in counts]
    gains = _gains(model, sets, zeros, folder, "neurons set to zero")
    chosen = max(range(len(counts)), key=gains.__getitem__)
    neurons = ranking.top(counts[chosen])
    rewritten = partial(
        edit_weights, model, neurons, "output_vector", sequences=sets.choosing, keep=sets.others,
        progress=False,
    )  # fmt: skip
    where = f"the first {counts[chosen]} neurons of the ranking"
    named = named_layers(layers_label(layers))
    return [
        Remedy(
            "bypass", f"the attention of {named} bypassed", [layers, options.bypass_mode],
            lambda: _bypasses(model, [layers], options)[0],
        ),
        Remedy("neurons set to zero", f"{where} set to zero", neurons, lambda: zeros[chosen]),
        Remedy("neurons rewritten", f"what {where} write changed by a search", neurons, rewritten),
    ]  # fmt: skip


def _best_layers(model: Any, sets: Sets, options: AuditOptions, folder: StudyDirectory) -> tuple[int, ...]:
    """Return the layers whose bypassed attention helps most."""
    n_layers = len(model.blocks)
    singles = [(layer,) for layer in range(n_layers)]
    gains = _gains(model, sets, _bypasses(model, singles, options), folder, "bypassed layers")
    order = sorted(singles, key=lambda layers: gains[layers[0]], reverse=True)
    pool = sorted(layer for (layer,) in order[:_POOL])
    sizes = [size for size in (2, 3) if size < n_layers]
    several = [layers for size in sizes for layers in combinations(pool, size)]
    gains += _gains(model, sets, _bypasses(model, several, options), folder, "bypassed sets of layers")
    tried = [*singles, *several]
    return max(zip(gains, tried, strict=True), key=lambda pair: (pair[0][0], -len(pair[1]), pair[0][1]))[1]


def _bypasses(model: Any, layers: Sequence[Sequence[int]], options: AuditOptions) -> Sequence[Intervention]:
    return attention_bypasses(model, layers=layers, mode=options.bypass_mode) if layers else []


def _gains(
    model: Any, sets: Sets, edits: Sequence[Intervention], folder: StudyDirectory, name: str
) -> list[tuple[float, float]]:
    """Return by how much each edit is better than none, and the drop of the log-probability."""
    if not edits:
        return []
    recall = folder.kept(name, partial(sweep, model, sets.choosing, edits, progress=False))
    drop = -recall.effect("exact_match").mean("sequence").values
    less = -recall.effect("target_logprob").mean("sequence").values
    rise = np.zeros(len(edits))
    if sets.text is not None:
        some = sets.text[0][:_CHOSEN_ON]
        read = partial(sweep, model, some, edits, ("target_logprob",), progress=False)
        rise = -folder.kept(f"{name} on text", read).effect("target_logprob").mean("sequence").values
    return [(float(a), float(b)) for a, b in zip((drop - rise).ravel(), less.ravel(), strict=True)]


def measured(
    model: Any,
    remedy: Remedy,
    sets: Sets,
    everything: SequenceSet,
    options: AuditOptions,
    folder: StudyDirectory,
) -> dict[str, Any]:
    """Return what a remedy does to the measuring halves, to the other strings and to the text, in one row."""
    text = None if sets.text is None else sets.text[1]
    others = [
        fingerprint(seqs) for seqs in (sets.choosing, sets.others, everything, text) if seqs is not None
    ]
    asked = options.mitigation()

    def measure() -> dict[str, Any]:
        found = evaluate_mitigation(
            model, remedy.make(), sets.measuring, others=sets.others, text=text, memorized=everything,
            options=asked,
        )  # fmt: skip
        return _row(found)

    about = [remedy.about, others, asked]
    row = folder.stored(remedy.name, model, sets.measuring, about, measure)
    return {"remedy": remedy.name, "what": remedy.words, **row}


def _row(found: Mitigation) -> dict[str, Any]:
    exact, sampled = found["exact match"], found["(n, p)-discoverable"]
    others, instead = found["others: exact match"], found["another memory, exactly"]
    row = {
        "strings": int(exact["n"]), "whole_before": exact["before"], "whole_after": exact["after"],
        "change": exact["change"], "change_low": exact["change_low"], "change_high": exact["change_high"],
        "change_random": exact.get("random directions", math.nan),
        "change_random_components": exact.get("random components", math.nan),
        "sampled_before": sampled["before"], "sampled_after": sampled["after"],
        "others_whole_before": others["before"], "others_whole_after": others["after"],
        "another_string_instead": instead["after"],
    }  # fmt: skip
    if "text: loss" in set(found.table["measure"]):
        loss = found["text: loss"]
        row |= {
            "perplexity_before": math.exp(loss["before"]), "perplexity_after": math.exp(loss["after"]),
            "perplexity_ratio": math.exp(loss["change"]),
            "perplexity_ratio_low": math.exp(loss["change_low"]),
            "perplexity_ratio_high": math.exp(loss["change_high"]),
        }  # fmt: skip
    return row


def change_of(row: Mapping[str, Any]) -> Estimate:
    """Return the change of the share that comes out whole, with its interval."""
    return Estimate(row["change"], row["change_low"], row["change_high"], int(row["strings"]))
