"""The command line's `memlens generate`: greedy continuations, with the attention of some layers bypassed."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text

from memlens.cli.console import OUT, Json, Switch, print_json
from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError
from memlens.studies.registry import ModelChoice


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


def parse_layers(text: str) -> list[int]:
    """Return the layers that a list of numbers and ranges names, each of them once.

    Raises:
        OptionError: It is not such a list, or a range runs backwards.

    >>> parse_layers("20-23,25")
    [20, 21, 22, 23, 25]
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise OptionError(
                f"{part.strip()!r} in {text!r} is not a layer or a range of layers: write it as in 20-23,25."
            )
        layers += range(first, last + 1)
    return list(dict.fromkeys(layers))


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
    mode: str = "identity",
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
