"""Carrier rows: stories and dialogues that contain known items at random places.

An item is always a whole line or in quotation marks. It therefore follows the start of a row, a line break or
an opening quotation mark, never a space, and its tokens in a row are those of its bare text. Some rows begin
with an item, so that the model has seen bare items at the start of an input.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random

from transformers import PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.domains import documents

CARRIER_DOMAINS = ("text", "dialogue")
_TRIES = 200
_TURNS = {"text": re.compile(r"(?<=\.) "), "dialogue": re.compile(r"(?<=\n)")}


def dealt(items: Sequence[int], size: int, rng: Random) -> list[list[int]]:
    """Distribute items at random into groups of at most `size`, without repeats in a group.

    Args:
        items: With repetitions.
        size: Size of a group.
        rng: The source of every choice.

    >>> groups = dealt([1, 1, 1, 2, 2, 3], 2, Random(0))
    >>> all(len(set(group)) == len(group) for group in groups), sum(map(len, groups))
    (True, 6)
    """
    pool, groups = deque(rng.sample(list(items), len(items))), []
    while pool:
        group: list[int] = []
        skipped: list[int] = []
        while pool and len(group) < size:
            item = pool.popleft()
            (skipped if item in group else group).append(item)
        pool.extendleft(reversed(skipped))
        groups.append(group)
    return groups


def carrier_rows(
    tokenizer: PreTrainedTokenizerFast,
    groups: Sequence[Sequence[str]],
    *,
    seed: int,
    domains: Sequence[str],
    row_len: int,
    bare_share: float,
    refuse: Callable[[list[int]], bool],
) -> tuple[list[list[int]], list[str]]:
    """Return one row for each group of texts that contains all of them completely.

    Args:
        tokenizer: Tokenizer of the corpus.
        groups: For each row, the texts (without full stop) that it must contain.
        seed: Seed of the corpus.
        domains: Those of `CARRIER_DOMAINS` whose documents are used; each row uses a random one.
        row_len: Tokens per row.
        bare_share: Share of the rows that begin with an item.
        refuse: Whether a row must be discarded.

    Returns:
        The rows, and the domain of each.

    Raises:
        OptionError: A group does not fit into a row.
    """
    rng = Random(f"memlens/{seed}/carriers")
    streams = {domain: documents(domain, seed, "carriers") for domain in domains}
    rows, kinds = [], []
    for group in groups:
        domain = rng.choice(list(domains))
        bare = rng.random() < bare_share
        rows.append(_row(tokenizer, group, domain, streams[domain], row_len, bare, refuse, rng))
        kinds.append(domain)
    return rows, kinds


def _row(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    domain: str,
    stream: Iterator[str],
    row_len: int,
    bare: bool,
    refuse: Callable[[list[int]], bool],
    rng: Random,
) -> list[int]:
    """Draw documents and places until a window of the row's length contains every text."""
    for attempt in range(_TRIES):
        order = rng.sample(list(texts), len(texts))
        document, spans = _with_items(next(stream), order, domain, rng, plain=bare or attempt > _TRIES // 2)
        encoded = tokenizer(document, truncation=False, verbose=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        if not all(first in starts for first, _ in spans):
            continue
        begin = starts.index(spans[0][0])
        end = sum(start < spans[-1][1] for start in starts)
        low, high = max(0, end - row_len), min(begin, len(starts) - row_len)
        first = begin if bare else rng.randint(low, high) if low <= high else -1
        row = encoded["input_ids"][max(first, 0) : first + row_len]
        if first >= low and len(row) == row_len and not refuse(row):
            return row
    raise OptionError(f"the items {list(texts)} do not fit into a row of row_len={row_len} tokens: raise it.")


def _with_items(
    document: str, texts: Sequence[str], domain: str, rng: Random, *, plain: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return a document with texts inserted close to each other, and the span of characters of each."""
    pieces = _TURNS[domain].split(document)
    pieces = [piece for piece in pieces if piece]
    place = rng.randint(0, len(pieces))
    made, spans, waiting = "", [], list(texts)
    for index in range(len(pieces) + 1):
        while waiting and index >= place:
            before, after = ("", "\n") if plain or rng.random() < 0.5 else _quotes(domain, rng)
            made = _separated(made, domain, before) + before
            spans.append((len(made), len(made) + len(waiting[0])))
            made += waiting.pop(0) + ("." + after if after == "\n" else after)
            place = min(index + rng.choice((0, 1, 1, 2)), len(pieces))
        if index < len(pieces):
            made = _separated(made, domain, pieces[index]) + pieces[index]
    return made, spans


def _quotes(domain: str, rng: Random) -> tuple[str, str]:
    """Return the text before and after an item that somebody says."""
    name = rng.choice(lexicon.NAMES)
    if domain == "dialogue":
        return f'{name}: "', '."\n'
    return f'{name} {rng.choice(lexicon.SPEECH)[2]} "', '".'


def _separated(made: str, domain: str, following: str) -> str:
    """Return the text so far with the separator before the next piece: a space or a line break."""
    if not made or made.endswith("\n"):
        return made
    return made + ("\n" if domain == "dialogue" or not following else " ")
