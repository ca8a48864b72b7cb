"""Precision: a model in a wider dtype for a while, and how far half precision stands from float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model run in a wider dtype for the length of a `with` block.

    The weights are the same numbers, so what differs is rounding on the way. Afterwards the model has its
    own tensors again, not copies cast back. Needs memory for the wider weights beside them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize]
    kept = [(t, t.data) for t in narrow]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "cfg", None)) is not None}.values()
    dtypes = [(c, c.dtype) for c in configs if isinstance(getattr(c, "dtype", None), torch.dtype)]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        for config, own in dtypes:
            config.dtype = dtype if own.itemsize < dtype.itemsize else own
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for config, own in dtypes:
            config.dtype = own


def in_float32(model: Any) -> AbstractContextManager[None]:
    """Let a model of 16-bit weights run in float32 for the length of a `with` block; see `in_dtype`."""
    return in_dtype(model, torch.float32)
