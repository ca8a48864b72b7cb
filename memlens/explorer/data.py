"""The data of the explorer: edits, and the measurements and continuations of each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from memlens.errors import SiteError, near_matches
from memlens.forward.hooks import check_head, check_layer
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head, head_label

UNCHANGED = "unchanged model"


@dataclass(frozen=True)
class Edits:
    """A set of layers with bypassed attention and of ablated heads.

    Attributes:
        bypassed: Layers, in order.
        ablated: Heads `(layer, head)`, in order.

    Example:
        >>> edits = Edits().toggled(3).toggled(1, 2)
        >>> edits.name
        'bypass L3 + ablate L1H2'
        >>> edits.toggled(3).toggled(1, 2) == Edits()
        True
    """

    bypassed: tuple[int, ...] = ()
    ablated: tuple[Head, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.bypassed or self.ablated)

    @property
    def name(self) -> str:
        """A name for the edits, equal for equal edits."""
        parts = []
        if self.bypassed:
            parts.append("bypass " + " ".join(f"L{layer}" for layer in self.bypassed))
        if self.ablated:
            parts.append("ablate " + " ".join(map(head_label, self.ablated)))
        return " + ".join(parts) or UNCHANGED

    def toggled(self, layer: int, head: int | None = None) -> Edits:
        """Return the edits with a layer's bypass (or a head's ablation) switched on, or off if it was on."""
        if head is None:
            return replace(self, bypassed=tuple(sorted(set(self.bypassed) ^ {layer})))
        return replace(self, ablated=tuple(sorted(set(self.ablated) ^ {(layer, head)})))

    def check(self, trunk: Trunk) -> None:
        """Raise `SiteError` if a layer or head does not exist."""
        for layer in (*self.bypassed, *(layer for layer, _ in self.ablated)):
            check_layer(layer, trunk.n_layers)
        for _, head in self.ablated:
            check_head(head, trunk.n_heads)


@dataclass(frozen=True, eq=False)
class Continuation:
    """The model's predictions of a sequence's targets, and what it generates after the prefix, under edits.

    Attributes:
        edits: The edits; none for the unchanged model.
        probability: Probability of each target, given the true tokens before it.
        rank: Zero-based rank of each target.
        greedy: The most likely token at each target, given the true tokens before it.
        correct: Whether that is the target.
        tokens: The tokens that greedy decoding generates after the prefix, one for each target.
        same: Whether each generated token equals the target at its position.
        text: The generated tokens as one text.
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
        """The share of the generated tokens that equal the target at their position."""
        return float(self.same.mean())

    @property
    def recalled(self) -> bool:
        """Whether the generated tokens are exactly the continuation."""
        return bool(self.same.all())

    def __repr__(self) -> str:
        score = self.memorization_score
        return f"Continuation({self.edits.name}: memorization score {score:.0%}, {self.text!r})"


@dataclass(frozen=True, eq=False)
class SequenceView:
    """One sequence.

    Attributes:
        id: Its id.
        facts: Entries of its table row (`group`, `domain`, `copies`, if present).
        tokens: Each token of prefix and continuation as text.
        prefix_len: Number of tokens of the prefix.
        prefix_text: The prefix as one text.
        target_text: The continuation as one text.
        continuation: The prediction of the unchanged model.
        lens_probability: Probability of each target after each layer (see `decode_residual`).
        lens_rank: Zero-based rank of each target after each layer.
        head_effects: Change of the metric by ablating each head; negative harms recall if a higher value of
            the metric is better.
        mlp_effects: Change by ablating each layer's MLP.
        bypass_effects: Change by bypassing each layer's attention.
        attention: For each head whose attention was kept, its attention on the sequence, from 0 to 255 (see
            `attention_maps`).
        edited: Predictions under edits that were computed in advance.
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
        """The id with its memorization score, for a menu."""
        facts = [f"memorization score {self.continuation.memorization_score:.0%}"]
        facts += [f"{value} copies" if key == "copies" else value for key, value in self.facts.items()]
        return " · ".join([self.id, *facts])


@dataclass(frozen=True, eq=False)
class Exploration:
    """Several sequences with the settings of their measurement.

    Attributes:
        views: One per sequence.
        settings: All options, and the facts of the model.

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
        """The ids of the sequences."""
        return [view.id for view in self.views]

    @property
    def metric(self) -> str:
        """The metric of the effects."""
        return str(self.settings["metric"])

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, name: str) -> SequenceView:
        """Return the sequence with this id."""
        return self.views[row_of(name, self.ids)]

    def __repr__(self) -> str:
        return f"Exploration({len(self)} sequences of {self.settings.get('model', 'a model')})"


def row_of(name: str, ids: Sequence[str]) -> int:
    """Return the row of the sequence with an id.

    Raises:
        SiteError: There is no such sequence.
    """
    if name not in ids:
        some = ", ".join(map(repr, ids[:8])) + (", …" if len(ids) > 8 else "")
        raise SiteError(
            f"there is no sequence {name!r} among these {len(ids)}: {some}.{near_matches(name, ids)}"
        )
    return ids.index(name)


def strongest_heads(effects: Float[np.ndarray, "layer head"], better: int = 0) -> list[Head]:
    """Return all heads `(layer, head)`, the strongest first.

    Args:
        effects: Effects of ablating each head.
        better: 1 if a higher value of the metric is better, -1 if a lower one is; the strongest head is then
            the one whose ablation harms most. With 0 it is the one whose ablation changes most.

    >>> strongest_heads(np.array([[0.5, -0.1], [0.0, -0.2]]), 1)[:2], strongest_heads(np.array([[0.5, -0.9]]))
    ([(1, 1), (0, 1)], [(0, 1), (0, 0)])
    """
    size = np.nan_to_num(effects * better if better else -np.abs(effects), nan=np.inf)
    order = np.argsort(size, axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, size.shape), strict=True)]
