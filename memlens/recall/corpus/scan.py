"""One block of a corpus scan: the model's scores of its windows, and which of them are kept.

What is kept of a block depends only on the block, the model, the settings and the blocks before it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveInt

from memlens.errors import OptionError, VocabularyError
from memlens.forward.exclusive import computes
from memlens.options import options_class
from memlens.recall.columns import SCORE_COLUMNS
from memlens.recall.corpus.windows import Block
from memlens.recall.score import score_recall
from memlens.recall.trivial import TrivialRules, trivial_columns
from memlens.sequences.checks import eos_mask
from memlens.sequences.set import SequenceSet

ROLES = ("memorized", "unmemorized", "predictable")

_THRESHOLDS = {"target_accuracy": 0.5, "target_logprob": -1.5}


@options_class
class PredictableRule:
    """What counts as predictable: text that the model predicts well and does not recite.

    A window is predictable if greedy decoding does not give its continuation, `measure` is at least
    `threshold`, and the teacher-forced `target_accuracy` is under `below`. This is a statement about this
    model's predictions only. It does not show that the text was not in training, nor that none of its tokens
    is recalled: partly memorized text is predicted well, too, and `below` only excludes the worst of it (in
    the zoo, where copies are known, 6 % of the predictable windows were planted eight times or more, 13 %
    with `below=0.9`). Where that matters, scan text that the model cannot have seen for controls. Definition
    and thresholds are ours.

    Raises:
        OptionError: An unknown measure, or a number out of range.

    Example:
        >>> import memlens as ml
        >>> ml.recall.PredictableRule(below=0.5).below
        0.5
    """

    measure: Literal["target_accuracy", "target_logprob"] = "target_accuracy"
    """Share of the continuation's tokens that are the arg-max (teacher-forced), or their mean log-probability
    in nats."""
    threshold: float | None = None
    """The least value; by default 0.5, or -1.5 nats."""
    below: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Accuracy that the window must not reach."""

    def __post_init__(self) -> None:
        if self.threshold is None:
            object.__setattr__(self, "threshold", _THRESHOLDS[self.measure])
        assert self.threshold is not None
        low, high = (0, 1) if self.measure == "target_accuracy" else (-np.inf, 0)
        if not low <= self.threshold <= high:
            raise OptionError(f"threshold={self.threshold} is not a {self.measure}: give {low} to {high}")

    def holds(self, table: pd.DataFrame) -> np.ndarray:
        """Return whether the rule applies, for each row of scores."""
        exact = table["exact_match"].to_numpy() == 1
        high = table[self.measure].to_numpy(dtype=float) >= self.threshold
        return ~exact & high & (table["target_accuracy"].to_numpy(dtype=float) < self.below)

    def settings(self) -> dict[str, str | float]:
        """Return the rule under the names that results record."""
        return {f"predictable_{name}": value for name, value in asdict(self).items()}


@options_class
class ScanOptions:
    """The options of a scan (see `build_memorized_set`)."""

    prefix_len: PositiveInt
    suffix_len: PositiveInt
    n: PositiveInt | None
    seed: int
    max_rows: PositiveInt | None
    keep_trivial: bool
    stride: PositiveInt | None
    below: Annotated[float, Field(gt=0, le=1)]
    predictable: PredictableRule
    rules: TrivialRules
    on_eos: Literal["drop", "keep"]
    pool_size: PositiveInt
    block_size: PositiveInt
    bos: int | None = None
    """The token that is put in front of every window that does not begin with it; None: nothing."""

    def settings(self) -> dict[str, Any]:
        """Return the options under the names that results record."""
        own = {name: value for name, value in asdict(self).items() if name not in ("predictable", "rules")}
        if self.bos is None:  # as before there was the choice, so that older scans are resumed
            del own["bos"]
        return {**own, **self.predictable.settings(), **self.rules.settings()}


