"""What the parts of the attention-bypass study share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from memlens.errors import EmptySetError, check_option
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.bypass import attention_bypasses, bypass_attention
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.provenance import describe
from memlens.organisms.training.architectures import untrained_like
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.studies.bypass.controls import MEMORIZED
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.running import StudyDirectory, at_most

_GROUPS = (MEMORIZED, "not memorized", "predictable")

TEXTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
"""What the report says about its sections."""

METRICS = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")
"""Of every block, from one teacher-forced sweep."""


@dataclass(frozen=True, eq=False)
class BypassInputs:
    """One model of the attention-bypass study.

    Attributes:
        model: A TransformerLens model.
        sequences: What `build_memorized_set` found; or sequences that the model recites; or a mapping with
            the groups "memorized" and, matched to it, "not memorized" (not recited) and "predictable"
            (predicted well without being recited).
        tasks: Benchmark tasks; see `ChoiceTask`.
        name: Its name in results; by default the name it was loaded under.

    Raises:
        EmptySetError: Fewer than 4 memorized sequences.
        OptionError: An unknown group.
    """

    model: Any
    sequences: MemorizedSet | SequenceSet | Mapping[str, SequenceSet]
    tasks: Sequence[ChoiceTask] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for name in self.groups:
            check_option("group", name, _GROUPS)
        if (n := len(self.groups.get(MEMORIZED, ()))) < 4:
            raise EmptySetError(
                f"{n} memorized sequences: halves and intervals need 4 or more. Scan more text with "
                "build_memorized_set, or take a larger model."
            )
        if not self.name:
            object.__setattr__(self, "name", str(describe(self.model)["model"]))

    @property
    def scan(self) -> MemorizedSet | None:
        """What `build_memorized_set` found, if the groups come from there."""
        return self.sequences if isinstance(self.sequences, MemorizedSet) else None

    @property
    def groups(self) -> dict[str, SequenceSet]:
        """The sequences by group, without empty groups."""
        given: Any = self.sequences
        if isinstance(given, MemorizedSet):
            given = dict(zip(_GROUPS, (given.memorized, given.unmemorized, given.predictable), strict=True))
        elif isinstance(given, SequenceSet):
            given = {MEMORIZED: given}
        return {str(name): seqs for name, seqs in given.items() if seqs is not None and len(seqs)}


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
