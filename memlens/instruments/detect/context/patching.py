"""Activation patching of recalling and of copying: which heads and layers carry each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from memlens.errors import check_option
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.metrics import METRICS
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.context.comparing import (
    CITES,
    condition_difference,
    largest,
    plot_context,
    read_difference,
)
from memlens.instruments.detect.context.sets import ContextOptions, ContextSets, context_sets, replaced
from memlens.instruments.patch.pairs import DIRECTIONS
from memlens.instruments.patch.patching import patch_activations
from memlens.results.kinds import register_kind
from memlens.results.result import Result
from memlens.results.statistics.estimates import mean_estimate
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

PATCHED = ("alone", "repeated", "copied")
"""What is patched; see `context_patching`."""
_SITES = {
    "target": ("z", "head", ""),
    "attn": ("attn_out", "layer", "attention patched"),
    "mlp": ("mlp_out", "layer", "MLP patched"),
}


@computes
def context_patching(
    model: Any,
    sequences: SequenceSet,
    *,
    options: ContextOptions | None = None,
    direction: str = "noising",
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    r"""Patch heads and layers where a continuation is recalled, and where it is copied.

    The prompts are those of `context_or_weights`. Each condition is a pair of runs, clean and corrupt, of the
    same lengths and targets:

    - `alone`: the prefix, and the prefix of another sequence (or the own one shuffled, with
      ``wrong="shuffle"``): what recall takes from its prefix;
    - `repeated`: the same corruption of the last prefix, with the whole text standing before it;
    - `copied`: the whole text standing before the prefix, and the wrong version there: what is taken from
      the context alone.

    `alone` and `repeated` differ in nothing but the earlier text. So their difference (`context_heads`) says
    which heads and layers matter more or less where the text can be copied too. The same for sequences that
    the model does not recall is the control.

    Args:
        model: A TransformerLens model.
        sequences: Recalled sequences, or their controls; at least two with one prefix length.
        options: Those of the prompts: `separator`, `wrong`, `too_long`, `layers`, `seed`.
        direction: "noising" (corrupt activations are written into the clean run: what it needs) or
            "denoising" (the reverse: what suffices).
        batch_size: Sequences in a batch; chosen to fit the memory by default.
        progress: Show progress bars.

    Returns:
        Kind "context_patching", mean log-probability per token of the memorized continuation, nats:

        - `target_logprob` `(sequence, condition, layer, head)` with one head's output patched at all
          positions; `attn_logprob` and `mlp_logprob` `(sequence, condition, layer)` with all that attention
          or the MLP adds in a layer;
        - each with `_clean` and `_corrupt` `(sequence, condition)`, and `_baseline`, the one of them that is
          patched: `Result.effect` is patched less that, and
          ``ml.stats.restored_share(result, metric="attn_logprob")`` is 1 where all of the clean run is kept
          and 0 where the corrupt one is reached.

    Raises:
        EmptySetError: No sequences, or none that fits the context.
        OptionError: Another direction.
        SequenceError: As for `context_sets`, or a prefix that cannot be corrupted.
        SiteError: A layer that does not exist.

    Source: ours; activation patching is that of `patch_activations`.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_patching(model, seqs, progress=False)
        >>> found["target_logprob"].dims, found["mlp_logprob"].dims
        (('sequence', 'condition', 'layer', 'head'), ('sequence', 'condition', 'layer'))
        >>> found["condition"].values.tolist()
        ['alone', 'repeated', 'copied']
    """
    check_option("direction", direction, DIRECTIONS)
    options = options or ContextOptions()
    layers = chosen_layers(options.layers, Trunk(model).n_layers)
    sets = context_sets(model, sequences, options=options)
    pairs = patched_pairs(sets, options)
    shared: dict[str, Any] = {
        "direction": direction, "layers": layers, "metrics": ("target_logprob",),
        "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    variables: dict[str, Any] = {}
    for stem, (site, over, words) in _SITES.items():
        found = [patch_activations(model, *pairs[c], site=site, over=over, **shared) for c in PATCHED]
        attrs = dict(METRICS["target_logprob"].attrs)
        if words:
            attrs["label"] = f"{attrs['label']}, {words}"
        dims = ("sequence", "condition", "layer", "head")[: 4 if over == "head" else 3]
        for tail in ("", "_baseline", "_clean", "_corrupt"):
            values = np.stack([each[f"target_logprob{tail}"].values for each in found], 1)
            variables[f"{stem}_logprob{tail}"] = (dims if not tail else dims[:2], values, attrs)
    coords: dict[str, Any] = {"condition": list(PATCHED), "layer": layers}
    coords["head"] = np.arange(Trunk(model).n_heads)
    settings = {
        **{name: asdict(options)[name] for name in ("separator", "wrong", "too_long", "seed")},
        "direction": direction, "layers": layers, "n_left_out": len(sequences) - len(sets.alone),
    }  # fmt: skip
    return make_result("context_patching", model, sets.alone, variables, coords, settings)


def patched_pairs(
    sets: ContextSets, options: ContextOptions
) -> Mapping[str, tuple[SequenceSet, SequenceSet]]:
    """Return the clean and the corrupt sequences of each condition of `context_patching`."""
    kind = "other_sequence" if options.wrong == "other_sequence" else "shuffle_prefix"
    alone = corrupt(sets.alone, kind, seed=options.seed)
    first = 1 if sets.alone.attrs.get("prepend_bos") else 0
    own, prompts = sets.alone.halves()[0], sets.repeated.halves()[0]
    other = alone.halves()[0]
    # The last prefix stands at the end of the prompt, without the token that memlens prepended.
    changed = [
        [*prompt[: len(prompt) - len(prefix) + first], *new[first:]]
        for prompt, prefix, new in zip(prompts, own, other, strict=True)
    ]
    repeated = replaced(sets.repeated, changed, sets.alone.halves()[1])
    return {
        "alone": (sets.alone, alone),
        "repeated": (sets.repeated, repeated),
        "copied": (sets.repeated, sets.conflict),
    }


def read_patching(result: Result, metric: str | None) -> str:
    """Say what each corruption costs, which head and layer matter most, and where the conditions differ."""
    name = metric or "target_logprob"
    parts = []
    for condition in PATCHED:
        here = Result(result.data.sel(condition=condition, drop=True))
        clean, corrupted = (mean_estimate(here[f"{name}_{run}"]).text("nats") for run in ("clean", "corrupt"))
        _, place, most = largest(here, name)
        parts.append(f"{condition}: {clean} clean, {corrupted} corrupt, most by {place}, {most.text('nats')}")
    over = f"{result.data.sizes['sequence']} sequences ({result.settings['direction']})"
    return f"Over {over}: {'; '.join(parts)}. {read_difference(condition_difference(result), metric)}"


register_kind(
    "context_patching",
    plot=plot_context,
    reading=read_patching,
    cites=(*CITES, ("meng2022", "causal tracing, the origin of activation patching")),
)
