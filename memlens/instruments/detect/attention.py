"""Where heads look when a target is predicted: how evenly, how far, at the first token, at the prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeInt
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import EmptySetError, ResultError
from memlens.forward.batches import Targets, make_batches
from memlens.forward.capture import run_capturing
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.trunk import Trunk
from memlens.recall.scores import RecallScores
from memlens.recall.taxonomy import CLASSES, recall_classes
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_head_map, plot_layer_lines
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import mean_estimate
from memlens.results.statistics.strata import difference_within
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

STATISTICS = ("attention_entropy", "first_share", "mean_distance", "prefix_share")
_WORDS: dict[str, dict[str, str]] = {
    "attention_entropy": {"long_name": "attention entropy", "units": "share of the largest"},
    "first_share": {"long_name": "attention to the first token", "units": "share"},
    "mean_distance": {"long_name": "mean distance attended", "units": "tokens"},
    "prefix_share": {"long_name": "attention to the prefix", "units": "share"},
}
_BYTES = 2**28

Describe = Callable[[Tensor, Targets, Tensor], Tensor]
"""Given a pattern `[batch, head, query, key]`, its targets and row numbers: `[statistic, batch, head]`."""


@computes
@torch.no_grad()
def attention_statistics(
    model: Any,
    sequences: SequenceSet,
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Result:
    r"""Describe each head's attention at the positions that predict targets.

    With :math:`a_{qk}` the attention of query position :math:`q` to key position :math:`k`, and :math:`n_q`
    the positions that q can see (q + 1, or the window of a local layer):

    - `attention_entropy`: :math:`-\sum_k a_{qk} \log a_{qk} / \log n_q`, 1 for even attention, 0 for
      attention to one token;
    - `first_share`: :math:`a_{q0}`;
    - `mean_distance`: :math:`\sum_k a_{qk} (q - k)`, tokens;
    - `prefix_share`: :math:`\sum_{k < \text{prefix}} a_{qk}`.

    Each is averaged over a sequence's targets. Length changes all four: compare sequences of equal prefix and
    continuation lengths, of one task, such as matched controls (`attention_difference`), and use copies as
    the dose (``result.mean_ci(group="copies")``).

    Args:
        model: A TransformerLens model.
        sequences: The sequences.
        layers: All by default.
        progress: Show a progress bar.

    Returns:
        Kind "attention_statistics": the four, each `(sequence, layer, head)`. Entropy is NaN where one
        position is all that is seen.

    Raises:
        EmptySetError: No sequences.
        SiteError: A layer that does not exist.

    Source: that attention is even where much is memorized is the observation of arXiv 2310.06714 on
    fine-tuned models, between tasks; the statistics, for decoders and within a task, are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> found = ml.detect.attention_statistics(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> found["prefix_share"].dims, bool((found["attention_entropy"] <= 1).all())
        (('sequence', 'layer', 'head'), True)
    """
    layers = chosen_layers(layers, Trunk(model).n_layers)

    def describe(pattern: Tensor, targets: Targets, rows: Tensor) -> Tensor:
        return _described(pattern, targets, sequences.prefix_len[rows].to(pattern.device))

    values = over_patterns(model, sequences, layers, describe, progress=progress)
    dims = ("sequence", "layer", "head")
    variables = {name: (dims, values[i], _WORDS[name]) for i, name in enumerate(STATISTICS)}
    coords = {"layer": layers, "head": np.arange(values.shape[-1])}
    return make_result("attention_statistics", model, sequences, variables, coords, {"at": "targets"})


def over_patterns(
    model: Any, sequences: SequenceSet, layers: Sequence[int], describe: Describe, *, progress: bool
) -> Float[np.ndarray, "statistic seq layer head"]:
    """Describe the attention pattern of every layer and sequence, batch by batch.

    Args:
        model: A TransformerLens model.
        sequences: The sequences.
        layers: The layers.
        describe: What is computed of each pattern.
        progress: Show a progress bar.
    """
    check_sequences(sequences, model, on_eos="keep")
    trunk = Trunk(model)
    names = [hook_name("pattern", layer) for layer in layers]
    longest = int(sequences.lengths.max())
    size = max(1, _BYTES // (len(layers) * trunk.n_heads * longest**2 * trunk.dtype.itemsize))
    parts: list[np.ndarray] = []
    with tqdm(total=len(sequences), disable=not progress, desc="attention", unit="seq") as bar:
        for batch, targets in make_batches(sequences, min(16, size), trunk.device):
            _, store = run_capturing(trunk, batch.tokens, names)
            each = [describe(store[name], targets, batch.rows) for name in names]
            parts.append(torch.stack(each, 2).cpu().numpy())
            bar.update(len(batch.rows))
    return np.concatenate(parts, axis=1)


def _described(
    pattern: Float[Tensor, "batch head query key"], targets: Targets, prefix: Int[Tensor, " batch"]
) -> Float[Tensor, "statistic batch head"]:
    rows = torch.arange(len(pattern), device=pattern.device)[:, None]
    at = pattern.transpose(1, 2)[rows, targets.positions].float()  # [batch, target, head, key]
    query, key = targets.positions, torch.arange(pattern.shape[-1], device=pattern.device)
    # A local layer sees a window only: what no head of any sequence gives weight to is masked.
    visible = (pattern > 0).any(0).any(0).sum(-1)[query]
    plain = -torch.special.xlogy(at, at).sum(-1)
    entropy = plain / visible.float().log()[..., None]
    entropy = torch.where((visible > 1)[..., None], entropy, torch.nan)
    distance = (at * (query[..., None, None] - key)).sum(-1)
    in_prefix = (at * (key < prefix[:, None])[:, None, None]).sum(-1)
    return torch.stack([_mean(x, targets.mask) for x in (entropy, at[..., 0], distance, in_prefix)])


def _mean(
    values: Float[Tensor, "batch target head"], mask: Bool[Tensor, "batch target"]
) -> Float[Tensor, "batch head"]:
    """Return the mean over targets; NaN is skipped."""
    return torch.where(mask[..., None], values, torch.nan).nanmean(1)


def attention_difference(
    model: Any,
    recalled: SequenceSet,
    matched: SequenceSet,
    statistic: str = "attention_entropy",
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Compare a statistic of every head between recalled and matched sequences.

    Args:
        model: As for `attention_statistics`.
        recalled: Sequences that the model recalls.
        matched: Others of the same lengths; compared pair by pair if they name their matches (`matched_to`).
        statistic: One of the four.
        layers: All by default.
        seed: Of resamples and permutations.
        progress: Show progress bars.

    Returns:
        As `memlens.compare_groups`: `difference` (recalled minus matched), `low`, `high`, `p` and
        `p_corrected` (over all heads), `(layer, head)`.

    Raises:
        EmptySetError: A group is empty.
        ResultError: A group has one sequence, or the statistic is unknown.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.detect.attention_difference(model, seqs[-4:], seqs[:4], layers=[0], progress=False)
        >>> found.sizes["layer"]
        1
    """
    for name, seqs in (("recalled", recalled), ("matched", matched)):
        if not len(seqs):
            raise EmptySetError(f"there are no {name} sequences: two groups are compared.")
    first, second = (
        attention_statistics(model, seqs, layers=layers, progress=progress) for seqs in (recalled, matched)
    )
    return compare_groups(first, second, statistic, seed=seed)


@computes
def attention_by_class(
    model: Any,
    recall: RecallScores,
    *,
    above: NonNegativeInt | None = None,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Result:
    """Describe each head's attention at the targets, by class of the guess-or-recall taxonomy.

    ``result.mean_ci(("sequence", "layer", "head"), group="recall_class")`` gives the mean of each class with
    its interval, `class_differences` compares the classes, and the figure draws them over layers.

    Args:
        model: A TransformerLens model.
        recall: What `score_recall` returned for it, with the columns of the group `taxonomy`.
        above: As for `recall_classes`.
        layers: All by default.
        progress: Show a progress bar.

    Returns:
        Kind "attention_classes": as `attention_statistics`, with the coordinate `recall_class` along
        `sequence`.

    Raises:
        OptionError: The scores lack the taxonomy, or (with `above`) the copies.
        EmptySetError: No sequences.
        SiteError: A layer that does not exist.

    Source: the classes are those of arXiv 2508.02573 (see `taxonomy_columns`); the statistics and their
    comparison are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-60:]
        >>> recall = ml.score_recall(model, seqs, generate=False, progress=False)
        >>> found = ml.detect.attention_by_class(model, recall, progress=False)
        >>> means = found.mean_ci(("sequence", "layer", "head"), group="recall_class")
        >>> means["prefix_share"].dims
        ('recall_class', 'statistic')
    """
    classes = recall_classes(recall.table, above=above).to_numpy()
    seqs = recall.sequences.with_table(recall.sequences.table.assign(recall_class=classes))
    found = attention_statistics(model, seqs, layers=layers, progress=progress)
    return Result(found.data.assign_attrs(kind="attention_classes"))


def class_differences(
    result: Result,
    *,
    within: Sequence[str] = ("copies", "domain"),
    by: str = "recall_class",
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the classes of `attention_by_class`, two at a time, also among sequences that are alike.

    Classes differ in more than how they come about: recalled sequences have more copies, and guesses are
    mostly lists and tables. So the difference is given twice: of all sequences, and inside groups with equal
    values of `within` (see `difference_within`), as the control.

    Args:
        result: Of `attention_by_class`.
        within: Coordinates along `sequence` that must be equal, all of them; those that the result does not
            have are left out. With none the columns of the control are NaN.
        by: The coordinate that holds the classes.
        n_resamples: Resamples of the intervals.
        n_permutations: Permutations of the tests.
        seed: Seed of both.

    Returns:
        One row per statistic and pair of classes that have at least two sequences each: `statistic`, `a`,
        `b`, `n_a`, `n_b`; `mean_a` and `mean_b` (over heads and sequences) and `difference` (a minus b) with
        `low`, `high`, `p`; `heads`, the number of heads that differ (p corrected over all heads below 0.05),
        `of`; and with the prefix `within_` the difference inside equal values, its interval and p, and the
        numbers of sequences that it compares. Units are those of the statistic.

    Raises:
        ResultError: The result does not have the coordinate, or there are no two classes to compare.

    Source: ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> recall = ml.score_recall(model, seqs[[0, 1, 2, 427, 428, 429]], generate=False, progress=False)
        >>> found = ml.detect.attention_by_class(model, recall, progress=False)
        >>> options = {"by": "domain", "within": (), "n_resamples": 20, "n_permutations": 19}
        >>> ml.detect.class_differences(found, **options)[["a", "b"]].notna().to_numpy().all()
        np.True_
    """
    classes = result[by].values.astype(str)
    named = [name for name in dict.fromkeys([*CLASSES, *classes.tolist()]) if (classes == name).sum() >= 2]
    if len(named) < 2:
        counts = ", ".join(f"{name}: {n}" for name, n in pd.Series(classes).value_counts().items())
        raise ResultError(f"two classes with two or more sequences each are compared; here are {counts}.")
    known = [result[name].values for name in within if name in result.data.coords]
    keys = list(zip(*(values.tolist() for values in known), strict=True)) if known else []
    stratum = pd.factorize(pd.Series(keys, dtype=object))[0] if keys else np.arange(len(classes))
    options: dict[str, Any] = {"n_resamples": n_resamples, "n_permutations": n_permutations, "seed": seed}
    size, rows = {name: int((classes == name).sum()) for name in named}, []
    for (a, b), name in product(combinations(named, 2), STATISTICS):
        ours, theirs = (
            Result(result.data[[name]].isel(sequence=np.flatnonzero(classes == c))) for c in (a, b)
        )
        whole = [Result(part.data.mean(["layer", "head"])) for part in (ours, theirs)]
        found = compare_groups(whole[0], whole[1], name, **options)
        heads = compare_groups(ours, theirs, name, **options)
        here = np.isin(classes, [a, b])
        values = result[name].mean(["layer", "head"]).values[here]
        inside = difference_within(values, classes[here] == a, stratum[here], **options)
        alike = {"difference": inside.found.value, "low": inside.found.low, "high": inside.found.high}
        rows.append(
            {
                "statistic": name, "a": a, "b": b, "n_a": size[a], "n_b": size[b],
                "mean_a": float(whole[0][name].mean()), "mean_b": float(whole[1][name].mean()),
                **{key: float(found[key]) for key in ("difference", "low", "high", "p")},
                "heads": int((heads["p_corrected"] < 0.05).sum()), "of": heads["p"].size,
                **{f"within_{key}": value for key, value in alike.items()},
                "within_p": inside.p, "within_n_a": inside.n_a, "within_n_b": inside.n_b,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


@takes(of="value", group="recall_class")
def plot_classes(result: Result, s: Selection) -> go.Figure:
    """Draw the mean over heads along the layers, one line per class."""
    return plot_layer_lines(result, s)


def read_classes(result: Result, metric: str | None) -> str:
    """Give the mean of each class, over all heads."""
    name, classes = metric or STATISTICS[0], result["recall_class"].values
    mean = result[name].mean(["layer", "head"])
    said = "; ".join(
        f"{c}: {(found := mean_estimate(mean[classes == c])).text(_WORDS[name]['units'])}, n = {found.n}"
        for c in np.unique(classes)
    )
    return f"By class, the {_WORDS[name]['long_name']} at the targets, mean over heads, is {said}."


def read_attention(result: Result, metric: str | None) -> str:
    """Say which heads look most evenly and least, and how that depends on copies."""
    name = metric or STATISTICS[0]
    array, words = result[name], _WORDS[name]
    by_head = array.mean("sequence")
    said = []
    for what, place in (("highest", np.argmax(by_head.values)), ("lowest", np.argmin(by_head.values))):
        i, j = np.unravel_index(place, by_head.shape)
        found = mean_estimate(array[:, int(i), int(j)])
        said.append(f"{what} in layer {array['layer'].values[i]}, head {j}: {found.text(words['units'])}")
    text = f"Over {len(array)} sequences, {words['long_name']} at the targets is " + "; ".join(said) + "."
    if "copies" in result.data.coords and len(copies := np.unique(result["copies"].values)) > 1:
        mean = array.mean(["layer", "head"])
        few, most = (
            mean_estimate(mean[result["copies"].values == c]).text(words["units"]) for c in copies[[0, -1]]
        )
        text += f" The mean over heads is {few} with {copies[0]} copies, {most} with {copies[-1]}."
    return text


register_kind(
    "attention_classes",
    plot=plot_classes,
    reading=read_classes,
    cites=(("dentan2025", "guess or recall"), ("zeng2023", "evenness of attention and memorization")),
)
register_kind(
    "attention_statistics",
    plot=plot_head_map,
    reading=read_attention,
    cites=(("zeng2023", "evenness of attention and memorization"),),
)
