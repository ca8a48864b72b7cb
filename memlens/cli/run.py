"""The command line's `memlens run`: the studies."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
from memlens.cli.plans import PLAN_NOTE, idiom_works, localize_works, print_plans
from memlens.errors import OptionError, SourceNotFoundError

__all__ = ["run_app"]

run_app = typer.Typer(help="Run a study and write its results and report to a folder.", no_args_is_help=True)


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
    options = ml.LocalizeOptions(
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
    options = ml.IdiomOptions(
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
        run = ml.study_idioms(
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

    options = ml.CriteriaOptions(seed=seed)
    if idioms != "zoo":
        return options
    kinds = ("neutral_contexts", "shifted_contexts")
    # Parts of a planted expression leave two targets by construction: half is no answer.
    options = replace(options, part_threshold=0.5)
    return replace(options, **{kind: tuple(f"{lead}\n" for lead in getattr(options, kind)) for kind in kinds})


def _counted(text: Path | None, idioms: str, model: Any) -> list[Any]:
    """Return n-gram references: of a text file, and for the zoo's own lists of the corpus they stand in."""
    import memlens as ml
    from memlens.organisms.zoo import zoo_corpus

    found = []
    if text is not None:
        if not text.is_file():
            raise SourceNotFoundError(f"there is no text file {text}: give the path of one.")
        found.append(ml.NgramReference(text.read_text(encoding="utf-8").splitlines()))
    if idioms == "zoo":
        corpus = zoo_corpus(str(getattr(model.tokenizer, "name_or_path", "")))
        longest = 22  # tokens: the longest prompt of the lists has 21
        found.append(
            ml.NgramReference(corpus.rows, order=longest, tokenizer=corpus.tokenizer, name="training corpus")
        )
    return found


def _read(name: str, source: str, model: Any, limit: int | None) -> Any:
    import memlens as ml
    from memlens.sequences import text_windows

    if name == "text":
        if source.endswith(".txt"):
            return text_windows(model.tokenizer, source)
        return ml.load_sequences(source, model, prefix_len=1, on_short="drop", on_eos="keep")
    return ml.load_sequences(source, model, limit=limit)
