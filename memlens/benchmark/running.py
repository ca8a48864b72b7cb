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
from memlens.errors import MemlensError, OptionError, ResultError
from memlens.files import expanded, json_text, parsing, read_json, write_atomically
from memlens.forward.components import COMPONENT_KINDS, ComponentWeights
from memlens.models.load import load_model
from memlens.models.quiet import quiet
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import certify
from memlens.organisms.planting.folder import component_table, save_organism, truth_table
from memlens.organisms.planting.plant import plant
from memlens.store.executors import run_parts
from memlens.store.keyed_folder import KeyedFolder, read_manifest
from memlens.store.sharing import Part, do_share

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
    part: Part | None = None,
    executor: Any = None,
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
        part: Only a share of the organisms, for job arrays: (i, n) or "i/n" for each n-th, beginning with the
            i-th (from 0), "slurm", or "auto" for those that no other process has claimed (see `sweep`).
        executor: Make the organisms on the workers of an executor, as for `sweep`.
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
    about = _about(chosen, names)
    if part is not None and executor is not None:
        raise OptionError("part= and executor= contradict each other: give one.")
    job = _Job(_store(out, about), chosen, names, keep_organisms)
    every = list(job.planned)
    missing = [name for name in every if not job.done(name)]
    with tqdm(
        total=len(every), initial=len(every) - len(missing), disable=not progress, unit="organism"
    ) as bar:

        def work(name: str) -> None:
            bar.set_description(name)
            job.work(name)
            bar.update()

        if executor is not None:
            run_parts(executor, job, every, on_done=lambda *_: bar.update())
        elif part is not None:
            do_share(part, every, job.folder, job.done, work)
        else:
            for name in missing:
                work(name)
    return read_benchmark(out)


class _Job:
    """The organisms of a suite as parts.

    Args:
        store: The folder of the run.
        suite: The suite.
        localizers: Names of localizers.
        keep: Whether organisms are saved as checkpoints.
    """

    folder: Path

    def __init__(self, store: KeyedFolder, suite: Suite, localizers: list[str], keep: bool) -> None:
        self.store, self.suite, self.localizers, self.keep = store, suite, localizers, keep
        self.folder, self.planned = store.path, {item.name: item for item in suite.organisms()}
        self.texts: dict[str, Material] = {}
        self.costs: Costs = {}

    def __reduce__(self) -> Any:
        return _job_elsewhere, (str(self.folder.absolute()), self.suite, self.localizers, self.keep)

    def _path(self, part: str) -> Path:
        return self.folder / "parts" / f"{part}.json"

    def done(self, part: str) -> bool:
        """Whether an organism's file is there."""
        return self._path(part).exists()

    def work(self, part: str) -> None:
        """Make an organism and write its file."""
        item = self.planned[part]
        if item.model not in self.texts:
            self.texts = {item.model: material(item.model, self.suite)}
        timer, texts = Timer(), self.texts[item.model]
        record = _run_one(item, self.suite, texts, self.localizers, self.store, self.keep, self.costs)
        record |= {**timer.stop().columns(), "peak_mib": peak_memory()}
        record["seal"] = self.store.seal(f"{part}.json", json_text(record))
        self._path(part).parent.mkdir(exist_ok=True)
        write_atomically(self._path(part), json_text(record, indent=1).encode())


def _job_elsewhere(folder: str, suite: Suite, localizers: list[str], keep: bool) -> _Job:
    return _Job(_store(folder, _about(suite, localizers)), suite, localizers, keep)


def _about(suite: Suite, localizers: list[str]) -> dict[str, Any]:
    return {"suite": asdict(suite), "localizers": localizers}


def missing_organisms(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the names of a run's organisms, and of those that are missing.

    Raises:
        ResultError: The folder does not hold a run of the benchmark.
    """
    folder = expanded(folder)
    about = read_manifest(folder / "manifest.json", "benchmark", 1)["about"]
    job = _Job(_store(folder, about), Suite(**about["suite"]), about["localizers"], keep=False)
    names = list(job.planned)
    return names, [name for name in names if not job.done(name)]


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
