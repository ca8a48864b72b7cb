"""In context or in weights: a continuation recalled from its prefix, or copied from earlier in the prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from memlens import figures
from memlens.choices import AblationMode
from memlens.errors import EmptySetError, SequenceError, check_option
from memlens.figures.labels import metric_text
from memlens.forward.batches import Targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.detect.attention import STATISTICS, attention_statistics, over_patterns
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.options import options_class
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import mean_estimate, share_estimate
from memlens.sequences.checks import check_is_set
from memlens.sequences.corrupt import derangement
from memlens.sequences.set import SequenceSet, some
from memlens.sequences.tokenizing import encode, need_tokenizer
from memlens.sweeps.labels import make_result
from memlens.sweeps.run import measure

CONDITIONS = ("alone", "repeated", "conflict")
Condition = Literal["alone", "repeated", "conflict"]


@options_class
class ContextOptions:
    """Options of `context_or_weights`; the result records all of them."""

    separator: str | tuple[NonNegativeInt, ...] = "\n"
    """What stands between the earlier text and the prefix: text, or token ids; may be empty."""
    wrong: Literal["other_sequence", "shuffle"] = "other_sequence"
    """The wrong continuation: that of another sequence of the set with as many tokens, each used once; or the
    own tokens in another order."""
    too_long: Literal["raise", "drop"] = "raise"
    """What happens to sequences whose text, separator and text exceed the context: an error, or left out with
    a warning."""
    effects: Literal["ablation", "gradients"] = "ablation"
    """How the effects of heads are found: exactly, by `ablate_heads`, or estimated by
    `attribute_ablation`."""
    mode: AblationMode = "mean_of_other_heads"
    """What replaces a head's output; see `ablate_heads`."""
    steps: Annotated[int, Field(ge=1)] = 8
    """Points on the path of the integrated gradients, for "gradients"."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers; all by default."""
    seed: int = 0
    """Seed of the wrong continuations and of "resample"."""


@dataclass(frozen=True, eq=False)
class ContextSets:
    """The same continuations after three prompts; rows, ids and tables are those of one set.

    Attributes:
        alone: The prefix. This is the set that was given, without sequences that are too long.
        repeated: The text (prefix and continuation), a separator, the prefix.
        conflict: The prefix with the wrong continuation, a separator, the prefix. Targets are still the
            memorized continuation.
        wrong: The wrong continuations, as long as the memorized ones.
        lag: Tokens from each target back to the same place in the earlier text, `[seq]`.
    """

    alone: SequenceSet
    repeated: SequenceSet
    conflict: SequenceSet
    wrong: list[list[int]]
    lag: np.ndarray

    def __iter__(self) -> Any:
        return iter((self.alone, self.repeated, self.conflict))

    def with_wrong_targets(self) -> list[SequenceSet]:
        """Return the three sets with the wrong continuation as the target."""
        return [_rows(s, s.halves()[0], self.wrong) for s in (self.alone, self.repeated, self.conflict)]


def _rows(seqs: SequenceSet, prompts: list[list[int]], continuations: list[list[int]]) -> SequenceSet:
    """Return a set with other tokens; what its table says stays, except for the text."""
    rows = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    table = seqs.table.drop(columns="text", errors="ignore")
    return SequenceSet.from_tokens(rows, [len(p) for p in prompts], table=table, attrs=seqs.attrs)


