"""One block of a corpus scan: what the model says of its windows, and which of them are kept.

What is kept of a block follows from the block, the model, the settings and the blocks before it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from memlens.errors import OptionError, VocabularyError, check_option
from memlens.recall.corpus.windows import Block
from memlens.recall.score import score_recall
from memlens.recall.trivial import TrivialRules, trivial_columns
from memlens.sequences.checks import eos_mask
from memlens.sequences.set import SequenceSet

ROLES = ("memorized", "unmemorized", "predictable")

_THRESHOLDS = {"target_accuracy": 0.5, "target_logprob": -1.5}


@dataclass(frozen=True)
class PredictableRule:
    """What counts as predictable: text that the model predicts well and does not recite.

    A window is predictable where greedy decoding does not give its continuation, `measure` is at least
    `threshold`, and the teacher-forced `target_accuracy` is under `below`. It is a statement on this model's
    predictions alone. It does not show that the text was not in training, nor that none of its tokens is
    recalled: what is memorized in part is predicted well, too, and `below` leaves out the worst of it only
    (in the zoo, where copies are known, 6 % of the predictable windows were planted eight times or more, 13 %
    with `below=0.9`). Where that matters, scan text that the model cannot have seen for controls. Definition
    and thresholds are ours.

    Attributes:
        measure: "target_accuracy" (share of the continuation's tokens that are the arg-max, teacher-forced)
            or "target_logprob" (their mean log-probability, nats).
        threshold: The least value; by default 0.5, or -1.5 nats.
        below: Accuracy that the window must not reach.

    Raises:
        OptionError: An unknown measure, or a number out of range.
    """

    measure: str = "target_accuracy"
    threshold: float | None = None
    below: float = 0.75

    def __post_init__(self) -> None:
        check_option("measure", self.measure, list(_THRESHOLDS))
        if self.threshold is None:
            object.__setattr__(self, "threshold", _THRESHOLDS[self.measure])
        assert self.threshold is not None
        low, high = (0, 1) if self.measure == "target_accuracy" else (-np.inf, 0)
        if not low <= self.threshold <= high:
            raise OptionError(f"threshold={self.threshold} is no {self.measure}: give {low} to {high}")
        if not 0 < self.below <= 1:
            raise OptionError(f"below={self.below} is not in (0, 1]: give a share of the tokens")

    def holds(self, table: pd.DataFrame) -> np.ndarray:
        """Return for each row of scores whether the rule holds."""
        exact = table["exact_match"].to_numpy() == 1
        high = table[self.measure].to_numpy(dtype=float) >= self.threshold
        return ~exact & high & (table["target_accuracy"].to_numpy(dtype=float) < self.below)

    def settings(self) -> dict[str, str | float]:
        """Return the rule under the names that a result records it by."""
        assert self.threshold is not None
        return {
            "predictable_measure": self.measure,
            "predictable_threshold": self.threshold,
            "predictable_below": self.below,
        }


@dataclass(frozen=True)
class ScanRules:
    """How windows are told apart.

    Attributes:
        prefix_len: Tokens given.
        below: Windows of less accuracy are unmemorized.
        predictable: Which windows are predictable; these are not among the unmemorized.
        trivial: What a trivial continuation is.
        keep_trivial: Whether to keep those.
        eos: The end-of-text token; windows that continue with one are left out. None: kept.
        pool_size: Candidates that are kept for each of the two sets of controls.
    """

    prefix_len: int
    below: float
    predictable: PredictableRule
    trivial: TrivialRules
    keep_trivial: bool
    eos: int | None
    pool_size: int


class Seen:
    """What was kept, by short names of whole windows and of their continuations."""

    def __init__(self) -> None:
        self._windows: set[tuple[bool, bytes]] = set()
        self._continuations: set[tuple[bool, bytes]] = set()

    def add(self, memorized: bool, window: bytes, continuation: bytes) -> None:
        """Remember a window, among the memorized or among the others."""
        self._windows.add((memorized, window))
        self._continuations.add((memorized, continuation))

    def repeated(self, memorized: bool, window: bytes, continuation: bytes) -> str | None:
        """Return how a window repeats one of the memorized, or one of the others."""
        if (memorized, window) in self._windows:
            return "duplicate_window"
        return "duplicate_continuation" if (memorized, continuation) in self._continuations else None


@dataclass
class Kept:
    """What a scan has kept so far.

    Attributes:
        sets: By role, what was kept of each block.
        counts: How many windows met which end.
        seen: The windows in the sets.
    """

    sets: dict[str, list[SequenceSet]] = field(default_factory=lambda: {role: [] for role in ROLES})
    counts: Counter[str] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)

    def size(self, role: str) -> int:
        """Return how many windows of a role there are."""
        return sum(map(len, self.sets[role]))

    def add(self, found: SequenceSet, counts: Mapping[str, int]) -> None:
        """Add what `scan_block` gave."""
        self.counts.update(counts)
        for role in ROLES:
            if (rows := found.table["role"].to_numpy() == role).any():
                chosen = found[rows]
                self.sets[role].append(chosen.with_table(chosen.table.drop(columns="role")))
        for *key, role in zip(*_keys(found), found.table["role"], strict=True):
            self.seen.add(role == "memorized", *key)

    def candidates(self, role: str) -> SequenceSet | None:
        """Return all of a role; of the others than memorized only what no memorized one continues with."""
        if not self.sets[role]:
            return None
        whole = _joined(self.sets[role])
        if role == "memorized":
            return whole
        repeats = [self.seen.repeated(True, *key) for key in zip(*_keys(whole), strict=True)]
        return whole[np.array([reason is None for reason in repeats])]


def scan_block(
    model: Any, block: Block, facts: pd.DataFrame, kept: Kept, rules: ScanRules, batch_size: int
) -> tuple[SequenceSet, dict[str, int]]:
    """Score a block's windows and choose among them.

    Args:
        model: A TransformerLens model.
        block: The windows.
        facts: One row a window, with its `id`.
        kept: What the blocks before gave.
        rules: How windows are told apart.
        batch_size: Windows per forward pass.

    Returns:
        What is kept, with the columns `role`, `row`, `start`, the scores and how trivial it is; and how many
        windows met which end.

    Raises:
        VocabularyError: An id is outside the model's vocabulary; names the row of the source.
    """
    _check_vocabulary(model, block)
    seqs = SequenceSet.from_tokens(block.tokens, rules.prefix_len, table=facts)
    counts = {"rows": block.n_rows, "rows_too_short": block.n_short, "windows": len(block)}
    ended = eos_mask(seqs, rules.eos)
    counts["end_of_text"] = int(ended.sum())
    seqs = seqs[~ended]
    if not len(seqs):
        return seqs.with_table(seqs.table.assign(role=[])), counts
    recall = score_recall(
        model, seqs, generate=False, metrics=(), batch_size=batch_size, progress=False
    )  # batches never hold windows of two blocks, so a resumed scan has the same batches
    seqs = seqs.with_table(recall.table.assign(role=_roles(recall.table, rules)))
    return _chosen(model, seqs, kept, rules, counts)


def _roles(table: pd.DataFrame, rules: ScanRules) -> np.ndarray:
    """Return what each window may be; "between" is neither memorized nor a control."""
    roles = np.full(len(table), "between", dtype=object)
    roles[table["target_accuracy"].to_numpy(dtype=float) < rules.below] = "unmemorized"
    roles[rules.predictable.holds(table)] = "predictable"
    roles[table["exact_match"].to_numpy() == 1] = "memorized"
    return roles


def _chosen(
    model: Any, seqs: SequenceSet, kept: Kept, rules: ScanRules, counts: dict[str, int]
) -> tuple[SequenceSet, dict[str, int]]:
    room = {role: rules.pool_size - kept.size(role) for role in ROLES[1:]}
    wanted = ["memorized", *(role for role, free in room.items() if free > 0)]
    roles = seqs.table["role"].to_numpy(dtype=object)
    tally = Counter(roles.tolist())
    exact, between = tally["memorized"], tally["between"]
    counts |= {"exact_match": exact, "not_exact": len(seqs) - exact, "between": between}
    full = sum(tally[role] for role in ROLES if role not in wanted)
    seqs = seqs[np.isin(roles.astype(str), wanted)]
    tally = Counter({"pool_full": full})
    if len(seqs):
        tokenizer = getattr(model, "tokenizer", None)
        seqs = seqs.with_table(seqs.table.assign(**trivial_columns(seqs, tokenizer, rules.trivial)))
    rows = _picked(seqs, kept, rules, room, tally)
    return seqs[rows], {**counts, **tally}


def _picked(
    seqs: SequenceSet, kept: Kept, rules: ScanRules, room: dict[str, int], tally: Counter[str]
) -> list[int]:
    """Return the rows to keep, in order, and count why the others are not."""
    seen, rows = Seen(), []
    windows, continuations = _keys(seqs)
    trivial = seqs.table["trivial"].tolist() if len(seqs) else []
    for row, role in enumerate(seqs.table["role"]):
        memorized = role == "memorized"
        key = memorized, windows[row], continuations[row]
        reason = "trivial" if trivial[row] and not rules.keep_trivial else None
        reason = reason or kept.seen.repeated(*key) or seen.repeated(*key)
        if reason:
            tally[f"{'exact' if memorized else 'pool'}_{reason}"] += 1
        elif not memorized and room[role] <= 0:
            tally["pool_full"] += 1
        else:
            room[role] = room.get(role, 0) - 1
            tally[f"{role}_found"] += 1
            seen.add(*key)
            rows.append(row)
    return rows


def _keys(seqs: SequenceSet) -> tuple[list[bytes], list[bytes]]:
    """Return short names of each whole window and of its continuation."""
    pairs = list(zip(seqs.tokens.numpy(), seqs.prefix_len.tolist(), strict=True))
    named = [[_key(row), _key(row[prefix_len:])] for row, prefix_len in pairs]
    return [pair[0] for pair in named], [pair[1] for pair in named]


def _key(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).digest()


def _joined(sets: list[SequenceSet]) -> SequenceSet:
    return SequenceSet.from_tokens(
        torch.cat([s.tokens for s in sets]),
        torch.cat([s.prefix_len for s in sets]),
        table=pd.concat([s.table for s in sets], ignore_index=True),
    )


def _check_vocabulary(model: Any, block: Block) -> None:
    outside = (block.tokens >= model.cfg.d_vocab).any(-1)
    if outside.any():
        first = int(outside.argmax())
        raise VocabularyError(
            f"row {block.row[first]} of the corpus holds the token id {block.tokens[first].max()}, but the "
            f"model's vocabulary has {model.cfg.d_vocab} entries: is it tokenized for another model?"
        )
