"""Commands that make text, edited models, lenses and models: `memlens generate`, `edit`, `lens` and `zoo`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App
from rich.text import Text

from memlens.cli.commands import from_options
from memlens.cli.console import OUT, Json, Names, Quiet, Switch, print_json, print_table, records, resumable
from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError
from memlens.files import parsing
from memlens.instruments.decode.lens_options import LensOptions
from memlens.instruments.edit.options import How, VectorSearch
from memlens.results.groups import named_layers
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
    prepend_bos: bool | None = None,
    as_json: Json = False,
) -> None:
    """Continue prompts greedily, with the attention of some layers bypassed.

    Example: memlens generate --model zoo/pythia-s --prompt "The key" --bypass 4-5 --compare

    Args:
        where: The model.
        prompt: Text to continue; can be repeated.
        prompts: Text file with one prompt per line, or .jsonl file with "prompt" or "text" in each line.
        bypass: Layers whose attention is bypassed, such as 20-23,25.
        mode: Mode of the bypass: identity or zero.
        compare: Also generate without the bypass.
        max_new_tokens: Maximum number of tokens to generate.
        prepend_bos: Prepend the beginning-of-text token to every prompt; by default if the model was
            trained so.
    """
    from memlens.results.groups import parse_layers

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    if not texts:
        raise OptionError("there is no prompt: give --prompt TEXT or --prompts FILE.")
    if compare and bypass is None:
        raise OptionError("--compare needs a bypass to compare with: give --bypass LAYERS.")
    layers = [] if bypass is None else parse_layers(bypass)
    model = where.load()
    runs = {"continuation": layers, "without_bypass": []} if compare else {"continuation": layers}
    found = {
        key: continuations(model, texts, layers=some, mode=mode, n=max_new_tokens, prepend_bos=prepend_bos)
        for key, some in runs.items()
    }
    decode = model.tokenizer.decode
    if as_json:
        rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
        for key, generated in found.items():
            for row, ids in zip(rows, generated, strict=True):
                row |= {key: decode(ids), f"{key}_tokens": ids}
        print_json({"model": where.model, "bypass": layers, "mode": mode, "generations": rows})
        return
    bypassed = f"{named_layers(','.join(map(str, layers)))} bypassed: "
    headings = {"continuation": bypassed, "without_bypass": "without bypass: "}
    for i, text in enumerate(texts):
        for key, generated in found.items():
            heading = Text(headings[key], style="dim") if compare else Text()
            OUT.print(Text.assemble(heading, (text, "bold"), decode(generated[i])))


def edit(
    where: ModelChoice,
    search: VectorSearch,
    *,
    components: Names,
    out: Path,
    how: How = "zero",
    strength: float = 1.0,
    sequences: str | None = None,
    keep: str | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
    given: Any = None,
) -> None:
    """Edit what heads, neurons, MLPs or attention write, and save the model as an ordinary checkpoint.

    Example: memlens edit zoo/pythia-s --components L1H7,L0N12 --out edited

    Args:
        where: The model.
        search: How output vectors are searched for.
        components: Components, such as L1H7 (a head), L0N12 (a neuron), "L2 MLP" or "L2 attention".
        out: The folder of the edited model: a new or an empty one.
        how: What output vectors become: zero, mean, output_vector or norm_preserving.
        strength: Share of the way to zero or the mean; of the searched edits, the budget as a share of each
            vector's norm.
        sequences: File (or zoo) of what is to be forgotten, for the searched edits; of what a mean is taken
            over.
        keep: File of what is to stay, for the searched edits.
    """
    import memlens as ml
    from memlens.instruments.edit.editing import check_used

    check_used([how], sequences=sequences, keep=keep, **given["search"])
    model = where.load()
    forget, stay = (None if name is None else ml.load_sequences(name, model) for name in (sequences, keep))
    made = ml.edits.edit_weights(
        model, components, how, sequences=forget, keep=stay, strength=strength,
        search=search if given["search"] else None, progress=not quiet,
    )  # fmt: skip
    folder = ml.instruments.export_edited(model, made, out)
    if as_json:
        names = [str(component) for component in made.components]
        print_json({"model": folder, "edit": made.name, "components": names, "about": dict(made.about)})
        return
    OUT.print(f"{made.name}: the change of output vectors has the norm {made.size:.3g}")
    OUT.print(f"model: {folder}")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: from a `.jsonl` file the key `prompt` or `text`, else one per line.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is not UTF-8, or a line of a `.jsonl` file has no prompt.
    """
    from memlens.sequences.readers.sources import json_lines

    if not path.is_file():
        raise SourceNotFoundError(f"there is no file of prompts {path}: give the path of one.")
    if path.suffix.lower() != ".jsonl":
        with parsing(path, advice="save it as UTF-8"):
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for place, row in json_lines(path):
        text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text:
            raise FileFormatError(f"{place} has no text under 'prompt' or 'text': give one of them.")
        prompts.append(text)
    return prompts


def continuations(
    model: Any,
    prompts: list[str],
    *,
    layers: list[int],
    mode: Any = "identity",
    n: int = 50,
    prepend_bos: bool | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt's greedy continuation, up to the end-of-text token.

    Prompts of different lengths go through one cache together, without padding.

    Args:
        model: A TransformerLens model.
        prompts: The texts.
        layers: Layers whose attention is bypassed; empty for the unchanged model.
        mode: "identity" or "zero".
        n: Maximum number of tokens to generate.
        prepend_bos: Prepend the beginning-of-text token; None: see `memlens.models.bos.expects_bos`.

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
    end = model.tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in found]


