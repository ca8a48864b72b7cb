"""What a reader switches on and off: bypassed layers and ablated heads, held together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from memlens.errors import check_option
from memlens.forward.hooks import check_head, check_layer
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head, head_label, head_set_ablations
from memlens.instruments.ablate.replacing import MODES
from memlens.instruments.bypass.bypass import BYPASS_MODES, attention_bypasses
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention

ABLATION_MODES = tuple(mode for mode in MODES if mode != "resample")
"""Modes of `ablate_heads` that hold for free generation too: what replaces a head asks for no other
sequence's token at the same place, which a continuation that is still being written does not have."""
AS_IT_IS = "the model as it is"


@dataclass(frozen=True)
class Edits:
    """Layers whose attention is bypassed and heads that are ablated, all at once.

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
        """The edits in words, the same for the same edits."""
        parts = []
        if self.bypassed:
            parts.append("bypass " + " ".join(f"L{layer}" for layer in self.bypassed))
        if self.ablated:
            parts.append("ablate " + " ".join(map(head_label, self.ablated)))
        return " + ".join(parts) or AS_IT_IS

    def toggled(self, layer: int, head: int | None = None) -> Edits:
        """Return the edits with a layer's bypass (or a head's ablation) switched on, or off again."""
        if head is None:
            return replace(self, bypassed=tuple(sorted(set(self.bypassed) ^ {layer})))
        return replace(self, ablated=tuple(sorted(set(self.ablated) ^ {(layer, head)})))

    def check(self, trunk: Trunk) -> None:
        """Raise `SiteError` where a layer or head does not exist."""
        for layer in (*self.bypassed, *(layer for layer, _ in self.ablated)):
            check_layer(layer, trunk.n_layers)
        for _, head in self.ablated:
            check_head(head, trunk.n_heads)


def edit_interventions(
    model: Any,
    edits: Edits,
    sequences: SequenceSet,
    *,
    ablation: str = "mean_of_other_heads",
    bypass: str = "identity",
    reference: SequenceSet | None = None,
) -> list[Intervention]:
    """Return edits as interventions that `memlens.applied` holds, for forwards and for generation.

    Where a layer is bypassed and one of its heads ablated, the bypass comes first: the other heads that
    an ablation averages are then bypassed ones.

    Args:
        model: A TransformerLens model.
        edits: What is switched on.
        sequences: What the edits will run on.
        ablation: One of `ABLATION_MODES`; see `ablate_heads`.
        bypass: See `bypass_attention`.
        reference: The set for "mean"; `sequences` itself by default.

    Raises:
        OptionError: Unknown modes.
        SiteError: A layer or head that does not exist.
    """
    check_option("ablation", ablation, ABLATION_MODES)
    check_option("bypass", bypass, BYPASS_MODES)
    edits.check(Trunk(model))
    found: list[Intervention] = []
    if edits.bypassed:
        found += attention_bypasses(model, layers=[edits.bypassed], mode=bypass)
    if edits.ablated:
        sets = {edits.name: edits.ablated}
        found += head_set_ablations(model, sequences, sets, mode=ablation, reference=reference)
    return found
