"""What the commands share: options, the consoles, loading with a spinner, tables, what a study found.

Results go to the standard output (with `--json` one document), bars and errors to the standard error.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies.running import StudyRun

_PIPE_WIDTH = 200
OUT = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models that begin so, for the shell's completion."""
    from memlens.models.families import families_table
    from memlens.models.zoo import zoo_names

    zoo = [f"zoo/{name.removeprefix('zoo/')}" for name in zoo_names()]
    return [name for name in (*zoo, *families_table()["model"]) if name.startswith(incomplete)]


def one_of(*values: str) -> Any:
    """Return a completion of an option that takes one of a few words."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Hub name, checkpoint folder, .gguf file or zoo name.",
        autocompletion=complete_model,
    ),
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
BackendOption = Annotated[
    str, typer.Option(help="auto, hooked or bridge.", autocompletion=one_of("auto", "hooked", "bridge"))
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16.", autocompletion=one_of("float32", "bfloat16", "float16")
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, mps (default: cuda where there is one).", autocompletion=one_of("cpu", "cuda", "mps")
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
StepOption = Annotated[int | None, typer.Option(help="Training step of Pythia or OLMo.")]
LimitOption = Annotated[int | None, typer.Option(help="Read only the first so many rows.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, for other programs.")]
PlanOption = Annotated[bool, typer.Option("--plan", help="Only print what it would cost.")]
ResumeOption = Annotated[
    bool, typer.Option(help="Go on with what the folder holds of an earlier run, or start over.")
]


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


@contextmanager
def resumable(out: Path | None, *, resume: bool = True, parts: Sequence[str] = ("sweeps",)) -> Iterator[None]:
    """Say after Ctrl-C how to go on; with `resume=False` delete first what an earlier run kept.

    Args:
        out: The folder that keeps what is finished.
        resume: Whether that is used.
        parts: Folders in it that hold nothing but that.
    """
    import shutil

    if not resume and out is not None:
        for part in parts:
            shutil.rmtree(out / part, ignore_errors=True)
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if out is None else f"; what was finished is in {out}"
        ERR.print(f"stopped{kept}, and the same command goes on from there.")
        raise typer.Exit(130) from None


def print_json(value: object) -> None:
    """Print a value as JSON; what JSON has no number for becomes null."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2))


def print_run(run: StudyRun, seconds: float, *, as_json: bool = False) -> None:
    """Print the findings of a study, what failed, and where the report is; exit with 1 if a step failed."""
    if as_json:
        found = [asdict(finding) for finding in run.findings]
        print_json(
            {"report": run.report, "seconds": seconds, "findings": found, "failures": dict(run.failures)}
        )
    else:
        _print_findings(run)
        OUT.print(f"done in {seconds:.0f} s")
        OUT.print(f"report: {run.report}")
    if run.failures:
        raise typer.Exit(1)


def _print_findings(run: StudyRun) -> None:
    for number, finding in enumerate(run.findings, 1):
        OUT.print(Text.assemble((f"{number}. {finding.title}: ", "bold"), finding.statement))
        if finding.number:
            OUT.print(Text(f"   {finding.number}"))
        if finding.control:
            OUT.print(Text(f"   control: {finding.control}", style="dim"))
    for step, message in run.failures.items():
        ERR.print(Text.assemble((f"{step} failed: ", "bold red"), message))


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


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows, for JSON."""
    return [dict(zip(map(str, frame.columns), row, strict=True)) for row in frame.itertuples(index=False)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value  # numbers and arrays of numpy
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
