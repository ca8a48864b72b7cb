"""Which localizer to use for which kind of component, and what the benchmark found of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from memlens.errors import OptionError
from memlens.organisms.planting.carriers import ComponentKind
from memlens.results.statistics.estimates import Estimate


@dataclass(frozen=True)
class Recommendation:
    """The localizer that found most in the benchmark's stored run.

    Attributes:
        component: The kind of component.
        localizer: Name of the localizer.
        variant: What is made of its scores: "", "less others" or "z-scored".
        average_precision: Its average precision, over organisms.
        recall_at_k: The share of planted components among the first k, the number planted.
        chance: Average precision of a random ranking.
        models: The base models.
        carriers: The carriers.
    """

    component: str
    localizer: str
    variant: str
    average_precision: Estimate
    recall_at_k: Estimate
    chance: float
    models: tuple[str, ...]
    carriers: tuple[str, ...]

    def __str__(self) -> str:
        variant = f", {self.variant}" if self.variant else ""
        found, n = self.average_precision, self.average_precision.n
        return (
            f"{self.component}: {self.localizer}{variant}: average precision {found} (chance "
            f"{self.chance:.2g}), "
            f"{self.recall_at_k} of the planted ones come first; {n} organisms of {len(self.models)} models"
        )


def recommended(component: ComponentKind) -> Recommendation:
    """Return the localizer to use for a kind of component, with the evidence for it.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.recommended("neuron").localizer
        'zero ablation of neurons'

    Raises:
        OptionError: The stored run has no carrier of this kind.
    """
    found = _stored().get(component)
    if found is None:
        raise OptionError(f"component {component!r}: choose from {', '.join(_stored())}.")

    def estimate(name: str) -> Estimate:
        return Estimate(found[name], found[f"{name}_low"], found[f"{name}_high"], found["n"])

    return Recommendation(
        component, found["localizer"], found["variant"], estimate("average_precision"),
        estimate("recall_at_k"), found["chance"], tuple(found["models"]), tuple(found["carriers"]),
    )  # fmt: skip


@cache
def _stored() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((files("memlens.benchmark") / "recommended.yaml").read_text(encoding="utf-8"))