@dataclass
class Kept:
    """What a scan has kept so far.

    Attributes:
        sets: By role, what was kept of each block.
        counts: How many windows were kept or left out, and why.
        seen: Digests of whole windows and of their continuations, each with whether it is memorized.
    """

    sets: dict[str, list[SequenceSet]] = field(default_factory=lambda: {role: [] for role in ROLES})
    counts: Counter[str] = field(default_factory=Counter)
    seen: set[tuple[bool, bytes]] = field(default_factory=set)

    def size(self, role: str) -> int:
        """Return how many windows of a role there are."""
        return sum(map(len, self.sets[role]))

    def add(self, found: SequenceSet, counts: Mapping[str, int]) -> None:
        """Add what `choose` returned."""
        self.counts.update(counts)
        for role in ROLES:
            if (rows := found.table["role"].to_numpy() == role).any():
                chosen = found[rows]
                self.sets[role].append(chosen.with_table(chosen.table.drop(columns="role")))
        for key, role in zip(_keys(found), found.table["role"], strict=True):
            self.seen |= {(role == "memorized", digest) for digest in key}

    def candidates(self, role: str) -> SequenceSet | None:
        """Return all windows of a role; of controls only those without a memorized continuation."""
        if not self.sets[role]:
            return None
        sets = self.sets[role]
        tokens: Any = [row for s in sets for row in s.rows()]
        if len({len(row) for row in tokens}) == 1:
            tokens = torch.cat([s.tokens for s in sets])
        prefix_len = torch.cat([s.prefix_len for s in sets])
        table = pd.concat([s.table for s in sets], ignore_index=True)
        whole = SequenceSet.from_tokens(tokens, prefix_len, table=table)
        if role == "memorized":
            return whole
        return whole[[_repeat(True, key, self.seen) is None for key in _keys(whole)]]


@computes
def score_block(
    model: Any, block: Block, facts: pd.DataFrame, options: ScanOptions, batch_size: int
) -> tuple[SequenceSet, dict[str, int]]:
    """Score a block's windows, whatever the blocks before gave.

    Args:
        model: A TransformerLens model.
        block: The windows.
        facts: One row per window, with its `id`.
        options: The options of the scan.
        batch_size: Windows per forward pass; batches never span two blocks, so that a resumed scan has the
            same ones.

    Returns:
        The windows that count, with the columns `role`, `row`, `start` and the scores; and how many there
        are.

    Raises:
        VocabularyError: An id is outside the model's vocabulary; names the row of the source.
    """
    _check_vocabulary(model, block)
    seqs = _sequences(block, facts, options)
    counts = {"rows": block.n_rows, "rows_too_short": block.n_short, "windows": len(block)}
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    ended = eos_mask(seqs, eos if options.on_eos == "drop" else None)
    counts["end_of_text"] = int(ended.sum())
    seqs = seqs[~ended]
    if not len(seqs):
        return seqs.with_table(seqs.table.assign(role=[])), counts
    # A corpus repeats what is memorized: each distinct window is scored once.
    codes = pd.factorize(np.array([whole + rest for whole, rest in _keys(seqs)], dtype=object))[0]
    distinct = seqs[np.unique(codes, return_index=True)[1]]
    recall = score_recall(model, distinct, generate=False, metrics=(), batch_size=batch_size, progress=False)
    scores = {name: recall.table[name].to_numpy()[codes] for name in SCORE_COLUMNS if name in recall.table}
    table = seqs.table.assign(**scores)
    return seqs.with_table(table.assign(role=_roles(table, options))), counts


def _sequences(block: Block, facts: pd.DataFrame, options: ScanOptions) -> SequenceSet:
    """Return the windows, with the beginning-of-text token in front where the scan puts it."""
    if options.bos is None:
        return SequenceSet.from_tokens(block.tokens, options.prefix_len, table=facts)
    bare = block.tokens[:, 0] != options.bos
    rows = [[options.bos] * b + row for b, row in zip(bare.tolist(), block.tokens.tolist(), strict=True)]
    return SequenceSet.from_tokens(rows, options.prefix_len + bare, table=facts, attrs={"prepend_bos": True})


