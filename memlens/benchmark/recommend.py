"""Which localizer to use for which kind of component, and what the benchmark found of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml

from memlens.benchmark.over_organisms import FEWEST_PAIRS
from memlens.errors import OptionError
from memlens.forward.components import ComponentKind
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


@dataclass(frozen=True)
class Known:
    """What the benchmark's stored run found of one method on one kind of component.

    Attributes:
        localizer: Name of the localizer.
        variant: What is made of its scores.
        component: The kind of component.
        family: The family of models; "" for all of them together.
        average_precision: Over organisms.
        recall_at_k: The share of planted components among the first k, the number planted.
        chance: `recall_at_k` of a random ranking.
        forwards: Cost in forward passes of the sequences; NaN where it was not counted.
        twin: Whether it needs the model without the memory.
    """

    localizer: str
    variant: str
    component: str
    family: str
    average_precision: Estimate
    recall_at_k: Estimate
    chance: float
    forwards: float
    twin: bool

    @property
    def method(self) -> str:
        """The method in words."""
        return method_name(self.localizer, self.variant)

    def __str__(self) -> str:
        found = self.recall_at_k
        organisms = "1 organism" if found.n == 1 else f"{found.n} organisms"
        where = f"{organisms} of {self.family or 'all families'}"
        interval = f" [{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.known else ""
        return (
            f"{self.method} finds {100 * found.value:.0f} %{interval} of planted {PLURALS[self.component]} "
            f"among the first k on {where} (chance {100 * self.chance:.0f} %)"
        )


PLURALS = {"head": "heads", "neuron": "neurons", "layer_mlp": "MLPs", "layer_attention": "attention layers"}
"""What several components of each kind are called."""


def method_name(localizer: str, variant: str = "") -> str:
    """Return a localizer and its variant in words.

    >>> method_name("zero ablation", "z-scored")
    'zero ablation, z-scored'
    """
    return f"{localizer}, {variant}" if variant else localizer


def known(
    localizer: str, variant: str = "", component: ComponentKind = "head", family: str | None = None
) -> Known | None:
    """Return what the benchmark found of a method; of all families where it has not measured this one.

    Args:
        localizer: Name of a localizer.
        variant: "", "less others", "z-scored" or "less twin".
        component: The kind of component.
        family: Of the model, as `describe` names it; all by default.

    Returns:
        None where the stored run did not measure the method on this kind of component.

    Example:
        >>> import memlens as ml
        >>> found = ml.benchmark.known("zero ablation", "z-scored", "head", family="pythia")
        >>> found.family, found.recall_at_k.value > found.chance
        ('pythia', True)
    """
    table = _leaderboard()
    same = (table["localizer"] == localizer) & (table["variant"] == variant)
    own: Any = table[same & (table["component"] == component)]
    for name in (family, ""):
        rows = own[own["family"] == name] if name is not None else own.head(0)
        if len(rows):
            return _known(rows.iloc[0].to_dict())
    return None


def what_is_known(
    localizer: str, variant: str = "", component: ComponentKind = "head", family: str | None = None
) -> str:
    """Return in one sentence what the benchmark found of a method, or that it has not measured it."""
    found = known(localizer, variant, component, family)
    if found is not None:
        return f"In the localization benchmark {found}."
    name = method_name(localizer, variant)
    return f"The localization benchmark has not measured {name} on {PLURALS[component]}."


ABLATIONS: Mapping[str, str] = {
    "zero": "zero ablation", "mean": "mean ablation", "resample": "resample ablation",
    "mean_of_other_heads": "mean-of-other-heads ablation",
}  # fmt: skip
"""The localizers that rank heads as `ablate_heads` does in each mode that the benchmark has."""

DOMINANT = "activation times norm"
"""The localizer that ranks neurons as the selection "dominant" of `knock_out_neurons`."""


def ranked_by(localizer: str, component: ComponentKind, family: str | None = None) -> str:
    """Return the note of a table that ranks components: by which method, and what is known of it.

    Args:
        localizer: Name of a localizer.
        component: The kind of component.
        family: Of the model, as `describe` names it; all by default.

    >>> ranked_by("attention bypass", "layer_attention").split(".")[0]
    'Ranked by attention bypass'
    """
    return f"Ranked by {localizer}. {what_is_known(localizer, '', component, family)}"


def affordable(component: ComponentKind, most_forwards: float, *, family: str | None = None) -> Known | None:
    """Return the best method for a kind of component that costs at most so many forward passes.

    The method of highest average precision among those that are not controls and need no twin. The passes on
    other sequences that a variant needs are not counted. None if no method is known to be so cheap. Of few
    organisms the best of many methods is often the luckiest, so a family decides only where it has at least
    `FEWEST_PAIRS` organisms.

    Args:
        component: The kind of component.
        most_forwards: In forward passes of the sequences.
        family: Of the model; all by default, and where it has too few organisms.
    """
    table = _leaderboard()
    fair = ~table["control"] & ~table["twin"] & (table["forwards"] <= most_forwards)
    own: Any = table[fair & (table["component"] == component)]
    rows = own[(own["family"] == family) & (own["n"] >= FEWEST_PAIRS)]
    rows = rows if len(rows) else own[own["family"] == ""]
    return None if rows.empty else _known(rows.loc[rows["average_precision"].idxmax()].to_dict())


def _known(row: dict[str, Any]) -> Known:
    def estimate(name: str) -> Estimate:
        return Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], int(row["n"]))

    return Known(
        row["localizer"], row["variant"], row["component"], row["family"], estimate("average_precision"),
        estimate("recall_at_k"), row["recall_at_k_chance"], row["forwards"], bool(row["twin"]),
    )  # fmt: skip


CHEAP: Mapping[str, tuple[str, str]] = {
    "head": ("zero ablation", "z-scored"), "neuron": ("gate gradient", ""),
    "layer_mlp": ("zero ablation", "z-scored"), "layer_attention": ("zero ablation", "z-scored"),
}  # fmt: skip
"""Localizer and variant to use where the stored run does not know what methods cost."""


@cache
def _leaderboard() -> pd.DataFrame:
    path = files("memlens.benchmark") / "leaderboard.csv"
    with path.open("r", encoding="utf-8") as file:
        return pd.read_csv(file, keep_default_na=False, na_values={n: [""] for n in _NUMBERS})


_NUMBERS = [
    *(f"{m}{e}" for m in ("average_precision", "recall_at_k") for e in ("", "_low", "_high", "_chance")),
    "uniqueness", "deletion_specific", "forwards", "forwards_others", "cpu_seconds",
]  # fmt: skip
