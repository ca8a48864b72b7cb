"""Attention bypass ("short-circuiting"): every token of a block attends to itself alone, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memlens.errors import OptionError, check_option
from memlens.models.hooks import HookFn, check_head, check_layer, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps import Intervention, Reads, applied, sweep
from memlens.sweeps.metrics import MetricLike

__all__ = ["BYPASS_MODES", "bypass_attention", "bypass_intervention", "bypassed"]

BYPASS_MODES = ("identity", "zero")


def bypass_attention(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "identity",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Any,
) -> Result:
    r"""Bypass the attention of each block alone and measure recall.

    - ``"identity"``: the attention matrix of every head becomes the identity, so that
      :math:`z_{h,t} = v_{h,t}`; value and output projections, biases, norms and the MLP stay
      (arXiv 2501.05078, as its released code does it). It is written on values, which every architecture
      obeys.
    - ``"zero"``: the attention adds nothing to the residual, its bias included (ours, as a control).

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        mode: One of the above.
        layers: The blocks, each bypassed alone; all by default.
        heads: Only these heads ("identity" only); all by default.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "attention_bypass": each metric `(sequence, layer)`, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown mode, or heads with mode "zero".
        SiteError: A layer or head that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.bypass_attention(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["exact_match"].dims
        ('sequence', 'layer')
    """
    layers = range(Trunk(model).n_layers) if layers is None else layers
    interventions = [
        bypass_intervention(model, [layer], mode=mode, heads=heads, coords={"layer": layer})
        for layer in layers
    ]
    settings = {"mode": mode, "heads": None if heads is None else list(heads)}
    return sweep(
        model, sequences, interventions, metrics, kind="attention_bypass", settings=settings, **options
    )


def bypass_intervention(
    model: Any,
    layers: int | Sequence[int],
    *,
    mode: str = "identity",
    heads: Sequence[int] | None = None,
    coords: dict[str, Any] | None = None,
) -> Intervention:
    """Return the joint bypass of some layers as one `Intervention`.

    Args:
        model: A TransformerLens model.
        layers: The block, or the blocks bypassed together.
        mode: "identity" or "zero"; see `bypass_attention`.
        heads: Only these heads ("identity" only); all by default.
        coords: Labels for the result.

    Raises:
        OptionError: Unknown mode, no layers, or heads with mode "zero".
        SiteError: A layer or head that does not exist.
    """
    check_option("mode", mode, BYPASS_MODES)
    trunk = Trunk(model)
    layers = [layers] if isinstance(layers, int) else list(layers)
    if not layers:
        raise OptionError("layers=[] bypasses nothing: give at least one layer.")
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
        for hook in (_zero(layer) if mode == "zero" else _identity(trunk, layer, heads))
    ]
    return Intervention(f"bypass {','.join(map(str, layers))} ({mode})", hooks, coords or {})


@contextmanager
def bypassed(
    model: Any, layers: int | Sequence[int], *, mode: str = "identity", heads: Sequence[int] | None = None
) -> Iterator[Any]:
    """Hold a bypass for the length of a `with` block: forward or generation, cached or not.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> with ml.bypassed(model, [5], mode="identity"):
        ...     logits = model(torch.tensor([[5, 6, 7]]))
        >>> tuple(logits.shape)[:2]
        (1, 3)
    """
    with applied(model, bypass_intervention(model, layers, mode=mode, heads=heads)):
        yield model


def _zero(layer: int) -> list[tuple[str, HookFn]]:
    return [(hook_name("attn_out", layer), lambda x, hook: torch.zeros_like(x))]


def _identity(trunk: Trunk, layer: int, heads: Sequence[int] | None) -> list[tuple[str, HookFn]]:
    """Remember the values, and write them where the mixed values would stand."""
    kept: list[Tensor] = []
    groups = trunk.n_heads // trunk.n_kv_heads
    mix = _written(heads)

    def remember(v: Tensor, hook: Any) -> None:
        kept[:] = [v]

    def write(z: Tensor, hook: Any) -> Tensor:
        v = kept.pop()
        if v.shape[2] != z.shape[2]:
            v = v.repeat_interleave(groups, dim=2)
        return mix(z, v)

    return [(hook_name("v", layer), Reads(remember)), (hook_name("z", layer), write)]


def _written(heads: Sequence[int] | None) -> Callable[[Tensor, Tensor], Tensor]:
    if heads is None:
        return lambda z, v: v.to(z.dtype)
    chosen = list(heads)

    def mix(z: Tensor, v: Tensor) -> Tensor:
        out = z.clone()
        out[:, :, chosen] = v[:, :, chosen]
        return out

    return mix
