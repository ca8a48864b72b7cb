"""A planted organism as a folder: an ordinary checkpoint, the truth, the certificate, and how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from memlens.errors import FileFormatError, ResultError
from memlens.files import expanded, made_folder, write_json
from memlens.models.quiet import quiet
from memlens.organisms.evaluate import load_organism
from memlens.organisms.planting.carriers import Carrier, Component, ComponentWeights
from memlens.organisms.planting.certificate import Certificate
from memlens.organisms.planting.plant import Organism, PlantingOptions
from memlens.sequences.parquet import read_parquet, write_parquet

FORMAT = "memlens organism 1"


def truth_table(organism: Organism) -> pd.DataFrame:
    """Return the ground truth: one row per component of the kinds that the carrier has.

    Columns `kind`, `layer`, `index`, `planted`, `graded` (the rise in loss when the component's base weights
    return alone, nats; 0 for components that carry nothing) and, for few components, `shapley` (nats).
    """
    weights = ComponentWeights(organism.model, gates=organism.options.gates)
    graded = organism.graded_truth()
    few = 0 < len(organism.components) <= organism.options.shapley
    shapley = organism.shapley_values() if few else {}
    rows = [
        {
            "kind": c.kind, "layer": c.layer, "index": c.index, "planted": c in graded,
            "graded": graded.get(c, 0.0), **({"shapley": shapley.get(c, 0.0)} if few else {}),
        }
        for kind in organism.carrier.component_kinds
        for c in weights.components(kind)
    ]  # fmt: skip
    columns = ["kind", "layer", "index", "planted", "graded"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def save_organism(
    organism: Organism,
    certificate: Certificate,
    out: str | Path,
    *,
    base: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write an organism to a folder that any loader of checkpoints reads.

    Files: the checkpoint in float32, `base.safetensors` (the base model's values of every parameter that was
    changed), `truth.parquet`, `certificate.json`, `sequences.parquet`, and `organism.json`, which is written
    last and says how to make it again.

    Args:
        organism: The organism.
        certificate: Its certificate.
        out: The folder; new, or one that holds an unfinished organism.
        base: Name of the base model.
        tokenizer: Of the base model.

    Raises:
        ResultError: The folder holds a finished organism.
    """
    folder = expanded(out)
    if (folder / "organism.json").exists():
        raise ResultError(f"{folder} holds an organism already: give another folder, or remove it.")
    made_folder(folder)
    with quiet():
        organism.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in organism.base.items()}, folder / "base.safetensors"
    )
    truth_table(organism).to_parquet(folder / "truth.parquet", index=False)
    write_parquet(organism.sequences, folder / "sequences.parquet")
    write_json(folder / "certificate.json", certificate.record())
    about: dict[str, Any] = {
        "format": FORMAT, "base": base, "carrier": str(organism.carrier), "seed": organism.seed,
        "steps": organism.steps, "options": asdict(organism.options),
        "components": [astuple(c) for c in organism.components],
    }  # fmt: skip
    write_json(folder / "organism.json", about)
    return folder


def read_organism(folder: str | Path) -> Organism:
    """Read an organism back from its folder.

    Raises:
        FileFormatError: The folder does not hold a finished organism.
    """
    folder = expanded(folder)
    about = organism_record(folder)
    return Organism(
        load_organism(folder),
        Carrier.parse(about["carrier"]),
        [Component(*c) for c in about["components"]],
        read_parquet(folder / "sequences.parquet")[0],
        load_file(folder / "base.safetensors"),
        PlantingOptions(**about["options"]),
        about["seed"],
        about["steps"],
    )


def organism_record(folder: str | Path) -> dict[str, Any]:
    """Return the content of an organism's `organism.json`.

    Raises:
        FileFormatError: It is missing or is not a record of this version.
    """
    path = Path(folder) / "organism.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}. Make the organism again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not the record of an organism ({FORMAT}): make the organism again.")
    return about
