"""The edit that takes given neurons' sub-updates out of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.hooks import HookFn, check_layer, hook_name
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import POSITIONS, where
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention


def neuron_knock_out(
    model: Any,
    neurons: Mapping[int, Sequence[int] | np.ndarray | Tensor],
    *,
    keep: bool = False,
    positions: str = "all",
    means: Mapping[int, Tensor] | None = None,
    name: str = "",
    coords: Mapping[str, Hashable] | None = None,
) -> Intervention:
    """Return the joint knock-out of given neurons as one `Intervention`.

    Args:
        model: A TransformerLens model.
        neurons: By layer their numbers: a list for all sequences, or `[seq, k]`, one list a sequence.
        keep: Knock out all but these.
        positions: As for `ablate_mlps`; other than "all", and lists that differ by sequence, need `sweep`.
        means: By layer what each neuron's coefficient becomes, `[neuron]`; 0 by default.
        name: What it is called.
        coords: Labels for the result.

    Raises:
        OptionError: Unknown positions, or no layer.
        SiteError: A layer or a neuron that does not exist.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> with ml.applied(model, ml.edits.neuron_knock_out(model, {0: [5, 17], 1: [3]})):
        ...     logits = model(torch.tensor([[5, 6, 7]]))
        >>> tuple(logits.shape)[:2]
        (1, 3)
    """
    check_option("positions", positions, POSITIONS)
    if not neurons:
        raise OptionError("neurons={} knocks out nothing: give the neurons of at least one layer.")
    chosen: dict[int, Tensor] = {}
    for layer, listed in neurons.items():
        check_layer(layer, Trunk(model).n_layers)
        chosen[layer] = torch.as_tensor(np.asarray(listed, dtype=np.int64))
        _check_neurons(chosen[layer], layer, len(value_vectors(model, layer)))
    name = name or f"knock-out in {','.join(map(str, chosen))}"
    return knock_out(chosen, keep, positions, means or {}, name, coords or {})


def knock_out(
    neurons: Mapping[int, Int[Tensor, "*seq k"]],
    keep: bool,
    positions: str,
    means: Mapping[int, Tensor],
    name: str,
    coords: Mapping[str, Hashable],
) -> Intervention:
    """Return the knock-out of neurons that are known to exist; see `neuron_knock_out`."""
    hooks = [
        (hook_name("mlp_post", layer), _cut(chosen, keep, positions, means.get(layer)))
        for layer, chosen in neurons.items()
    ]
    return Intervention(name, hooks, coords)


def _check_neurons(chosen: Int[Tensor, "*seq k"], layer: int, width: int) -> None:
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < width:
        wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
        raise SiteError(f"neuron {wrong} does not exist: layer {layer} has neurons 0 to {width - 1}.")


def _cut(
    neurons: Int[Tensor, "*seq k"], keep: bool, positions: str, value: Tensor | None
) -> HookFn | BatchHook:
    """The hook that replaces some coefficients, in each sequence its own."""

    def edit(rows: Tensor, at: Tensor | None) -> Callable[..., Tensor]:
        def fn(x: Tensor, hook: Any) -> Tensor:
            cut = torch.zeros(len(rows), x.shape[-1], dtype=torch.bool, device=x.device)
            cut.scatter_(1, rows.to(x.device), True)
            cut = (~cut if keep else cut)[:, None]
            cut = cut if at is None else cut & at[..., None]
            return torch.where(cut, 0.0 if value is None else value.to(x), x)

        return fn

    if neurons.ndim == 1 and positions == "all":
        return edit(neurons[None], None)

    def make(batch: Batch) -> Callable[..., Tensor]:
        rows = neurons[None].expand(len(batch.rows), -1) if neurons.ndim == 1 else neurons[batch.rows]
        return edit(rows, where(batch, positions))

    return ByBatch(make)
