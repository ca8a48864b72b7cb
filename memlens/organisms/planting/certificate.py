"""The certificate of a planted organism: only its carrier holds the memory, and no weights betray it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from scipy import stats
from torch import Tensor

from memlens.forward.components import Component, ComponentWeights
from memlens.options import options_class
from memlens.organisms.planting.plant import Organism, divergence, next_token_logprobs, recalled
from memlens.organisms.planting.substrate import LOSS_COLUMNS, ablate_others, sufficiency
from memlens.sequences.set import SequenceSet

FINGERPRINT_COLUMNS: tuple[str, ...] = (
    "kind", "statistic", "auc_base", "auc", "average_precision_base", "average_precision",
)  # fmt: skip
"""Columns of `fingerprints`."""


@options_class
class CertificateOptions:
    """Thresholds of a certificate.

    Example:
        >>> import memlens as ml
        >>> ml.zoo.CertificateOptions(min_recall=0.9).min_recall
        0.9
    """

    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Least share of planted tokens that are the model's first choice, in every sequence."""
    max_kl: NonNegativeFloat = 0.05
    """Most divergence from the base model on text that planting did not see, in nats per token."""
    max_fingerprint: NonNegativeFloat = 0.1
    """Most that planting may add to the ROC AUC of any statistic of the weights alone."""
    max_shared: NonNegativeFloat = 0.05
    """A component outside the carrier is shared substrate if its resample ablation loses more than this share
    of the planted tokens."""
    min_strictness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least share of components outside the carrier that are not shared substrate; 0 demands nothing."""
    screened: PositiveInt = 50
    """Neurons outside the carrier that are ablated: those with the largest estimated effect. Heads, MLPs and
    attentions are all ablated."""
    draws: PositiveInt = 3
    """Draws of each resampled activation, over which the loss is averaged."""


@dataclass(frozen=True)
class Certificate:
    """What was measured of an organism, and whether it may be used.

    Attributes:
        checks: One row per check: `check`, `value`, `threshold`, `passed`.
        facts: What is reported without a threshold.
        shared: The shared substrate, as `substrate.ablate_others` gives it.
    """

    checks: pd.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)
    shared: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=LOSS_COLUMNS))

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks["passed"].all())

    @property
    def failures(self) -> list[str]:
        """The names of the checks that failed."""
        return self.checks.loc[~self.checks["passed"].astype(bool), "check"].tolist()

    def record(self) -> dict[str, Any]:
        """Return it as plain values, as `certificate.json` holds it."""
        return {
            "passed": self.passed, "checks": self.checks.to_dict("records"), "facts": dict(self.facts),
            "shared": self.shared.to_dict("records"),
        }  # fmt: skip


@torch.no_grad()
def certify(
    organism: Organism, heldout: SequenceSet, options: CertificateOptions | None = None
) -> Certificate:
    r"""Check that a carrier carries what was planted, harms nothing else, and shows no fingerprint.

    - *recall*: the least share of planted tokens that are the first choice, over sequences;
    - *necessity*: with the carrier's base weights back, recall of no sequence is above what it was before
      planting (the value is the largest difference); *gain*: the carrier takes away loss on every sequence
      (the least, nats per token);
    - *harmlessness*: :math:`D_{KL}(p_\text{base} \| p)` on `heldout`, nats per token;
    - *strictness*: :math:`1 - S / N`, where N components of the carrier's kinds are outside it, and the
      resample ablation of S of them alone, with activations from `heldout`, loses more than `max_shared` of
      the planted tokens. These are the *shared substrate*: the memory also rests on them. Neurons beyond the
      `screened` strongest are not ablated and count as not shared;
    - *fingerprint*: by how much planting raised the ROC AUC with which a statistic of the weights alone
      (norm, excess kurtosis, distance from the mean component of its layer) tells the carrier from other
      components of its kind. The reference is the AUC of the *same components in the base model*, because a
      few components drawn at random are never exactly average.

    `facts` also has the *sufficiency*: the share of the gained log-probability that comes back from the
    carrier on its own (see `substrate.sufficiency`).

    Args:
        organism: The organism.
        heldout: Text that planting did not see.
        options: Thresholds.

    Returns:
        The certificate. For carrier "none" recall is not asked for, and for "spread" harmlessness is reported
        and not demanded, because a change of all weights is not meant to be harmless. Both have no
        components, and so no strictness or sufficiency.

    Example:
        >>> import memlens as ml
        >>> organism = ml.zoo.read_organism("organism")  # of `memlens organisms plant`  # doctest: +SKIP
        >>> ml.zoo.certify(organism, ml.load_sequences("zoo:heldout")).passed  # doctest: +SKIP
        True
    """
    options = options or CertificateOptions()
    planted = organism.options.planted
    with_carrier = recalled(organism.model, organism.sequences, planted)
    logprobs = next_token_logprobs(organism.model, heldout.tokens)
    with organism.restored() as model:
        without = recalled(model, organism.sequences, planted)
        harm = float(divergence(next_token_logprobs(model, heldout.tokens), logprobs, heldout.mask[:, 1:]))
    rows: list[tuple[str, float, float, bool]] = []
    least = float(with_carrier.accuracy.min())
    if organism.carrier.kind != "none":
        rows.append(("recall", least, options.min_recall, least >= options.min_recall))
        above = float((without.accuracy - organism.base_recall.to(without.accuracy)).max())
        rows.append(("necessity", above, 0.0, above <= 0))
        gain = float((without.nll - with_carrier.nll).min())
        rows.append(("gain", gain, 0.0, gain > 0))
    if organism.carrier.kind != "spread":
        rows.append(("harmlessness", harm, options.max_kl, harm <= options.max_kl))
    facts = {
        "nll": float(with_carrier.nll.mean()),
        "nll_without": float(without.nll.mean()),
        "recall_without": float(without.accuracy.mean()),
        "kl_heldout": harm,
        "steps": organism.steps,
    }
    lost = ablate_others(organism, heldout, screened=options.screened, draws=options.draws)
    shared: Any = lost[lost["recall_lost"] > options.max_shared].reset_index(drop=True)
    if organism.components:
        weights = ComponentWeights(organism.model)
        every = [c for kind in organism.carrier.component_kinds for c in weights.components(kind)]
        strictness = 1 - len(shared) / max(len(every) - len(organism.components), 1)
        rows.append(("strictness", strictness, options.min_strictness, strictness >= options.min_strictness))
        facts["sufficiency"] = sufficiency(organism)
    for row in fingerprints(organism).to_dict("records"):
        before, after = float(row["auc_base"]), float(row["auc"])
        added = max(after, 1 - after) - max(before, 1 - before)
        name = f"fingerprint: {row['statistic']} of {row['kind']}s"
        rows.append((name, added, options.max_fingerprint, added <= options.max_fingerprint))
    checks = pd.DataFrame(rows, columns=["check", "value", "threshold", "passed"])
    return Certificate(checks, facts, shared)


def fingerprints(organism: Organism) -> pd.DataFrame:
    """Measure how well the weights alone tell the carrier, in the base model and in the organism.

    Returns:
        One row per kind of component that the carrier has and each of "norm", "kurtosis" and
        "distance_from_mean": `kind`, `statistic`, and the ROC AUC and average precision of ranking components
        by the statistic, largest first: `auc_base`, `auc`, `average_precision_base`, `average_precision`.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    weights = ComponentWeights(organism.model, gates=organism.options.gates)
    rows = []
    for kind in organism.carrier.component_kinds:
        every = weights.components(kind)
        truth = np.array([c in set(organism.components) for c in every])
        if truth.all() or not truth.any():
            continue
        with organism.restored():
            before = weight_statistics(weights, every)
        after = weight_statistics(weights, every)
        for name in before:
            scores = [
                float(measure(truth, values[name]))
                for measure in (roc_auc_score, average_precision_score)
                for values in (before, after)
            ]
            rows.append((kind, name, *scores))
    return pd.DataFrame(rows, columns=FINGERPRINT_COLUMNS)


