"""Which layers of a model are of one kind, so that what holds for the code of one holds for all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def kinds_of_layers(model: Any) -> list[int]:
    """Return the first and last layer, and the first layer of each further kind (`first_of_each_kind`)."""
    return sorted({len(model.blocks) - 1, *first_of_each_kind(model.blocks)})


def first_of_each_kind(blocks: Iterable[Any], per_layer: Sequence[Sequence[Any]] = ()) -> list[int]:
    """Return the first layer of each kind, in their order.

    Layers are of one kind if their modules have the same classes, shapes and plain attributes, apart from the
    layer's number.

    Args:
        blocks: The layers.
        per_layer: Lists of what else tells them apart, one value per layer.
    """
    facts = [_layer_facts(block) for block in blocks]
    numbers = [key for key in facts[0] if all(own.get(key) == layer for layer, own in enumerate(facts))]
    first: dict[Any, int] = {}
    for layer, own in enumerate(facts):
        kind = sorted((repr(k), repr(v)) for k, v in own.items() if k not in numbers)
        first.setdefault((*kind, *(repr(values[layer]) for values in per_layer)), layer)
    return list(first.values())


def _layer_facts(block: Any) -> dict[tuple[int, str], Any]:
    """Return the class, the shapes and the plain attributes of each of a layer's modules."""
    facts: dict[tuple[int, str], Any] = {}
    for i, module in enumerate(block.modules()):
        facts[i, "class"] = type(module)
        facts[i, "shapes"] = [tuple(p.shape) for p in module.parameters(recurse=False)]
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)):
                facts[i, name] = _NUMBERS.sub("", value) if isinstance(value, str) else value
    return facts


_NUMBERS = re.compile(r"\d+")
