"""The ground truth of a routed organism: what each of its carriers holds, and whether it holds it alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from transformers import PreTrainedModel

from memlens.errors import FileFormatError
from memlens.forward.components import COMPONENT_KINDS, ComponentKind, ComponentWeights
from memlens.organisms.evaluate import load_organism, read_ground_truth, read_training, row_losses
from memlens.organisms.planting.carriers import Carrier, ChangedWeights
from memlens.organisms.planting.certificate import Certificate
from memlens.organisms.planting.folder import component_table
from memlens.organisms.planting.plant import Organism, PlantingOptions, recalled
from memlens.organisms.training.routing import RoutingSpec
from memlens.sequences.set import SequenceSet


def routed_organisms(folder: str | Path) -> dict[int, Organism]:
    """Return what gradient routing wrote into a model as organisms: one per carrier with its sequences.

    All share one model. Their `base` has 0 for the carrier's weights: `restored()` switches the carrier off,
    as training did on part of the other text. `base_recall` is that of the clean twin.

    Args:
        folder: Folder of a routed organism, such as that of `zoo/pythia-xs-routed`.

    Returns:
        The organisms by the number of their carrier; carriers to which no sequence went are left out.

    Raises:
        FileFormatError: The folder does not belong to a routed organism.
    """
    spec = routing_of(folder)
    model = load_organism(folder)
    parameters, weights = dict(model.named_parameters()), ComponentWeights(model)
    table = read_ground_truth(folder, "sequences")
    found: dict[int, Organism] = {}
    for number, components in enumerate(spec.components(weights)):
        own: Any = table[table["carrier"] == number]
        if own.empty:
            continue
        base = {
            name: parameters[name].detach().masked_fill(mask, 0)
            for name, mask in ChangedWeights(weights, components).masks.items()
        }
        sequences = SequenceSet.from_tokens(
            [list(map(int, tokens)) for tokens in own["tokens"]], int(own["prefix_len"].iloc[0])
        )
        recall = torch.tensor(own["clean_recall"].to_numpy(), dtype=torch.float32)
        carrier = Carrier.parse(spec.carriers[number])
        found[number] = Organism(
            model, carrier, components, sequences, base, recall, PlantingOptions(), spec.seed
        )
    return found


def routing_of(folder: str | Path) -> RoutingSpec:
    """Return how a routed organism was trained.

    Raises:
        FileFormatError: The folder does not belong to a routed organism.
    """
    record: Any = read_training(folder).get("routing")
    if record is None:
        raise FileFormatError(f"{folder} was not trained by gradient routing.")
    fields = record["spec"]
    return RoutingSpec(**{**fields, "carriers": tuple(fields["carriers"])})


def routed_truth(organisms: Mapping[int, Organism]) -> pd.DataFrame:
    """Return the ground truth of a routed organism: for each carrier one row per component.

    Columns `carrier` (its number), and those of `planting.folder.component_table`: `graded` is the rise in
    the loss of the carrier's sequences when the component alone is switched off (nats).
    """
    kinds = {kind for organism in organisms.values() for kind in organism.carrier.component_kinds}
    ordered: list[ComponentKind] = [kind for kind in COMPONENT_KINDS if kind in kinds]
    tables = [
        component_table(ComponentWeights(organism.model), ordered, organism.graded_truth()).assign(
            carrier=number
        )
        for number, organism in organisms.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    ordered_columns: Any = table[["carrier", *[name for name in table if name != "carrier"]]]
    return ordered_columns


@torch.no_grad()
def certify_routed(
    organisms: Mapping[int, Organism],
    other_text: Int[np.ndarray, "row pos"],
    *,
    min_recall: float = 0.95,
    max_above_clean: float = 0.05,
    max_harm: float = 0.05,
) -> Certificate:
    """Check that each carrier holds its sequences, and that without it they are gone.

    - *recall*: the least share of planted tokens that are the first choice, over the carrier's sequences;
    - *necessity*: with the carrier switched off, the mean recall of its sequences, less that of the clean
      twin, which was trained in the same way on the same text without the planted rows;
    - *harmlessness*: the loss on other text, less that with the carrier switched off (nats per token).

    Args:
        organisms: Of `routed_organisms`.
        other_text: Token ids of rows of other text that training did not see.
        min_recall: Threshold of recall.
        max_above_clean: Most that recall without the carrier may be above the twin's.
        max_harm: Most that the carrier may add to the loss of other text.

    Returns:
        The certificate; `facts` has for each carrier the number of its sequences, their mean recall, that
        without the carrier and that of the twin, the mean recall of all other planted sequences without
        the carrier, and the loss of other text without it; `loss` is that of the whole model.
    """
    rows: list[tuple[str, float, float, bool]] = []
    facts: dict[str, float] = {}
    for number, organism in organisms.items():
        facts["loss"] = facts.get("loss") or float(row_losses(organism.model, other_text).mean())
        others = [o.sequences for o in organisms.values() if o is not organism]
        now = recalled(organism.model, organism.sequences).accuracy
        with organism.restored() as model:
            without = float(recalled(model, organism.sequences).accuracy.mean())
            loss = float(row_losses(model, other_text).mean())
            elsewhere = [recalled(model, seqs).accuracy for seqs in others]
        clean = float(organism.base_recall.mean())
        rows += [
            (f"recall of carrier {number}", float(now.min()), min_recall, bool(now.min() >= min_recall)),
            (
                f"necessity of carrier {number}", without - clean, max_above_clean,
                bool(without - clean <= max_above_clean),
            ),
            (
                f"harmlessness of carrier {number}", facts["loss"] - loss, max_harm,
                facts["loss"] - loss <= max_harm,
            ),
        ]  # fmt: skip
        own = {
            "sequences": len(organism.sequences), "recall": float(now.mean()), "recall_without": without,
            "recall_clean": clean,
            "others_without": float(torch.cat(elsewhere).mean()) if elsewhere else float("nan"),
            "loss_without": loss,
        }  # fmt: skip
        facts |= {f"{name}_{number}": value for name, value in own.items()}
    return Certificate(pd.DataFrame(rows, columns=["check", "value", "threshold", "passed"]), facts)


@torch.no_grad()
def recall_of(model: PreTrainedModel, table: pd.DataFrame) -> np.ndarray:
    """Return the share of right tokens of each sequence of a `sequences` table, teacher-forced."""
    rows = [list(map(int, tokens)) for tokens in table["tokens"]]
    return recalled(model, SequenceSet.from_tokens(rows, int(table["prefix_len"].iloc[0]))).accuracy.numpy()
