"""The synthetic corpus with its ground truth: rows of tokens, what was planted, how often and where.

All text is made by the generators of `memlens.organisms.corpus.domains`; nothing is taken from third
parties. A corpus is a pure function of its `CorpusSpec`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.organisms.corpus.carriers import CARRIER_DOMAINS
from memlens.organisms.corpus.domains import DOMAINS, documents
from memlens.organisms.corpus.known_items import KnownItems, count_items, draw_items, occurrences, plant_items
from memlens.organisms.training.tokenizer import train_tokenizer


def draw_sequences(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    domains: Sequence[str],
    copies: Sequence[int],
    per_cell: int,
    n_heldout: int,
    length: int,
    prefix_len: int,
) -> pd.DataFrame:
    """Draw the planted and the held-out sequences: the first `length` tokens of fresh documents.

    Which of a domain's sequences get how many copies is chance alone, so sequences with different copies do
    not differ in kind. No two share their prefix or their continuation. Prefix and continuation are both
    whole in the text: encoding the text, or the text of the prefix, gives the tokens back.

    Args:
        tokenizer: of the corpus.
        seed: of the corpus.
        domains: keys of `memlens.organisms.corpus.domains.DOMAINS`.
        copies: the numbers of copies, all at least 1.
        per_cell: sequences for each domain and number of copies.
        n_heldout: sequences of each domain that are never planted (`copies` 0).
        length: tokens of a sequence.
        prefix_len: tokens of its prefix.

    Returns:
        Columns `id`, `tokens` (list of int), `prefix_len`, `text`, `domain`, `copies`; one row a sequence.
    """
    records = []
    for domain in domains:
        candidates = _candidates(tokenizer, domain, seed, length, prefix_len)
        cells = [(count, index) for count in copies for index in range(per_cell)]
        for count, index in [*cells, *((0, index) for index in range(n_heldout))]:
            tokens, text = next(candidates)
            name = f"{domain}-{count:03d}-{index:02d}"
            records.append((name, tokens, prefix_len, text, domain, count))
    return pd.DataFrame(records, columns=["id", "tokens", "prefix_len", "text", "domain", "copies"])


def _candidates(
    tokenizer: PreTrainedTokenizerFast, domain: str, seed: int, length: int, prefix_len: int
) -> Iterator[tuple[list[int], str]]:
    """Yield (tokens, text) of sequences that share neither prefix nor continuation with an earlier one."""
    prefixes: set[tuple[int, ...]] = set()
    continuations: set[tuple[int, ...]] = set()
    for document in documents(domain, seed, "planted"):
        ids = tokenizer(document, truncation=False, verbose=False).input_ids[:length]
        prefix, continuation = tuple(ids[:prefix_len]), tuple(ids[prefix_len:])
        if len(ids) < length or prefix in prefixes or continuation in continuations:
            continue
        text = str(tokenizer.decode(ids))
        if not (_survives(tokenizer, ids) and _survives(tokenizer, ids[:prefix_len])):
            continue
        prefixes.add(prefix)
        continuations.add(continuation)
        yield ids, text


def _survives(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bool:
    return tokenizer(tokenizer.decode(ids)).input_ids == ids


BACKGROUND = -1
CARRIER = -2
"""In `Corpus.row_sequence`: a row that holds no planted sequence; one that holds known items."""


@dataclass(frozen=True)
class CorpusSpec:
    """Everything that decides a corpus.

    Attributes:
        seed: of all draws.
        domains: keys of `DOMAINS`.
        copies: how often sequences are planted.
        per_cell: planted sequences for each domain and number of copies.
        n_heldout: sequences of each domain that are drawn alike and never planted.
        background_rows: rows of each domain that are not planted.
        heldout_rows: rows of each domain kept out of training, to measure the loss on.
        row_len: tokens of a row (one training window).
        prefix_len: tokens of a planted row that count as its prefix.
        vocab_size: of the tokenizer.
        tokenizer_documents: documents of each domain that the tokenizer learns from.
        item_copies: how often known items (expressions, facts, identifiers) are planted; empty: there are
            none.
        expressions_per_cell: expressions for each number of copies, whole families (see `draw_expressions`);
            as many are never planted.
        facts_per_cell: facts for each number of copies (see `draw_facts`), and as many never planted.
        identifiers_per_cell: the same of identifiers (see `draw_identifiers`).
        items_per_row: known items that share a carrier row.
        bare_share: share of the carrier rows that begin with an item.
        planted: False leaves the planted rows and the carriers out (same tokenizer, same background): the
            clean twin.
    """

    seed: int = 0
    domains: tuple[str, ...] = tuple(DOMAINS)
    copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    per_cell: int = 6
    n_heldout: int = 32
    background_rows: int = 3500
    heldout_rows: int = 100
    row_len: int = 64
    prefix_len: int = 32
    vocab_size: int = 1024
    tokenizer_documents: int = 400
    item_copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    expressions_per_cell: int = 16
    facts_per_cell: int = 8
    identifiers_per_cell: int = 8
    items_per_row: int = 2
    bare_share: float = 0.2
    planted: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.prefix_len < self.row_len:
            raise OptionError(
                f"prefix_len={self.prefix_len} leaves no prefix or no continuation in rows of {self.row_len} "
                "tokens: choose a number between."
            )
        if any(count < 1 for count in self.copies):
            raise OptionError(
                f"copies={self.copies} holds a number below 1: held-out sequences are `n_heldout`."
            )
        if any(count < 1 for count in self.item_copies):
            raise OptionError(
                f"item_copies={self.item_copies} holds a number below 1: items that are never planted are "
                "drawn anyway."
            )
        if self.items_per_row < 1:
            raise OptionError(f"items_per_row={self.items_per_row} leaves carriers empty: give 1 or more.")
        if self.item_copies and not self.carrier_domains:
            raise OptionError(
                f"domains={self.domains} has none that carries items ({', '.join(CARRIER_DOMAINS)}): add "
                "one, or leave items out with item_copies=()."
            )

    @property
    def carrier_domains(self) -> tuple[str, ...]:
        """Those of the domains whose documents carry known items."""
        return tuple(domain for domain in self.domains if domain in CARRIER_DOMAINS)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON would hold them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CorpusSpec:
        """Read back what `to_dict` gave; a record older than the known items is of a corpus without them.

        >>> CorpusSpec.from_dict(CorpusSpec(seed=3).to_dict()) == CorpusSpec(seed=3)
        True
        """
        lists = {name: tuple(fields.get(name, ())) for name in ("domains", "copies", "item_copies")}
        return cls(**{**fields, **lists})


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows of tokens with exact ground truth.

    Attributes:
        spec: what made it.
        tokenizer: of the rows.
        rows: the training windows in corpus order.
        row_sequence: for each row, the place in `sequences` of the sequence that stands there, or
            `BACKGROUND` (-1), or `CARRIER` (-2) where known items were put in.
        row_domain: for each row, the place in `spec.domains` of its domain.
        sequences: planted and held-out sequences (see `draw_sequences`).
        heldout: rows of the background's kind that are in no training row, `spec.heldout_rows` a domain in
            order.
        items: the known items, with their number of copies as counted in `rows`.
        item_positions: where each occurrence of each item stands (see `occurrences`).
    """

    spec: CorpusSpec
    tokenizer: PreTrainedTokenizerFast
    rows: Int[np.ndarray, "row pos"]
    row_sequence: Int[np.ndarray, "row"]
    row_domain: Int[np.ndarray, "row"]
    sequences: pd.DataFrame
    heldout: Int[np.ndarray, "heldout pos"]
    items: KnownItems
    item_positions: pd.DataFrame

    @property
    def token_counts(self) -> Int[np.ndarray, "vocab"]:
        """How often each token stands in the rows of one pass."""
        return np.bincount(self.rows.ravel(), minlength=len(self.tokenizer))

    def domain_counts(self) -> dict[str, Int[np.ndarray, "vocab"]]:
        """Return `token_counts` of each domain's rows alone."""
        return {
            domain: np.bincount(self.rows[self.row_domain == i].ravel(), minlength=len(self.tokenizer))
            for i, domain in enumerate(self.spec.domains)
        }

    @property
    def heldout_domains(self) -> list[str]:
        """The domain of each held-out row."""
        return [domain for domain in self.spec.domains for _ in range(self.spec.heldout_rows)]

    def positions(self) -> pd.DataFrame:
        """Return columns `id`, `row`: where each copy of each planted sequence stands."""
        rows = np.flatnonzero(self.row_sequence >= 0)
        ids = self.sequences["id"].to_numpy()[self.row_sequence[rows]]
        return pd.DataFrame({"id": ids, "row": rows}).sort_values(["id", "row"], ignore_index=True)

    def fingerprint(self) -> str:
        """Return a hash of all rows in order: equal for equal corpora."""
        return fingerprint(self.rows)


