"""What heads do, and where they look, when a continuation is recalled and when it can be copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.batches import Targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.detect.attention import STATISTICS, attention_statistics, over_patterns
from memlens.instruments.detect.context.comparing import CITES, plot_context, read_context
from memlens.instruments.detect.context.sets import CONDITIONS, ContextOptions, context_sets
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.results.kinds import register_kind
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result
from memlens.sweeps.run import measure


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


register_kind("context_or_weights", plot=plot_context, reading=read_context, cites=CITES)
