"""Commands that make something: `memlens generate` (text), `memlens lens` and `memlens zoo` (models)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App
from rich.table import Table
from rich.text import Text

from memlens.cli.commands import from_options
from memlens.cli.console import OUT, Json, Quiet, Switch, print_json, print_table, records, resumable
from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError
from memlens.instruments.decode.lens_options import LensOptions
from memlens.studies.registry import ModelChoice

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def generate(
    where: ModelChoice,
    *,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    bypass: str | None = None,
    mode: str = "identity",
    compare: Annotated[bool, Switch] = False,
    max_new_tokens: int = 50,
    prepend_bos: Annotated[bool, Switch] = False,
    as_json: Json = False,
) -> None:
    """Continue prompts greedily, with the attention of some layers bypassed.

    Example: memlens generate --model zoo/pythia-s --prompt "The key" --bypass 4-5 --compare

    Args:
        where: The model.
        prompt: A text to continue; may be given several times.
        prompts: A text file with one prompt per line, or .jsonl with "prompt" or "text".
        bypass: Layers whose attention is bypassed, such as 20-23,25.
        mode: identity or zero.
        compare: Also continue without the bypass.
        max_new_tokens: Tokens to generate.
        prepend_bos: Put the beginning-of-text token before every prompt.
    """
    from memlens.results.groups import parse_layers

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    if not texts:
        raise OptionError("there is no prompt: give --prompt TEXT or --prompts FILE.")
    if compare and bypass is None:
        raise OptionError("--compare needs a bypass to compare with: give --bypass LAYERS.")
    layers = [] if bypass is None else parse_layers(bypass)
    model = where.load()
    runs: dict[str, list[int]] = {"with": layers, "without": []} if compare else {"with": layers}
    found = {
        name: continuations(model, texts, layers=some, mode=mode, n=max_new_tokens, prepend_bos=prepend_bos)
        for name, some in runs.items()
    }
    if as_json:
        _print_json(model, texts, found, {"model": where.model, "bypass": layers, "mode": mode})
    else:
        _print_text(model, texts, found, layers)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: from a `.jsonl` file the key `prompt` or `text`, else one per line.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is not UTF-8, or a line of a `.jsonl` file holds no prompt.
    """
    if not path.is_file():
        raise SourceNotFoundError(f"there is no file of prompts {path}: give the path of one.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{place} is not JSON: {error}.") from error
    row = row if isinstance(row, dict) else {}
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str) or not text:
        raise FileFormatError(f"{place} has no text under 'prompt' or 'text': give one of them.")
    return text


