"""What the commands share: common flags, the consoles, tables, and how a study's findings are printed.

Results go to standard output (with `--json` as one document), progress bars and errors to standard error.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memlens.files import json_text

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies.running import StudyRun

_PIPE_WIDTH = 200
_MOST_ROWS = 20
OUT = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


Json = Annotated[
    bool,
    Parameter(
        name="--json", negative=(), show_default=False, help="Print one JSON document, for other programs."
    ),
]
Quiet = Annotated[
    bool, Parameter(name=["--quiet", "-q"], negative=(), show_default=False, help="Show no progress bars.")
]


def split_names(_: Any, tokens: Sequence[Token]) -> list[str]:
    """Return the names that an option gives, repeated or with commas between them.

    A path that exists may have a comma in its name.
    """
    return [
        name.strip()
        for value in (token.value for token in tokens)
        for name in ([value] if Path(value).exists() else value.split(","))
        if name.strip()
    ]


Names = Annotated[list[str], Parameter(converter=split_names, negative_iterable=())]
Switch: Parameter = Parameter(negative=(), show_default=False)
"""Parameter of a flag that is off by default."""


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["memlens", *sys.argv[1:]])


def in_shell_words(message: str, options: Collection[str]) -> str:
    """Return a message with a command's options as they are typed, in place of Python's parameters.

    Args:
        message: An error of memlens.
        options: The options of the command, such as "--prefix-len".

    >>> in_shell_words("prefix_len=32: choose a smaller prefix_len", ["--prefix-len"])
    '--prefix-len 32: choose a smaller --prefix-len'
    >>> in_shell_words("generate=False leaves out split='test'", ["--generate", "--no-generate", "--split"])
    "--no-generate leaves out --split 'test'"
    """
    for option in sorted(options, key=len, reverse=True):
        name = option.removeprefix("--").replace("-", "_")
        negative = f"--no-{option.removeprefix('--')}"
        start, end = rf"(?<![\w./-]){name}", r"(?!\w|[./-]\w)"
        if negative in options:
            message = re.sub(f"{start}=False{end}", negative, message)
            message = re.sub(f"{start}=True{end}", option, message)
        message = re.sub(rf"{start}=(?=[\w'\"\[(-])", f"{option} ", message)
        message = re.sub(f"{start}={end}", option, message)
        if "_" in name:  # without one it may be a word
            message = re.sub(start + end, option, message)
    return message


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """On Ctrl-C, print how to continue and exit with 130.

    Args:
        out: The folder with the finished parts.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if out is None else f"; finished parts are in {out}"
        ERR.print(f"stopped{kept}; run the same command again to continue.")
        raise SystemExit(130) from None


def print_json(value: object) -> None:
    """Print a value as JSON; NaN and infinity become null."""
    sys.stdout.write(json_text(value, indent=2) + "\n")


def print_run(run: StudyRun, times: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print a study's findings, tables, failures, time and report.

    Raises:
        SystemExit: With 3 if a limit was exceeded, else with 1 if a step failed.
    """
    seconds = sum(entry["seconds"] for entry in times)
    if as_json:
        found = [asdict(finding) for finding in run.findings]
        print_json(
            {
                "report": run.report,
                "seconds": seconds,
                "times": list(times),
                "findings": found,
                "failures": dict(run.failures),
                **run.facts,
                **({"exceeded": run.exceeded} if run.exceeded else {}),
            }
        )
    else:
        for title, table in run.tables.items():
            print_table(table.head(_MOST_ROWS), title)
        _print_findings(run)
        print_times(times, "Time")
        OUT.print(f"done in {seconds:.0f} s")
        OUT.print(f"report: {run.report}")
        if run.exceeded:
            ERR.print(Text(run.exceeded, style="bold red"))
    if run.exceeded:
        raise SystemExit(3)
    if run.failures:
        raise SystemExit(1)


def print_times(times: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print what the steps of a study took or will take, with the sum in the last row."""
    import pandas as pd

    frame = pd.DataFrame(list(times)).set_index("step")
    print_table(
        pd.concat([frame, frame.sum().to_frame("together").T.rename_axis("step")]).reset_index(), title
    )


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


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
