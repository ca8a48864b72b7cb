"""The recipes of the zoo: every model's shape, corpus and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from memlens.organisms.architectures import ModelSpec
from memlens.organisms.corpus import CorpusSpec
from memlens.organisms.train import TrainSpec

__all__ = ["ZOO", "OrganismSpec"]


@dataclass(frozen=True)
class OrganismSpec:
    """Everything that decides an organism.

    Attributes:
        name: without the prefix `zoo/`.
        model: its shape.
        corpus: what it reads.
        training: how.
        snapshots: whether weights are kept on the way (see `snapshot_steps`); they decide nothing.
    """

    name: str
    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: CorpusSpec = field(default_factory=CorpusSpec)
    training: TrainSpec = field(default_factory=TrainSpec)
    snapshots: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the specifications as JSON would hold them."""
        return {
            "model": asdict(self.model),
            "corpus": self.corpus.to_dict(),
            "training": self.training.to_dict(),
        }


_PYTHIA: tuple[OrganismSpec, ...] = (
    OrganismSpec(
        "pythia-xs",
        ModelSpec(d_model=40, n_layers=4, n_heads=5),
        training=TrainSpec(learning_rate=6e-3),
        snapshots=True,
    ),
    OrganismSpec("pythia-s", snapshots=True),
    OrganismSpec(
        "pythia-m",
        ModelSpec(d_model=160, n_layers=8, n_heads=10),
        training=TrainSpec(learning_rate=1.5e-3),
        snapshots=True,
    ),
    OrganismSpec("pythia-s-clean", corpus=CorpusSpec(planted=False)),
    OrganismSpec("pythia-s-untrained", training=TrainSpec(steps=0)),
)

ZOO: dict[str, OrganismSpec] = {spec.name: spec for spec in _PYTHIA}
