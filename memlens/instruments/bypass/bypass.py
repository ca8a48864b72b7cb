"""Attention bypass ("short-circuiting"): every token of a block attends to itself alone, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memlens.errors import OptionError, check_option
from memlens.forward.hooks import HookFn, check_head, check_layer, chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_bypass
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention, Reads
from memlens.sweeps.run import sweep

BYPASS_MODES = ("identity", "zero")
CONTROL_MODES = ("uniform", "first_token")
"""What else the attention matrix may become, as a control: they need the whole text at once."""
SPANS = ("layer", "window", "suffix", "prefix")


def bypass_attention(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "identity",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    span: str = "layer",
    width: int = 2,
    over: str | None = None,
    strengths: Sequence[float] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Any,
) -> Result:
    r"""Bypass the attention of each block, window or suffix of blocks, or head, and measure recall.

    - ``"identity"``: the attention matrix of every head becomes the identity, so that
      :math:`z_{h,t} = v_{h,t}`; value and output projections, biases, norms and the MLP stay
      (arXiv 2501.05078, as its released code does it). It is written on values, which every architecture
      obeys.
    - ``"zero"``: the attention adds nothing to the residual, its bias included (ours, as a control).
    - ``"uniform"``: every row of the attention matrix is the same for all tokens before and at its place,
      :math:`z_{h,t} = \frac{1}{t+1} \sum_{s \le t} v_{h,s}` (ours, as a control; a sliding window is not
      heeded).
    - ``"first_token"``: every token attends to the first one alone, :math:`z_{h,t} = v_{h,0}` (ours, as a
      control: many heads rest there).

    With a strength :math:`a` the attention matrix is :math:`(1-a)A + aI`: :math:`z_{h,t}` becomes
    :math:`(1-a)z_{h,t} + a\,v_{h,t}` (of "zero": :math:`1-a` times what attention adds).

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        mode: One of the above.
        layers: The blocks at which a bypass stands or begins (a "prefix": ends); all by default.
        heads: Only these heads (not with "zero"); all by default. With grouped queries, query heads.
        span: What is bypassed together: the block alone ("layer"), `width` consecutive blocks from it on
            ("window"; those that would pass the last block are left out), it and all later blocks
            ("suffix"), or all blocks up to and with it ("prefix").
        width: Blocks in a window.
        over: "head" bypasses each of `heads` alone (not with "zero").
        strengths: Strengths :math:`a` from 0 to 1 that are tried each; full strength alone by default.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "attention_bypass": each metric `(sequence, layer)`, with `head` and `strength` after it where
        they were asked for, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown mode, span or `over`, heads with mode "zero", a strength outside 0 to 1, or a
            window wider than the model is deep.
        SiteError: A layer or head that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.bypass_attention(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["exact_match"].dims
        ('sequence', 'layer')
    """
    if over is not None:
        check_option("over", over, ("head",))
    trunk = Trunk(model)
    each = [heads] if over is None else [[h] for h in (range(trunk.n_heads) if heads is None else heads)]
    interventions = [
        bypass_intervention(
            model,
            spanned,
            mode=mode,
            heads=some,
            strength=1.0 if strength is None else strength,
            coords={
                "layer": layer,
                **({} if over is None or some is None else {"head": some[0]}),
                **({} if strength is None else {"strength": strength}),
            },
        )
        for layer, spanned in spans(trunk.n_layers, span=span, width=width, layers=layers).items()
        for some in each
        for strength in (strengths or [None])
    ]
    settings = {
        "mode": mode,
        "heads": None if heads is None else list(heads),
        "span": span,
        "width": width if span == "window" else None,
        "over": over,
        "strengths": None if strengths is None else list(strengths),
    }
    return sweep(
        model, sequences, interventions, metrics, kind="attention_bypass", settings=settings, **options
    )


def spans(
    n_layers: int, *, span: str = "layer", width: int = 2, layers: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Return which blocks are taken together, by the block that names them.

    Args:
        n_layers: How many blocks the model has.
        span: "layer", "window", "suffix" or "prefix"; see `bypass_attention`.
        width: Blocks in a window.
        layers: The naming blocks; all by default.

    Raises:
        OptionError: An unknown span, or a window wider than the model is deep.
        SiteError: A layer that does not exist.

    >>> spans(4, span="window", width=3)
    {0: [0, 1, 2], 1: [1, 2, 3]}
    >>> spans(4, span="suffix", layers=[2])
    {2: [2, 3]}
    """
    check_option("span", span, SPANS)
    if not 1 <= width <= n_layers:
        raise OptionError(
            f"width={width} is no window of a model with {n_layers} layers: give 1 to {n_layers}."
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


def bypass_intervention(
    model: Any,
    layers: int | Sequence[int],
    *,
    mode: str = "identity",
    heads: Sequence[int] | None = None,
    strength: float = 1.0,
    coords: dict[str, Any] | None = None,
) -> Intervention:
    """Return the joint bypass of some layers as one `Intervention`.

    Args:
        model: A TransformerLens model.
        layers: The block, or the blocks bypassed together.
        mode: See `bypass_attention`.
        heads: Only these heads (not with "zero"); all by default.
        strength: How much of it, 0 to 1; see `bypass_attention`.
        coords: Labels for the result.

    Raises:
        OptionError: Unknown mode, no layers, heads with mode "zero", or a strength outside 0 to 1.
        SiteError: A layer or head that does not exist.
    """
    check_option("mode", mode, (*BYPASS_MODES, *CONTROL_MODES))
    trunk = Trunk(model)
    layers = [layers] if isinstance(layers, int) else list(layers)
    if not layers:
        raise OptionError("layers=[] bypasses nothing: give at least one layer.")
    if not 0 <= strength <= 1:
        raise OptionError(f"strength={strength} is no share: give a number from 0 to 1.")
    for layer in layers:
        check_layer(layer, trunk.n_layers)
    for head in heads or []:
        check_head(head, trunk.n_heads)
    if heads is not None and mode == "zero":
        raise OptionError(
            "heads= goes with mode='identity': ablate single heads to zero with ablate_heads(mode='zero')."
        )
    hooks = [
        hook
        for layer in layers
        for hook in (
            _zero(layer, strength) if mode == "zero" else _on_values(trunk, layer, mode, heads, strength)
        )
    ]
    what = mode if strength == 1 else f"{mode} x {strength:g}"
    return Intervention(f"bypass {','.join(map(str, layers))} ({what})", hooks, coords or {})


@contextmanager
def bypassed(
    model: Any,
    layers: int | Sequence[int],
    *,
    mode: str = "identity",
    heads: Sequence[int] | None = None,
    strength: float = 1.0,
) -> Iterator[Any]:
    """Hold a bypass for the length of a `with` block.

    A token that sees itself alone needs no cache and no padding mask, so a forward, generation with or
    without a cache, left-padded batches, and a prompt fed in chunks all give the same tokens.

    Args:
        model: A TransformerLens model.
        layers: The block, or the blocks bypassed together.
        mode: "identity" or "zero"; see `bypass_attention`.
        heads: Only these heads ("identity" only); all by default.
        strength: How much of it, 0 to 1.

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
    with applied(model, bypass_intervention(model, layers, mode=mode, heads=heads, strength=strength)):
        yield model


def _zero(layer: int, strength: float) -> list[tuple[str, HookFn]]:
    return [(hook_name("attn_out", layer), lambda x, hook: x * (1 - strength))]


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
"""What each mode makes of the values `[batch, pos, head, d_head]`."""


def _on_values(
    trunk: Trunk, layer: int, mode: str, heads: Sequence[int] | None, strength: float
) -> list[tuple[str, HookFn]]:
    """Remember the values, and write what the mode makes of them where the mixed values would stand."""
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
