"""`run`: make organisms, certify them, score every localizer, and keep one file per organism."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from memlens.benchmark.cost import Timer, peak_memory
from memlens.benchmark.leaderboard import Leaderboard
from memlens.benchmark.localizer import LOCALIZERS
from memlens.benchmark.measure import Costs, measure_organism
from memlens.benchmark.scores import MEASURES
from memlens.benchmark.suites import (
    Material,
    Planned,
    Suite,
    check_localizers,
    material,
    of_families,
    read_suite,
)
from memlens.errors import MemlensError, ResultError
from memlens.files import expanded, json_text, parsing, read_json, write_atomically
from memlens.forward.components import COMPONENT_KINDS, ComponentWeights
from memlens.models.load import load_model
from memlens.models.quiet import quiet
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import certify
from memlens.organisms.planting.folder import component_table, save_organism, truth_table
from memlens.organisms.planting.plant import plant
from memlens.store.keyed_folder import KeyedFolder, read_manifest

_LOG = logging.getLogger(__name__)


def run(
    suite: str | Path | Suite = "standard",
    out: str | Path = "benchmark",
    *,
    models: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    carriers: Sequence[str] | None = None,
    sequences: int | None = None,
    others: int | None = None,
    localizers: Sequence[str] | None = None,
    part: tuple[int, int] | None = None,
    keep_organisms: bool = False,
    progress: bool = True,
) -> Leaderboard:
    """Run the localization benchmark: which localizer finds the components into which a memory was written?

    Each organism is one file; the same call again makes only what is missing.

    Args:
        suite: "mini", "standard", "transfer" or "inj", a YAML file, or a `Suite`.
        out: Folder of the run.
        models: Instead of the suite's models.
        families: Only the models of these families.
        carriers: Instead of the suite's carriers.
        sequences: Instead of the suite's number of organisms per model and carrier.
        others: Instead of the suite's number of other sequences.
        localizers: Instead of the suite's localizers.
        part: (i, n): only each n-th organism, beginning with the i-th (from 0), for job arrays.
        keep_organisms: Also save every organism as a checkpoint in `<out>/organisms`.
        progress: Show a bar.

    Returns:
        The leaderboard of all organisms that the folder holds.

    Raises:
        OptionError: Unknown names, or values that are not allowed.
        OtherRunError: The folder holds a run of another suite.
        SequenceError: A model has too few sequences.

    Example:
        >>> import memlens as ml
        >>> board = ml.benchmark.run("mini", "bench")  # some minutes  # doctest: +SKIP
        >>> board.best("head")["localizer"]  # doctest: +SKIP
    """
    chosen = read_suite(
        suite, models=models, carriers=carriers, sequences=sequences, others=others, localizers=localizers
    )
    if families is not None:
        chosen = of_families(chosen, families)
    check_localizers(chosen.localizers)
    names = list(chosen.localizers or LOCALIZERS.names())
    about = {"suite": asdict(chosen), "localizers": names}
    folder = _store(out, about)
    planned = list(chosen.organisms())
    if part is not None:
        planned = planned[part[0] :: part[1]]
    missing = [p for p in planned if not (folder.path / "parts" / f"{p.name}.json").exists()]
    texts: dict[str, Material] = {}
    costs: Costs = {}
    with tqdm(
        total=len(planned), initial=len(planned) - len(missing), disable=not progress, unit="organism"
    ) as bar:
        for item in missing:
            bar.set_description(item.name)
            if item.model not in texts:
                texts = {item.model: material(item.model, chosen)}
            timer = Timer()
            record = _run_one(item, chosen, texts[item.model], names, folder, keep_organisms, costs)
            record |= {**timer.stop().columns(), "peak_mib": peak_memory()}
            record["seal"] = folder.seal(f"{item.name}.json", json_text(record))
            path = folder.path / "parts" / f"{item.name}.json"
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json_text(record, indent=1).encode())
            bar.update()
    return read_benchmark(out)


def _store(folder: str | Path, about: dict[str, Any]) -> KeyedFolder:
    return KeyedFolder(folder, "benchmark", about, version=1, parts="parts/*.json")


def _run_one(
    item: Planned,
    suite: Suite,
    texts: Material,
    names: list[str],
    folder: KeyedFolder,
    keep: bool,
    costs: Costs,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": item.model, "carrier": str(item.carrier), "carrier_kind": item.carrier.kind,
        "seed": item.seed,
    }  # fmt: skip
    timer = Timer()
    base = texts.base()
    planted = texts.planted[[item.row]]
    try:
        organism = plant(
            base, planted, item.carrier, heldout=texts.training, seed=item.seed, options=suite.planting
        )
    except MemlensError as error:
        return record | {"failed": str(error), "rows": []}
    certificate = certify(organism, texts.heldout, suite.certificate)
    record |= {"certificate": certificate.record(), "plant_seconds": timer.stop().seconds}
    if not certificate.passed:
        _LOG.info("%s fails its certificate: %s", item.name, ", ".join(certificate.failures))
        return record | {"rows": []}
    if keep:
        save_organism(
            organism, certificate, folder.path / "organisms" / item.name, base=item.model,
            tokenizer=texts.tokenizer,
        )  # fmt: skip
    truth = truth_table(organism, certificate)
    if truth.empty:
        truth = pretended_truth(organism.model, item.seed)
    twin = texts.twin if suite.twin and item.carrier.kind != "none" else None
    with quiet():
        model = load_model(organism.model, check_weights=False)
    rows = measure_organism(
        model, planted, texts.others, truth, twin=twin, localizers=names, seed=item.seed, costs=costs
    )
    return record | {"rows": [_plain(row) for row in rows.to_dict("records")]}


def _plain(row: dict[Any, Any]) -> dict[Any, Any]:
    """Leave out what this row has not: a table of rows has NaN there."""
    return {key: value for key, value in row.items() if not isinstance(value, float) or value == value}


DRAWS = 10
"""Truths that are drawn for an organism without one."""


def pretended_truth(model: Any, seed: int, draws: int = DRAWS) -> pd.DataFrame:
    """Return components drawn at random as if they had been planted, to see that methods are at chance.

    For carriers without a truth: "none", and "spread", which is in all components.

    Args:
        model: A Hugging Face model.
        seed: Of the first draw.
        draws: How many independent truths, told apart by the column `draw`.
    """
    weights = ComponentWeights(model)
    truths = []
    for draw in range(draws):
        drawn = {
            c
            for text in ("heads=4", "neurons=30", "mlp", "attention")
            for c in Carrier.parse(text).draw(weights, seed + 1000 * draw)
        }
        table = component_table(weights, COMPONENT_KINDS, dict.fromkeys(drawn, 0.0))
        truths.append(table.assign(draw=draw))
    return pd.concat(truths, ignore_index=True)


def read_benchmark(folder: str | Path) -> Leaderboard:
    """Read the leaderboard of a run's folder, finished or not.

    Raises:
        ResultError: The folder holds no finished organism, or one that was edited.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.read_benchmark("bench").table()  # the folder of a run  # doctest: +SKIP
    """
    folder = expanded(folder)
    manifest = folder / "manifest.json"
    with parsing(manifest, ResultError, "run it again in another folder"):
        store = _store(folder, read_manifest(manifest, "benchmark", 1)["about"])
    organisms, rows = [], []
    for path in sorted((folder / "parts").glob("*.json")):
        with parsing(path, ResultError, "delete it and run again"):
            record = read_json(path, kind=ResultError)
            seal = record.pop("seal")
            store.check(path.name, json_text(record), seal)
            own = record.pop("rows")
            facts = {key: record[key] for key in ("model", "carrier", "carrier_kind", "seed")}
        certificate = record.get("certificate", {})
        failed = [c["check"] for c in certificate.get("checks", []) if not c["passed"]]
        organisms.append(
            {
                **facts, "passed": certificate.get("passed", False), "failures": ", ".join(failed),
                **certificate.get("facts", {}),
                **({"shared": len(certificate["shared"])} if "shared" in certificate else {}),
                **{name: record.get(name, np.nan) for name in ("seconds", "cpu_seconds", "peak_mib")},
            }
        )  # fmt: skip
        rows += [{**facts, **row} for row in own]
    if not organisms:
        raise ResultError(f"{folder} holds no finished organism of a benchmark: run it first.")
    table = pd.DataFrame(rows)
    if rows:  # a measure that no row has
        table = table.reindex(columns=list(dict.fromkeys([*table.columns, *MEASURES])))
    return Leaderboard(pd.DataFrame(organisms), table)