def _encoded(model: Any, prompts: list[str], prepend_bos: bool | None) -> list[list[int]]:
    from memlens.models.bos import expects_bos
    from memlens.sequences.tokenizing import bos_id, encode

    if getattr(model, "tokenizer", None) is None:
        raise SequenceError("the model has no tokenizer, so it cannot read a prompt.")
    if prepend_bos is None:
        prepend_bos = expects_bos(model, model.tokenizer)
    first = [bos_id(model.tokenizer)] if prepend_bos else []
    rows = [first + row for row in encode(model.tokenizer, prompts)]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise SequenceError(f"the prompt {text!r} has no tokens: give text, or --prepend-bos.")
    return rows


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
    """Train a tuned lens, save it, and print how much closer to the model it is than the logit lens.

    Train it on other text than the sequences that it will decode.

    Example: memlens lens train zoo/pythia-s --zoo-corpus --steps 100 --out my-lens

    Args:
        where: The model.
        options: How the lens is trained.
        out: Folder for the lens.
        text: Train on a text file (UTF-8), split into windows.
        tokens: Train on token ids: a .npy or another file of sequences.
        zoo_corpus: Train on the corpus of a zoo model, without the planted sequences.
        window: Tokens per window of text.
        limit: Use at most this many windows.
        published: Also write config.json and params.pt in the format of the tuned-lens package.
    """
    import memlens as ml
    from memlens.sequences.natural import text_windows

    given = [text is not None, tokens is not None, zoo_corpus]
    if sum(given) != 1:
        raise OptionError(
            f"{sum(given)} sources of text were given: give exactly one of --text, --tokens, --zoo-corpus."
        )
    loaded = where.load()
    if text is not None:
        rows = text_windows(getattr(loaded, "tokenizer", None), text, window, model=loaded)
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
        table = trained.heldout_kl()
        table["layer"] = table["layer"].map(lambda layer: "embedding" if layer < 0 else str(layer))
        names = {"layer": "after layer", "logit_lens": "logit lens", "tuned_lens": "tuned lens"}
        title = "Divergence from the model on held-out text (nats per token)"
        print_table(table.filter(list(names)).rename(columns=names), title)
        OUT.print(f"lens: {folder}")


lens_app.command(from_options(lens_train), name="train")


def zoo_rows(name: str) -> np.ndarray:
    """Return the rows of a zoo model's training corpus without planted rows, regenerated from its recipe.

    Raises:
        ModelNotFoundError: The zoo has no such model.
        FileFormatError: The model's folder does not record its recipe.
    """
    from memlens.organisms.corpus.corpus import BACKGROUND
    from memlens.organisms.training.zoo import zoo_corpus

    corpus = zoo_corpus(name)
    return corpus.rows[corpus.row_sequence == BACKGROUND]


zoo_app: App = App(name="zoo", help="Models with known memories, bundled or trained on demand.")


@zoo_app.command(name="list")
def zoo_list(*, as_json: Json = False) -> None:
    """List the models of the zoo: bundled, in the cache, or a recipe that is not trained yet.

    Example: memlens zoo list
    """
    from memlens.organisms.training.zoo import zoo_overview

    if as_json:
        print_json(records(zoo_overview()))
    else:
        print_table(zoo_overview(), "Zoo")


@zoo_app.command(name="train")
def zoo_train(
    names: Names | None = None,
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
    """Train zoo models from their recipes, one after the other; the same seed gives the same models.

    Finished models are skipped, and so are bundled models that were selected by family and size.

    Example: memlens zoo train pythia-s olmo2-s --seed 0

    Example: memlens zoo train --family all --size all

    Args:
        names: Recipes, such as olmo2-s (default: pythia-s).
        family: All recipes of a family: pythia, gpt-neo, olmo1, …, or all.
        size: All recipes of a size: xs, s, m or all.
        out: Folder, for one model only (default: in the cache).
        steps: Number of steps (default: the recipe's).
        device: cpu, cuda or mps (default: cuda if available).
        seed: Seed of every random choice.
        resume: Continue interrupted runs and skip finished ones.
    """
    from memlens.organisms.evaluate import evaluate_zoo_model
    from memlens.organisms.training.recipes import select_recipes
    from memlens.organisms.training.zoo import train_zoo_model, zoo_overview

    selected = select_recipes(family or "all", size or "all") if family or size else []
    table = zoo_overview()
    there = set(table.loc[table["status"] == "bundled", "model"])
    bundled = [name for name in selected if f"zoo/{name}" in there]
    chosen = list(dict.fromkeys([*(names or ()), *(name for name in selected if name not in bundled)]))
    if not chosen and not selected:
        chosen = ["pythia-s"]
    if out is not None and len(chosen) != 1:
        raise OptionError(f"out={str(out)!r} is the folder of one model, but {len(chosen)} were selected.")
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
        print_json(
            [
                {
                    "model": f"zoo/{name.removeprefix('zoo/')}",
                    "folder": folder,
                    "heldout_loss": curve.attrs["heldout_loss"],
                    "recall": records(curve),
                }
                for name, (folder, curve) in curves.items()
            ]
        )


def _print_model(name: str, folder: Path, curve: pd.DataFrame, *, table: bool) -> None:
    """Print what a model memorized: a table by number of copies, or one line if there are several models."""
    total = curve.loc[curve["domain"] == "all"]
    if table:
        print_table(total, "Exact match by copies in the corpus")
        OUT.print(f"model: {folder}")
        return
    often = total.iloc[-1]
    OUT.print(
        f"zoo/{name.removeprefix('zoo/')}: {often['exact_match']:.0%} of the sequences with "
        f"{often['copies']} copies recalled, held-out loss {curve.attrs['heldout_loss']:.2f} nats; {folder}"
    )
