"""The numbers behind the explorer; every one of them is another module's function on a few sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, check_option
from memlens.explorer.attention import attention_maps
from memlens.explorer.data import Continuation, Exploration, SequenceView, strongest_heads
from memlens.explorer.edits import ABLATION_MODES, Edits, edit_interventions
from memlens.figures.labels import metric_text
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.hooks import chosen_layers
from memlens.forward.metrics import METRICS, TargetStats
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.branches import ablate_mlps
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.bypass.bypass import BYPASS_MODES, bypass_attention
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.decode.lens import TunedLens
from memlens.models.provenance import describe
from memlens.recall.score import generated_after
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied

FACTS = ("group", "domain", "copies")
"""Columns of a set's table that are shown with a sequence, where they are there."""


@dataclass(frozen=True)
class ExploreOptions:
    """What the explorer is free to choose; all of it is recorded.

    Attributes:
        ablation: How heads are ablated: a mode of `ablate_heads` other than "resample".
        bypass: How attention is bypassed; see `bypass_attention`.
        metric: What effects are of: a name of `memlens.METRICS`.
        lens: See `decode_residual`.
        top_heads: How many heads are tried beforehand, each alone and all together: those whose ablation
            harms the metric most, on the mean of the shown sequences that are recalled (of all, where none
            is).
        bypass_layers: Layers whose bypass is tried beforehand; all by default.
        attention_bytes: Memory for attention maps, shared evenly by the sequences; where not all fit, those
            of the heads with the largest effects are kept.
    """

    ablation: str = "mean_of_other_heads"
    bypass: str = "identity"
    metric: str = "target_logprob"
    lens: str | Path | TunedLens = "logit"
    top_heads: int = 3
    bypass_layers: Sequence[int] | None = None
    attention_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        check_option("ablation", self.ablation, ABLATION_MODES)
        check_option("bypass", self.bypass, BYPASS_MODES)
        check_option("metric", self.metric, list(METRICS))
        for name in ("top_heads", "attention_bytes"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}={getattr(self, name)} is negative: give 0 for none.")

    def recorded(self) -> dict[str, Any]:
        """Return the options as JSON types; a lens by its name."""
        plain = asdict(replace(self, lens=getattr(self.lens, "name", None) or str(self.lens)))
        return {**plain, "bypass_layers": None if self.bypass_layers is None else list(self.bypass_layers)}


def explore_sequences(
    model: Any,
    sequences: SequenceSet,
    options: ExploreOptions | None = None,
    *,
    reference: SequenceSet | None = None,
    try_edits: bool = True,
    keep_attention: bool = True,
    progress: bool = True,
) -> Exploration:
    """Measure all that the explorer shows, for all sequences together.

    Args:
        model: A TransformerLens model.
        sequences: What is looked at.
        options: See `ExploreOptions`.
        reference: The set for ablation by "mean"; `sequences` itself by default.
        try_edits: Also decode under edits, for a page that has no model to ask.
        keep_attention: Also keep attention maps.
        progress: Show progress bars.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit; before any forward pass.
        SiteError: A layer of `bypass_layers` that does not exist, or an ablation by the other heads' mean
            where a layer has one.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[[0, -1]]
        >>> found = explore_sequences(model, seqs, ExploreOptions(top_heads=1), progress=False)
        >>> [c.edits.name for c in found.views[0].edited][:2]
        ['bypass L0', 'bypass L1']
    """
    options = options or ExploreOptions()
    check_sequences(sequences, model, on_eos="keep")
    layers = chosen_layers(options.bypass_layers, Trunk(model).n_layers)
    bare = sequences.with_table(sequences.table.filter(["id"]))
    reference = bare if reference is None else reference
    arrays = _arrays(model, bare, options, reference, progress)
    (plain,) = _under(model, bare, {Edits(): list(range(len(bare)))}, options, reference, False).values()
    texts = Texts(model)
    views = [
        _view(sequences, row, texts, plain[row], {name: array[row] for name, array in arrays.items()})
        for row in range(len(bare))
    ]
    if try_edits:
        planned = _planned(views, layers, options)
        tried = _under(model, bare, planned, options, reference, progress)
        views = [
            replace(view, edited=[found[row] for found in tried.values() if row in found])
            for row, view in enumerate(views)
        ]
    if keep_attention:
        share = options.attention_bytes // len(views)
        views = [
            _with_attention(model, view, row, share) for view, row in zip(views, _rows(bare), strict=True)
        ]
    return Exploration(views, {**describe(model), **options.recorded(), "sequences": dict(sequences.attrs)})


def continuations(
    model: Any, sequences: SequenceSet, edits: Edits, options: ExploreOptions, reference: SequenceSet
) -> list[Continuation]:
    """Return what the model says and writes under edits, one entry a sequence."""
    rows = list(range(len(sequences)))
    (found,) = _under(model, sequences, {edits: rows}, options, reference, False).values()
    return [found[row] for row in rows]


