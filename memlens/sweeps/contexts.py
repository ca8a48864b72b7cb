"""Any intervention as a context: the edit holds for whatever runs inside the `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memlens.models.hooks import attached
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.silent import EditWatch

__all__ = ["applied"]


@contextmanager
def applied(model: Any, *interventions: Intervention) -> Iterator[Any]:
    """Hold interventions on a model for the length of a `with` block: forward, generation, evaluation.

    Hooks are gone afterwards, also after an exception. On the bridge they also act inside
    ``model.original_model(...)`` and its ``generate``.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        interventions: What is changed, in this order. A hook that differs by sequence (a `BatchHook`) needs
            `sweep`.

    Yields:
        The model.

    Raises:
        SiteError: A hook name that the model does not have.
        SilentInterventionError: On leaving, when a hook edited its activation and the model ignored it.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> edit = ml.Intervention("no MLP in 0", [("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)])
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> plain = model(tokens)
        >>> with ml.applied(model, edit):
        ...     changed = model(tokens)
        >>> bool((changed == plain).all()), bool((model(tokens) == plain).all())
        (False, True)
    """
    hooks = [hook for i in interventions for hook in i.bound(None)]
    device = next(model.parameters()).device
    watch = EditWatch(model, torch.arange(4, device=device)[None] % model.cfg.d_vocab)
    with attached(model, [(name, watch.wrap(name, fn)) for name, fn in hooks]):
        yield model
    watch.settle(sorted(watch.fired))
