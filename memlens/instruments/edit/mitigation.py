"""What a mitigation must answer, in one table: is the target gone, what comes instead, what else is lost?"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field, NonNegativeInt, PositiveInt
from rapidfuzz.distance import Levenshtein
from torch import nn

from memlens.errors import EmptySetError, MemlensError, OptionError, SequenceError
from memlens.forward.exclusive import computes
from memlens.instruments.donors import check_donor
from memlens.instruments.edit.editing import control_edits
from memlens.instruments.edit.folding import as_weight_edit
from memlens.instruments.patch.depth import unlearning_depth
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.load import load_model
from memlens.options import options_class
from memlens.recall.sampling import Sampling
from memlens.recall.score import score_recall
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import mean_interval
from memlens.sequences.corrupt import corrupt
from memlens.sequences.natural import text_windows
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention, as_interventions

_TEXT_WINDOW = 128


@options_class
class MitigationOptions:
    """How a mitigation is evaluated.

    Example:
        >>> import memlens as ml
        >>> ml.instruments.MitigationOptions(n_samples=20).n_samples
        20
    """

    shorter: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.25)
    """Shares of each target's prefix that are kept, from its end."""
    replaced: tuple[PositiveInt, ...] = (1, 4)
    """Numbers of tokens of each target's prefix that are replaced by others."""
    near: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Edit similarity, by tokens, from which a continuation counts as nearly verbatim."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are sampled for (n, p)-discoverability."""
    n_samples: PositiveInt = 100
    """n: samples within which a target counts as discoverable …"""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """… with at least this probability, p."""
    n_random: NonNegativeInt = 3
    """Random edits of each kind of control."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Of the replaced tokens and the random edits."""


@dataclass(frozen=True, eq=False)
class Mitigation:
    """What `evaluate_mitigation` found; shows as its table.

    Attributes:
        table: One row per measure: `question`, `measure`, `unit`, `n` (sequences, questions or windows),
            `before`, `after`, the mean `change` with `change_low` and `change_high`, and for each kind of
            control the mean change under it, `<control>`, `<control>_low`, `<control>_high`. Intervals are
            over the units of `n`, of paired changes; the edits of one kind of control are averaged first.
        instead: One row per target after which another memorized continuation comes: `under` ("unchanged",
            "edited"), `target`, `other` (ids), `similarity`, `generated` (token ids), `text`.
        settings: The parameters; under `without_controls` why a kind of control is missing, and under
            `without_prompts` why a number of replaced tokens is.
    """

    table: pd.DataFrame
    instead: pd.DataFrame
    settings: Mapping[str, Any]

    def __getitem__(self, measure: str) -> dict[Any, Any]:
        """Return the row of a measure, by column.

        Raises:
            OptionError: It was not measured.
        """
        rows = self.table.loc[self.table["measure"] == measure]
        if not len(rows):
            raise OptionError(f"{measure!r} was not measured: {', '.join(self.table['measure'])}.")
        return rows.iloc[0].to_dict()

    def _repr_html_(self) -> str:
        head = f"<h4>{html.escape(str(self.settings['edit']))}</h4>"
        return head + self.table.to_html(index=False, float_format="{:.3f}".format, na_rep="")


_Values = dict[tuple[str, str, str], np.ndarray]
"""A value per unit, by question, measure and unit."""
_GOES, _INSTEAD, _KEPT = "Does the target go?", "Does another memory come instead?", "What else is lost?"
_DEPTH = "Is it gone inside?"


