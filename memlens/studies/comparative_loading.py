"""A model of the study, loaded, and what is noted of it."""

from __future__ import annotations

from typing import Any

from memlens.models.loading import load_model
from memlens.models.provenance import describe
from memlens.models.trunk import Trunk
from memlens.studies.comparative_config import StudyModel
from memlens.sweeps.fingerprint import model_fingerprint

__all__ = ["facts_of", "loaded"]


def loaded(entry: StudyModel) -> Any:
    """Return the model of an entry: as it was given, or loaded now."""
    if entry.model is not None:
        return entry.model
    return load_model(
        entry.name, backend=entry.backend, revision=entry.revision, checkpoint_step=entry.checkpoint_step,
        dtype=entry.dtype, device=entry.device,
    )  # fmt: skip


def facts_of(model: Any, entry: StudyModel) -> dict[str, Any]:
    """Return what is noted of a model: who it is, its sizes, and the fingerprint of its weights."""
    described, trunk = describe(model), Trunk(model)
    return {
        **described,
        "label": entry.label,
        "family": entry.family_of(described),
        "corpus": entry.corpus_of,
        "control": entry.is_control,
        "n_layers": trunk.n_layers,
        "n_heads": trunk.n_heads,
        "fingerprint": model_fingerprint(model),
        "entry": entry.settings(),
    }
