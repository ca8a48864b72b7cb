"""Measure the data of the explorer on a few sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from memlens.choices import BypassMode, OwnAblation
from memlens.errors import OptionError, check_option
from memlens.explorer.attention import attention_maps
from memlens.explorer.data import Continuation, Edits, Exploration, SequenceView, strongest_heads
from memlens.figures.labels import metric_text
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.metrics import METRICS, TargetStats
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.branches import ablate_mlps
from memlens.instruments.ablate.heads import ablate_heads, head_set_ablations
from memlens.instruments.bypass.bypass import BYPASS_MODES, attention_bypasses, bypass_attention
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.decode.lens import TunedLens
from memlens.models.provenance import describe
from memlens.recall.score import generated_after
from memlens.results.groups import layers_label, named_layers
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention

ABLATION_MODES = tuple(mode for mode in get_args(OwnAblation) if mode != "resample")
"""Modes of `ablate_heads` that also work during generation. "resample" does not: it needs another sequence's
token at the same position, which does not exist yet."""
FACTS = ("group", "domain", "copies")
"""Columns of a set's table that are shown with a sequence, if present."""


@dataclass(frozen=True)
class ExploreOptions:
    """Options of the explorer; all are recorded.

    Attributes:
        ablation: How heads are ablated: a mode of `ablate_heads` other than "resample".
        bypass: How attention is bypassed; see `bypass_attention`.
        metric: Metric of the effects, one of `memlens.METRICS`.
        lens: See `decode_residual`.
        top_heads: Number of heads whose ablation is computed in advance, each alone and all together: those
            that harm the mean metric of the recalled sequences most (of all sequences, if none is recalled).
        bypass_layers: Layers whose bypass is computed in advance; all by default.
        attention_bytes: Memory for attention maps, shared evenly by the sequences; if not all fit, those of
            the heads with the largest effects are kept.

    Example:
        >>> import memlens as ml
        >>> ml.ExploreOptions(top_heads=5).top_heads
        5
    """

    ablation: OwnAblation = "mean_of_other_heads"
    bypass: BypassMode = "identity"
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
        """Return the options as JSON types, with the name of a lens."""
        plain = asdict(replace(self, lens=getattr(self.lens, "name", None) or str(self.lens)))
        return {**plain, "bypass_layers": None if self.bypass_layers is None else list(self.bypass_layers)}