def fingerprint(rows: Int[np.ndarray, "row pos"]) -> str:
    """Return a hash of token ids in order.

    >>> fingerprint(np.array([[1, 2]])) == fingerprint(np.array([[2, 1]]))
    False
    """
    return sha256(np.ascontiguousarray(rows, dtype="<i4").tobytes()).hexdigest()[:16]


def corpus_tokenizer(spec: CorpusSpec) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a corpus, learned from documents of their own (none of the planted).

    Args:
        spec: of the corpus; `planted` makes no difference.
    """
    streams = (documents(domain, spec.seed, "tokenizer") for domain in spec.domains)
    texts = [text for stream in streams for text in islice(stream, spec.tokenizer_documents)]
    return train_tokenizer(texts, vocab_size=spec.vocab_size, n_ctx=2 * spec.row_len)


def build_corpus(spec: CorpusSpec) -> Corpus:
    """Make the corpus of a specification.

    Background rows are windows of a stream of documents with `<|endoftext|>` between them, one stream a
    domain; a planted row is the whole sequence; a carrier row is a window of one document with known items
    in it (see `organisms.corpus.carriers`). All rows are shuffled together. A background or carrier window
    that holds a continuation of a planted or held-out sequence is left out, so every copy is a planted one.

    Args:
        spec: what to make.

    Returns:
        The rows and their ground truth; the same for the same spec.
    """
    tokenizer = corpus_tokenizer(spec)
    sequences = draw_sequences(
        tokenizer,
        seed=spec.seed,
        domains=spec.domains,
        copies=spec.copies,
        per_cell=spec.per_cell,
        n_heldout=spec.n_heldout,
        length=spec.row_len,
        prefix_len=spec.prefix_len,
    )
    streams = [_background(tokenizer, spec, domain, sequences) for domain in spec.domains]
    n_train, n_domains = spec.background_rows, len(spec.domains)
    heldout = np.concatenate([stream[n_train:] for stream in streams])
    copies = sequences["copies"].to_numpy() if spec.planted else np.zeros(len(sequences), dtype=int)
    planted = np.repeat(np.arange(len(sequences)), copies)
    items = draw_items(tokenizer, spec)
    carriers, carrier_domain = _carriers(tokenizer, spec, items, sequences)
    which = np.concatenate(
        [np.full(n_train * n_domains, BACKGROUND), planted, np.full(len(carriers), CARRIER)]
    )
    tokens = np.array(sequences["tokens"].tolist(), dtype=np.int64)
    rows = np.concatenate([*(stream[:n_train] for stream in streams), tokens[planted], carriers])
    codes = np.array([spec.domains.index(domain) for domain in sequences["domain"]])
    domain = np.concatenate([np.repeat(np.arange(n_domains), n_train), codes[planted], carrier_domain])
    order = list(range(len(rows)))
    Random(f"memlens/{spec.seed}/order").shuffle(order)
    rows = rows[order]
    places = occurrences(tokenizer, rows, items)
    counted = count_items(items, places)
    return Corpus(spec, tokenizer, rows, which[order], domain[order], sequences, heldout, counted, places)


def _carriers(
    tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec, items: KnownItems, sequences: pd.DataFrame
) -> tuple[Int[np.ndarray, "row pos"], Int[np.ndarray, "row"]]:
    """Return the carrier rows and the place of each one's domain; none for the clean twin."""
    if not (spec.planted and spec.item_copies):
        return np.zeros((0, spec.row_len), dtype=np.int64), np.zeros(0, dtype=np.int64)
    halves = _halves(spec, sequences.loc[sequences["domain"].isin(spec.carrier_domains), "tokens"])
    rows, domains = plant_items(
        tokenizer, spec, items, spec.carrier_domains, refuse=lambda row: _holds(row, halves)
    )
    return np.array(rows, dtype=np.int64), np.array([spec.domains.index(domain) for domain in domains])


