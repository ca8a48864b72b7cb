"""What the parts of the attention-bypass study share."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.bypass import attention_bypasses, bypass_attention
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.organisms.untrained import untrained_like
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.studies.bypass.controls import MEMORIZED
from memlens.studies.bypass.options import BypassInputs, BypassOptions
from memlens.studies.running import StudyDirectory, at_most

METRICS = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")
"""Of every block, from one teacher-forced sweep."""


class BypassContext:
    """A model with its sequences, the folder, the options, and what was measured so far."""

    inputs: BypassInputs
    folder: StudyDirectory
    options: BypassOptions
    progress: bool
    model: Any
    n_layers: int
    groups: dict[str, SequenceSet]

    def __init__(
        self, inputs: BypassInputs, folder: StudyDirectory, options: BypassOptions, *, progress: bool
    ) -> None:
        self.inputs, self.folder, self.options, self.progress = inputs, folder, options, progress
        self.model, self.n_layers = inputs.model, Trunk(inputs.model).n_layers
        self.groups = inputs.groups
        self.groups = self.chosen(options.max_sequences)
        self.swept: dict[str, Result] = {}
        self.headed: dict[str, Result] = {}
        self.tasks: Result | None = None
        self._twin: Any = None

    @property
    def twin(self) -> Any:
        """The model's shape with fresh weights."""
        if self._twin is None:
            self._twin = untrained_like(self.model, seed=self.options.seed)
        return self._twin

    def chosen(self, most: int) -> dict[str, SequenceSet]:
        """Return at most so many of the memorized sequences, and of the controls those matched to them."""
        found = dict(self.groups)
        found[MEMORIZED] = at_most(found[MEMORIZED], most, self.options.seed)
        ids = found[MEMORIZED].table["id"].astype(str).tolist()
        for name, seqs in found.items():
            if name != MEMORIZED and "matched_to" in seqs.table:
                mine = np.flatnonzero(seqs.table["matched_to"].astype(str).isin(ids))
                found[name] = seqs[mine.tolist()]
            found[name] = at_most(found[name], most, self.options.seed)
        return {name: seqs for name, seqs in found.items() if len(seqs)}

    def bypass(self, model: Any, seqs: SequenceSet, name: str) -> Result:
        """Bypass each block alone."""
        work = partial(bypass_attention, model, seqs, mode=self.options.mode, metrics=METRICS)
        return self.folder.kept(f"blocks_{name}", partial(work, progress=self.progress))

    def evaluate(self, inputs: BypassInputs, name: str) -> Result:
        """Answer the tasks with each block bypassed."""
        edits = attention_bypasses(inputs.model, mode=self.options.mode)
        work = partial(evaluate_tasks, inputs.model, inputs.tasks, edits, progress=self.progress)
        return self.folder.kept(name, work)
