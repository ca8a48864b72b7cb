"""The command line: `memlens --help`."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError
from rich.text import Text

import memlens
from memlens.cli.benchmark import benchmark_app, organisms_app
from memlens.cli.commands import from_options
from memlens.cli.console import (
    ERR,
    OUT,
    Json,
    Quiet,
    command_line,
    in_shell_words,
    print_json,
    print_run,
    print_table,
    records,
    resumable,
)
from memlens.cli.data import data_app
from memlens.cli.making import edit, generate, lens_app, zoo_app
from memlens.cli.recall import recall_app
from memlens.cli.sharing import OnOption, SlurmOption, TasksOption, gather
from memlens.errors import MemlensError, check_option
from memlens.registry import named_plugins
from memlens.studies.registry import ModelChoice, SequenceChoice

if TYPE_CHECKING:
    import pandas as pd


def _packages() -> str | None:
    """Return which packages extend memlens: they may add studies to `memlens run`."""
    found = dict.fromkeys(plugin.package for plugin in named_plugins())
    return f"Extended by {', '.join(found)}: see memlens plugins." if found else None


app: App = App(
    name="memlens",
    help="Find where in a language model a memorized sequence is recalled.",
    version=memlens.__version__,
    help_flags=["--help", "-h"],
    help_epilogue=_packages(),
    result_action="return_value",
)
app.command("memlens.cli.run:run_app", name="run", help="Run a study and write its results and report.")
app.command(recall_app)
app.command("memlens.cli.run:audit", name="audit", help="Audit a model: which of these strings leak?")
app.command(zoo_app)
app.command(data_app)
app.command(lens_app)
app.command(benchmark_app)
app.command(organisms_app)
app.command(from_options(generate), name="generate")
app.command(from_options(edit), name="edit")
app.register_install_completion_command()


def main() -> None:
    """Run the command line.

    Exit codes: 0 for success, 1 if a step of a study failed, 2 for errors raised by memlens or the parser
    (printed as one line), 3 if a limit such as `--fail-above` was exceeded, 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not sys.stderr.isatty():  # a file or a CI log: one line every 30 seconds
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, "30")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except (MemlensError, CycloptsError) as error:
        ERR.print(Text.assemble(("error: ", "bold red"), in_words(error)))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        ERR.print("stopped.")
        raise SystemExit(130) from None


