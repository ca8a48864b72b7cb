"""The command line's `memlens run bypass`: the attention-bypass study."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlens.cli.console import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlanOption,
    QuietOption,
    ResumeOption,
    RevisionOption,
    SeedOption,
    StepOption,
    command_line,
    load,
    print_run,
    resumable,
)
from memlens.cli.plans import PLAN_NOTE, bypass_works, print_plans
from memlens.errors import OptionError

if TYPE_CHECKING:
    from memlens.attribution.tasks import ChoiceTask
    from memlens.studies import BypassInputs

__all__ = ["run_bypass"]


def run_bypass(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")],
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text that is scanned for what the model recites: .npy of token ids, .txt, or a source of "
            "sequences (default for the zoo: the text it was trained on)."
        ),
    ] = None,
    memorized: Annotated[
        str | None,
        typer.Option(help="In place of --corpus: a folder of build_memorized_set, or sequences."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Further model, such as another size (more than once for several)."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Commas between: local, a .jsonl file of questions, names of lm-eval tasks, lm-eval for its "
            "five usual ones (default; for the zoo: local), or none."
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions of each task, at most.")] = 100,
    n: Annotated[int, typer.Option(help="Stop scanning at so many memorized sequences.")] = 128,
    prefix_len: Annotated[int, typer.Option(help="Tokens given to the model.")] = 32,
    suffix_len: Annotated[int, typer.Option(help="Tokens that must match.")] = 32,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next (default: windows do not overlap)."),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Scan so many rows of the corpus at most.")] = None,
    max_sequences: Annotated[int, typer.Option(help="Sequences of each group that are examined.")] = 128,
    control_sequences: Annotated[int, typer.Option(help="Of these, for other edits and heads.")] = 48,
    joint_sequences: Annotated[
        int, typer.Option(help="Of these, for sets of blocks; 0 leaves that out.")
    ] = 96,
    joint_questions: Annotated[int, typer.Option(help="Questions of each task for sets of blocks.")] = 50,
    mode: Annotated[str, typer.Option(help="identity or zero.")] = "identity",
    free_running: Annotated[bool, typer.Option(help="Also decode freely under each bypass.")] = True,
    heads: Annotated[bool, typer.Option(help="Also bypass single heads.")] = True,
    bounds: Annotated[int, typer.Option(help="Sequences for the bounds; 0 leaves them out.")] = 8,
    untrained_control: Annotated[bool, typer.Option(help="Also edit freshly drawn weights.")] = True,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    checkpoint_step: StepOption = None,
    seed: SeedOption = 0,
    plan: PlanOption = False,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Study what each block's attention gives to recitation, and what its bypass costs elsewhere.

    The same command again takes up scan and sweeps where they stopped.

    Example: memlens run bypass --model zoo/pythia-s --out my-bypass
    """
    import memlens as ml

    start = time.perf_counter()
    if corpus is not None and memorized is not None:
        raise OptionError("--corpus and --memorized both say what is recited: give one of them.")
    options = ml.BypassOptions(
        mode=mode,
        max_sequences=max_sequences,
        free_running=free_running,
        control_sequences=control_sequences,
        heads=heads,
        untrained_control=untrained_control,
        bounds_sequences=bounds,
        joint_sequences=joint_sequences,
        joint_questions=joint_questions,
        seed=seed,
    )

    def read(name: str, **where: Any) -> BypassInputs:
        loaded = load(name, backend, dtype, device, where.pop("revision", None), where.pop("step", None))
        tasked = _tasks(loaded, name, tasks, questions, seed)
        if memorized is not None and not (Path(memorized) / "memorized_set.json").is_file():
            seqs = ml.load_sequences(memorized, loaded, prefix_len=prefix_len)
            scores = ml.score_recall(loaded, seqs, generate=False, metrics=(), progress=not quiet)
            return ml.BypassInputs(loaded, scores.memorized(), tasks=tasked, name=name)
        if memorized is not None:
            return ml.BypassInputs.of(loaded, ml.MemorizedSet.load(memorized), tasked, name=name)
        found = ml.build_memorized_set(
            loaded, _corpus(loaded, name, corpus), out=out / "memorized" / name.replace("/", "_"), n=n,
            prefix_len=prefix_len, suffix_len=suffix_len, stride=stride, max_rows=max_rows, seed=seed,
            progress=not quiet,
        )  # fmt: skip
        return ml.BypassInputs.of(loaded, found, tasked, name=name)

    if plan:
        loaded = load(model, backend, dtype, device, revision, checkpoint_step)
        tasked = _tasks(loaded, model, tasks, questions, seed)
        works = bypass_works(loaded, tasked, options, prefix_len, suffix_len)
        print_plans(loaded, works, as_json=as_json, note=PLAN_NOTE)
        return
    with resumable(out, resume=resume, parts=("sweeps", "memorized")):
        run = ml.study_attention_bypass(
            read(model, revision=revision, step=checkpoint_step),
            out,
            others=[partial(read, name) for name in compare or []],
            options=options,
            command=command_line(),
            progress=not quiet,
        )
    print_run(run, time.perf_counter() - start, as_json=as_json)


def _corpus(model: Any, name: str, corpus: str | None) -> Any:
    import numpy as np

    import memlens as ml
    from memlens.models.zoo import is_zoo_name
    from memlens.organisms.zoo import zoo_corpus
    from memlens.sequences import text_ids

    if corpus is None:
        if not is_zoo_name(name):
            raise OptionError(
                "--corpus or --memorized must say what is recited: only the zoo's text is known."
            )
        return zoo_corpus(name).rows
    if corpus.endswith(".txt"):
        return np.asarray(text_ids(model.tokenizer, corpus))
    if corpus.endswith(".npy"):
        return corpus
    return ml.load_sequences(corpus, model, prefix_len=1, on_short="drop", on_eos="keep")


def _tasks(model: Any, name: str, tasks: str | None, questions: int, seed: int) -> list[ChoiceTask]:
    import memlens as ml
    from memlens.models.zoo import is_zoo_name

    wanted = (tasks or ("local" if is_zoo_name(name) else "lm-eval")).split(",")
    found: list[ChoiceTask] = []
    names: list[str] = []
    for one in (part.strip() for part in wanted):
        if one == "none":
            continue
        if one == "local":
            found += ml.local_tasks("zoo", model, n=questions, seed=seed)
        elif one == "lm-eval":
            found += ml.tasks_from_lm_eval(None, model, limit=questions)
        elif one.endswith(".jsonl"):
            found.append(ml.ChoiceTask.from_jsonl(one, model).take(slice(0, questions)))
        else:
            names.append(one)
    return [*found, *(ml.tasks_from_lm_eval(names, model, limit=questions) if names else [])]
