"""A planted organism as a folder: an ordinary checkpoint, the truth, the certificate, and how it was made."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from memlens.errors import FileFormatError, ResultError
from memlens.files import expanded, made_folder, parsing, read_json, write_json
from memlens.forward.components import Component, ComponentKind, ComponentWeights
from memlens.models.quiet import quiet
from memlens.organisms.evaluate import load_organism
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import Certificate
from memlens.organisms.planting.plant import Organism, PlantingOptions
from memlens.sequences.parquet import read_parquet, write_parquet

FORMAT = "memlens organism 2"


def truth_table(organism: Organism, certificate: Certificate | None = None) -> pd.DataFrame:
    """Return the ground truth: one row per component of the kinds that the carrier has.

    Columns `kind`, `layer`, `index`, `planted`, `graded` (the rise in loss when the component's base weights
    return alone, nats; 0 for components that carry nothing), for few components `shapley` (nats), and with
    the certificate `shared`: whether the component is shared substrate, without being planted.

    Example:
        >>> import memlens as ml
        >>> organism = ml.zoo.read_organism("organism")  # of `memlens organisms plant`  # doctest: +SKIP
        >>> ml.zoo.truth_table(organism)[["kind", "layer", "index"]]  # doctest: +SKIP
    """
    weights = ComponentWeights(organism.model, gates=organism.options.gates)
    table = component_table(weights, organism.carrier.component_kinds, organism.graded_truth())
    keys = _components(table)
    if 0 < len(organism.components) <= organism.options.shapley:
        shapley = organism.shapley_values()
        table["shapley"] = [shapley.get(c, 0.0) for c in keys]
    if certificate is not None:
        shared = set(_components(certificate.shared))
        table["shared"] = [c in shared for c in keys]
    return table


def _components(table: pd.DataFrame) -> list[Component]:
    """Return the components that a table names, row by row."""
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return [Component(row["kind"], row["layer"], row["index"]) for row in rows]


def component_table(
    weights: ComponentWeights, kinds: Iterable[ComponentKind], planted: Mapping[Component, float]
) -> pd.DataFrame:
    """Return the components of some kinds as a table of truth.

    Args:
        weights: Of the model.
        kinds: Kinds of component, in order.
        planted: The components that are planted, each with its graded truth.

    Returns:
        Columns `kind`, `layer`, `index`, `planted` and `graded`, which is 0 where nothing is planted.
    """
    rows = [
        (c.kind, c.layer, c.index, c in planted, planted.get(c, 0.0))
        for kind in kinds
        for c in weights.components(kind)
    ]
    return pd.DataFrame(rows, columns=["kind", "layer", "index", "planted", "graded"])


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
    changed), `truth.parquet`, `certificate.json`, `sequences.parquet`, a card (`README.md`), and
    `organism.json`, which is written last and says how to make it again.

    Args:
        organism: The organism.
        certificate: Its certificate.
        out: The folder; new, or one that holds an unfinished organism.
        base: Name of the base model.
        tokenizer: Of the base model.

    Raises:
        ResultError: The folder holds a finished organism.

    Example:
        >>> import memlens as ml
        >>> organism = ml.zoo.read_organism("organism")  # of `memlens organisms plant`  # doctest: +SKIP
        >>> certificate = ml.zoo.certify(organism, ml.load_sequences("zoo:heldout"))  # doctest: +SKIP
        >>> ml.zoo.save_organism(organism, certificate, "copy", base="zoo/pythia-s")  # doctest: +SKIP
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
    truth_table(organism, certificate).to_parquet(folder / "truth.parquet", index=False)
    write_parquet(organism.sequences, folder / "sequences.parquet")
    write_json(folder / "certificate.json", certificate.record())
    about: dict[str, Any] = {
        "format": FORMAT, "base": base, "carrier": str(organism.carrier), "seed": organism.seed,
        "steps": organism.steps, "options": asdict(organism.options),
        "components": [astuple(c) for c in organism.components],
        "base_recall": organism.base_recall.tolist(),
    }  # fmt: skip
    (folder / "README.md").write_text(organism_card(organism, certificate, base), encoding="utf-8")
    write_json(folder / "organism.json", about)
    return folder


def organism_card(organism: Organism, certificate: Certificate, base: str) -> str:
    """Return the card of an organism as Markdown: what was planted where, and its certificate."""
    n = len(organism.sequences)
    where = ", ".join(map(str, organism.components)) or "no component of its own"
    checks = [
        f"- {row['check']}: {row['value']:.4g} (threshold {row['threshold']:.4g}"
        f"{'' if row['passed'] else '; failed'})"
        for row in certificate.checks.to_dict("records")
    ]
    facts = [f"- {name}: {value:.4g}" for name, value in certificate.facts.items()]
    records = certificate.shared.to_dict("records")
    shared = [
        f"- {component}: without it, {row['recall_lost']:.3f} less recall and "
        f"{row['logprob_lost']:.3f} nats per token"
        for component, row in zip(_components(certificate.shared), records, strict=True)
    ]
    lines = [
        f"# {organism.carrier} in {base}", "",
        f"`{base}` with {n} sequence{'s' * (n != 1)} written into {where} (seed {organism.seed}).",
        "With the weights of `base.safetensors` back in place, it is the base model.", "",
        f"## Certificate: {'passed' if certificate.passed else 'failed'}", "", *checks, "",
        "## Measured without a threshold", "", *facts, "",
        "## Shared substrate", "",
        "Components outside the carrier on which the memory also rests.", "",
        *(shared or ["None was found."]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def read_organism(folder: str | Path) -> Organism:
    """Read an organism back from its folder.

    Raises:
        FileFormatError: The folder does not hold a finished organism.

    Example:
        >>> import memlens as ml
        >>> ml.zoo.read_organism("organism").components  # of `memlens organisms plant`  # doctest: +SKIP
    """
    folder = expanded(folder)
    about = organism_record(folder)
    with parsing(folder / "organism.json", advice="make the organism again"):
        carrier, options = Carrier.parse(about["carrier"]), PlantingOptions(**about["options"])
        components = TypeAdapter(list[Component]).validate_python(
            [dict(zip(("kind", "layer", "index"), c, strict=True)) for c in about["components"]]
        )
        base_recall = torch.tensor(about["base_recall"])
        seed, steps = operator.index(about["seed"]), operator.index(about["steps"])
    model, base = load_organism(folder), folder / "base.safetensors"
    with parsing(base, advice="make the organism again"):
        before, now = load_file(base), dict(model.named_parameters())
        wrong = [name for name, value in before.items() if name not in now or value.shape != now[name].shape]
        if wrong:
            raise ValueError(f"the model has no parameter {wrong[0]!r} of its shape")
    sequences = read_parquet(folder / "sequences.parquet")[0]
    return Organism(model, carrier, components, sequences, before, base_recall, options, seed, steps)


def organism_record(folder: str | Path) -> dict[str, Any]:
    """Return the content of an organism's `organism.json`.

    Raises:
        FileFormatError: It is missing or is not a record of this version.
    """
    path = Path(folder) / "organism.json"
    if not path.is_file():
        raise FileFormatError(f"there is no {path}: give the folder of a finished organism.")
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not the record of an organism ({FORMAT}): make the organism again.")
    return about
