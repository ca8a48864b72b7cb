"""The command line's `memlens run`: one command per registered study, made from its options."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from memlens.cli.commands import from_options
from memlens.cli.console import (
    OUT,
    Json,
    Quiet,
    Switch,
    command_line,
    print_json,
    print_run,
    print_table,
    print_times,
    resumable,
)
from memlens.cli.sharing import OnOption, PartOption, SlurmOption, TasksOption, sharing, slurm_script
from memlens.cli.workers import SchedulerOption, WorkersOption, executor_of
from memlens.errors import OptionError
from memlens.options import read_options
from memlens.studies.pilot import plan_steps, record_times, save_plan
from memlens.studies.plans import PlanTable
from memlens.studies.registry import STUDIES, Call, Study
from memlens.studies.times import READING

_LOG = logging.getLogger(__name__)

run_app: App = App(name="run", help="Run a study and write its results and report to a folder.")


def study_command(study: Study) -> Any:
    """Return the command of a study."""

    def run(
        where: Any,
        inputs: Any,
        options: Any,
        *,
        out: Path | None = None,
        options_file: Annotated[Path | None, Parameter(name="--options")] = None,
        plan: Annotated[bool, Switch] = False,
        on: OnOption = None,
        slurm: SlurmOption = False,
        array_tasks: TasksOption = 16,
        part: PartOption = None,
        workers: WorkersOption = None,
        scheduler: SchedulerOption = None,
        resume: bool = True,
        as_json: Json = False,
        quiet: Quiet = False,
        given: Any = None,
    ) -> None:
        chosen = {
            **(read_options(options_file, study.options, check=True) if options_file else {}),
            **given["options"],
        }
        if out is None and study.folder and not plan:
            out = Path(study.folder)
        if on is not None and not plan:
            raise OptionError(f"--on {on} plans for another device: give --plan with it.")
        shared = part is not None or slurm
        call = Call(where, study.options(**chosen), out, chosen, progress=not quiet, on=on, shared=shared)
        asked = {"--part": part, "--slurm": slurm or None, "--workers": workers, "--scheduler": scheduler}
        asked = [name for name, value in asked.items() if value is not None]
        if asked and not study.shares:
            raise OptionError(
                f"{study.alone}: run it without {' and '.join(asked)} "
                f"({', '.join(name for name in STUDIES if STUDIES[name].shares)} can)."
            )
        if slurm and (workers is not None or scheduler is not None):
            raise OptionError(f"--slurm writes a script with --part: leave out {asked[-1]}.")
        if slurm:
            print_script(inputs, call, array_tasks)
            return
        if plan:
            _plan(study, inputs, call, as_json=as_json)
            return
        if not resume:
            for folder in study.kept(call):
                shutil.rmtree(folder, ignore_errors=True)
        with resumable(call.folder), sharing(part), executor_of(workers, scheduler, part) as executor:
            with call.watch.timed(READING):
                arguments = {"options": call.options, **inputs.read(call)}
            shared = {name: how for name, how in (("part", part), ("executor", executor)) if how is not None}
            found = study(
                **arguments, **shared, out=call.folder, command=command_line(), progress=call.progress
            )
        print_run(found, record_times(call.folder, call.watch.times), as_json=as_json)

    run.__annotations__ |= {"where": study.where, "inputs": study.inputs, "options": study.options}
    again = "continues an interrupted run" if study.keeps else "starts over"
    run.__doc__ = f"""{study.help}

    The same command again {again}.

    Example: {study.example}

    Args:
        out: Folder for results and report.
        options_file: YAML file with options of the study; options on the command line override it.
        plan: Only print the estimated time of each step, from small runs, and the cost of the sweeps;
            with --out, the run in that folder records it beside the time that it took. With --on, only
            the cost of the sweeps.
        resume: Continue an earlier run in the folder, or start over.
    """
    return from_options(run)


def _plan(study: Study, inputs: Any, call: Call, *, as_json: bool) -> None:
    """Print what a study's steps would take, which is saved for the run, and what its sweeps would cost."""
    call = replace(call, loaded={})
    steps = plan_steps(study, inputs, call) if study.sizes and call.on is None else None
    counted = inputs.plan(call)
    if call.on is not None and (counted is None or "on" not in counted.document):
        raise OptionError(f"--on {call.on} is not available for this study: plan it without.")
    if steps is None and counted is None:
        raise OptionError("--plan is not available for this study: run it without.")
    if steps is not None and call.out is not None:
        save_plan(steps, call.folder)
    if as_json:
        print_json({**(counted.document if counted else {}), **(steps or {})})
        return
    if counted is not None:
        print_plan(counted, as_json=False)
    if steps is not None:
        print_times(steps["steps"], "Time, estimated from small runs of the study")
        for note in steps["notes"]:
            OUT.print(note)


def print_script(inputs: Any, call: Call, tasks: int) -> None:
    """Print the script of a Slurm job array that does a study."""
    counted = inputs.plan(call)
    if counted is None:
        raise OptionError("--slurm is not available for these inputs: write the script by hand with --part.")
    note = (
        f"Parts of up to {counted.part_gflop:,.0f} GFLOP, if as many sequences are recalled as are examined."
    )
    sys.stdout.write(slurm_script(shlex.split(command_line()), call.out, counted.parts, tasks, [note]))


def print_plan(plan: PlanTable, *, as_json: bool) -> None:
    """Print the estimated cost of a study as a table or as JSON."""
    if as_json:
        print_json(plan.document)
        return
    print_table(plan.table, plan.title)
    for note in plan.notes:
        OUT.print(note)


def _add_studies() -> None:
    """Give every study its command; one of a plugin that cannot have one is skipped with a warning."""
    for name in STUDIES:
        try:
            run_app.command(study_command(STUDIES[name]), name=name)
        except Exception as error:
            _LOG.warning("the study %s has no command: %s: %s", name, type(error).__name__, error)


_add_studies()
audit: Any = study_command(STUDIES["audit"])
