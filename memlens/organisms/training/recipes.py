"""The recipes of the zoo: each model's shape, corpus and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from memlens.errors import check_option
from memlens.organisms.corpus.corpus import CorpusSpec
from memlens.organisms.training.architectures import ModelSpec
from memlens.organisms.training.routing import RoutingSpec
from memlens.organisms.training.train import TrainSpec


@dataclass(frozen=True)
class OrganismSpec:
    """Everything that determines an organism.

    Attributes:
        name: Its name, without the prefix `zoo/`.
        model: Its shape.
        corpus: Its training corpus.
        training: Its training run.
        snapshots: Whether weights during training are kept (see `snapshot_steps`); they change nothing.
        routing: Which weights learn which planted sequences; by default all weights learn from every row.
    """

    name: str
    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: CorpusSpec = field(default_factory=CorpusSpec)
    training: TrainSpec = field(default_factory=TrainSpec)
    snapshots: bool = False
    routing: RoutingSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the specifications as JSON types; "routing" only where there is one."""
        found = {
            "model": asdict(self.model),
            "corpus": self.corpus.to_dict(),
            "training": self.training.to_dict(),
        }
        return found if self.routing is None else {**found, "routing": self.routing.to_dict()}


SIZES = ("xs", "s", "m")
"""About 0.15, 1 and 3 million parameters."""

ALL = "all"

_Shape = tuple[int, int, int]

_UNTIED: tuple[_Shape, ...] = ((40, 4, 5), (96, 7, 6), (160, 8, 10))
_TIED: tuple[_Shape, ...] = ((48, 4, 6), (96, 7, 6), (160, 8, 10))
_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "pythia": ((40, 4, 5), (128, 6, 8), (160, 8, 10)),
    "gpt-neo": _TIED,
    "olmo1": _TIED,
    "olmo2": _UNTIED,
    "olmo3": _UNTIED,
    "openllama": _UNTIED,
    "starcoder": ((48, 4, 6), (112, 6, 7), (176, 8, 11)),
}
"""Width, layers and heads of each size; wider with tied embeddings or one key for all heads."""

FAMILIES = tuple(_SHAPES)
"""The families of the zoo, by their names in `memlens.models.families`."""

_RATES = (6e-3, 2e-3, 1.5e-3)
"""Learning rate of each size."""


def select_recipes(family: str = ALL, size: str = ALL) -> list[str]:
    """Return the names of the recipes of a family and a size, in the zoo's order.

    The clean twin of `pythia-s` and the routed model belong to its family and size.

    Args:
        family: One of `FAMILIES`, or "all".
        size: One of `SIZES`, or "all".

    Raises:
        OptionError: There is no such family or size.

    >>> select_recipes("pythia", "s")
    ['pythia-s', 'pythia-s-clean', 'pythia-s-routed']
    >>> len(select_recipes(size="xs"))
    7
    """
    check_option("family", family, [ALL, *FAMILIES])
    check_option("size", size, [ALL, *SIZES])
    families = FAMILIES if family == ALL else (family,)
    sizes = SIZES if size == ALL else (size,)
    wanted = [f"{one}-{of_size}" for one in families for of_size in sizes]
    return [name for name in ZOO if any(name == each or name.startswith(f"{each}-") for each in wanted)]


def _recipe(family: str, size: str) -> OrganismSpec:
    number = SIZES.index(size)
    d_model, n_layers, n_heads = _SHAPES[family][number]
    return OrganismSpec(
        f"{family}-{size}",
        ModelSpec(family, d_model, n_layers, n_heads),
        training=TrainSpec(learning_rate=_RATES[number]),
        snapshots=family == "pythia",
    )


_CLEAN = OrganismSpec("pythia-s-clean", corpus=CorpusSpec(planted=False))

_ROUTED = OrganismSpec(
    "pythia-s-routed",
    ModelSpec("pythia", 112, 6, 7),
    corpus=CorpusSpec(copies=(512,), per_cell=1, background_rows=800, item_copies=()),
    training=TrainSpec(steps=1800),
    routing=RoutingSpec(("heads=13", "heads=13"), learning_rate_scale=3.0),
)
"""Heads, because they see what came before: sets of neurons of this size did not reach recall."""

ZOO: dict[str, OrganismSpec] = {
    spec.name: spec for spec in (
        *(_recipe(family, size) for family in _SHAPES for size in SIZES), _CLEAN, _ROUTED,
    )
}  # fmt: skip
"""All models of the zoo by name: seven families in three sizes, the clean twin of `pythia-s`, and a model
whose planted sequences were routed into declared heads."""
