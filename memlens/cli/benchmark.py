"""Commands of the localization benchmark: `memlens benchmark` and `memlens organisms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from memlens.cli.console import OUT, Json, Names, Quiet, Switch, print_json, print_table, records, resumable
from memlens.cli.sharing import PartOption
from memlens.cli.workers import SchedulerOption, WorkersOption, executor_of

if TYPE_CHECKING:
    from memlens.benchmark import Leaderboard

benchmark_app: App = App(name="benchmark", help="Which localizer finds a memory whose place is known?")
organisms_app: App = App(name="organisms", help="Write memories into known components of a model.")


@benchmark_app.command(name="run")
def benchmark_run(
    suite: str = "standard",
    *,
    out: Path = Path("benchmark"),
    models: Names | None = None,
    families: Names | None = None,
    carriers: Names | None = None,
    sequences: int | None = None,
    others: int | None = None,
    localizers: Names | None = None,
    part: PartOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    keep_organisms: Annotated[bool, Switch] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the organisms of a suite, score every localizer on them, and print the leaderboard.

    The same command again makes only what is missing.

    Example: memlens benchmark run mini --out bench

    Args:
        suite: mini, standard, transfer, inj, or a YAML file.
        out: Folder of the run.
        models: Other models than the suite's.
        families: Only the models of these families, such as pythia or olmo2.
        carriers: Other carriers, such as neurons=30, heads=4, mlp, attention, path, spread, none.
        sequences: Organisms per model and carrier.
        others: Sequences that are not planted, to compare with.
        localizers: Only these localizers.
        keep_organisms: Also save every organism as a checkpoint.
    """
    from memlens import benchmark

    with resumable(out), executor_of(workers, scheduler, part) as executor:
        found = benchmark.run(
            suite, out, models=models, families=families, carriers=carriers, sequences=sequences,
            others=others, localizers=localizers, part=part, executor=executor,
            keep_organisms=keep_organisms, progress=not quiet,
        )  # fmt: skip
    _print(found, as_json)


@benchmark_app.command(name="report")
def benchmark_report(out: Path, *, measure: str = "average_precision", as_json: Json = False) -> None:
    """Write report.html into a run's folder, finished or not, and print its leaderboard.

    Example: memlens benchmark report bench --measure recall_at_k

    Args:
        out: Folder of the run.
        measure: average_precision, recall_at_k, roc_auc, ndcg or layer_hit.
    """
    from memlens import benchmark

    found = benchmark.read_benchmark(out)
    page = benchmark.report(out)
    _print(found, as_json, measure)
    if not as_json:
        OUT.print(f"report: {page}")


@benchmark_app.command(name="publish")
def benchmark_publish(
    folder: Path, *, to: Path | None = None, docs: Path | None = None, as_json: Json = False
) -> None:
    """Write what a run found where memlens' recommendations, and a page's tables, are read from.

    Example: memlens benchmark publish table --docs docs/localization.md

    Args:
        folder: Folder of the run.
        to: Folder for recommended.yaml and leaderboard.csv; memlens' own by default.
        docs: Markdown page whose marked part is replaced by the run's tables.
    """
    from memlens import benchmark

    written = [str(path) for path in benchmark.publish(folder, to, docs=docs)]
    if as_json:
        print_json({"written": written})
    else:
        OUT.print(*written, sep="\n")


@benchmark_app.command(name="fingerprint")
def benchmark_fingerprint(
    model: str = "zoo/pythia-s",
    *,
    carrier: str = "neurons=1%",
    sequences: int = 2,
    seed: int = 100,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Plant with norms kept and not, and print what the weights alone then tell about the carrier.

    Example: memlens benchmark fingerprint zoo/pythia-s --sequences 3 --out bench

    Args:
        model: The base model.
        carrier: What is planted into.
        sequences: Organisms for each way of planting.
        seed: Of the first organism.
        out: Folder of a run, whose report then shows the table.
    """
    from memlens import benchmark
    from memlens.benchmark.fingerprint import FINGERPRINT
    from memlens.files import made_folder, write_atomically

    found = benchmark.fingerprint_table(model, carrier, sequences=sequences, seed=seed)
    if out is not None:
        table = found.assign(model=model, carrier=carrier)
        write_atomically(made_folder(out) / FINGERPRINT, table.to_parquet())
    if as_json:
        print_json(records(found))
    else:
        print_table(found, f"Fingerprint: {carrier} of {model}")


@benchmark_app.command(name="localizers")
def benchmark_localizers(*, as_json: Json = False) -> None:
    """List the localizers, those of installed packages included.

    Example: memlens benchmark localizers
    """
    import pandas as pd

    from memlens.benchmark import LOCALIZERS

    rows = [
        {"localizer": m.name, "components": ", ".join(m.components), "control": m.control, "cost": m.cost}
        for m in LOCALIZERS.values()
    ]
    table = pd.DataFrame(rows)
    if as_json:
        print_json(records(table))
    else:
        print_table(table, "Localizers")


def _print(found: Leaderboard, as_json: bool, measure: str = "average_precision") -> None:
    table = found.table(measure)
    if as_json:
        print_json({"organisms": records(found.organisms), "leaderboard": records(table)})
        return
    passed = int(found.organisms["passed"].to_numpy(bool).sum())
    cells: Any = table.groupby(["carrier_kind", "component"], sort=False)
    for key, own in cells:
        title = f"carrier {key[0]}, {key[1]}: {measure.replace('_', ' ')}, best first"
        print_table(own.drop(columns=["carrier_kind", "component"]).head(12), title)
    OUT.print(f"{passed} of {len(found.organisms)} organisms passed their certificates and were used")


@organisms_app.command(name="plant")
def organisms_plant(
    model: str,
    *,
    out: Path,
    carrier: str = "heads=4",
    sequences: int = 1,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Write sequences into chosen components of a model, check the result, and save it as a checkpoint.

    Example: memlens organisms plant zoo/pythia-s --carrier heads=4 --seed 0 --out organism

    Args:
        model: Zoo name, hub name or checkpoint folder.
        out: Folder of the organism.
        carrier: neurons=N, heads=N, mlp, attention (with @LAYER), path=N, spread or none.
        sequences: Number of sequences that are written into the same carrier.
        seed: Draws the components and the sequences.
    """
    from memlens.benchmark.suites import Suite, material
    from memlens.zoo import certify, plant, save_organism

    texts = material(model, Suite(models=(model,), carriers=(carrier,), sequences=sequences))
    organism = plant(texts.base(), texts.planted, carrier, heldout=texts.training, seed=seed)
    certificate = certify(organism, texts.heldout)
    save_organism(organism, certificate, out, base=model, tokenizer=texts.tokenizer)
    if as_json:
        print_json({"organism": out, **certificate.record()})
        return
    print_table(certificate.checks, f"Certificate of {out}")
    if not certificate.shared.empty:
        print_table(certificate.shared, "Shared substrate: components outside the carrier that it also needs")
    if "sufficiency" in certificate.facts:
        OUT.print(
            f"sufficiency: {certificate.facts['sufficiency']:.2f} of the gain comes from the carrier alone"
        )
    verdict = "passed" if certificate.passed else f"failed ({', '.join(certificate.failures)})"
    OUT.print(f"certificate {verdict}; components: {', '.join(map(str, organism.components)) or 'none'}")
