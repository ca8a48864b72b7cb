"""The command line's `memlens run`: the studies."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlens.cli.console import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    PlanOption,
    PrefixOption,
    QuietOption,
    ResumeOption,
    RevisionOption,
    SeedOption,
    SequencesOption,
    StepOption,
    TargetOption,
    TargetsOption,
    command_line,
    load,
    print_run,
    resumable,
)
from memlens.cli.plans import PLAN_NOTE, bypass_works, idiom_works, localize_works, print_plans
from memlens.errors import OptionError, SourceNotFoundError

if TYPE_CHECKING:
    from memlens.instruments.tasks.tasks import ChoiceTask
    from memlens.studies.bypass.options import BypassInputs
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

from memlens.cli.console import OUT, print_json, print_table, records
from memlens.errors import near_matches

if TYPE_CHECKING:
    import pandas as pd

    from memlens.studies.comparative.config import StudyModel
    from memlens.studies.comparative.options import ComparativeOptions


run_app: typer.Typer = typer.Typer(
    help="Run a study and write its results and report to a folder.", no_args_is_help=True
)


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
    plan: PlanOption = False,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score, decode, ablate, bypass and patch: where does this model recall these sequences?

    The same command again takes up the sweeps where they stopped.

    Example: memlens run localize --model zoo/pythia-s --sequences zoo --out my-run
    """
    import memlens as ml

    start = time.perf_counter()
    options = ml.studies.LocalizeOptions(
        max_sequences=max_sequences,
        max_patched=max_patched,
        head_mode=head_mode,
        bypass_mode=bypass_mode,
        patch_site=patch_site,
        untrained_control=untrained_control,
        seed=seed,
    )
    loaded = load(model, backend, dtype, device, revision, checkpoint_step)
    seqs = ml.load_sequences(
        sequences, loaded, prefix_len=prefix_len, max_targets=max_targets, target=target, limit=limit
    )
    if plan:
        print_plans(loaded, localize_works(loaded, seqs, options), as_json=as_json, note=PLAN_NOTE)
        return
    with resumable(out, resume=resume):
        run = ml.localize(loaded, seqs, out, options=options, command=command_line(), progress=not quiet)
    print_run(run, time.perf_counter() - start, as_json=as_json)