def continuations(
    model: Any,
    prompts: list[str],
    *,
    layers: list[int],
    mode: Any = "identity",
    n: int = 50,
    prepend_bos: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt's greedy continuation, up to the end-of-text token.

    Prompts of different lengths go through one cache together, without padding.

    Args:
        model: A TransformerLens model.
        prompts: The texts.
        layers: Layers whose attention is bypassed; empty for the unchanged model.
        mode: "identity" or "zero".
        n: Most tokens to generate.
        prepend_bos: Put the beginning-of-text token first.

    Raises:
        OptionError: Fewer than one token, or an unknown mode.
        SiteError: A layer that does not exist.
        SequenceError: No tokenizer, an empty prompt, or one that leaves no room for `n` tokens.
    """
    import memlens as ml
    from memlens.forward.generate import greedy_continuations
    from memlens.sequences.checks import check_sequences

    if n < 1:
        raise OptionError(f"max_new_tokens={n} generates nothing: give 1 or more.")
    rows = _encoded(model, prompts, prepend_bos)
    bypass = ml.bypassed(model, layers, mode=mode) if layers else nullcontext()
    seqs = ml.SequenceSet.from_tokens([row + [0] * n for row in rows], [len(row) for row in rows])
    check_sequences(seqs, model, on_eos="keep")
    with bypass:
        found = greedy_continuations(model, seqs).tolist()
    return [_until_end(row, model.tokenizer.eos_token_id) for row in found]


def _encoded(model: Any, prompts: list[str], prepend_bos: bool) -> list[list[int]]:
    from memlens.sequences.tokenizing import bos_id, encode

    if getattr(model, "tokenizer", None) is None:
        raise SequenceError("the model has no tokenizer, so it cannot read a prompt.")
    first = [bos_id(model.tokenizer)] if prepend_bos else []
    rows = [first + row for row in encode(model.tokenizer, prompts)]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise SequenceError(f"the prompt {text!r} has no tokens: give text, or --prepend-bos.")
    return rows


def _until_end(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end)] if end is not None and end in row else row


def _print_json(model: Any, prompts: list[str], found: dict[str, list[list[int]]], about: Any) -> None:
    rows = []
    for i, text in enumerate(prompts):
        row: dict[str, Any] = {"prompt": text}
        for name, key in (("with", "continuation"), ("without", "without_bypass")):
            if name in found:
                row[key] = model.tokenizer.decode(found[name][i])
                row[f"{key}_tokens"] = found[name][i]
        rows.append(row)
    print_json({**about, "generations": rows})


def _print_text(model: Any, prompts: list[str], found: dict[str, list[list[int]]], layers: list[int]) -> None:
    names = {"with": f"layers {','.join(map(str, layers))} bypassed: ", "without": "without bypass: "}
    for i, text in enumerate(prompts):
        for name, rows in found.items():
            heading = Text(names[name], style="dim") if len(found) > 1 else Text()
            OUT.print(Text.assemble(heading, (text, "bold"), model.tokenizer.decode(rows[i])))


lens_app: App = App(name="lens", help="Tuned lenses: affine translators for residual decoding.")


def lens_train(
    where: ModelChoice,
    options: LensOptions,
    *,
    out: Path,
    text: Path | None = None,
    tokens: Path | None = None,
    zoo_corpus: Annotated[bool, Switch] = False,
    window: int = 128,
    limit: int | None = None,
    published: Annotated[bool, Switch] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tuned lens on text that will not be decoded later; write it, and print what it gained.

    Example: memlens lens train zoo/pythia-s --zoo-corpus --steps 100 --out my-lens

    Args:
        where: The model.
        options: How the lens is trained.
        out: Folder for the lens.
        text: A text file (UTF-8), which is cut into windows.
        tokens: Token ids: .npy, or another file of sequences.
        zoo_corpus: The text that a zoo model was trained on, without what was planted in it.
        window: Tokens per window of text.
        limit: Use at most this many windows.
        published: Also write config.json and params.pt in the format of tuned-lens.
    """
    import memlens as ml
    from memlens.sequences.natural import text_windows

    given = [text is not None, tokens is not None, zoo_corpus]
    if sum(given) != 1:
        raise OptionError(
            f"{sum(given)} sources of text were given: give one of --text, --tokens, --zoo-corpus."
        )
    loaded = where.load()
    if text is not None:
        rows = text_windows(getattr(loaded, "tokenizer", None), text, window)
    elif tokens is not None:
        rows = ml.load_sequences(str(tokens), loaded, prefix_len=1)
    else:
        rows = zoo_rows(where.model)
    rows = rows if limit is None else rows[:limit]
    trained = ml.lens.train_tuned_lens(loaded, rows, options, progress=not quiet)
    folder = trained.save(out)
    if published:
        trained.save(out, layout="published")
    if as_json:
        print_json({"lens": folder, "heldout_kl": records(trained.heldout_kl())})
    else:
        _print_gain(trained)
        OUT.print(f"lens: {folder}")


lens_app.command(from_options(lens_train), name="train")


def zoo_rows(name: str) -> np.ndarray:
    """Return the rows that a zoo model was trained on, rebuilt from its recipe, without planted ones.

    Raises:
        ModelNotFoundError: The zoo has no such model.
        FileFormatError: The model's folder does not record its recipe.
    """
    from memlens.organisms.corpus.corpus import BACKGROUND
    from memlens.organisms.training.zoo import zoo_corpus

    corpus = zoo_corpus(name)
    return corpus.rows[corpus.row_sequence == BACKGROUND]


def _print_gain(trained: Any) -> None:
    table = Table(title="Divergence from the model on held-out text (nats per token)")
    for column in ("after block", "logit lens", "tuned lens"):
        table.add_column(column, justify="right")
    for layer, before, after, _ in trained.heldout_kl().itertuples(index=False):
        table.add_row("embedding" if layer < 0 else str(layer), f"{before:.4g}", f"{after:.4g}")
    OUT.print(table)


zoo_app: App = App(name="zoo", help="Models with known memories, bundled or trained on demand.")

_DEFAULT = "pythia-s"


@zoo_app.command(name="list")
def zoo_list(*, as_json: Json = False) -> None:
    """List the models of the zoo: bundled, trained into the cache, or a recipe that can be trained.

    Example: memlens zoo list
    """
    from memlens.organisms.training.zoo import zoo_overview

    if as_json:
        print_json(records(zoo_overview()))
    else:
        print_table(zoo_overview(), "Zoo")


@zoo_app.command(name="train")
def zoo_train(
    names: list[str] | None = None,
    *,
    family: str | None = None,
    size: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train zoo models from their recipes, one after the other: same corpus, same seed, same models.

    Finished models are skipped, and so are bundled ones that were chosen by family and size.

    Example: memlens zoo train pythia-s olmo2-s --seed 0

    Example: memlens zoo train --family all --size all

    Args:
        names: Recipes, such as olmo2-s (default: pythia-s).
        family: All recipes of a family: pythia, gpt-neo, olmo1, …, or all.
        size: All recipes of a size: xs, s, m or all.
        out: Folder, for one model (default: the user's cache).
        steps: Fewer or more steps than the recipe has.
        device: cpu, cuda or mps; by default cuda where there is one.
        seed: Seed of every random choice.
        resume: Continue interrupted runs and skip finished ones.
    """
    from memlens.organisms.evaluate import evaluate_zoo_model
    from memlens.organisms.training.zoo import train_zoo_model

    chosen = list(names or ()) or ([] if family or size else [_DEFAULT])
    bundled: list[str] = []
    if family or size:
        selected, bundled = _selection(family or "all", size or "all")
        chosen = list(dict.fromkeys([*chosen, *selected]))
    if out is not None and len(chosen) != 1:
        raise OptionError(f"out={str(out)!r} is the folder of one model, but {len(chosen)} were chosen.")
    curves: dict[str, tuple[Path, pd.DataFrame]] = {}
    for name in bundled if not as_json else []:
        OUT.print(f"zoo/{name}: bundled")
    for name in chosen:
        with resumable(out):
            folder = train_zoo_model(
                name, out, seed=seed, steps=steps, device=device, progress=not quiet, resume=resume
            )
        curves[name] = folder, evaluate_zoo_model(folder)
        if not as_json:
            _print_model(name, *curves[name], table=len(chosen) == 1)
    if as_json:
        print_json([_told(name, *found) for name, found in curves.items()])


def _told(name: str, folder: Path, curve: pd.DataFrame) -> dict[str, Any]:
    """Return what JSON says of a model."""
    told = {"model": f"zoo/{name.removeprefix('zoo/')}", "folder": folder}
    return {**told, "heldout_loss": curve.attrs["heldout_loss"], "recall": records(curve)}


def _selection(family: str, size: str) -> tuple[list[str], list[str]]:
    """Return the recipes of a family and size to train, and those that are bundled already."""
    from memlens.organisms.training.recipes import select_recipes
    from memlens.organisms.training.zoo import zoo_overview

    table = zoo_overview()
    there = set(table.loc[table["status"] == "bundled", "model"])
    wanted = select_recipes(family, size)
    bundled = [name for name in wanted if f"zoo/{name}" in there]
    return [name for name in wanted if name not in bundled], bundled


def _print_model(name: str, folder: Path, curve: pd.DataFrame, *, table: bool) -> None:
    """Print what a model remembers: a table by copies, or one line where there are several models."""
    total = curve.loc[curve["domain"] == "all"]
    if table:
        print_table(total, "Exact match by copies in the corpus")
        OUT.print(f"model: {folder}")
        return
    often = total.iloc[-1]
    OUT.print(
        f"zoo/{name.removeprefix('zoo/')}: {often['exact_match']:.0%} of the sequences with "
        f"{often['copies']} copies exact, held-out loss {curve.attrs['heldout_loss']:.2f} nats; {folder}"
    )
