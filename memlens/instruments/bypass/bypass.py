"""Attention bypass ("short-circuiting"): every token attends only to itself, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from memlens.choices import BypassControl, BypassedTo, BypassMode
from memlens.errors import OptionError, check_option
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, check_head, check_layer, chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.screen.instruments import register_instrument
from memlens.results.groups import layers_label
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_bypass
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention, Reads
from memlens.sweeps.run import SweepOptions, sweep

BYPASS_MODES: tuple[BypassedTo, ...] = get_args(BypassedTo)
CONTROL_MODES: tuple[BypassControl, ...] = get_args(BypassControl)
Span = Literal["layer", "window", "suffix", "prefix"]
SPANS: tuple[str, ...] = get_args(Span)


@computes
def bypass_attention(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: BypassMode = "identity",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    span: Span = "layer",
    width: int = 2,
    over: str | None = None,
    strengths: Sequence[float] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Bypass the attention of each layer, of windows or suffixes of layers, or of heads, and measure recall.

    - ``"identity"``: the attention matrix of every head becomes the identity, so that
      :math:`z_{h,t} = v_{h,t}`; value and output projections, biases, norms and the MLP stay as they are
      (as in the released code of arXiv 2501.05078). It is implemented on values, which works on every
      architecture.
    - ``"zero"``: attention adds nothing to the residual, not even its bias (ours, for comparison).
    - ``"uniform"``: every token attends equally to itself and all tokens before it,
      :math:`z_{h,t} = \frac{1}{t+1} \sum_{s \le t} v_{h,s}` (ours, for comparison; sliding windows are
      ignored).
    - ``"first_token"``: every token attends only to the first one, :math:`z_{h,t} = v_{h,0}` (ours, for
      comparison: many heads attend mostly there).

    With a strength :math:`a` the attention matrix is :math:`(1-a)A + aI`, and :math:`z_{h,t}` becomes
    :math:`(1-a)z_{h,t} + a\,v_{h,t}`; with "zero", what attention adds is multiplied by :math:`1-a`.

    Args:
        model: A TransformerLens model.
        sequences: The recalled sequences.
        mode: One of the above.
        layers: The layers at which a bypass starts (for "prefix", ends); all by default.
        heads: Only these heads (not with "zero"); all by default. With grouped queries, query heads.
        span: Which layers are bypassed together: the layer alone ("layer"), `width` consecutive layers
            starting with it ("window"; windows beyond the last layer are left out), the layer and all later
            ones ("suffix"), or all layers up to and including it ("prefix").
        width: Number of layers in a window.
        over: "head" bypasses each of `heads` separately (not with "zero").
        strengths: Strengths :math:`a` from 0 to 1, each tried separately; only full strength by default.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "attention_bypass": each metric `(sequence, layer)`, followed by `head` and `strength` if
        requested, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown mode, span or `over`, heads with mode "zero", a strength outside 0 to 1, or a
            window with more layers than the model.
        SiteError: A layer or head that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.bypass_attention(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["exact_match"].dims
        ('sequence', 'layer')
    """
    interventions = attention_bypasses(
        model, mode=mode, layers=layers, heads=heads, span=span, width=width, over=over, strengths=strengths
    )
    settings = {
        "mode": mode, "heads": None if heads is None else list(heads), "span": span,
        "width": width if span == "window" else None, "over": over,
        "strengths": None if strengths is None else list(strengths),
    }  # fmt: skip
    return sweep(
        model, sequences, interventions, metrics, kind="attention_bypass", settings=settings, **options
    )


def attention_bypasses(
    model: Any,
    *,
    mode: BypassMode = "identity",
    layers: Sequence[int | Sequence[int]] | None = None,
    heads: Sequence[int] | None = None,
    span: Span = "layer",
    width: int = 2,
    over: str | None = None,
    strengths: Sequence[float] | None = None,
) -> list[Intervention]:
    """Return the interventions that `bypass_attention` runs; see there for the arguments and errors.

    An entry of `layers` may also be a set of layers to bypass together, whatever `span` is. Sets are labeled
    `layers` in a result ("0, 3-5"), single layers `layer`.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> len(ml.edits.attention_bypasses(model))
        6
        >>> [dict(edit.coords) for edit in ml.edits.attention_bypasses(model, layers=[[0, 1], [5]])]
        [{'layers': '0-1'}, {'layers': '5'}]
    """
    check_option("mode", mode, BYPASS_MODES + CONTROL_MODES)
    if over is not None:
        check_option("over", over, ("head",))
    for strength in strengths or []:
        if not 0 <= strength <= 1:
            raise OptionError(f"strength={strength} is out of range: give a number from 0 to 1.")
    if mode == "zero" and (heads is not None or over is not None):
        raise OptionError(
            "heads= does not work with mode='zero': set single heads to zero with ablate_heads(mode='zero')."
        )
    trunk = Trunk(model)
    for head in heads or []:
        check_head(head, trunk.n_heads)
    each = [heads] if over is None else [[h] for h in (range(trunk.n_heads) if heads is None else heads)]
    words = {s: mode if s in (None, 1) else f"{mode} x {s:g}" for s in strengths or [None]}
    return [
        Intervention(
            f"bypass {layers_label(together)} ({words[strength]})",
            [
                hook
                for layer in together
                for hook in _hooks(trunk, layer, mode, some, 1.0 if strength is None else strength)
            ],
            {
                **place,
                **({} if over is None or some is None else {"head": some[0]}),
                **({} if strength is None else {"strength": strength}),
            },
        )
        for place, together in _places(trunk.n_layers, layers, span, width)
        for some in each
        for strength in words
    ]


