"""Writing a `WeightEdit` into the parameters of a Hugging Face model."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlens.errors import UnsupportedModelError
from memlens.forward.components import ComponentWeights, NormPart
from memlens.instruments.edit.weight_edit import OUTPUTS, WeightChange, WeightEdit

_NORMS: tuple[str, ...] = get_args(NormPart)
_Write = tuple[str, int, Tensor | None, Tensor]
"""A parameter's name, the dimension that an index counts, the index (None: everything) and the values."""


@torch.no_grad()
def write_edit(hf_model: PreTrainedModel, edit: WeightEdit) -> list[str]:
    """Write an edit into a plain Hugging Face model, in place.

    Args:
        hf_model: A model with the weights for which the edit was made, not wrapped by TransformerLens.
        edit: The edit.

    Returns:
        The names of the parameters that changed.

    Raises:
        UnsupportedModelError: The architecture has no place for a change, such as a bias that it lacks. Then
            nothing was written.
    """
    weights = ComponentWeights(hf_model)
    writes = [write for change in edit.changes for write in _writes(weights, change, type(hf_model).__name__)]
    for name, dim, index, values in writes:
        parameter = weights.parameter(name)
        if index is None:
            parameter.copy_(values)
        else:
            parameter.index_copy_(dim, index.to(parameter.device), values.to(parameter))
    return list(dict.fromkeys(name for name, *_ in writes))


def _writes(weights: ComponentWeights, change: WeightChange, kind: str) -> list[_Write]:
    layer, part, bias = change.layer, change.part, change.bias
    if part in _NORMS:
        found = weights.norm(layer, part)  # pyright: ignore[reportArgumentType]
        if found is None or (found[1] is None and bias is not None and bool(bias.any())):
            raise _no_place(kind, f"norm {part!r}", layer)
        named = [(found[0], change.weight), (found[1], bias)]
        return [(name, 0, None, value) for name, value in named if name is not None and value is not None]
    place = weights.matrix(layer, part)  # pyright: ignore[reportArgumentType]
    if place is None or change.index is None:
        raise _no_place(kind, f"map {part!r}", layer)
    index = change.index.cpu()
    transposed = (part in OUTPUTS) == (place.dim == 0)
    values = change.weight.T if transposed else change.weight
    writes: list[_Write] = [(place.name, place.dim, place.index[index], values)]
    if bias is None:
        return writes
    where = weights.bias(layer, part)  # pyright: ignore[reportArgumentType]
    if where is None:
        if bool(bias.any()):
            raise _no_place(kind, f"bias of {part!r} (attention's output is 'o', the MLP's 'out')", layer)
        return writes
    own = where.index if part in OUTPUTS else where.index[index]
    return [*writes, (where.name, 0, own, bias)]


def _no_place(kind: str, what: str, layer: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights of {kind} cannot express this edit: layer {layer} has no {what}."
    )
