"""The command line's `memlens generate`: greedy continuations, with the attention of some layers bypassed."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from memlens.cli.console import (
    OUT,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    print_json,
)
from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError


def generate(
    model: ModelOption,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; may be given often.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line, or .jsonl with 'prompt' or 'text'.")
    ] = None,
    bypass: Annotated[
        str | None, typer.Option(help="Layers whose attention is bypassed, such as 20-23,25.")
    ] = None,
    mode: Annotated[str, typer.Option(help="identity or zero.")] = "identity",
    compare: Annotated[bool, typer.Option("--compare", help="Also continue without the bypass.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 50,
    as_json: JsonOption = False,
    prepend_bos: Annotated[
        bool, typer.Option("--prepend-bos", help="Put the beginning-of-text token before every prompt.")
    ] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Continue prompts greedily, with the attention of some layers bypassed.

    Example: memlens generate --model zoo/pythia-s --prompt "The key" --bypass 4-5 --compare
    """
    import memlens as ml

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    if not texts:
        raise OptionError("there is no prompt: give --prompt TEXT or --prompts FILE.")
    if compare and bypass is None:
        raise OptionError("--compare needs a bypass to compare with: give --bypass LAYERS.")
    layers = [] if bypass is None else parse_layers(bypass)
    loaded = ml.load_model(model, backend=backend, dtype=dtype, device=device, revision=revision)
    runs: dict[str, list[int]] = {"with": layers, "without": []} if compare else {"with": layers}
    found = {
        name: continuations(loaded, texts, layers=some, mode=mode, n=max_new_tokens, prepend_bos=prepend_bos)
        for name, some in runs.items()
    }
    if as_json:
        _print_json(loaded, texts, found, {"model": model, "bypass": layers, "mode": mode})
    else:
        _print_text(loaded, texts, found, layers)


def parse_layers(text: str) -> list[int]:
    """Return the layers that a list of numbers and ranges names, each once.

    Raises:
        OptionError: It is no such list, or a range runs backwards.

    >>> parse_layers("20-23,25")
    [20, 21, 22, 23, 25]
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise OptionError(
                f"{part.strip()!r} in {text!r} is no layer or range of layers: write it as in 20-23,25."
            )
        layers += range(first, last + 1)
    return list(dict.fromkeys(layers))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: of a `.jsonl` the key `prompt` or `text`, else one line each.

    Raises:
        SourceNotFoundError: No such file.
        FileFormatError: It is not UTF-8, or a line of a `.jsonl` holds no prompt.
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
        raise FileFormatError(f"{place} is no JSON: {error}.") from error
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
    mode: str = "identity",
    n: int = 50,
    prepend_bos: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt's greedy continuation, up to the end-of-text token.

    Prompts of different lengths go through one cache together, without padding.

    Args:
        model: A TransformerLens model.
        prompts: The texts.
        layers: Layers whose attention is bypassed; none for the model as it is.
        mode: "identity" or "zero".
        n: Tokens at most.
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
