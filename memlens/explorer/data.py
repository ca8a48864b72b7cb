"""What the explorer shows: numbers of each sequence, and what the model writes under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from memlens.errors import SiteError, near_matches
from memlens.explorer.edits import Edits
from memlens.instruments.ablate.heads import Head


@dataclass(frozen=True, eq=False)
class Continuation:
    """What the model says of a sequence's targets, and what it writes after the prefix, under some edits.

    Attributes:
        edits: What was changed; nothing, for the model as it is.
        probability: Of each target, given the true tokens before it.
        rank: Zero-based rank of each target.
        greedy: The token that the model would write there, given the true tokens before it.
        correct: Whether that is the target.
        tokens: What greedy decoding writes after the prefix, as many tokens as there are targets.
        same: Whether each of them equals the target at its place.
        text: All of them as one text.
    """

    edits: Edits
    probability: Float[np.ndarray, "target"]
    rank: Int[np.ndarray, "target"]
    greedy: Sequence[str]
    correct: Bool[np.ndarray, "target"]
    tokens: Sequence[str]
    same: Bool[np.ndarray, "target"]
    text: str

    @property
    def memorization_score(self) -> float:
        """The share of the written tokens that equal the target at their place."""
        return float(self.same.mean())

    @property
    def recalled(self) -> bool:
        """Whether the whole continuation is written as it was."""
        return bool(self.same.all())

    def __repr__(self) -> str:
        score = self.memorization_score
        return f"Continuation({self.edits.name}: {score:.0%} of {len(self.same)} tokens, {self.text!r})"


@dataclass(frozen=True, eq=False)
class SequenceView:
    """One sequence.

    Attributes:
        id: Its name.
        facts: What the table says of it (`group`, `domain`, `copies`, …, where it has them).
        tokens: Every token as text, prefix and continuation.
        prefix_len: How many of them are given.
        prefix_text: The prefix as one text.
        target_text: The continuation as one text.
        continuation: What the model writes as it is.
        lens_probability: Of each target after each layer (see `decode_residual`).
        lens_rank: Zero-based rank of each target after each layer.
        head_effects: What ablating each head changes of the metric: negative harms recall, for metrics of
            which more is better.
        mlp_effects: The same of taking away each layer's MLP.
        bypass_effects: The same of bypassing each layer's attention.
        attention: By head, its attention on the sequence in steps of 1/255 (see `attention_maps`), as far
            as it was kept.
        edited: What the model writes under edits that were tried beforehand.
    """

    id: str
    facts: Mapping[str, str]
    tokens: Sequence[str]
    prefix_len: int
    prefix_text: str
    target_text: str
    continuation: Continuation
    lens_probability: Float[np.ndarray, "layer target"]
    lens_rank: Int[np.ndarray, "layer target"]
    head_effects: Float[np.ndarray, "layer head"]
    mlp_effects: Float[np.ndarray, "layer"]
    bypass_effects: Float[np.ndarray, "layer"]
    attention: Mapping[Head, UInt8[np.ndarray, "query key"]] = field(default_factory=dict)
    edited: Sequence[Continuation] = ()

    @property
    def targets(self) -> Sequence[str]:
        """The continuation's tokens as text."""
        return self.tokens[self.prefix_len :]

    @property
    def label(self) -> str:
        """The id with its recall, for a menu."""
        facts = [f"{self.continuation.memorization_score:.0%} recalled"]
        facts += [f"{value} copies" if key == "copies" else value for key, value in self.facts.items()]
        return " · ".join([self.id, *facts])


@dataclass(frozen=True, eq=False)
class Exploration:
    """Several sequences, and how they were looked at.

    Attributes:
        views: One a sequence.
        settings: Every choice that was made, with the facts of the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:1]
        >>> found = ml.explore(model, seqs).exploration(progress=False)
        >>> found["text-001-00"].lens_probability.shape
        (6, 32)
    """

    views: Sequence[SequenceView]
    settings: Mapping[str, Any]

    @property
    def ids(self) -> list[str]:
        """The sequences' names."""
        return [view.id for view in self.views]

    @property
    def metric(self) -> str:
        """The metric that effects are of."""
        return str(self.settings["metric"])

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, name: str) -> SequenceView:
        """Return the sequence of this id."""
        for view in self.views:
            if view.id == name:
                return view
        raise SiteError(
            f"there is no sequence {name!r} among these {len(self)}.{near_matches(name, self.ids)}"
        )

    def __repr__(self) -> str:
        return f"Exploration({len(self)} sequences of {self.settings.get('model', 'a model')})"


def strongest_heads(effects: Float[np.ndarray, "layer head"], better: int = 0) -> list[Head]:
    """Return all heads `(layer, head)`, the strongest first.

    Args:
        effects: What ablating each changes.
        better: 1 where a higher value of the metric is better, -1 where a lower one is: the head whose
            ablation harms most is then the strongest. 0: the one whose ablation changes most.

    >>> strongest_heads(np.array([[0.5, -0.1], [0.0, -0.2]]), 1)[:2], strongest_heads(np.array([[0.5, -0.9]]))
    ([(1, 1), (0, 1)], [(0, 1), (0, 0)])
    """
    size = np.nan_to_num(effects * better if better else -np.abs(effects), nan=np.inf)
    order = np.argsort(size, axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, size.shape), strict=True)]