@computes
def explore_sequences(
    model: Any,
    sequences: SequenceSet,
    options: ExploreOptions | None = None,
    *,
    reference: SequenceSet | None = None,
    try_edits: bool = True,
    keep_attention: bool = True,
    progress: bool = True,
    on_step: Callable[[str], None] | None = None,
) -> Exploration:
    """Measure everything that the explorer shows, for all sequences together.

    Args:
        model: A TransformerLens model.
        sequences: The sequences.
        options: See `ExploreOptions`.
        reference: The set for ablation by "mean"; `sequences` itself by default.
        try_edits: Also compute continuations under edits, for a page without a model.
        keep_attention: Also keep attention maps.
        progress: Show progress bars.
        on_step: Called with the name of each step of `planned_steps` as it begins.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit; before any forward pass.
        SiteError: A layer of `bypass_layers` does not exist, or heads are ablated by the mean of the others
            and a layer has only one head.

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
    *_, views = measured_views(model, sequences, options, reference, progress=progress, on_step=on_step)
    if try_edits:
        bar = tqdm(_planned(views, layers, options), desc="decoding under edits", disable=not progress)
        tried = [continuations(model, bare, edits, options, reference) for edits in bar]
        views = [replace(view, edited=[found[row] for found in tried]) for row, view in enumerate(views)]
    if keep_attention:
        share = options.attention_bytes // len(views)
        views = [
            _with_attention(model, view, tokens, share)
            for view, tokens in zip(views, _rows(bare), strict=True)
        ]
    return Exploration(views, {**describe(model), **options.recorded(), "sequences": dict(sequences.attrs)})


@computes
def continuations(
    model: Any, sequences: SequenceSet, edits: Edits, options: ExploreOptions, reference: SequenceSet
) -> list[Continuation]:
    """Return the predictions under edits, one per sequence."""
    texts = Texts(model)
    edit = edit_interventions(
        model, edits, sequences, ablation=options.ablation, bypass=options.bypass, reference=reference
    )
    with applied(model, *edit):
        stats = teacher_forced_stats(model, sequences, progress=False)
        written = generated_after(model, sequences, stats)
    return [
        _continuation(edits, texts, sequences[[row]], stats, row, ids)
        for row, ids in enumerate(written.tolist())
    ]


@computes
def edit_interventions(
    model: Any,
    edits: Edits,
    sequences: SequenceSet,
    *,
    ablation: OwnAblation = "mean_of_other_heads",
    bypass: BypassMode = "identity",
    reference: SequenceSet | None = None,
) -> list[Intervention]:
    """Return edits as interventions for `memlens.applied`, for forward passes and generation.

    If a layer is bypassed and one of its heads is ablated, the bypass comes first, so an ablation averages
    bypassed heads.

    Args:
        model: A TransformerLens model.
        edits: The edits.
        sequences: The sequences that the edits will run on.
        ablation: One of `ABLATION_MODES`; see `ablate_heads`.
        bypass: See `bypass_attention`.
        reference: The set for "mean"; `sequences` itself by default.

    Raises:
        OptionError: A mode is unknown.
        SiteError: A layer or head does not exist.
    """
    check_option("ablation", ablation, ABLATION_MODES)
    check_option("bypass", bypass, BYPASS_MODES)
    edits.check(Trunk(model))
    found: list[Intervention] = []
    if edits.bypassed:
        found += attention_bypasses(model, layers=[edits.bypassed], mode=bypass)
    if edits.ablated:
        sets = {edits.name: edits.ablated}
        found += head_set_ablations(model, sequences, sets, mode=ablation, reference=reference)
    return found


class Texts:
    """Token ids as text, such as `#17` for a model without a tokenizer."""

    def __init__(self, model: Any) -> None:
        self._tokenizer = getattr(model, "tokenizer", None)
        self._known: dict[int, str] = {}

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return each token as text."""
        for token in set(ids) - self._known.keys():
            self._known[token] = f"#{token}" if self._tokenizer is None else self._tokenizer.decode([token])
        return [self._known[token] for token in ids]

    def text(self, ids: Sequence[int]) -> str:
        """Return all tokens as one text."""
        return " ".join(self.tokens(ids)) if self._tokenizer is None else self._tokenizer.decode(list(ids))


_FORWARDS = 18
"""Work of one portion of heads, in forward passes: a few seconds for 64 tokens and 135 million parameters."""


def planned_steps(model: Any, options: ExploreOptions, *, in_portions: bool = True) -> list[str]:
    """Return the names of the steps of `measured_views`, in order; see there for the arguments.

    Example:
        >>> import memlens as ml
        >>> planned_steps(ml.load_model("zoo/pythia-s"), ExploreOptions())[3:]
        ['MLPs', 'heads of layers 0-2', 'heads of layers 3-5']
    """
    heads = map(_heads_step, _head_portions(Trunk(model), options, in_portions=in_portions))
    return [*_EARLY_STEPS, *heads]


_EARLY_STEPS = ("generated text", "lens", "attention bypasses", "MLPs")


def _heads_step(layers: range) -> str:
    return f"heads of {named_layers(layers_label(layers))}"