def _places(
    n_layers: int, layers: Sequence[int | Sequence[int]] | None, span: str, width: int
) -> list[tuple[dict[str, Hashable], Sequence[int]]]:
    """The sets of layers to bypass together, each with its label."""
    singles = [layer for layer in layers or [] if not isinstance(layer, Sequence)]
    if layers is None or len(singles) == len(layers):
        named = spans(n_layers, span=span, width=width, layers=None if layers is None else singles)
        return [({"layer": layer}, together) for layer, together in named.items()]
    sets = [entry if isinstance(entry, Sequence) else [entry] for entry in layers]
    for together in sets:
        if not together:
            raise OptionError("an empty set of layers bypasses nothing: give at least one layer.")
        for layer in together:
            check_layer(layer, n_layers)
    return [({"layers": layers_label(together)}, together) for together in sets]


def spans(
    n_layers: int, *, span: str = "layer", width: int = 2, layers: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Return which layers are bypassed together, by the layer after which they are named.

    Args:
        n_layers: Number of layers of the model.
        span: "layer", "window", "suffix" or "prefix"; see `bypass_attention`.
        width: Number of layers in a window.
        layers: The layers that give names; all by default.

    Raises:
        OptionError: An unknown span, or a window with more layers than the model.
        SiteError: A layer that does not exist.

    >>> spans(4, span="window", width=3)
    {0: [0, 1, 2], 1: [1, 2, 3]}
    >>> spans(4, span="suffix", layers=[2])
    {2: [2, 3]}
    """
    check_option("span", span, SPANS)
    if not 1 <= width <= n_layers:
        raise OptionError(
            f"width={width} is not a window of a model with {n_layers} layers: give 1 to {n_layers}."
        )
    layers = chosen_layers(layers, n_layers)
    ends: dict[str, Callable[[int], range]] = {
        "layer": lambda layer: range(layer, layer + 1),
        "window": lambda layer: range(layer, layer + width),
        "suffix": lambda layer: range(layer, n_layers),
        "prefix": lambda layer: range(layer + 1),
    }
    found = {layer: list(ends[span](layer)) for layer in layers}
    return {layer: blocks for layer, blocks in found.items() if blocks[-1] < n_layers}


@contextmanager
def bypassed(
    model: Any,
    layers: int | Sequence[int],
    *,
    mode: BypassMode = "identity",
    heads: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Iterator[Any]:
    """Bypass attention inside a `with` block.

    A token that attends only to itself needs neither a cache nor a padding mask, so a forward pass,
    generation with or without a cache, left-padded batches, and a prompt fed in chunks all give the same
    tokens.

    Args:
        model: A TransformerLens model.
        layers: The layer, or the layers bypassed together.
        mode: "identity" or "zero"; see `bypass_attention`.
        heads: Only these heads ("identity" only); all by default.
        strength: Strength of the bypass, from 0 to 1.

    Yields:
        The model.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> with ml.bypassed(model, [5], mode="identity"):
        ...     logits = model(torch.tensor([[5, 6, 7]]))
        >>> tuple(logits.shape)[:2]
        (1, 3)
    """
    check_option("mode", mode, BYPASS_MODES)
    edits = attention_bypasses(model, layers=[layers], mode=mode, heads=heads, strengths=[strength])
    with applied(model, *edits):
        yield model


def _uniform(v: Tensor) -> Tensor:
    """The mean of the values up to each position, summed in float32 at least."""
    count = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]
    wide = v if v.dtype == torch.float64 else v.float()
    return wide.cumsum(1) / count


_MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "uniform": _uniform,
    "first_token": lambda v: v[:, :1].expand_as(v),
}
"""What each mode turns the values `[batch, pos, head, d_head]` into."""


def _hooks(
    trunk: Trunk, layer: int, mode: str, heads: Sequence[int] | None, strength: float
) -> list[tuple[str, HookFn]]:
    """Scale what attention adds ("zero"), or store the values and write what the mode turns them into."""
    if mode == "zero":
        return [(hook_name("attn_out", layer), lambda x, hook: x * (1 - strength))]
    mixed = _MIXED[mode]
    kept: list[Tensor] = []
    groups = trunk.n_heads // trunk.n_kv_heads
    chosen: Any = slice(None) if heads is None else list(heads)

    def remember(v: Tensor, hook: Any) -> None:
        kept[:] = [v]

    def write(z: Tensor, hook: Any) -> Tensor:
        v = mixed(kept.pop())
        if v.shape[2] != z.shape[2]:
            v = v.repeat_interleave(groups, dim=2)
        v = v[:, :, chosen].to(z.dtype)
        out = z.clone()
        out[:, :, chosen] = v if strength == 1 else torch.lerp(z[:, :, chosen], v, strength)
        return out

    return [(hook_name("v", layer), Reads(remember)), (hook_name("z", layer), write)]


register_kind(
    "attention_bypass", plot=plot_bypass, reading=read_effects, cites=(("menta2025", "attention bypass"),)
)
register_instrument("attention_bypass", ranks="layer", kind="attention_bypass", run=bypass_attention)