def _roles(table: pd.DataFrame, options: ScanOptions) -> np.ndarray:
    """Return each window's possible role; "between" is neither memorized nor a control."""
    roles = np.full(len(table), "between", dtype=object)
    roles[table["target_accuracy"].to_numpy(dtype=float) < options.below] = "unmemorized"
    roles[options.predictable.holds(table)] = "predictable"
    roles[table["exact_match"].to_numpy() == 1] = "memorized"
    return roles


def choose(
    model: Any, seqs: SequenceSet, kept: Kept, options: ScanOptions, found: Mapping[str, int]
) -> tuple[SequenceSet, dict[str, int]]:
    """Choose among the scored windows of a block.

    Args:
        model: A TransformerLens model.
        seqs: What `score_block` returned, like `found`.
        kept: What the blocks before gave.
        options: The options of the scan.
        found: How many windows there are.

    Returns:
        What is kept, with the shares that follow by rule; and how many were kept or left out, and why.
    """
    counts = dict(found)
    if not len(seqs):
        return seqs, counts
    room = {role: options.pool_size - kept.size(role) for role in ROLES[1:]}
    wanted = ["memorized", *(role for role, free in room.items() if free > 0)]
    tally = Counter(seqs.table["role"])
    exact = tally["memorized"]
    counts |= {"exact_match": exact, "not_exact": len(seqs) - exact, "between": tally["between"]}
    tally = Counter({"pool_full": sum(tally[role] for role in ROLES if role not in wanted)})
    seqs = seqs[seqs.table["role"].isin(wanted).to_numpy()]
    if len(seqs):
        tokenizer = getattr(model, "tokenizer", None)
        seqs = seqs.with_table(seqs.table.assign(**trivial_columns(seqs, tokenizer, options.rules)))
    rows = _picked(seqs, kept, options, room, tally)
    return seqs[rows], {**counts, **tally}


def _picked(
    seqs: SequenceSet, kept: Kept, options: ScanOptions, room: dict[str, int], tally: Counter[str]
) -> list[int]:
    """Return the rows to keep, in order, and count why the others are left out."""
    seen: set[tuple[bool, bytes]] = set()
    rows = []
    trivial = seqs.table["trivial"].tolist() if len(seqs) else []
    for row, (role, key) in enumerate(zip(seqs.table["role"], _keys(seqs), strict=True)):
        memorized = role == "memorized"
        reason = "trivial" if trivial[row] and not options.keep_trivial else None
        reason = reason or _repeat(memorized, key, kept.seen, seen)
        if reason:
            tally[f"{'exact' if memorized else 'pool'}_{reason}"] += 1
        elif not memorized and room[role] <= 0:
            tally["pool_full"] += 1
        else:
            room[role] = room.get(role, 0) - 1
            tally[f"{role}_found"] += 1
            seen |= {(memorized, digest) for digest in key}
            rows.append(row)
    return rows


def _repeat(memorized: bool, key: tuple[bytes, bytes], *seen: set[tuple[bool, bytes]]) -> str | None:
    """Return how a window repeats one of the memorized, or one of the others."""
    for digest, reason in zip(key, ("duplicate_window", "duplicate_continuation"), strict=True):
        if any((memorized, digest) in known for known in seen):
            return reason
    return None


def _keys(seqs: SequenceSet) -> list[tuple[bytes, bytes]]:
    """Return digests of each whole window and of its continuation."""
    tokens, lengths = seqs.tokens.numpy(), seqs.lengths.tolist()
    rows = zip(tokens, lengths, seqs.prefix_len.tolist(), strict=True)
    return [(_digest(row[:n]), _digest(row[prefix_len:n])) for row, n, prefix_len in rows]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).digest()


def _check_vocabulary(model: Any, block: Block) -> None:
    outside = (block.tokens >= model.cfg.d_vocab).any(-1)
    if outside.any():
        first = int(outside.argmax())
        raise VocabularyError(
            f"row {block.row[first]} of the corpus holds the token id {block.tokens[first].max()}, but the "
            f"model's vocabulary has {model.cfg.d_vocab} entries: is it tokenized for another model?"
        )
