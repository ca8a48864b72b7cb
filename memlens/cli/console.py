"""What the commands share: options, the consoles, loading with a spinner, tables, what a study found."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies import StudyRun

_PIPE_WIDTH = 200
OUT = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)

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


def load(
    name: str, backend: str, dtype: str, device: str | None, revision: str | None, checkpoint_step: int | None
) -> Any:
    """Load a model, with a spinner while it takes."""
    import memlens as ml

    with ERR.status(f"loading {name}"):
        return ml.load_model(
            name,
            backend=backend,
            dtype=dtype,
            device=device,
            revision=revision,
            checkpoint_step=checkpoint_step,
        )


def command_line() -> str:
    """Return the command line that is running, as a shell would take it again."""
    return shlex.join(["memlens", *sys.argv[1:]])


def print_run(run: StudyRun, seconds: float) -> None:
    """Print the findings of a study, what failed, and where the report is; exit with 1 if a step failed."""
    for number, finding in enumerate(run.findings, 1):
        OUT.print(Text.assemble((f"{number}. {finding.title}: ", "bold"), finding.statement))
        if finding.number:
            OUT.print(Text(f"   {finding.number}"))
        if finding.control:
            OUT.print(Text(f"   control: {finding.control}", style="dim"))
    for step, message in run.failures.items():
        ERR.print(Text.assemble((f"{step} failed: ", "bold red"), message))
    OUT.print(f"done in {seconds:.0f} s")
    OUT.print(f"report: {run.report}")
    if run.failures:
        raise typer.Exit(1)


def print_table(frame: pd.DataFrame, title: str) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(
            str(column), justify="right" if frame[column].dtype.kind in "if" else "left", overflow="fold"
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))
    OUT.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
