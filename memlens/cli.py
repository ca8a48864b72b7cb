"""The command line: `memlens --help`."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memlens.errors import MemlensError, check_option
from memlens.generate_cli import generate
from memlens.lens_cli import lens_app

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies import LocalizedRun

__all__ = ["app", "main"]

app = typer.Typer(
    help="Find where in a language model a memorized sequence is recalled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_app = typer.Typer(help="Run a study and write its results and report to a folder.", no_args_is_help=True)
zoo_app = typer.Typer(help="The bundled models with known memories.", no_args_is_help=True)
app.add_typer(run_app, name="run")
app.add_typer(zoo_app, name="zoo")
app.add_typer(lens_app, name="lens")
app.command()(generate)

_PIPE_WIDTH = 200
_OUT = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_ERR = Console(stderr=True, soft_wrap=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Hub name, checkpoint folder, .gguf file or zoo name.")
]
SequencesOption = Annotated[
    str, typer.Option("--sequences", "-s", help=".npy, .jsonl, .csv or .parquet file, hf:NAME, or zoo.")
]
PrefixOption = Annotated[
    int | None, typer.Option(help="Tokens given to the model (default: the file's own, or 32).")
]
TargetsOption = Annotated[
    int | None, typer.Option(help="Keep only the first so many tokens of each continuation.")
]
TargetOption = Annotated[
    str, typer.Option(help="For the idiom file: first_token of the last word, or the word.")
]
BackendOption = Annotated[str, typer.Option(help="auto, hooked or bridge.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
StepOption = Annotated[int | None, typer.Option(help="Training step of Pythia or OLMo.")]
LimitOption = Annotated[int | None, typer.Option(help="Read only the first so many rows.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def main() -> None:
    """Run the command line; errors that memlens foresaw are one line, and the exit code is 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(standalone_mode=True)
    except MemlensError as error:
        _ERR.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _ERR.print(
            "stopped; results that were finished are in the output folder, `memlens report DIR` shows them."
        )
        raise SystemExit(130) from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("memlens-demo"),
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Find where the bundled zoo/pythia-s recalls what was planted in it (about a minute).

    Example: memlens demo
    """
    import memlens as ml

    start = time.perf_counter()
    model = ml.load_model("zoo/pythia-s")
    sequences = ml.load_sequences("zoo", model)
    options = ml.LocalizeOptions(max_sequences=32, max_patched=32, seed=seed)
    run = ml.localize(model, sequences, out, options=options, command=_command(), progress=not quiet)
    _print_run(run, time.perf_counter() - start)


@run_app.command("localize")
def run_localize(
    model: ModelOption,
    sequences: SequencesOption,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")],
    prefix_len: PrefixOption = None,
    max_targets: TargetsOption = None,
    target: TargetOption = "first_token",
    limit: LimitOption = None,
    max_sequences: Annotated[int, typer.Option(help="Memorized sequences to examine.")] = 64,
    max_patched: Annotated[int, typer.Option(help="Sequences for activation patching.")] = 32,
    head_mode: Annotated[
        str, typer.Option(help="mean_of_other_heads, zero, mean or resample.")
    ] = "mean_of_other_heads",
    bypass_mode: Annotated[str, typer.Option(help="identity or zero.")] = "identity",
    patch_site: Annotated[
        str, typer.Option(help="resid_pre, resid_post, attn_out, mlp_out or z.")
    ] = "resid_pre",
    untrained_control: Annotated[bool, typer.Option(help="Also run on freshly drawn weights.")] = True,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    checkpoint_step: StepOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Score, decode, ablate, bypass and patch: where does this model recall these sequences?

    Example: memlens run localize --model zoo/pythia-s --sequences zoo --out my-run
    """
    import memlens as ml

    start = time.perf_counter()
    options = ml.LocalizeOptions(
        max_sequences=max_sequences,
        max_patched=max_patched,
        head_mode=head_mode,
        bypass_mode=bypass_mode,
        patch_site=patch_site,
        untrained_control=untrained_control,
        seed=seed,
    )
    loaded = _load(model, backend, dtype, device, revision, checkpoint_step)
    seqs = ml.load_sequences(
        sequences, loaded, prefix_len=prefix_len, max_targets=max_targets, target=target, limit=limit
    )
    run = ml.localize(loaded, seqs, out, options=options, command=_command(), progress=not quiet)
    _print_run(run, time.perf_counter() - start)


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
    quiet: QuietOption = False,
) -> None:
    """Score how well a model recalls each sequence; write a table and print a summary.

    Example: memlens score --model zoo/pythia-s --sequences zoo --out recall.parquet
    """
    import memlens as ml
    from memlens.recall import METRIC_GROUPS

    named = {"all": list(METRIC_GROUPS), "none": []}
    groups = named.get(metrics, [group.strip() for group in metrics.split(",")])
    for group in groups:
        check_option("metrics", group, ["all", "none", *METRIC_GROUPS])
    sampling = ml.Sampling(temperature, top_k, top_p)
    loaded = _load(model, backend, dtype, device, revision, checkpoint_step)
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
    _print_table(recall.summary(), "Recall (means with 95 % intervals)")
    _OUT.print(f"table: {path}")


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
) -> None:
    """Say what ablating every head, bypassing every layer and patching every site would cost.

    Example: memlens plan --model zoo/pythia-s --sequences zoo
    """
    import memlens as ml

    loaded = _load(model, backend, dtype, device, revision, checkpoint_step)
    seqs = ml.load_sequences(
        sequences, loaded, prefix_len=prefix_len, max_targets=max_targets, target=target, limit=limit
    )
    layers = range(len(loaded.blocks))
    works = {
        "ablate each head": ml.head_ablations(loaded, seqs),
        "bypass each layer": [ml.bypass_intervention(loaded, [layer]) for layer in layers],
        "patch layer x position": ml.activation_patches(loaded, seqs),
    }
    for name, interventions in works.items():
        _OUT.print(f"{name}: {ml.plan(loaded, seqs, interventions)}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that a run wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file (default: report.html in the folder).")
    ] = None,
) -> None:
    """Make the report of a run's folder again, finished or not.

    Example: memlens report memlens-demo
    """
    from memlens.report import report_from_directory

    _OUT.print(f"report: {report_from_directory(folder, out)}")