def context_sets(model: Any, sequences: SequenceSet, *, options: ContextOptions | None = None) -> ContextSets:
    """Build the three sets of `context_or_weights`.

    A beginning-of-text token that memlens prepended stays at the beginning of the prompt, once.

    Args:
        model: A TransformerLens model, for its context length and tokenizer.
        sequences: The sequences.
        options: See `ContextOptions`.

    Raises:
        EmptySetError: No sequences, or none that fits the context.
        SequenceError: A sequence does not fit the context, has no other to take a wrong continuation from,
            or cannot be shuffled; or a separator is text and the model has no tokenizer.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2].first_targets(4)
        >>> built = ml.detect.context_sets(model, seqs)
        >>> built.alone.lengths.tolist(), built.repeated.lengths.tolist(), built.lag.tolist()
        ([36, 36], [73, 73], [37, 37])
    """
    options = options or ContextOptions()
    check_is_set(sequences)
    between = options.separator
    if isinstance(between, str):
        between = encode(need_tokenizer(model.tokenizer), [between])[0] if between else ()
    first = 1 if sequences.attrs.get("prepend_bos") else 0
    alone = _fitting(sequences, 2 * sequences.lengths + len(between) - first, model.cfg.n_ctx, options)
    wrong = _wrong_continuations(alone, options)
    prefixes, continuations = alone.halves()
    repeated, conflict = (
        [[*a, *b, *between, *a[first:]] for a, b in zip(prefixes, earlier, strict=True)]
        for earlier in (continuations, wrong)
    )
    lag = alone.lengths.numpy() + len(between) - first
    after = [_rows(alone, prompts, continuations) for prompts in (repeated, conflict)]
    return ContextSets(alone, after[0], after[1], wrong, lag)


def _fitting(seqs: SequenceSet, lengths: Tensor, n_ctx: int, options: ContextOptions) -> SequenceSet:
    if not len(seqs):
        raise EmptySetError("no sequences: give at least one.")
    long = (lengths > n_ctx).numpy()
    if not long.any():
        return seqs
    row = int(np.flatnonzero(long)[0])
    said = (
        f"{int(long.sum())} of {len(seqs)} sequences are too long to stand in the prompt twice: row {row} "
        f"takes {int(lengths[row])} tokens, but the model's context holds {n_ctx}"
    )
    if options.too_long == "raise":
        raise SequenceError(f"{said}: keep fewer targets (first_targets) or leave them out (too_long='drop')")
    if long.all():
        raise EmptySetError(f"{said}: none is left.")
    warnings.warn(f"{said}; they are left out.", stacklevel=4)
    return seqs[~long]


def _wrong_continuations(seqs: SequenceSet, options: ContextOptions) -> list[list[int]]:
    rng = np.random.default_rng(options.seed % 2**64)
    own = seqs.halves()[1]
    if options.wrong == "shuffle":
        return [_shuffled(row, rng, i) for i, row in enumerate(own)]
    wrong = list(own)
    lengths = np.array([len(row) for row in own])
    for n in np.unique(lengths):
        rows = np.flatnonzero(lengths == n)
        givers = derangement(np.array([own[i] for i in rows]), rng)
        if givers is None:
            raise SequenceError(
                f"rows {some(rows.tolist())} have a continuation of {n} tokens, and too few differ to "
                "exchange them: add sequences with as many targets, or take wrong='shuffle'"
            )
        for i, giver in zip(rows, rows[givers], strict=True):
            wrong[i] = own[giver]
    return wrong


def _shuffled(row: list[int], rng: np.random.Generator, number: int) -> list[int]:
    if len(set(row)) < 2:
        raise SequenceError(f"the continuation of row {number} repeats a single token: it cannot be shuffled")
    while True:
        found = [int(token) for token in rng.permutation(row)]
        if found != row:
            return found