@run_app.command("idioms")
def run_idioms(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")],
    idioms: Annotated[
        str, typer.Option(help="The idiom file (a column idiom), other prompts and targets, or zoo.")
    ] = "zoo",
    text: Annotated[
        str | None,
        typer.Option(help="Natural text for controls and lens: .txt, or a source of sequences."),
    ] = None,
    facts: Annotated[str | None, typer.Option(help="Cloze statements: LAMA-style .jsonl.")] = None,
    identifiers: Annotated[
        str | None, typer.Option(help="Table with the columns label and identifier.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Model that the recall criteria ask (more than once for several)."),
    ] = None,
    reference_text: Annotated[
        Path | None, typer.Option(help="Text file whose word n-grams are a reference too.")
    ] = None,
    lens: Annotated[Path | None, typer.Option(help="Folder of a tuned lens.")] = None,
    train_lens: Annotated[
        bool | None,
        typer.Option(help="Train a tuned lens on the text (default: for the zoo; long for large models)."),
    ] = None,
    lens_steps: Annotated[int, typer.Option(help="Updates of that training.")] = 250,
    limit: LimitOption = None,
    leave_out: Annotated[
        str, typer.Option(help="Items with one of these columns true, such as definition,shared_prompt.")
    ] = "",
    max_items: Annotated[
        int | None, typer.Option(help="Recalled items for the knock-outs (default: all).")
    ] = None,
    max_controls: Annotated[
        int, typer.Option(help="Of these, the items with random and norm-matched controls.")
    ] = 30,
    max_others: Annotated[int, typer.Option(help="Items of each control group for the knock-outs.")] = 30,
    knock_out: Annotated[bool, typer.Option(help="Run the knock-out grid.")] = True,
    controls: Annotated[bool, typer.Option(help="Random and norm-matched neurons beside.")] = True,
    top_k: Annotated[str | None, typer.Option(help="Neurons knocked out, such as 1,10,100.")] = None,
    windows: Annotated[str | None, typer.Option(help="Consecutive layers, such as 1,2,3.")] = None,
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
    """Study how fixed expressions (and facts, and identifiers) are recalled, layer by layer.

    The same command again takes up the knock-out grid where it stopped.

    Example: memlens run idioms --model zoo/pythia-s --out my-idioms
    """
    import memlens as ml

    start = time.perf_counter()
    options = ml.studies.IdiomOptions(
        leave_out=tuple(leave_out.split(",")) if leave_out else (),
        max_items=max_items,
        max_controls=max_controls,
        max_others=max_others,
        knock_out=knock_out,
        top_k=_numbers("top-k", top_k),
        windows=_numbers("windows", windows),
        selections=("dominant", "random", "norm_matched") if controls else ("dominant",),
        lens_steps=lens_steps,
        criteria=_criteria(idioms, seed),
        seed=seed,
    )
    if reference_text is not None and str(reference_text) == text:
        raise OptionError(
            f"--text and --reference-text are both {text}: n-grams that know the controls and not the "
            "items say nothing of the items; count them in another text."
        )
    loaded = load(model, backend, dtype, device, revision, checkpoint_step)
    sources = {"idioms": idioms, "text": text, "facts": facts, "identifiers": identifiers}
    if idioms == "zoo":
        own = {"idioms": "zoo:expressions", "text": "zoo:heldout", "facts": "zoo:facts"}
        own["identifiers"] = "zoo:identifiers"
        sources = {name: own[name] if name == "idioms" else sources[name] or own[name] for name in sources}
    given = {name: _read(name, source, loaded, limit) for name, source in sources.items() if source}
    if plan:
        print_plans(loaded, idiom_works(loaded, given["idioms"], options), as_json=as_json, note=PLAN_NOTE)
        return
    asked = [load(name, backend, dtype, device, None, None) for name in reference or []]
    with resumable(out, resume=resume):
        run = ml.studies.study_idioms(
            loaded,
            given.pop("idioms"),
            out,
            **given,
            references=[*asked, *_counted(reference_text, idioms, loaded)],
            lens=lens,
            train_lens=idioms == "zoo" if train_lens is None else train_lens,
            options=options,
            command=command_line(),
            progress=not quiet,
        )
    print_run(run, time.perf_counter() - start, as_json=as_json)


def _numbers(name: str, given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise OptionError(f"--{name} {given!r} is no list of whole numbers: give 1,10,100.") from None


def _criteria(idioms: str, seed: int) -> Any:
    """Return how the criteria are tested: what is planted in the zoo's corpus stands on lines of its own."""
    import memlens as ml

    options = ml.recall.CriteriaOptions(seed=seed)
    if idioms != "zoo":
        return options
    kinds = ("neutral_contexts", "shifted_contexts")
    # Parts of a planted expression leave two targets by construction: half is no answer.
    options = replace(options, part_threshold=0.5)
    return replace(options, **{kind: tuple(f"{lead}\n" for lead in getattr(options, kind)) for kind in kinds})


def _counted(text: Path | None, idioms: str, model: Any) -> list[Any]:
    """Return n-gram references: of a text file, and for the zoo's own lists of the corpus they stand in."""
    import memlens as ml
    from memlens.organisms.training.zoo import zoo_corpus

    found = []
    if text is not None:
        if not text.is_file():
            raise SourceNotFoundError(f"there is no text file {text}: give the path of one.")
        found.append(ml.recall.NgramReference(text.read_text(encoding="utf-8").splitlines()))
    if idioms == "zoo":
        corpus = zoo_corpus(str(getattr(model.tokenizer, "name_or_path", "")))
        longest = 22  # tokens: the longest prompt of the lists has 21
        found.append(
            ml.recall.NgramReference(
                corpus.rows, order=longest, tokenizer=corpus.tokenizer, name="training corpus"
            )
        )
    return found


def _read(name: str, source: str, model: Any, limit: int | None) -> Any:
    import memlens as ml
    from memlens.sequences.natural import text_windows

    if name == "text":
        if source.endswith(".txt"):
            return text_windows(model.tokenizer, source)
        return ml.load_sequences(source, model, prefix_len=1, on_short="drop", on_eos="keep")
    return ml.load_sequences(source, model, limit=limit)


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
    options = ml.studies.BypassOptions(
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
            return ml.studies.BypassInputs(loaded, scores.memorized(), tasks=tasked, name=name)
        if memorized is not None:
            return ml.studies.BypassInputs.of(
                loaded, ml.recall.MemorizedSet.load(memorized), tasked, name=name
            )
        found = ml.recall.build_memorized_set(
            loaded, _corpus(loaded, name, corpus), out=out / "memorized" / name.replace("/", "_"), n=n,
            prefix_len=prefix_len, suffix_len=suffix_len, stride=stride, max_rows=max_rows, seed=seed,
            progress=not quiet,
        )  # fmt: skip
        return ml.studies.BypassInputs.of(loaded, found, tasked, name=name)

    if plan:
        loaded = load(model, backend, dtype, device, revision, checkpoint_step)
        tasked = _tasks(loaded, model, tasks, questions, seed)
        works = bypass_works(loaded, tasked, options, prefix_len, suffix_len)
        print_plans(loaded, works, as_json=as_json, note=PLAN_NOTE)
        return
    with resumable(out, resume=resume, parts=("sweeps", "memorized")):
        run = ml.studies.study_attention_bypass(
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
    from memlens.organisms.training.zoo import zoo_corpus
    from memlens.sequences.natural import text_ids

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
            found += ml.tasks.local_tasks("zoo", model, n=questions, seed=seed)
        elif one == "lm-eval":
            found += ml.tasks.from_lm_eval(None, model, limit=questions)
        elif one.endswith(".jsonl"):
            found.append(ml.tasks.ChoiceTask.from_jsonl(one, model).take(slice(0, questions)))
        else:
            names.append(one)
    return [*found, *(ml.tasks.from_lm_eval(names, model, limit=questions) if names else [])]


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
    from memlens.studies.comparative.config import StudyConfig, parse_model, parse_sources, read_config

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
        run = ml.studies.study_comparative(
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
    from memlens.studies.comparative.plan import PlanSizes, plan_comparative

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