@app.command()
def models() -> None:
    """List the model families that memlens knows by name.

    Example: memlens models
    """
    from memlens.models.families import families_table
    from memlens.models.zoo import zoo_names

    columns = ["model", "size", "family", "backend", "corpus", "license"]
    _print_table(families_table().filter(columns), "Families")
    _OUT.print("zoo: " + ", ".join(f"zoo/{name.removeprefix('zoo/')}" for name in zoo_names()))


@zoo_app.command("list")
def zoo_list() -> None:
    """List the models of the zoo that are here.

    Example: memlens zoo list
    """
    from memlens.models.zoo import zoo_names, zoo_path

    for name in zoo_names():
        _OUT.print(f"{name}  {zoo_path(name)}")


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="A recipe of the zoo, such as pythia-s.")] = "pythia-s",
    out: Annotated[Path | None, typer.Option(help="Folder (default: the user's cache).")] = None,
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe's.")] = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = True,
    quiet: QuietOption = False,
) -> None:
    """Train a zoo model from its recipe: same corpus, same seed, same model.

    Example: memlens zoo train pythia-s --seed 0
    """
    from memlens.organisms.evaluate import evaluate_zoo_model
    from memlens.organisms.zoo import train_zoo_model

    folder = train_zoo_model(
        name, out, seed=seed, steps=steps, device=device, progress=not quiet, resume=resume
    )
    curve = evaluate_zoo_model(folder)
    _print_table(curve.loc[curve["domain"] == "all"], "Exact match by copies in the corpus")
    _OUT.print(f"model: {folder}")


def _load(
    name: str, backend: str, dtype: str, device: str | None, revision: str | None, checkpoint_step: int | None
) -> Any:
    import memlens as ml

    with _ERR.status(f"loading {name}"):
        return ml.load_model(
            name,
            backend=backend,
            dtype=dtype,
            device=device,
            revision=revision,
            checkpoint_step=checkpoint_step,
        )


def _command() -> str:
    return shlex.join(["memlens", *sys.argv[1:]])


def _print_run(run: LocalizedRun, seconds: float) -> None:
    for number, finding in enumerate(run.findings, 1):
        _OUT.print(Text.assemble((f"{number}. {finding.title}: ", "bold"), finding.statement))
        if finding.number:
            _OUT.print(Text(f"   {finding.number}"))
        if finding.control:
            _OUT.print(Text(f"   control: {finding.control}", style="dim"))
    for step, message in run.failures.items():
        _ERR.print(Text.assemble((f"{step} failed: ", "bold red"), message))
    _OUT.print(f"done in {seconds:.0f} s")
    _OUT.print(f"report: {run.report}")
    if run.failures:
        raise typer.Exit(1)


def _print_table(frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(
            str(column), justify="right" if frame[column].dtype.kind in "if" else "left", overflow="fold"
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))
    _OUT.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
