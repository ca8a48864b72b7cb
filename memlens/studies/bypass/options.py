"""What the attention-bypass study is free to choose, and what one model brings to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.instruments.bypass.bypass import BYPASS_MODES
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.provenance import describe
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.results.statistics.tradeoff import OVER
from memlens.sequences.set import SequenceSet

EDITS = ("identity", "zero", "mean", "uniform", "first_token", "mlp_zero", "mlp_mean")
"""What each layer's attention (or MLP) becomes: "identity" is the bypass, the others its controls."""


@dataclass(frozen=True)
class BypassOptions:
    """What `study_attention_bypass` is free to choose; all of it is recorded.

    Attributes:
        mode: How attention is bypassed: "identity" as the paper, or "zero".
        max_sequences: Sequences of each group that are examined; a random choice where there are more.
        free_running: Also decode the memorized sequences freely under each bypass, for the score M.
        max_free_running: Of these, how many.
        edits: What else is done to each layer, beside the bypass itself.
        control_sequences: Of `max_sequences`, those of each group for these edits, and for single heads.
        heads: Also bypass every head alone.
        untrained_control: Also edit freshly drawn weights.
        bounds_sequences: Sequences for bounds and predictor; 0 leaves them out.
        joint_sequences: Of `max_sequences`, those for the search over sets of blocks; 0 leaves it out.
        joint_questions: Questions of each task for that search; None takes all.
        over: The cost of an edit is the largest ("max") or the "mean" loss over tasks.
        greedy_size: Blocks of the greedy search's last set.
        exact_layers: Models of at most so many layers are searched over every set of layers.
        exact_pool: In deeper ones, every set of so many best single blocks.
        n_random: Random sets of each size that the search came to.
        quartiles: In how many parts depth is cut.
        n_resamples: Of every bootstrap.
        seed: Of every random choice.
    """

    mode: str = "identity"
    max_sequences: int = 128
    free_running: bool = True
    max_free_running: int = 64
    edits: tuple[str, ...] = EDITS
    control_sequences: int = 48
    heads: bool = True
    untrained_control: bool = True
    bounds_sequences: int = 8
    joint_sequences: int = 96
    joint_questions: int | None = 50
    over: str = "max"
    greedy_size: int = 4
    exact_layers: int = 7
    exact_pool: int = 5
    n_random: int = 8
    quartiles: int = 4
    n_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_option("mode", self.mode, BYPASS_MODES)
        check_option("over", self.over, OVER)
        for edit in self.edits:
            check_option("edit", edit, EDITS)
        if self.edits and "identity" not in self.edits:
            raise OptionError(f"edits={self.edits} lacks 'identity': controls alone say nothing.")
        least = {"max_sequences": 4, "max_free_running": 1, "control_sequences": 2, "quartiles": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise OptionError(f"{name}={getattr(self, name)}: give {low} or more.")


@dataclass(frozen=True, eq=False)
class BypassInputs:
    """One model with what it recites, what it does not, and what else it should be able to do.

    Attributes:
        model: A TransformerLens model.
        memorized: Sequences that it recites.
        unmemorized: Matched sequences that it does not recite.
        predictable: Matched sequences that it predicts well without reciting them.
        tasks: Benchmark tasks; see `ChoiceTask`.
        name: What it is called in results; by default what it was loaded as.
        scan: Where the groups come from, for the report.
    """

    model: Any
    memorized: SequenceSet
    unmemorized: SequenceSet | None = None
    predictable: SequenceSet | None = None
    tasks: Sequence[ChoiceTask] = field(default_factory=tuple)
    name: str = ""
    scan: MemorizedSet | None = None

    def __post_init__(self) -> None:
        if len(self.memorized) < 4:
            raise EmptySetError(
                f"{len(self.memorized)} memorized sequences: halves and intervals need 4 or more. Scan more "
                "text with build_memorized_set, or take a larger model."
            )
        if not self.name:
            object.__setattr__(self, "name", str(describe(self.model)["model"]))

    @classmethod
    def of(
        cls, model: Any, found: MemorizedSet, tasks: Sequence[ChoiceTask] = (), *, name: str = ""
    ) -> BypassInputs:
        """Take the three groups from what `build_memorized_set` found; empty controls are left out."""
        unmemorized, predictable = (
            group if len(group) else None for group in (found.unmemorized, found.predictable)
        )
        return cls(model, found.memorized, unmemorized, predictable, tasks, name, found)

    @property
    def groups(self) -> dict[str, SequenceSet]:
        """The sequences by group."""
        given = {
            "memorized": self.memorized,
            "not memorized": self.unmemorized,
            "predictable": self.predictable,
        }
        return {name: seqs for name, seqs in given.items() if seqs is not None and len(seqs)}
