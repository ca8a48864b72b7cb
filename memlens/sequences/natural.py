"""Natural text as a control: running text, and prompts cut from it with the lengths of a set's prompts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from memlens.errors import EmptySetError, OptionError, SequenceError, SourceNotFoundError
from memlens.files import expanded, parsing
from memlens.models.bos import expects_bos
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import Tokenizer, bos_id, encode

_SPACES = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write the space before a word."""


def text_ids(tokenizer: Tokenizer, path: str | Path) -> list[int]:
    """Return a text file as one long row of token ids.

    Args:
        tokenizer: The model's tokenizer.
        path: A text file in UTF-8.

    Raises:
        SourceNotFoundError: No such file.
        FileFormatError: The file is not UTF-8.
        SequenceError: There is no tokenizer.
    """
    path = expanded(path)
    if not path.is_file():
        raise SourceNotFoundError(f"there is no text file {path}: give the path of one.")
    if tokenizer is None:
        raise SequenceError("the model has no tokenizer for a text file: give token ids.")
    with parsing(path, advice="save it as UTF-8, or give token ids"):
        return encode(tokenizer, [path.read_text(encoding="utf-8")])[0]


def text_windows(
    tokenizer: Tokenizer, path: str | Path, window: int = 128, *, model: Any = None
) -> SequenceSet:
    """Return a text file as windows of `window` token ids, without an incomplete one at the end.

    Args:
        tokenizer: The model's tokenizer.
        path: As for `text_ids`, which raises the other errors.
        window: Number of tokens, with the beginning-of-text token where there is one.
        model: Of which the windows are read: where its texts begin with a beginning-of-text token (see
            `load_sequences`), so does each window.

    Raises:
        OptionError: A window of fewer than two tokens.
        SequenceError: The text has fewer than two windows.
    """
    if window < 2:
        raise OptionError(f"window={window} leaves nothing to predict: give 2 tokens or more.")
    ids = text_ids(tokenizer, path)
    first = [bos_id(tokenizer)] if model is not None and expects_bos(model, tokenizer) else []
    step = window - len(first)
    rows = [first + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    if len(rows) < 2:
        raise SequenceError(
            f"{path} has {len(ids)} tokens, fewer than two windows of {window}: give more text or a shorter "
            "window."
        )
    attrs = {"source": Path(path).name, "prepend_bos": bool(first)}
    return SequenceSet.from_tokens(rows, prefix_len=1, attrs=attrs)


def natural_controls(
    text: SequenceSet, like: SequenceSet, *, tokenizer: Tokenizer = None, n: int | None = None, seed: int = 0
) -> SequenceSet:
    """Cut prompts from running text that are as long as those of a set; the next token is the target.

    The model has no reason to have stored them, so an effect that recalled sequences and these have in common
    is not a sign of recall. With a tokenizer, prompts and targets begin with a word, as those of idioms do
    (the token starts with white space and a letter), so that word pieces are not easy targets. Where the set
    was read with a beginning-of-text token in front (`prepend_bos`), the prompts begin with one too.

    Args:
        text: Running text; its prefix lengths are ignored. Rows must be longer than the prompts of `like`.
        like: The set whose prompt lengths (in tokens) are used in turn.
        tokenizer: The model's tokenizer; None: prompts and targets may begin anywhere.
        n: Number of controls; by default as many as `like` has.
        seed: Seed of the places.

    Returns:
        Sequences with one target each, all different; the table has `text_row`, `start`, the other columns of
        the text's table, and with a tokenizer `text`, `prompt` and `target` (the word that the target
        begins).

    Raises:
        EmptySetError: No place in the text fits.
        OptionError: `n` is below 1.

    >>> text = SequenceSet.from_tokens([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]], 1)
    >>> like = SequenceSet.from_tokens([[1, 2, 3], [1, 2, 3, 4]], [2, 3])
    >>> [len(row) for row in natural_controls(text, like).rows()]
    [3, 4]
    """
    n = len(like) if n is None else n
    if n < 1:
        raise OptionError(f"n={n} controls: ask for at least one.")
    rng = np.random.default_rng(seed)
    first = like.tokens[:1, 0].tolist() if like.attrs.get("prepend_bos") else []
    lengths = np.resize(like.prefix_len.numpy(), n) - len(first)
    begins = _word_starts(text, tokenizer)
    places = np.full((n, 2), -1)
    for length in np.unique(lengths):
        wanted = np.flatnonzero(lengths == length)
        free = np.argwhere(begins[:, : max(0, begins.shape[1] - length)] & begins[:, length:])
        chosen = free[np.sort(rng.choice(len(free), min(len(wanted), len(free)), replace=False))]
        places[wanted[: len(chosen)]] = chosen
    kept = places[:, 0] >= 0
    if not kept.any():
        raise EmptySetError(
            f"no place in the {len(text)} rows of text leaves a prompt of {int(lengths.min())} tokens and a "
            "target that begins a word: give longer rows or more text."
        )
    if not kept.all():
        warnings.warn(f"the text gives only {int(kept.sum())} of {n} controls: give more text", stacklevel=2)
    return _cut(text, places[kept], lengths[kept], tokenizer, seed, first)


def _word_starts(text: SequenceSet, tokenizer: Tokenizer) -> np.ndarray:
    """Return whether a word begins at each place, `[seq, pos]`."""
    if tokenizer is None:
        return text.mask.numpy()
    ids, places = np.unique(text.tokens.numpy(), return_inverse=True)
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]
    marked = any(piece.startswith(_SPACES) for piece in pieces)  # else its tokens are whole words
    starts = np.array(
        [
            piece.startswith(_SPACES) == marked and piece.lstrip("".join(_SPACES))[:1].isalpha()
            for piece in pieces
        ]
    )
    return starts[places.reshape(text.tokens.shape)] & text.mask.numpy()


def _cut(
    text: SequenceSet,
    places: np.ndarray,
    lengths: np.ndarray,
    tokenizer: Tokenizer,
    seed: int,
    first: list[int],
) -> SequenceSet:
    tokens = text.tokens.numpy()
    rows = [tokens[r, s : s + n + 1].tolist() for (r, s), n in zip(places, lengths, strict=True)]
    table = text.table.iloc[places[:, 0]].reset_index(drop=True).drop(columns=["text"], errors="ignore")
    ids = [f"{text.ids[r]}:{s}+{n}" for (r, s), n in zip(places, lengths, strict=True)]
    table = table.assign(id=ids, text_row=places[:, 0], start=places[:, 1])
    if tokenizer is not None:
        ends = [tokens[r, s + n : int(text.lengths[r])] for (r, s), n in zip(places, lengths, strict=True)]
        table = table.assign(**_spelled(rows, ends, tokenizer))
    attrs = {**text.attrs, "cut_seed": seed, "control": "natural text", "prepend_bos": bool(first)}
    rows = [[*first, *row] for row in rows]
    return SequenceSet.from_tokens(rows, lengths + len(first), table=table, attrs=attrs)


def _spelled(rows: list[list[int]], ends: list[np.ndarray], tokenizer: Any) -> dict[str, list[str]]:
    """Return the texts of the prompts, of the words that the targets begin, and of the sequences."""
    prompts = tokenizer.batch_decode([row[:-1] for row in rows])
    # No word has more than eight tokens.
    words = tokenizer.batch_decode([end[:8].tolist() for end in ends])
    return {
        "prompt": [prompt.strip() for prompt in prompts],
        "target": [re.split(r"[^\w'-]", word.strip(), maxsplit=1)[0] for word in words],
        "text": tokenizer.batch_decode(rows),
    }