def in_words(error: BaseException) -> str:
    """Return an error as one line: memlens' own message if an option refused a value."""
    cause = error
    while isinstance(cause, CycloptsError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__ or cause
    if not isinstance(cause, MemlensError):
        return " ".join(str(error).split())
    return in_shell_words(" ".join(str(cause).split()), _options_typed())


def _options_typed() -> list[str]:
    """Return the options of the command that was typed."""
    command = app.parse_commands(sys.argv[1:])[1][-1]
    if command.default_command is None:
        return []
    return [name for argument in command.assemble_argument_collection() for name in argument.names]


@app.command
def demo(
    *, out: Path = Path("memlens-demo"), seed: int = 0, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Find where the bundled zoo/pythia-s recalls what was planted in it (about a minute).

    Example: memlens demo

    Args:
        out: Folder for results and report.
        seed: Seed of every random choice.
    """
    import memlens as ml
    from memlens.studies.pilot import record_times
    from memlens.studies.times import LOADING, Stopwatch

    watch = Stopwatch()
    with watch.timed(LOADING):
        model = ml.load_model("zoo/pythia-s")
        sequences = ml.load_sequences("zoo", model)
    options = ml.studies.LocalizeOptions(max_sequences=32, max_patched=32, seed=seed)
    with resumable(out):
        run = ml.localize(model, sequences, out, options=options, command=command_line(), progress=not quiet)
    print_run(run, record_times(out, watch.times), as_json=as_json)


def score(
    where: ModelChoice,
    what: SequenceChoice,
    *,
    out: Path = Path("recall.parquet"),
    generate: bool = True,
    metrics: str = "all",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    n_samples: int = 100,
    probability: float = 0.5,
    min_k: float = 0.2,
    portion: int | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score how well a model recalls each sequence; write a table and print a summary.

    Example: memlens score --model zoo/pythia-s --sequences zoo --out recall.parquet

    Args:
        where: The model.
        what: The sequences.
        out: The table to write, one row per sequence: .parquet, .csv or .jsonl.
        generate: Decode the sequences that contain an error, for the score M.
        metrics: all, none, or a comma-separated list of likelihood, sampling, near_verbatim, trivial,
            taxonomy.
        temperature: Sampling temperature for np_discoverable.
        top_k: Sample from the k most likely tokens (default: all).
        top_p: Sample from the most likely tokens up to this probability mass.
        n_samples: n of (n, p)-discoverable.
        probability: p of (n, p)-discoverable.
        min_k: Share of the targets that Min-K % averages over.
        portion: Read, score and write so many rows at a time (into .parquet): for sources larger than memory.
            The same command continues a run that was stopped.
    """
    import memlens as ml
    from memlens.recall.columns import METRIC_GROUPS
    from memlens.recall.scores import criterion_of, read_scores, summarized, table_suffix

    table_suffix(out)  # before the work, not after it
    named = {"all": list(METRIC_GROUPS), "none": []}
    groups = named.get(metrics, [group.strip() for group in metrics.split(",")])
    for group in groups:
        check_option("metrics", group, ["all", "none", *METRIC_GROUPS])
    options = {
        "generate": generate,
        "metrics": groups,
        "sampling": ml.recall.Sampling(temperature, top_k, top_p),
        "n_samples": n_samples,
        "probability": probability,
        "min_k": min_k,
        "progress": not quiet,
    }
    model = where.load()
    if portion is None:
        recall = ml.score_recall(model, what.load(model), **options)
        path, table = recall.save(out), recall.table
        rows = table.assign(prefix_len=recall.sequences.prefix_len.numpy()) if as_json else None
    else:
        reading = what.reading()
        path = ml.recall.score_to_file(model, what.sequences, out, size=portion, reading=reading, **options)
        table, rows = read_scores(path), None
    summary, best = summarized(table), criterion_of(table)
    if as_json:
        listed = {} if rows is None else {"sequences": records(rows)}
        print_json({"table": path, "summary": records(summary), **listed})
    else:
        print_table(_most_recalled(table, best), "What is recalled best")
        shown = summary.query(f"by == 'all' or metric in ['exact_match', {best!r}]")
        print_table(shown, "Recall (means with 95 % intervals)")
        OUT.print(f"table: {path}")


def _most_recalled(table: pd.DataFrame, criterion: str, most: int = 10) -> pd.DataFrame:
    """The sequences that are recalled best, with the columns that tell which they are."""
    from memlens.sequences.set import shortened_cells

    order = [name for name in ("exact_match", criterion, "target_logprob") if name in table]
    best = table.sort_values(order, ascending=False, kind="stable").head(most)
    shown = [name for name in ("id", "text", "domain", "copies", *order, "np_discoverable") if name in best]
    return shortened_cells(best.filter(list(dict.fromkeys(shown))))


def plan(
    where: ModelChoice,
    what: SequenceChoice,
    *,
    out: Path | None = None,
    on: OnOption = None,
    slurm: SlurmOption = False,
    array_tasks: TasksOption = 16,
    as_json: Json = False,
) -> None:
    """Estimate the cost of ablating every head, bypassing every layer and patching every site.

    With --slurm, print the script of a job array that does it by `memlens run localize`.

    Example: memlens plan --model zoo/pythia-s --sequences zoo

    Args:
        where: The model.
        what: The sequences.
        out: With --slurm: the folder of the run.
    """
    from memlens.cli.run import print_plan, print_script
    from memlens.studies.localization.command import LocalizeInputs
    from memlens.studies.localization.options import LocalizeOptions
    from memlens.studies.registry import Call

    if slurm:
        inputs = LocalizeInputs(**vars(what))
        print_script(inputs, Call(where, LocalizeOptions(), out), array_tasks)
        return
    from memlens.studies.localization.command import localize_works
    from memlens.studies.plans import plan_works

    model = where.load()
    print_plan(plan_works(model, localize_works(model, what.load(model)), on=on), as_json=as_json)


def check(where: ModelChoice, *, as_json: Json = False) -> None:
    """Check a model's logits, layers and hooks; exit with 0 if all checks pass, else with 1.

    Example: memlens check zoo/pythia-s

    Args:
        where: The model.
    """
    import memlens as ml

    try:
        found = ml.check_model(where.load(check_weights="always"))
    except ml.errors.ModelLoadError as error:
        print_json({"ok": False, "error": str(error)}) if as_json else OUT.print(str(error))
        raise SystemExit(1) from None
    if as_json:
        print_json({"ok": found.ok, "checks": records(found.to_frame())})
    else:
        OUT.print(str(found))
    if not found.ok:
        raise SystemExit(1)


app.command(gather)
app.command(from_options(check), name="check")
app.command(from_options(score), name="score")
app.command(from_options(plan), name="plan")


@app.command
def report(folder: Path, *, out: Path | None = None, as_json: Json = False) -> None:
    """Write the report of a run's folder again, whether the run is finished or not.

    Example: memlens report memlens-demo

    Args:
        folder: A folder that a run wrote.
        out: The HTML file (default: report.html in the folder).
    """
    from memlens.report.from_directory import report_from_directory

    path = report_from_directory(folder, out)
    if as_json:
        print_json({"report": path})
    else:
        OUT.print(f"report: {path}")


@app.command
def plugins(*, as_json: Json = False) -> None:
    """List the modules of other packages that extend memlens; exit with 1 if one cannot be imported.

    Example: memlens plugins
    """
    import pandas as pd

    from memlens.registry import Plugin, load_plugins

    columns = [field.name for field in fields(Plugin)]
    found = pd.DataFrame([astuple(plugin) for plugin in load_plugins()], columns=columns)
    if as_json:
        print_json(records(found))
    elif len(found):
        found["adds"] = found["adds"].map(lambda adds: ", ".join(adds) or "nothing")
        print_table(found.replace({"error": {"": "none"}}), "Plugins")
    else:
        OUT.print("no installed package extends memlens")
    if any(plugin.error for plugin in load_plugins()):
        raise SystemExit(1)


@app.command
def models(*, as_json: Json = False) -> None:
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
