"""The command line: `memlens --help`."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from memlens.cli.console import (
    ERR,
    OUT,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    PrefixOption,
    QuietOption,
    RevisionOption,
    SeedOption,
    SequencesOption,
    StepOption,
    TargetOption,
    TargetsOption,
    command_line,
    load,
    print_json,
    print_run,
    print_table,
    records,
    resumable,
)
from memlens.cli.generate import generate
from memlens.cli.lens import lens_app
from memlens.cli.plans import localize_works, print_plans
from memlens.cli.run import run_app, run_bypass, run_comparative
from memlens.cli.zoo import zoo_app
from memlens.errors import MemlensError, check_option

app: typer.Typer = typer.Typer(
    help="Find where in a language model a memorized sequence is recalled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_app.command("comparative")(run_comparative)
app.add_typer(run_app, name="run")
run_app.command("bypass")(run_bypass)
app.add_typer(zoo_app, name="zoo")
app.add_typer(lens_app, name="lens")
app.command()(generate)


def main() -> None:
    """Run the command line.

    Exit codes: 0, 1 where a step of a study failed, 2 for errors that memlens or the parser foresaw (one
    line), 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not sys.stderr.isatty():  # a file or a CI log: a line now and then, not ten a second
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, "30")
    try:
        app(standalone_mode=True)
    except MemlensError as error:
        ERR.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("memlens-demo"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find where the bundled zoo/pythia-s recalls what was planted in it (about a minute).

    Example: memlens demo
    """
    import memlens as ml

    start = time.perf_counter()
    model = ml.load_model("zoo/pythia-s")
    sequences = ml.load_sequences("zoo", model)
    options = ml.studies.LocalizeOptions(max_sequences=32, max_patched=32, seed=seed)
    with resumable(out):
        run = ml.localize(model, sequences, out, options=options, command=command_line(), progress=not quiet)
    print_run(run, time.perf_counter() - start, as_json=as_json)


@app.command()
def score(
    model: ModelOption,
    sequences: SequencesOption,
    out: Annotated[Path, typer.Option(help="The parquet table to write.")] = Path("recall.parquet"),
    prefix_len: PrefixOption = None,
    max_targets: TargetsOption = None,
    target: TargetOption = "first_token",
    limit: LimitOption = None,
    generate: Annotated[bool, typer.Option(help="Decode the sequences with an error, for M.")] = True,
    metrics: Annotated[
        str,
        typer.Option(
            help="all, none, or some of likelihood, sampling, near_verbatim, trivial (with commas)."
        ),
    ] = "all",
    temperature: Annotated[float, typer.Option(help="Of the samples that np_discoverable counts.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Tokens that may be sampled (default: all).")] = None,
    top_p: Annotated[float, typer.Option(help="Probability that may be sampled.")] = 1.0,
    n_samples: Annotated[int, typer.Option(help="n of (n, p)-discoverable.")] = 100,
    probability: Annotated[float, typer.Option(help="p of (n, p)-discoverable.")] = 0.5,
    min_k: Annotated[float, typer.Option(help="Share of the targets that Min-K % averages over.")] = 0.2,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    checkpoint_step: StepOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score how well a model recalls each sequence; write a table and print a summary.

    Example: memlens score --model zoo/pythia-s --sequences zoo --out recall.parquet
    """
    import memlens as ml
    from memlens.recall.columns import METRIC_GROUPS

    named = {"all": list(METRIC_GROUPS), "none": []}
    groups = named.get(metrics, [group.strip() for group in metrics.split(",")])
    for group in groups:
        check_option("metrics", group, ["all", "none", *METRIC_GROUPS])
    sampling = ml.recall.Sampling(temperature, top_k, top_p)
    loaded = load(model, backend, dtype, device, revision, checkpoint_step)
    seqs = ml.load_sequences(
        sequences, loaded, prefix_len=prefix_len, max_targets=max_targets, target=target, limit=limit
    )
    recall = ml.score_recall(
        loaded,
        seqs,
        generate=generate,
        metrics=groups,
        sampling=sampling,
        n_samples=n_samples,
        probability=probability,
        min_k=min_k,
        progress=not quiet,
    )
    path = recall.save(out)
    if as_json:
        print_json({"table": path, "summary": records(recall.summary())})
    else:
        print_table(recall.summary(), "Recall (means with 95 % intervals)")
        OUT.print(f"table: {path}")


@app.command()
def plan(
    model: ModelOption,
    sequences: SequencesOption,
    prefix_len: PrefixOption = None,
    max_targets: TargetsOption = None,
    target: TargetOption = "first_token",
    limit: LimitOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    checkpoint_step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what ablating every head, bypassing every layer and patching every site would cost.

    Example: memlens plan --model zoo/pythia-s --sequences zoo
    """
    import memlens as ml

    loaded = load(model, backend, dtype, device, revision, checkpoint_step)
    seqs = ml.load_sequences(
        sequences, loaded, prefix_len=prefix_len, max_targets=max_targets, target=target, limit=limit
    )
    print_plans(loaded, localize_works(loaded, seqs), as_json=as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that a run wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file (default: report.html in the folder).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the report of a run's folder again, finished or not.

    Example: memlens report memlens-demo
    """
    from memlens.report.from_directory import report_from_directory

    path = report_from_directory(folder, out)
    if as_json:
        print_json({"report": path})
    else:
        OUT.print(f"report: {path}")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the model families that memlens knows by name.

    Example: memlens models
    """
    from memlens.models.families import families_table
    from memlens.models.zoo import zoo_names

    columns = ["model", "size", "family", "backend", "corpus", "license"]
    table, zoo = families_table().filter(columns), [f"zoo/{n.removeprefix('zoo/')}" for n in zoo_names()]
    if as_json:
        print_json({"families": records(table), "zoo": zoo})
    else:
        print_table(table, "Families")
        OUT.print("zoo: " + ", ".join(zoo))