def _background(
    tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec, domain: str, sequences: pd.DataFrame
) -> Int[np.ndarray, "row pos"]:
    """Return `background_rows + heldout_rows` windows of one domain's stream."""
    forbidden = _halves(spec, sequences.loc[sequences["domain"] == domain, "tokens"])
    wanted = spec.background_rows + spec.heldout_rows
    rows: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    buffer: list[int] = []
    stream = documents(domain, spec.seed, "background")
    while len(rows) < wanted:
        for ids in tokenizer(list(islice(stream, 256)), verbose=False).input_ids:
            buffer += [*ids, tokenizer.eos_token_id]
        for start in range(0, len(buffer) - spec.row_len + 1, spec.row_len):
            row = buffer[start : start + spec.row_len]
            if tuple(row) not in seen and not _holds(row, forbidden):
                rows.append(row)
                seen.add(tuple(row))
        buffer = buffer[len(buffer) // spec.row_len * spec.row_len :]
    return np.array(rows[:wanted], dtype=np.int64)


def _halves(spec: CorpusSpec, sequences: Iterable[list[int]]) -> set[tuple[int, ...]]:
    """Return the prefixes and the continuations of planted and held-out sequences."""
    return {
        tuple(half) for tokens in sequences for half in (tokens[: spec.prefix_len], tokens[spec.prefix_len :])
    }


def _holds(row: list[int], forbidden: set[tuple[int, ...]]) -> bool:
    lengths = {len(part) for part in forbidden}
    return any(tuple(row[i : i + n]) in forbidden for n in lengths for i in range(len(row) - n + 1))
