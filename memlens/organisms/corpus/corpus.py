"""The synthetic corpus with its ground truth: rows of tokens, and what was planted, how often and where.

The generators in `memlens.organisms.corpus.domains` make all text; nothing comes from third parties. A corpus
is a pure function of its `CorpusSpec`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.files import json_text, parsed_json
from memlens.organisms.corpus.carriers import CARRIER_DOMAINS
from memlens.organisms.corpus.domains import DOMAINS, documents
from memlens.organisms.corpus.known_items import KnownItems, count_items, draw_items, occurrences, plant_items

END_OF_TEXT = "<|endoftext|>"

BACKGROUND = -1
CARRIER = -2
"""Values of `Corpus.row_sequence` for rows without a planted sequence and for rows with known items."""


@dataclass(frozen=True)
class CorpusSpec:
    """Everything that determines a corpus.

    Attributes:
        seed: Seed of all draws.
        domains: Keys of `DOMAINS`.
        copies: Numbers of copies of planted sequences.
        per_cell: Planted sequences for each domain and number of copies.
        n_heldout: Sequences of each domain that are drawn in the same way and never planted.
        background_rows: Rows of each domain without planted text.
        heldout_rows: Rows of each domain kept out of training, to measure the loss.
        row_len: Tokens per row (one training window).
        prefix_len: Tokens of the prefix of a planted row.
        vocab_size: Size of the tokenizer's vocabulary.
        tokenizer_documents: Documents of each domain that the tokenizer is trained on.
        item_copies: Numbers of copies of known items (expressions, facts, identifiers); empty for a corpus
            without known items.
        expressions_per_cell: Expressions for each number of copies, in whole families (see
            `draw_expressions`), and as many that are never planted.
        facts_per_cell: Facts for each number of copies (see `draw_facts`), and as many that are never
            planted.
        identifiers_per_cell: The same for identifiers (see `draw_identifiers`).
        items_per_row: Known items in one carrier row.
        bare_share: Share of the carrier rows that begin with an item.
        planted: False omits planted rows and carriers, with the same tokenizer and background: the clean
            twin.
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
                "tokens: give 1 or more, and less than row_len."
            )
        for name, hint in (
            ("copies", "use n_heldout for sequences without copies"),
            ("item_copies", "items that are never planted are always drawn"),
        ):
            if any(count < 1 for count in getattr(self, name)):
                raise OptionError(f"{name}={getattr(self, name)} contains a number below 1: {hint}.")
        if self.items_per_row < 1:
            raise OptionError(
                f"items_per_row={self.items_per_row} leaves carrier rows empty: give 1 or more."
            )
        if self.item_copies and not self.carrier_domains:
            raise OptionError(
                f"domains={self.domains} contains none that carries items ({', '.join(CARRIER_DOMAINS)}): "
                "add one, or omit known items with item_copies=()."
            )

    @property
    def carrier_domains(self) -> tuple[str, ...]:
        """The domains whose documents carry known items."""
        return tuple(domain for domain in self.domains if domain in CARRIER_DOMAINS)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return parsed_json(json_text(asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CorpusSpec:
        """Return the specification of a `to_dict` record; one without known items predates them.

        >>> CorpusSpec.from_dict(CorpusSpec(seed=3).to_dict()) == CorpusSpec(seed=3)
        True
        """
        lists = {name: tuple(fields.get(name, ())) for name in ("domains", "copies", "item_copies")}
        return cls(**{**fields, **lists})


def draw_sequences(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> pd.DataFrame:
    """Draw the planted and the held-out sequences: the first `spec.row_len` tokens of new documents.

    Which of a domain's sequences get how many copies is random, so sequences with different numbers of copies
    do not differ in kind. No two share their prefix or their continuation. Text and tokens correspond:
    encoding the text of the sequence, or of its prefix, returns the tokens.

    Args:
        tokenizer: Tokenizer of the corpus.
        spec: Specification of the corpus.

    Returns:
        One row per sequence, with columns `id`, `tokens` (list of int), `prefix_len`, `text`, `domain`,
        `copies`.
    """
    records = []
    for domain in spec.domains:
        candidates = _candidates(tokenizer, domain, spec.seed, spec.row_len, spec.prefix_len)
        cells = [(count, index) for count in spec.copies for index in range(spec.per_cell)]
        for count, index in [*cells, *((0, index) for index in range(spec.n_heldout))]:
            tokens, text = next(candidates)
            name = f"{domain}-{count:03d}-{index:02d}"
            records.append((name, tokens, spec.prefix_len, text, domain, count))
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


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows of tokens with exact ground truth.

    Attributes:
        spec: Its specification.
        tokenizer: Tokenizer of the rows.
        rows: The training windows in corpus order.
        row_sequence: For each row, the index in `sequences` of its planted sequence, or `BACKGROUND` (-1), or
            `CARRIER` (-2) for a row with known items.
        row_domain: For each row, the index of its domain in `spec.domains`.
        sequences: Planted and held-out sequences (see `draw_sequences`).
        heldout: Background rows that are not in training, `spec.heldout_rows` per domain in order.
        items: The known items, with their number of copies counted in `rows`.
        item_positions: Row and position of each occurrence of each item (see `occurrences`).
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
        """The number of occurrences of each token in the rows."""
        return np.bincount(self.rows.ravel(), minlength=len(self.tokenizer))

    def domain_counts(self) -> dict[str, Int[np.ndarray, "vocab"]]:
        """Return the `token_counts` of each domain's rows."""
        return {
            domain: np.bincount(self.rows[self.row_domain == i].ravel(), minlength=len(self.tokenizer))
            for i, domain in enumerate(self.spec.domains)
        }

    @property
    def heldout_domains(self) -> list[str]:
        """The domain of each held-out row."""
        return [domain for domain in self.spec.domains for _ in range(self.spec.heldout_rows)]

    def positions(self) -> pd.DataFrame:
        """Return the row of each copy of each planted sequence, as columns `id` and `row`."""
        rows = np.flatnonzero(self.row_sequence >= 0)
        ids = self.sequences["id"].to_numpy()[self.row_sequence[rows]]
        return pd.DataFrame({"id": ids, "row": rows}).sort_values(["id", "row"], ignore_index=True)

    def fingerprint(self) -> str:
        """Return a hash of all rows in order, equal for equal corpora."""
        return fingerprint(self.rows)


def fingerprint(rows: Int[np.ndarray, "row pos"]) -> str:
    """Return a hash of token ids in order.

    >>> fingerprint(np.array([[1, 2]])) == fingerprint(np.array([[2, 1]]))
    False
    """
    return sha256(np.ascontiguousarray(rows, dtype="<i4").tobytes()).hexdigest()[:16]


def corpus_tokenizer(spec: CorpusSpec) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a corpus, trained on separate documents (no planted ones).

    Args:
        spec: Specification of the corpus; `planted` makes no difference.
    """
    streams = (documents(domain, spec.seed, "tokenizer") for domain in spec.domains)
    texts = [text for stream in streams for text in islice(stream, spec.tokenizer_documents)]
    return train_tokenizer(texts, vocab_size=spec.vocab_size, n_ctx=2 * spec.row_len)


def build_corpus(spec: CorpusSpec) -> Corpus:
    """Return the corpus of a specification.

    Background rows are windows of a stream of documents with `<|endoftext|>` between them, with one stream
    per domain. A planted row is a whole sequence. A carrier row is a window of one document with known items
    in it (see `organisms.corpus.carriers`). All rows are shuffled together. A background or carrier window
    that contains a prefix or continuation of a planted or held-out sequence is discarded, so every copy is a
    planted one.

    Args:
        spec: The specification.

    Returns:
        The rows and their ground truth, always the same for the same specification.
    """
    tokenizer = corpus_tokenizer(spec)
    sequences = draw_sequences(tokenizer, spec)
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
    """Return the carrier rows and the index of each row's domain; no rows for the clean twin."""
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
    """Return the prefixes and the continuations of sequences."""
    return {
        tuple(half) for tokens in sequences for half in (tokens[: spec.prefix_len], tokens[spec.prefix_len :])
    }


def _holds(row: list[int], forbidden: set[tuple[int, ...]]) -> bool:
    lengths = {len(part) for part in forbidden}
    return any(tuple(row[i : i + n]) in forbidden for n in lengths for i in range(len(row) - n + 1))


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 1024, n_ctx: int = 128
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Each digit is one token, so that sums can be learned. The vocabulary contains all 256 bytes, so any text
    is encoded and decoded without loss. `<|endoftext|>` is token 0 and serves as every special token, as in
    Pythia's tokenizer; none is added to a text.

    Args:
        texts: The training documents.
        vocab_size: Number of tokens including special and byte tokens, at least 257.
        n_ctx: The maximum length that the tokenizer reports.

    >>> tokenizer = train_tokenizer(["a tiny lamp, a tiny bell"] * 3, vocab_size=270)
    >>> tokenizer.decode(tokenizer("Ωmega 12").input_ids)
    'Ωmega 12'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=n_ctx,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a checkpoint folder, without network access.

    Args:
        folder: The folder with `tokenizer.json`.
    """
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
