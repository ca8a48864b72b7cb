"""Runs that many processes share: `memlens gather`, `--part` and the script of a Slurm job array."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from memlens.cli.console import OUT, Json, print_json, print_table
from memlens.errors import OptionError, ResultError, UnfinishedError
from memlens.files import expanded

PartOption = Annotated[
    str | None,
    Parameter(
        name="--part",
        help="Only a share of the work, for several processes on one folder: I/N (I from 0), slurm (from the "
        "variables of the job array), or auto (whatever nobody has claimed).",
    ),
]
SlurmOption = Annotated[
    bool,
    Parameter(
        name="--slurm", negative=(), show_default=False,
        help="With --plan: print the script of a Slurm job array that does the work.",
    ),
]  # fmt: skip
OnOption = Annotated[
    str | None,
    Parameter(
        name="--on",
        help="Plan for another device, by the roofline: a name such as h100-sxm, or here (this machine's "
        "device is measured).",
    ),
]
TasksOption = Annotated[
    int, Parameter(name="--array-tasks", help="Tasks of the job array, at most one per part.")
]


@contextmanager
def sharing(part: str | None) -> Iterator[None]:
    """End a command without an error when its own share is done and parts of others are missing."""
    try:
        yield
    except UnfinishedError as error:
        if part is None:
            raise
        OUT.print(f"this share is done. {error}", markup=False)
        raise SystemExit(0) from None


def gather(folder: Path, *, out: Path | None = None, as_json: Json = False) -> None:
    """Join the parts that several processes made, or name those that are missing (and exit with 1).

    Example: memlens gather my-run

    Args:
        folder: The folder of a sweep, a study or a benchmark.
        out: For a sweep, the file of the joined result (default: gathered.nc in the folder).
    """
    from memlens.sweeps.shards import gather, parts_of

    folder = expanded(folder)
    sweeps = [folder] if (folder / "manifest.json").exists() else sorted((folder / "sweeps").glob("*"))
    sweeps = [place for place in sweeps if (place / "manifest.json").exists()]
    if not sweeps:
        raise ResultError(
            f"{folder} holds neither a sweep nor a study with sweeps: give the folder of a run."
        )
    if _is_benchmark(folder):
        from memlens.benchmark.running import missing_organisms

        found = {folder.name: missing_organisms(folder)}
    else:
        found = {place.name: parts_of(place) for place in sweeps}
    missing = {name: left for name, (_, left) in found.items() if left}
    rows = [
        {"sweep": name, "parts": len(every), "missing": len(left)} for name, (every, left) in found.items()
    ]
    document: dict[str, object] = {"parts": rows, "missing": missing}
    if not missing and sweeps == [folder] and not _is_benchmark(folder):
        document["result"] = gather(folder).save(out or folder / "gathered.nc")
    elif not missing and (folder / "report.html").exists():
        document["report"] = folder / "report.html"
    if as_json:
        print_json(document)
    else:
        import pandas as pd

        print_table(pd.DataFrame(rows), f"Parts in {folder}")
        for name, left in missing.items():
            OUT.print(f"missing in {name}: {', '.join(left)}", markup=False)
        if "result" in document:
            OUT.print(f"result: {document['result']}")
        elif "report" in document:
            OUT.print(f"all parts are there; report: {document['report']}", markup=False)
        elif not missing:
            OUT.print("all parts are there: the command without --part writes the report.")
    if missing:
        raise SystemExit(1)


def _is_benchmark(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.exists() and b'"memlens benchmark ' in manifest.read_bytes()[:200]


def slurm_script(words: Sequence[str], out: Path | None, parts: int, tasks: int, notes: Sequence[str]) -> str:
    """Return a job script that runs a command as an array, each task with its share.

    Args:
        words: The command line of the plan, from "memlens" on; options of the plan itself are left out.
        out: The folder that the tasks share.
        parts: Number of parts that there are.
        tasks: Tasks of the array, at most one per part.
        notes: Comments.

    Raises:
        OptionError: No folder, or no task.

    Example:
        >>> words = ["memlens", "run", "localize", "-m", "zoo/pythia-s", "--out", "a b", "--plan", "--slurm"]
        >>> print(slurm_script(words, Path("a b"), 40, 16, []).splitlines()[-1])
        memlens run localize -m zoo/pythia-s --out 'a b' --part slurm
    """
    if out is None:
        raise OptionError("--slurm writes a script whose tasks share a folder: give --out.")
    if tasks < 1:
        raise OptionError(f"--array-tasks {tasks} does no work: give 1 or more.")
    tasks = max(1, min(tasks, parts))
    kept, skip = [], False
    for word in words:
        if (
            not skip
            and word not in ("--plan", "--slurm")
            and not re.match("--(array-tasks|part|on)(=|$)", word)
        ):
            kept.append(word)
        skip = not skip and word in ("--array-tasks", "--part", "--on")
    if kept[1:2] == ["plan"]:
        kept[1:2] = ["run", "localize"]
    command = shlex.join(kept)
    comments = "".join(f"# {note}\n" for note in [*notes, f"{parts:,} parts, shared by {tasks} tasks."])
    return f"""#!/bin/bash
#SBATCH --job-name=memlens
#SBATCH --array=0-{tasks - 1}
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
# Add what your cluster needs: --partition, --account, --gres=gpu:1, --mem.
{comments}# The task that ends last writes the report.
# After a failure, submit the script again: only what is missing is done.
# What is missing: memlens gather {shlex.quote(str(out))}
set -euo pipefail
{command} --part slurm
"""
