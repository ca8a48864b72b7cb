"""`memlens run comparative`: the comparative study over many models, or its plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlens.cli.console import (
    OUT,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    ResumeOption,
    SeedOption,
    command_line,
    print_json,
    print_run,
    print_table,
    records,
    resumable,
)
from memlens.errors import OptionError, near_matches

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies import ComparativeOptions, StudyModel

__all__ = ["run_comparative", "with_checkpoints"]

_ZOO = "zoo"


def run_comparative(
    more_models: Annotated[list[str] | None, typer.Argument(help="Further models.")] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", "-m", help="Models: zoo names, hub names, folders; NAME@REVISION."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results and report.")] = None,
    sequences: Annotated[
        list[str] | None,
        typer.Option("--sequences", "-s", help="zoo, one source with a column domain, or DOMAIN=SOURCE."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with models, domains and options.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=STEP,STEP or MODEL=all: training steps that are followed."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: any field of ComparativeOptions.")
    ] = None,
    add: Annotated[
        bool, typer.Option(help="Also compare the models that the folder holds from earlier runs.")
    ] = False,
    plan: Annotated[
        bool, typer.Option(help="Only print what it would cost (without models: the paper's list).")
    ] = False,
    device_tflops: Annotated[float, typer.Option(help="Speed that --plan reckons with, TFLOP/s.")] = 100.0,
    per_domain: Annotated[int, typer.Option(help="Sequences a domain that --plan reckons with.")] = 300_000,
    plan_domains: Annotated[int, typer.Option(help="Domains that --plan reckons with.")] = 5,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare how models memorize: rates, domains, noise, layers, heads, and signatures of families.

    The same command again computes only what is missing; --add compares with what the folder holds.

    Example: memlens run comparative --models zoo/pythia-s zoo/gpt-neo-s --out my-comparison
    """
    import memlens as ml
    from memlens.studies.comparative_config import StudyConfig, parse_model, parse_sources, read_config

    start = time.perf_counter()
    read = read_config(config) if config is not None else StudyConfig()
    placed = {"backend": backend, "dtype": dtype, "device": device}
    named = [name for entry in [*(models or []), *(more_models or [])] for name in entry.split(",") if name]
    entries = [*read.models, *(replace(parse_model(name), **placed) for name in named)]
    entries = with_checkpoints(entries, checkpoints or [])
    options = _with_options(read.options, option or [], seed)
    if plan:
        _print_plan(entries, options, device_tflops, per_domain, plan_domains, as_json=as_json)
        return
    if out is None:
        raise OptionError("--out is missing: name a folder for results and report.")
    sources: Mapping[str, Any] = parse_sources(sequences) if sequences else read.sources or {"": _ZOO}
    with resumable(out, resume=resume, parts=("models",)):
        run = ml.study_comparative(
            entries,
            sources,
            out,
            options=options,
            include_saved=add,
            command=command_line(),
            progress=not quiet,
        )
    print_run(run, time.perf_counter() - start, as_json=as_json)


def with_checkpoints(entries: Sequence[StudyModel], given: Sequence[str]) -> list[StudyModel]:
    """Return the models with the training steps that are followed."""
    from memlens.models.revisions import checkpoint_steps

    wanted: dict[str, tuple[int, ...]] = {}
    for entry in given:
        name, _, steps = entry.partition("=")
        if not steps or (steps != "all" and not steps.replace(",", "").isdigit()):
            raise OptionError(f"--checkpoints {entry!r} is not clear: give MODEL=100,200 or MODEL=all.")
        steps_of_model = (
            checkpoint_steps(name) if steps == "all" else map(int, filter(None, steps.split(",")))
        )
        wanted[name] = tuple(steps_of_model)
    unknown = sorted(set(wanted) - {entry.label for entry in entries})
    if unknown:
        raise OptionError(
            f"--checkpoints names {unknown[0]!r}, which is not among the models: name it there."
        )
    return [replace(e, checkpoints=wanted[e.label]) if e.label in wanted else e for e in entries]


def _with_options(options: ComparativeOptions, given: Sequence[str], seed: int) -> ComparativeOptions:
    """Return options with those of the command line, each read as YAML would read it."""
    import yaml

    known = [f.name for f in fields(options)]
    values: dict[str, Any] = {"seed": seed} if seed else {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or name not in known:
            raise OptionError(
                f"--option {entry!r} is not clear: give NAME=VALUE with a field of ComparativeOptions."
                f"{near_matches(name, known)}"
            )
        found = yaml.safe_load(f"[{value}]" if isinstance(getattr(options, name), tuple) else value)
        values[name] = tuple(found) if isinstance(found, list) else found
    return replace(options, **values)


def _print_plan(
    entries: Sequence[StudyModel],
    options: ComparativeOptions,
    device_tflops: float,
    per_domain: int,
    domains: int,
    *,
    as_json: bool,
) -> None:
    from memlens.studies.comparative_plan import PlanSizes, plan_comparative

    sizes = PlanSizes(per_domain=per_domain, domains=domains)
    table = plan_comparative(entries, sizes=sizes, options=options, device_tflops=device_tflops)
    if as_json:
        print_json({"device_tflops": device_tflops, "sizes": asdict(sizes), "models": records(table)})
        return
    columns = [
        "model", "revision", "corpus", "forwards", "head_forwards", "weights_gib", "activations_gib", "hours",
        "head_hours",
    ]  # fmt: skip
    print_table(
        table.loc[:, columns],
        f"{per_domain:,} sequences in each of {domains} domains, {sizes.heads_per_domain:,} for heads "
        f"({sizes.heads_if_large:,} of models beyond {sizes.large / 1e9:g} B), at {device_tflops:g} TFLOP/s",
    )
    hours, for_heads = (table[name].to_numpy().sum() for name in ("hours", "head_hours"))
    OUT.print(f"together {hours:,.0f} hours, {for_heads:,.0f} of them for heads")
    OUT.print(
        f"Reckoned with {sizes.memorized:.0%} memorized sequences, {len(options.alphas)} strengths of noise "
        f"in {options.noise_draws} draws, and greedy decoding of every sequence."
    )
    for note, part in table.groupby("note", sort=False):
        OUT.print(f"{_list(part)}: {note}")


def _list(part: pd.DataFrame) -> str:
    return ", ".join(str(name).rpartition("/")[2] for name in part["model"])