@computes
def evaluate_mitigation(
    model: Any,
    edit: Intervention | Sequence[Intervention] | nn.Module | str | Path,
    target: SequenceSet,
    *,
    others: SequenceSet,
    text: SequenceSet | str | Path | None = None,
    tasks: Sequence[ChoiceTask] = (),
    neighbors: SequenceSet | None = None,
    memorized: SequenceSet | None = None,
    retain: Any = None,
    controls: Mapping[str, Sequence[Intervention]] | None = None,
    options: MitigationOptions | None = None,
) -> Mitigation:
    """Measure what an edit, a bypass or an edited model does to a memory and to everything else.

    - *Does the target go?* Greedily (exact match, memorization score, nearly verbatim), by sampling ((n,
      p)-discoverable), in log-probability, from shorter and from damaged prefixes, and of the `neighbors`.
    - *Does another memory come instead?* The greedy continuations of the targets' prefixes are compared with
      the continuations of all other sequences, over the shorter length: exactly and nearly verbatim.
    - *What else is lost?* Recall of the `others`, accuracy on `tasks`, and the loss on a text of your own
      (its exponential is the perplexity).
    - *Is it gone inside?* The unlearning depth, where there is a model that never learned the target.

    For weight edits, and interventions that weights can express, random edits of the same size are measured
    too: random directions for the same output vectors, and other components of the same layers
    (`memlens.edits.control_edits`).

    Args:
        model: The unchanged model.
        edit: Interventions on it (such as a weight edit or a bypass), which are applied together; or the
            edited model, as a TransformerLens model or the folder of its checkpoint.
        target: What is to be forgotten.
        others: Other memorized sequences, which are to be kept; none of them in `target`.
        text: A text file, or windows of one, for the loss; see `memlens.sequences.natural.text_windows`.
        tasks: Tasks, such as those of `memlens.tasks.local_tasks`.
        neighbors: Sequences that are close to the target in the corpus, such as its near duplicates.
        memorized: All memorized sequences, where `others` are only some of them: what comes instead of the
            target is looked for in these too.
        retain: A model that never learned the target, such as a clean twin, for the depth.
        controls: Interventions to compare with, by the name of a kind of control; those of one kind are
            averaged. By default the random edits.
        options: Parameters.

    Returns:
        See `Mitigation`.

    Raises:
        EmptySetError: `target` or `others` is empty.
        OptionError: A sequence of `others` is in `target`.
        DonorError: An edited model does not fit the model.

    Source: the list of questions is ours. That an edit may replace one memorized string by another is a
    warning from the literature on memory edits.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> often = seqs[seqs.table["copies"].to_numpy() == 256]
        >>> edit = ml.edits.edit_weights(model, ["L0H4", "L0H1"])
        >>> quick = ml.instruments.MitigationOptions(shorter=(0.5,), replaced=(), n_random=1)
        >>> evaluate = ml.instruments.evaluate_mitigation
        >>> found = evaluate(model, edit, often[:2], others=often[2:6], options=quick)
        >>> float(found["exact match"]["before"]), found.table["question"].unique().tolist()
        (1.0, ['Does the target go?', 'Does another memory come instead?', 'What else is lost?'])
    """
    options = options or MitigationOptions()
    if not isinstance(options, MitigationOptions):
        raise OptionError(f"options={options!r}: give memlens.instruments.MitigationOptions(…).")
    for name, seqs in (
        ("target", target),
        ("others", others),
        ("neighbors", neighbors),
        ("memorized", memorized),
    ):
        if seqs is not None and not isinstance(seqs, SequenceSet):
            raise SequenceError(
                f"{name} is a {type(seqs).__name__}, not a SequenceSet: read it with memlens.load_sequences "
                "first."
            )
    for name, seqs in (("target", target), ("others", others)):
        if not len(seqs):
            raise EmptySetError(f"{name} has no sequences: give at least one.")
    known = {tuple(row) for row in target.rows()}
    again = [i for i, row in zip(others.ids, others.rows(), strict=True) if tuple(row) in known]
    if again:
        raise OptionError(f"{again[0]!r} is in target and in others: give others without the targets.")
    if isinstance(text, (str, Path)):
        text = text_windows(model.tokenizer, text, _TEXT_WINDOW, model=model)
    measuring = _Measuring(target, others, text, tasks, neighbors, memorized, options)
    variant = _variant(model, edit)
    given = None if controls is None else _given_controls(controls)
    found, missing = (given, {}) if given is not None else _controls(model, variant, options)
    with variant.running() as edited:
        after, instead = measuring.values(edited)
    before, already = measuring.values(model)
    compared: dict[str, list[_Values]] = {}
    for kind, edits in found.items():
        for control in edits:
            with applied(model, control):
                compared.setdefault(kind, []).append(measuring.values(model)[0])
    if retain is not None:
        key = (_DEPTH, "unlearning depth", "share")
        after[key] = _depth(model, target, retain, variant.edited)
        before[key] = np.zeros(len(target))
        for kind, edits in found.items():
            for values, control in zip(compared[kind], edits, strict=True):
                values[key] = _depth(model, target, retain, control)
    rows = [_row(key, before, after, compared, options) for key in before]
    tables = [frame.assign(under=under) for under, frame in (("unchanged", already), ("edited", instead))]
    settings: dict[str, Any] = {
        **asdict(options),
        "edit": variant.name,
        "targets": len(target),
        "others": len(others),
    }
    settings |= {"without_controls": missing, "without_prompts": measuring.too_short()}
    return Mitigation(pd.DataFrame(rows), pd.concat(tables, ignore_index=True), settings)


