"""The comparison with Hugging Face's model, and the bounds of every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memlens.forward.check.reference import FirstLayers, Reference
from memlens.forward.check.table import Check, Status
from memlens.forward.hooks import HookFn, attached, capturing, hook_name
from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.models.state import content_key

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float16: 0.01}
"""Largest root mean square of a difference, relative to that of what it is compared with (centered).

In 16 bits rounding adds up over layers, so there these bounds are for four layers and grow with the square
root of the depth; what one layer adds is compared as well, from the same residual."""
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""The same, where both sides run on the same modules or through one layer only."""


def size_of(x: Tensor) -> float:
    """Return the root mean square."""
    return float(wide(x).square().mean().sqrt())


def wide(x: Tensor) -> Tensor:
    """Return numbers in which sums of squares are far more exact than any bound here."""
    return x if x.dtype == torch.float64 else x.float()


def compared(
    name: str, a: Tensor, b: Tensor, bounds: dict[torch.dtype, float], note: str = "", depth: int = 1
) -> Check:
    """Compare two tensors by the root mean square of their difference, relative to that of `b`, centered."""
    allowed = bounds.get(a.dtype, bounds[torch.float32])
    if is_narrow(a):
        allowed *= max(1.0, depth / 4) ** 0.5
    if a.shape != b.shape:
        return Check(name, "failed", allowed=allowed, note=f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
    a, b = wide(a), wide(b).to(a.device)
    difference = size_of(a - b) / max(size_of(b - b.mean(-1, keepdim=True)), 1e-12)
    difference = difference if difference == difference else float("inf")
    status: Status = "ok" if difference <= allowed else "failed"
    return Check(name, status, difference, allowed, note=note)


def against_huggingface(
    model: Any, reference: Reference | None, resid: dict[str, Tensor], logits: Tensor
) -> Check:
    """Compare logits with Hugging Face's; without a reference, return what was found when it was loaded."""
    if reference is None:
        found, key = AT_LOAD.get(model, (None, None))
        if found is None:
            return Check("logits", "not compared", note="not loaded by memlens, or unchecked")
        if key != content_key(model):
            return Check("logits", "not compared", note="the model has been changed since it was loaded")
        return found
    expected = reference.logits.to(logits.device)
    depth = len(model.blocks)
    if is_processed(model):  # centering the unembedding shifts all logits of a position by one constant
        logits, expected = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
        return compared(
            "logits", logits, expected, TOLERANCE, "log-probabilities against Hugging Face's", depth
        )
    found = compared("logits", logits, expected, TOLERANCE, "against Hugging Face's", depth)
    if found.status == "ok":
        return found
    if (first := _first_difference(resid, reference.resid, depth)) is not None:
        return replace(found, layer=first.layer, note=first.note)
    note = "differs from Hugging Face's model after the last layer's input"
    return replace(found, layer=depth - 1, note=note)


def _residuals(n_layers: int) -> list[str]:
    """The hooks of the residual at the input of each layer and at the output of the last one."""
    inputs = [hook_name("resid_pre", layer) for layer in range(n_layers)]
    return [*inputs, hook_name("resid_post", n_layers - 1)]


def _first_difference(resid: Mapping[str, Tensor], wanted: Sequence[Tensor], n_layers: int) -> Check | None:
    """Return the first residual that differs from Hugging Face's, with the layer that it comes from."""
    for layer, (name, own) in enumerate(zip(_residuals(n_layers), wanted, strict=False)):
        found = compared("logits", resid[name], own, TOLERANCE, depth=layer) if name in resid else None
        if found is not None and found.status == "failed":
            note = "differs from Hugging Face's model" + (" in its embedding" if layer == 0 else "")
            return replace(found, layer=max(0, layer - 1), note=note)
    return None


def by_layer(trunk: Trunk | None, resid: Sequence[Tensor], made: Mapping[int, Tensor], found: Check) -> Check:
    """Compare what each layer adds to the residual, from Hugging Face's own residual: nothing adds up.

    Args:
        trunk: It runs a layer alone where `made` lacks or differs; None if it cannot.
        resid: Hugging Face's residual at the input of each layer, and at the output of the last one if that
            is to be compared as well.
        made: By layer, what it makes of that residual in the model's own pass (`own_pass`).
        found: What is returned if none differs.
    """
    for layer, (start, end) in enumerate(pairwise(resid)):
        allowed = (SAME if is_narrow(start) else TOLERANCE)[start.dtype]
        added = size_of(wide(end) - start) + torch.finfo(start.dtype).eps * size_of(end) / allowed
        off = 0.0
        for out in _outputs(trunk, layer, start, made):
            off = size_of(wide(out).to(end.device) - end) / max(added, 1e-12)
            if off <= allowed:
                break
        if not off <= allowed:
            note = "what the layer adds to the residual differs from Hugging Face's model"
            return Check("logits", "failed", off, allowed, layer, note)
    return found


def _outputs(trunk: Trunk | None, layer: int, start: Tensor, made: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """What a layer makes of a residual: in the model's own pass, and run alone."""
    if layer in made:
        yield made[layer]
    if trunk is not None:
        yield trunk.run(start.to(trunk.device), layer, layer + 1)


def by_first_layers(model: Any, trunk: Trunk | None, first: FirstLayers, found: Check) -> Check:
    """Compare the embedding and the first layers on more tokens; `found` is returned if none differs."""
    n_layers = len(first.resid) - 1
    resid, _, made = own_pass(model, first.tokens, first.resid, stop=n_layers)
    differs = _first_difference(resid, first.resid, n_layers)
    return by_layer(trunk, first.resid, made, found) if differs is None else differs


def own_pass(
    model: Any, tokens: Tensor, given: Sequence[Tensor], stop: int | None = None
) -> tuple[dict[str, Tensor], Tensor, dict[int, Tensor]]:
    """Run the model on tokens, and each of its layers from Hugging Face's residual, in the same pass.

    For the latter the batch holds the tokens twice, and in the second half the residual at the input of each
    layer is replaced.

    Args:
        model: The model.
        tokens: The tokens.
        given: Hugging Face's residual at the input of each layer; empty: only the tokens run.
        stop: First layer that does not run; by default all run.

    Returns:
        The residual at the input of each layer and at the output of the last one, by hook name; the logits
        (with `stop`, the residual there); and by layer what it makes of Hugging Face's residual.
    """
    n, points = len(tokens), model.hook_dict  # which a bridge makes anew each time
    residuals = _residuals(stop or len(model.blocks))
    inputs, outputs = residuals[:-1], residuals[1:]
    names = [name for name in residuals if name in points]
    twice = len(given) >= len(inputs) and {*inputs} <= {*names}
    writes = [(name, _replacing(rows, n)) for name, rows in zip(inputs, given, strict=False)] if twice else []
    options = {} if stop is None else {"stop_at_layer": stop}
    with capturing(model, names) as found, attached(model, writes):
        out = model(torch.cat([tokens, tokens]) if twice else tokens, **options)
    made = {layer: found[name][n:] for layer, name in enumerate(outputs) if twice and name in found}
    return {name: value[:n] for name, value in found.items()}, out[:n], made


def _replacing(rows: Tensor, n: int) -> HookFn:
    """Return a hook that replaces what follows the first `n` rows."""

    def fn(activation: Tensor, hook: Any) -> Tensor:
        return torch.cat([activation[:n], rows.to(activation)])

    return fn


def is_narrow(x: Tensor) -> bool:
    """Whether numbers have 16 bits."""
    return x.dtype.itemsize < 4


def is_processed(model: Any) -> bool:
    """Whether the weights have TransformerLens' classic form, in which activations are other ones."""
    return bool(describe(model)["processed_weights"])


AT_LOAD: WeakKeyDictionary[Any, tuple[Check, tuple[Any, ...]]] = WeakKeyDictionary()
"""The comparison with Hugging Face's model, which is gone later, and the content when it was loaded."""