def weight_statistics(weights: ComponentWeights, components: list[Component]) -> dict[str, np.ndarray]:
    """Return what a component's output weights show without any input, one value per component.

    `norm` is the Euclidean norm, `kurtosis` the excess kurtosis of the entries, `distance_from_mean` the
    distance from the mean of the layer's components of the kind (from the mean layer, for whole layers).
    """
    vectors = [_output_vector(weights, c) for c in components]
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "norm": lambda rows: np.linalg.norm(rows, axis=1),
        "kurtosis": lambda rows: stats.kurtosis(rows, axis=1),
    }
    stacked = torch.stack(vectors).double().cpu().numpy()
    found = {name: measure(stacked) for name, measure in statistics.items()}
    layers = np.array([c.layer for c in components])
    if components[0].kind.startswith("layer"):
        layers = np.zeros_like(layers)
    means = np.stack([stacked[layers == layer].mean(0) for layer in np.unique(layers)])
    found["distance_from_mean"] = np.linalg.norm(
        stacked - means[np.searchsorted(np.unique(layers), layers)], axis=1
    )
    return found


def _output_vector(weights: ComponentWeights, component: Component) -> Tensor:
    """Weights that write to the residual stream: a neuron's column, a head's columns, a layer's matrix."""
    parts = weights.slices(component)
    part = parts[0] if component.kind == "neuron" else parts[-1]
    value = weights.parameter(part.name).detach()
    return value.index_select(part.dim, part.index).flatten()