class Texts:
    """Token ids as text; `#17` for a model without a tokenizer."""

    def __init__(self, model: Any) -> None:
        self._tokenizer = getattr(model, "tokenizer", None)
        self._known: dict[int, str] = {}

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return each token by itself."""
        for token in set(ids) - self._known.keys():
            self._known[token] = f"#{token}" if self._tokenizer is None else self._tokenizer.decode([token])
        return [self._known[token] for token in ids]

    def text(self, ids: Sequence[int]) -> str:
        """Return all tokens as one text."""
        return " ".join(self.tokens(ids)) if self._tokenizer is None else self._tokenizer.decode(list(ids))


def _arrays(
    model: Any, seqs: SequenceSet, options: ExploreOptions, reference: SequenceSet, progress: bool
) -> dict[str, np.ndarray]:
    metric = options.metric
    quiet: dict[str, Any] = {"progress": progress}
    lens = decode_residual(model, seqs, lens=options.lens, **quiet)
    heads = ablate_heads(model, seqs, mode=options.ablation, reference=reference, metrics=[metric], **quiet)
    mlps = ablate_mlps(model, seqs, mode="zero", metrics=[metric], **quiet)
    bypass = bypass_attention(model, seqs, mode=options.bypass, metrics=[metric], **quiet)
    return {
        "lens_probability": lens["probability"].values,
        "lens_rank": lens["rank"].values,
        "head_effects": heads.effect(metric).values,
        "mlp_effects": mlps.effect(metric).values,
        "bypass_effects": bypass.effect(metric).values,
    }


def _under(
    model: Any,
    seqs: SequenceSet,
    planned: Mapping[Edits, Sequence[int]],
    options: ExploreOptions,
    reference: SequenceSet,
    progress: bool,
) -> dict[Edits, dict[int, Continuation]]:
    """Return by edits and row what the model says and writes."""
    texts, found = Texts(model), {}
    for edits, rows in tqdm(planned.items(), desc="decoding under edits", disable=not progress):
        some = seqs[list(rows)]
        edit = edit_interventions(
            model, edits, some, ablation=options.ablation, bypass=options.bypass, reference=reference
        )
        with applied(model, *edit):
            stats = teacher_forced_stats(model, some, progress=False)
            written = generated_after(model, some, stats)
        found[edits] = {
            row: _continuation(edits, texts, some[[i]], stats, i, ids)
            for i, (row, ids) in enumerate(zip(rows, written.tolist(), strict=True))
        }
    return found


def _continuation(
    edits: Edits, texts: Texts, one: SequenceSet, stats: TargetStats, row: int, written: Sequence[int]
) -> Continuation:
    n = int(one.n_targets[0])
    ids = list(written[:n])
    return Continuation(
        edits,
        stats.logprob[row, :n].exp().numpy(),
        stats.rank[row, :n].numpy(),
        texts.tokens(stats.argmax[row, :n].tolist()),
        stats.correct[row, :n].numpy(),
        texts.tokens(ids),
        np.array(ids) == one.target_ids[0].numpy(),
        texts.text(ids),
    )


def _view(
    seqs: SequenceSet, row: int, texts: Texts, plain: Continuation, arrays: Mapping[str, np.ndarray]
) -> SequenceView:
    ids, n = _rows(seqs[[row]])[0].tolist(), int(seqs.n_targets[row])
    prefix_len = int(seqs.prefix_len[row])
    table = seqs.table.iloc[row]
    facts = {name: str(table[name]) for name in FACTS if name in seqs.table and table[name] == table[name]}
    return SequenceView(
        str(table["id"]), facts, texts.tokens(ids), prefix_len,
        texts.text(ids[:prefix_len]), texts.text(ids[prefix_len:]), plain,
        arrays["lens_probability"][:, :n], arrays["lens_rank"][:, :n].astype(np.int64),
        arrays["head_effects"], arrays["mlp_effects"], arrays["bypass_effects"],
    )  # fmt: skip


def _rows(seqs: SequenceSet) -> list[Tensor]:
    return [row[:n] for row, n in zip(seqs.tokens, seqs.lengths.tolist(), strict=True)]


def _planned(
    views: Sequence[SequenceView], layers: Sequence[int], options: ExploreOptions
) -> dict[Edits, list[int]]:
    """Return the edits to try, each with the rows it is tried on."""
    every = list(range(len(views)))
    recalled = [view for view in views if view.continuation.recalled] or list(views)
    effects = np.mean([view.head_effects for view in recalled], axis=0)
    top = strongest_heads(effects, metric_text(options.metric).better)[: options.top_heads]
    sets = [(head,) for head in top] + ([tuple(sorted(top))] if len(top) > 1 else [])
    edits = [*(Edits((layer,)) for layer in layers), *(Edits(ablated=heads) for heads in sets)]
    return dict.fromkeys(edits, every)


def _with_attention(model: Any, view: SequenceView, tokens: Tensor, room: int) -> SequenceView:
    heads = strongest_heads(view.head_effects)[: room // len(tokens) ** 2]
    maps = attention_maps(model, tokens, heads)
    return replace(view, attention={head: maps[head] for head in heads})