def _head_portions(trunk: Trunk, options: ExploreOptions, *, in_portions: bool) -> list[range]:
    """Divide the layers into portions of about `_FORWARDS` forward passes, from the first layer on.

    Ablating a head runs its layer and the later ones. Where a reference set must run first, there is one
    portion.
    """
    if not in_portions or options.ablation == "mean":
        return [range(trunk.n_layers)]
    found, first, cost = [], 0, 0.0
    for layer in range(trunk.n_layers):
        cost += trunk.n_heads * (1 - layer / trunk.n_layers)
        if cost >= _FORWARDS or layer == trunk.n_layers - 1:
            found.append(range(first, layer + 1))
            first, cost = layer + 1, 0.0
    return found


@computes
def measured_views(
    model: Any,
    sequences: SequenceSet,
    options: ExploreOptions,
    reference: SequenceSet,
    *,
    in_portions: bool = False,
    progress: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Iterator[list[SequenceView]]:
    """Measure sequences in steps: the text and the lens, then the effects.

    Args:
        model: A TransformerLens model.
        sequences: The sequences, which have been checked.
        options: See `ExploreOptions`.
        reference: The set for ablation by "mean".
        in_portions: Measure heads a few layers at a time.
        progress: Show progress bars.
        on_step: Called with the name of each of `planned_steps` as it begins.

    Yields:
        After the lens, and after each later step, one view per sequence. Effects that have not been measured
        yet are NaN.
    """
    trunk, texts, metric = Trunk(model), Texts(model), options.metric
    begin = on_step or (lambda step: None)
    text, lens, bypasses, mlps = _EARLY_STEPS
    bare = sequences.with_table(sequences.table.filter(["id"]))
    measure: dict[str, Any] = {"metrics": [metric], "progress": progress}

    begin(text)
    plain = continuations(model, bare, Edits(), options, reference)
    begin(lens)
    decoded = decode_residual(model, bare, lens=options.lens, progress=progress)
    effects = {
        "head_effects": np.full((len(bare), trunk.n_layers, trunk.n_heads), np.nan),
        "mlp_effects": np.full((len(bare), trunk.n_layers), np.nan),
        "bypass_effects": np.full((len(bare), trunk.n_layers), np.nan),
    }

    def views() -> list[SequenceView]:
        arrays = {
            "lens_probability": decoded["probability"].values,
            "lens_rank": decoded["rank"].values,
            **{name: array.copy() for name, array in effects.items()},
        }
        return [
            _view(sequences, row, texts, plain[row], {name: array[row] for name, array in arrays.items()})
            for row in range(len(bare))
        ]

    yield views()
    begin(bypasses)
    found = bypass_attention(model, bare, mode=options.bypass, **measure)
    effects["bypass_effects"][:] = found.effect(metric).values
    yield views()
    begin(mlps)
    effects["mlp_effects"][:] = ablate_mlps(model, bare, mode="zero", **measure).effect(metric).values
    yield views()
    for layers in _head_portions(trunk, options, in_portions=in_portions):
        begin(_heads_step(layers))
        heads = ablate_heads(
            model, bare, mode=options.ablation, layers=layers, reference=reference, **measure
        )
        effects["head_effects"][:, layers.start : layers.stop] = heads.effect(metric).values
        yield views()


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


def _planned(views: Sequence[SequenceView], layers: Sequence[int], options: ExploreOptions) -> list[Edits]:
    """Return the edits under which continuations are computed in advance."""
    recalled = [view for view in views if view.continuation.recalled] or list(views)
    effects = np.mean([view.head_effects for view in recalled], axis=0)
    top = strongest_heads(effects, metric_text(options.metric).better)[: options.top_heads]
    sets = [(head,) for head in top] + ([tuple(sorted(top))] if len(top) > 1 else [])
    return list(dict.fromkeys([*(Edits((i,)) for i in layers), *(Edits(ablated=heads) for heads in sets)]))


def _with_attention(model: Any, view: SequenceView, tokens: Tensor, room: int) -> SequenceView:
    heads = strongest_heads(view.head_effects)[: room // len(tokens) ** 2]
    maps = attention_maps(model, tokens, heads)
    return replace(view, attention={head: maps[head] for head in heads})
