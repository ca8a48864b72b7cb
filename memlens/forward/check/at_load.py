"""The check of a model as it is loaded: begun before TransformerLens touches the Hugging Face model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memlens.forward.check.comparison import AT_LOAD
from memlens.forward.check.identity import model_digest
from memlens.forward.check.kept import KeptVerdicts, Verdict
from memlens.forward.check.kinds import kinds_of_layers
from memlens.forward.check.model import check_model
from memlens.forward.check.reference import Reference, record_reference
from memlens.forward.check.table import Check
from memlens.forward.hooks import refuse_sites
from memlens.models.checks import check_finite_weights, noting_finite_products
from memlens.models.names import Source
from memlens.models.quiet import quiet
from memlens.models.state import content_key

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckAtLoad:
    """A check that has begun.

    Attributes:
        reference: What the Hugging Face model computes; None if a verdict is kept.
        kept: Where verdicts on the model are kept; None where they are not.
        known: The verdicts on it by the state of the model that is made.
    """

    reference: Reference | None
    kept: KeptVerdicts | None
    known: Mapping[str, Verdict]

    @classmethod
    def begin(
        cls,
        hf_model: Any,
        name: str,
        options: Mapping[str, Any],
        *,
        source: Source | None = None,
        begun: float = 0.0,
        anew: bool = False,
    ) -> CheckAtLoad:
        """Check the weights and record what the Hugging Face model computes, unless a verdict is kept.

        Args:
            hf_model: The model as it was read.
            name: Its name.
            options: Whatever else decides what is made of it.
            source: The files that it was read from; None where no verdict is to be kept.
            begun: When reading them began, in seconds.
            anew: Do not use a kept verdict.

        Raises:
            NonFiniteError: NaN or infinity in the weights.
            ModelLoadError: It does not run.
        """
        kept = None if source is None else KeptVerdicts.about(hf_model, source, options, begun=begun)
        known = {} if kept is None or anew else kept.read()
        if known:
            return cls(None, kept, known)
        finite: set[int] = set()
        try:
            with quiet(), noting_finite_products(hf_model, finite):
                sparing = not options.get("process_weights")
                return cls(record_reference(hf_model, name, sparing=sparing), kept, {})
        finally:
            check_finite_weights(hf_model, name, finite)  # which may be why it did not run

    def finish(self, model: Any) -> bool:
        """Check the TransformerLens model that was made, or take the kept verdict on it.

        Returns:
            False if the kept verdicts are on other models that were made of the same files: it must be loaded
            and checked anew.

        Raises:
            ModelLoadError: It fails the check.
        """
        state = "" if self.kept is None else model_digest(model)  # which the check may change
        if self.reference is not None:
            with quiet():
                found = check_model(model, reference=self.reference, layers=kinds_of_layers(model))
            found.raise_if_failed()
            if self.kept is not None:
                self.kept.keep(state, Verdict.of(found))
            return True
        verdict = self.known.get(state)
        if verdict is None:
            _LOG.info("the kept verdict is not on the model that was made now: it is loaded and checked anew")
            return False
        refuse_sites(model, verdict.refused)
        note = f"{verdict.note}, when it was first loaded ({verdict.date})"
        loaded = Check("logits", "ok", verdict.difference, verdict.allowed, note=note)
        AT_LOAD[model] = loaded, content_key(model)
        return True