@dataclass(frozen=True)
class _Variant:
    """The edited model: interventions on the model, or another model."""

    name: str
    edited: Any
    running: Callable[[], Any]


def _variant(model: Any, edit: Any) -> _Variant:
    if isinstance(edit, (str, Path)):
        edit = load_model(edit, device=next(model.parameters()).device)
    if isinstance(edit, nn.Module):
        check_donor(model, edit)

        @contextmanager
        def other() -> Iterator[Any]:
            yield edit

        return _Variant(str(getattr(edit.cfg, "model_name", "edited model")), edit, other)
    some = as_interventions(edit)
    return _Variant(" + ".join(one.name for one in some), some, lambda: applied(model, *some))


def _controls(
    model: Any, variant: _Variant, options: MitigationOptions
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The random edits of the same size by kind, and why a kind is missing."""
    found: dict[str, list[Any]] = {}
    missing: dict[str, str] = {}
    for name, kind in (("random directions", "direction"), ("random components", "components")):
        if not options.n_random:
            continue
        if not isinstance(variant.edited, list) or len(variant.edited) != 1:
            missing[name] = "they are made for a single edit of the model: give controls=."
            continue
        try:
            edit = as_weight_edit(model, variant.edited[0])
            found[name] = control_edits(model, edit, kind, n=options.n_random, seed=options.seed)  # pyright: ignore[reportArgumentType]
        except MemlensError as error:
            missing[name] = str(error)
    return found, missing


def _given_controls(controls: Any) -> dict[str, list[Intervention]]:
    """Return controls of the caller's own, each kind as a list."""
    if not isinstance(controls, Mapping):
        raise OptionError(
            f"controls is a {type(controls).__name__}: give interventions by the name of a kind of control."
        )
    taken = ("question", "measure", "unit", "n", "before", "after", "change")
    for kind in controls:
        if str(kind).removesuffix("_low").removesuffix("_high") in taken:
            raise OptionError(f"controls: {kind!r} is a column of the table, give the kind another name.")
    return {str(kind): as_interventions(some) for kind, some in controls.items()}


def _depth(model: Any, target: SequenceSet, retain: Any, edited: Any) -> np.ndarray:
    result = unlearning_depth(model, target, retain=retain, edited=edited, progress=False)
    return result["depth"].values.astype(float)


@dataclass(frozen=True)
class _Measuring:
    """What is measured on each variant of the model."""

    target: SequenceSet
    others: SequenceSet
    text: SequenceSet | None
    tasks: Sequence[ChoiceTask]
    neighbors: SequenceSet | None
    memorized: SequenceSet | None
    options: MitigationOptions

    def values(self, model: Any) -> tuple[_Values, pd.DataFrame]:
        """Return all measures, and what comes instead of the targets."""
        options = self.options
        scores = score_recall(
            model, self.target, metrics=("sampling", "near_verbatim"), sampling=options.sampling,
            n_samples=options.n_samples, probability=options.probability, progress=False,
        ).table  # fmt: skip
        found: _Values = {}

        def put(question: str, measure: str, values: Any, unit: str = "share") -> None:
            found[question, measure, unit] = np.asarray(values, dtype=float)

        put(_GOES, "exact match", scores["exact_match"])
        put(_GOES, "memorization score", scores["memorization_score"])
        put(_GOES, "nearly verbatim", scores["edit_similarity"] >= options.near)
        put(_GOES, "(n, p)-discoverable", scores["np_discoverable"])
        put(_GOES, "log-probability", scores["target_logprob"], "nats per token")
        for name, seqs in self._prompts().items():
            put(_GOES, name, _teacher_forced(model, seqs)["exact_match"])
        instead = self._instead(model, scores)
        came = set(instead["target"])
        exact = set(instead["target"][instead["similarity"] == 1])
        ids = self.target.ids
        put(_INSTEAD, "another memory, exactly", [i in exact for i in ids])
        put(_INSTEAD, "another memory, nearly verbatim", [i in came for i in ids])
        kept = _teacher_forced(model, self.others)
        put(_KEPT, "others: exact match", kept["exact_match"])
        put(_KEPT, "others: log-probability", kept["target_logprob"], "nats per token")
        if self.tasks:
            accuracy = evaluate_tasks(model, self.tasks)
            for task in self.tasks:
                own = accuracy["task"].values == task.name
                put(_KEPT, f"{task.name}: accuracy", accuracy["accuracy"].values[own])
        if self.text is not None:
            put(_KEPT, "text: loss", -_teacher_forced(model, self.text)["target_logprob"], "nats per token")
        return found, instead

    def _prompts(self) -> dict[str, SequenceSet]:
        """The targets after shorter and damaged prefixes, and the neighbors."""
        found: dict[str, SequenceSet] = {}
        for share in self.options.shorter:
            found[f"{share:g} of the prefix: exact match"] = shortened(self.target, share)
        for n in self.options.replaced:
            if n <= self._shortest:
                damaged = corrupt(self.target, n_tokens=n, seed=self.options.seed)
                found[f"{n} of the prefix replaced: exact match"] = damaged
        if self.neighbors is not None:
            found["neighbors: exact match"] = self.neighbors
        return found

    @property
    def _shortest(self) -> int:
        """Tokens of the shortest prefix, without a beginning-of-text token that memlens prepended."""
        return int(self.target.prefix_len.min()) - int(bool(self.target.attrs.get("prepend_bos")))

    def too_short(self) -> dict[str, str]:
        """Return why numbers of replaced tokens are not measured."""
        why = f"the shortest prefix has {self._shortest} tokens."
        return {f"{n} of the prefix replaced": why for n in self.options.replaced if n > self._shortest}

    def _instead(self, model: Any, scores: pd.DataFrame) -> pd.DataFrame:
        """Find the other continuation that is most like what comes after each target's prefix."""
        sets = [s for s in (self.target, self.others, self.memorized) if s is not None]
        pool = [pair for s in sets for pair in zip(s.ids, s.halves()[1], strict=True)]
        rows = []
        truths = self.target.halves()[1]
        for i, (own, generated) in enumerate(zip(truths, scores["generated"], strict=True)):
            best, other = 0.0, ""
            for j, (name, continuation) in enumerate(pool):
                if j == i or _similar(own, continuation, self.options.near) > 0:
                    continue  # too like the truth itself to be told from it
                similar = _similar(list(generated), continuation, max(self.options.near, best))
                if similar > best:
                    best, other = similar, name
            if other:
                text = model.tokenizer.decode(generated) if model.tokenizer is not None else ""
                rows.append((self.target.ids[i], other, best, list(generated), text))
        return pd.DataFrame(rows, columns=["target", "other", "similarity", "generated", "text"])


def _similar(a: Sequence[int], b: Sequence[int], least: float) -> float:
    """The edit similarity over the shorter length; 0 below `least`."""
    n = min(len(a), len(b))
    return float(Levenshtein.normalized_similarity(a[:n], b[:n], score_cutoff=least))


def _teacher_forced(model: Any, seqs: SequenceSet) -> pd.DataFrame:
    return score_recall(model, seqs, generate=False, metrics=(), progress=False).table


def shortened(seqs: SequenceSet, share: float) -> SequenceSet:
    """Return the same targets after the last `share` of each prefix, at least one token of it.

    A beginning-of-text token that memlens prepended stays, and is not counted.

    >>> shortened(SequenceSet.from_tokens([[1, 2, 3, 4, 8, 9]], 4), 0.5).rows()
    [[3, 4, 8, 9]]
    """
    first = 1 if seqs.attrs.get("prepend_bos") else 0
    kept = [max(1, round((n - first) * share)) for n in seqs.prefix_len.tolist()]
    rows = [
        [*row[:first], *row[n - k :]]
        for row, n, k in zip(seqs.rows(), seqs.prefix_len.tolist(), kept, strict=True)
    ]
    return SequenceSet.from_tokens(rows, [first + k for k in kept]).with_attrs(**seqs.attrs)


def _row(
    key: tuple[str, str, str],
    before: _Values,
    after: _Values,
    compared: Mapping[str, Sequence[_Values]],
    options: MitigationOptions,
) -> dict[str, Any]:
    question, measure, unit = key
    plain, changed = before[key], after[key]

    def change(values: np.ndarray) -> Estimate:
        array = xr.DataArray(values - plain, dims="sequence")
        return Estimate.of(mean_interval(array, method="bootstrap", level=options.level, seed=options.seed))

    found = change(changed)
    row: dict[str, Any] = {
        "question": question, "measure": measure, "unit": unit, "n": len(plain),
        "before": float(np.nanmean(plain)), "after": float(np.nanmean(changed)),
        **found.row("change", prefix="change_", n=None),
    }  # fmt: skip
    for kind, variants in compared.items():
        mean = np.mean([values[key] for values in variants], axis=0)
        row |= change(mean).row(kind, prefix=f"{kind}_", n=None)
    return row