@computes
def context_or_weights(
    model: Any,
    sequences: SequenceSet,
    *,
    options: ContextOptions | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    r"""Measure one continuation recalled from its prefix, and copied from earlier in the prompt.

    The same targets stand after three prompts:

    - `alone`: [prefix]: what is predicted comes from the weights;
    - `repeated`: [prefix continuation] [separator] [prefix]: it can be copied as well;
    - `conflict`: [prefix wrong continuation] [separator] [prefix]: context and weights disagree.

    For each, every head is ablated (`ablate_heads`), its attention is described (`attention_statistics`), and
    `copy_attention` is its attention to what would be copied: with :math:`a_{qk}` the attention of position
    :math:`q`, which predicts the token at :math:`q + 1`, and :math:`\ell` the distance between the two
    places (`ContextSets.lag`), :math:`a_{q,\,q + 1 - \ell}`, averaged over targets.

    Attention depends on the length of the prompt, which differs between `alone` and the others; and
    repeating is easier than recalling. So measure sequences that the model does *not* recall in the same way,
    as the control (`context_heads`).

    Args:
        model: A TransformerLens model.
        sequences: Recalled sequences, or their controls.
        options: See `ContextOptions`.
        batch_size: Sequences in a batch; chosen to fit the memory by default.
        progress: Show progress bars.

    Returns:
        Kind "context_or_weights". By `(sequence, condition, layer, head)`: `target_logprob` under the
        ablation of the head, mean over the memorized continuation's tokens, in nats (`Result.effect` is
        ablated minus unchanged); the four attention statistics; `copy_attention`, NaN alone. By `(sequence,
        condition)`: `target_logprob_baseline`, `exact_match` (1 where the memorized continuation is the
        greedy one), and `wrong_logprob`, `wrong_match` of the wrong continuation.

    Raises:
        EmptySetError: No sequences, or none that fits the context.
        SequenceError: As for `context_sets`.
        OptionError: An option that `ablate_heads` or `attribute_ablation` does not have.
        SiteError: A layer that does not exist.

    Source: ours, after the question that putting domain knowledge into the prompt instead of the weights
    raises (arXiv 2311.10779, read as its abstract).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> found["target_logprob"].dims, found["condition"].values.tolist()
        (('sequence', 'condition', 'layer', 'head'), ['alone', 'repeated', 'conflict'])
        >>> ml.detect.which_wins(found)[["copies", "n"]].values.tolist()
        [[0, 3]]
    """
    options = options or ContextOptions()
    trunk = Trunk(model)
    layers = chosen_layers(options.layers, trunk.n_layers)
    sets = context_sets(model, sequences, options=options)
    effects = [_effects(model, seqs, layers, options, batch_size, progress) for seqs in sets]
    attention = [attention_statistics(model, seqs, layers=layers, progress=progress) for seqs in sets]
    copied = [np.full((len(sets.alone), len(layers), trunk.n_heads), np.nan)]
    copied += [_copy_attention(model, s, sets.lag, layers, progress) for s in (sets.repeated, sets.conflict)]
    own = [measure(model, seqs, ("exact_match",), batch_size=batch_size) for seqs in sets]
    wrong = [measure(model, seqs, batch_size=batch_size) for seqs in sets.with_wrong_targets()]
    by_set, by_head = ("sequence", "condition"), ("sequence", "condition", "layer", "head")
    name = "target_logprob"
    variables: dict[str, Any] = {
        name: (by_head, np.stack([e[name].values for e in effects], 1)),
        f"{name}_baseline": (by_set, np.stack([e.baseline(name).values for e in effects], 1)),
        "exact_match": (by_set, np.stack([o["exact_match"] for o in own], 1)),
        "wrong_logprob": (
            by_set,
            np.stack([w[name] for w in wrong], 1),
            {"long_name": "log-prob of the wrong continuation", "units": "nats"},
        ),
        "wrong_match": (by_set, np.stack([w["exact_match"] for w in wrong], 1)),
        "copy_attention": (
            by_head,
            np.stack(copied, 1),
            {"long_name": "attention to what would be copied", "units": "share"},
        ),
    }
    for each in STATISTICS:
        values = np.stack([a[each].values for a in attention], 1)
        variables[each] = (by_head, values, dict(attention[0][each].attrs))
    coords = {"condition": list(CONDITIONS), "layer": layers, "head": np.arange(trunk.n_heads)}
    settings = {**asdict(options), "layers": layers, "n_left_out": len(sequences) - len(sets.alone)}
    return make_result("context_or_weights", model, sets.alone, variables, coords, settings)


def _effects(
    model: Any, seqs: SequenceSet, layers: list[int], options: ContextOptions, size: int | None, bar: bool
) -> Result:
    shared: dict[str, Any] = {
        "mode": options.mode, "layers": layers, "seed": options.seed, "batch_size": size, "progress": bar,
    }  # fmt: skip
    if options.effects == "ablation":
        return ablate_heads(model, seqs, metrics=("target_logprob",), **shared)
    return attribute_ablation(model, seqs, steps=options.steps, **shared)


@torch.no_grad()
def _copy_attention(
    model: Any, seqs: SequenceSet, lag: np.ndarray, layers: Sequence[int], progress: bool
) -> Float[np.ndarray, "seq layer head"]:
    back = torch.from_numpy(lag)

    def describe(pattern: Tensor, targets: Targets, rows: Tensor) -> Tensor:
        batch = torch.arange(len(pattern), device=pattern.device)[:, None]
        key = targets.positions + 1 - back[rows].to(pattern.device)[:, None]
        at = pattern[batch, :, targets.positions, key.clamp_min(0)].float()  # [batch, target, head]
        return torch.where(targets.mask[..., None], at, torch.nan).nanmean(1)[None]

    return over_patterns(model, seqs, layers, describe, progress=progress)[0]


def condition_difference(
    result: Result, first: Condition = "repeated", second: Condition = "alone"
) -> Result:
    """Return the difference of two conditions, sequence by sequence.

    Args:
        result: Of `context_or_weights`.
        first: One condition.
        second: The condition that is subtracted.

    Returns:
        Kind "context_difference": the variables of the result without `condition`. `Result.effect` is the
        effect of a head in the first condition less that in the second; ``mean_ci(of="effect")`` gives means
        with intervals over sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> ml.detect.condition_difference(found).effect("target_logprob").dims
        ('sequence', 'layer', 'head')
    """
    for name in (first, second):
        check_option("condition", name, CONDITIONS)
    a, b = (result.data.sel(condition=name, drop=True) for name in (first, second))
    about = {**result.data.attrs, "kind": "context_difference"}
    found = (a - b).assign_attrs({**about, "conditions": f"{first} less {second}"})
    for name, array in found.data_vars.items():
        array.attrs = dict(result.data[name].attrs)
    return Result(found)


def context_heads(
    result: Result,
    metric: str = "target_logprob",
    *,
    control: Result | None = None,
    first: Condition = "repeated",
    second: Condition = "alone",
    seed: int = 0,
) -> xr.Dataset:
    """Say which heads differ between two conditions, and whether they do so beyond a control.

    Args:
        result: Of `context_or_weights`.
        metric: "target_logprob", whose effects are compared, or a statistic of attention.
        control: The same of sequences that the model does not recall. Then differences are compared: those
            of the result's sequences with those of the control's, by pairs if these name their matches.
        first: One condition.
        second: The condition that is subtracted.
        seed: Of resamples and permutations.

    Returns:
        As `memlens.compare_groups`: `difference`, `low`, `high`, `p` and `p_corrected` (over all heads),
        `(layer, head)`. Two sequences have no interval.

    Raises:
        ResultError: Fewer than two sequences, or the two results have other sites.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> ml.detect.context_heads(found)["difference"].dims
        ('layer', 'head')
    """
    of = _of(result, metric)
    if control is not None:
        ours, theirs = (condition_difference(r, first, second) for r in (result, control))
    else:
        data = result.data.assign_coords(match=("sequence", result["sequence"].values))
        ours, theirs = (Result(data.sel(condition=name, drop=True)) for name in (first, second))
    return compare_groups(ours, theirs, metric, of=of, seed=seed)


def which_wins(result: Result, by: str = "copies") -> pd.DataFrame:
    """Say whether the context or the weights win where they disagree.

    The context wins in a sequence if, in the condition `conflict`, the wrong continuation, which stands in
    the prompt, is more likely than the memorized one.

    Args:
        result: Of `context_or_weights`.
        by: A coordinate along `sequence`; one row in all if the result does not have it.

    Returns:
        One row per value: the value, `n`; `memorized` and `wrong`, the mean log-probabilities per token of
        the two continuations in the conflict, nats, and `memorized_alone`; `context_wins`, the share of
        sequences, with `low` and `high` (Wilson's interval; NaN for fewer than three sequences); and
        `wins_alone`, the share in which the wrong continuation is the likelier one after the prefix alone:
        what `context_wins` would be if the context did nothing.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> table = ml.detect.which_wins(found)
        >>> bool(table["context_wins"].between(0, 1).all())
        True
    """
    data = result.data.sel(condition="conflict")
    own, wrong = (data[name].values for name in ("target_logprob_baseline", "wrong_logprob"))
    before = result.data.sel(condition="alone")
    alone, wrong_alone = (before[name].values for name in ("target_logprob_baseline", "wrong_logprob"))
    groups = data[by].values if by in data.coords else np.full(len(own), "all")
    rows = []
    for value in np.unique(groups):
        here = groups == value
        share = share_estimate(wrong[here] > own[here])
        rows.append(
            {
                by: value, "memorized": own[here].mean(), "wrong": wrong[here].mean(),
                "memorized_alone": alone[here].mean(), **share.row("context_wins"),
                "wins_alone": (wrong_alone[here] > alone[here]).mean(),
            }
        )  # fmt: skip
    columns = [by, "n", "memorized", "wrong", "memorized_alone", "context_wins", "low", "high", "wins_alone"]
    return pd.DataFrame(rows, columns=columns)


@takes(of=None, group=None)
def plot_context(
    result: Result, s: Selection, *, condition: Condition | Literal["difference"] = "difference"
) -> go.Figure:
    """Draw the effect or the attention of each head: repeated less alone, or in one condition."""
    check_option("condition", condition, (*CONDITIONS, "difference"))
    if condition == "difference":
        return plot_difference(condition_difference(result), s)
    chosen = Result(result.data.sel(condition=condition, drop=True))
    return _drawn(chosen, s, f"Each head, condition: {condition}", signed=False)


@takes(of=None, group=None)
def plot_difference(result: Result, s: Selection) -> go.Figure:
    """Draw the difference of two conditions for each head."""
    return _drawn(result, s, f"Each head, {result.data.attrs['conditions']}", signed=True)


def _drawn(result: Result, s: Selection, heading: str, *, signed: bool) -> go.Figure:
    name = s.metric or "target_logprob"
    of = s.of or _of(result, name)
    note = s.note(result, [name], of)
    ci, caption = s.drawn(result, ("layer", "head"), heading, of=of, names=[name], note=note)
    return figures.heatmap_layer_head(ci, signed=signed or of == "effect", **caption)


def _of(result: Result, metric: str) -> Literal["value", "effect"]:
    return "effect" if f"{metric}_baseline" in result.data else "value"


def read_context(result: Result, metric: str | None) -> str:
    """Say how likely the continuation is in each condition, who wins, and which head differs most."""
    logprob = result["target_logprob_baseline"]
    said = ", ".join(f"{mean_estimate(logprob.sel(condition=c)).text('nats')} {c}" for c in CONDITIONS)
    wins = result["wrong_logprob"] > logprob
    share = share_estimate(wins.sel(condition="conflict"))
    return (
        f"Over {len(logprob)} sequences, the mean log-probability of the memorized continuation is {said}. "
        f"In the conflict the context wins in a share of {share.text()}. "
        + read_difference(condition_difference(result), metric)
    )


def read_difference(result: Result, metric: str | None) -> str:
    """Say for which head two conditions differ most."""
    name = metric or "target_logprob"
    of, words = _of(result, name), metric_text(name, result[name])
    values = result.effect(name) if of == "effect" else result[name]
    means = values.mean("sequence").values
    layer, head = (int(i) for i in np.unravel_index(np.nanargmax(np.abs(means)), means.shape))
    most = mean_estimate(values[:, layer, head]).text(words.unit)
    what = f"the effect of ablation on the {words.label}" if of == "effect" else words.label
    return (
        f"Of {means.size} heads, {what} differs most ({result.data.attrs['conditions']}) for head {head} of "
        f"layer {result['layer'].values[layer]}: {most}."
    )


register_kind(
    "context_or_weights",
    plot=plot_context,
    reading=read_context,
    cites=(("yao2023", "knowledge in the prompt instead of the weights"),),
)
register_kind("context_difference", plot=plot_difference, reading=read_difference)
