"""How much of its known items an organism recalls: expressions, facts and identifiers, by their frequency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from memlens.organisms.evaluate import load_organism, read_ground_truth
from memlens.organisms.known_items import KINDS
from memlens.organisms.tokenizer import load_tokenizer
from memlens.results.statistics import wilson_interval

__all__ = ["CONTEXTS", "evaluate_items", "neutral_contexts"]

CONTEXTS = ("none", "neutral")
_LONGEST = 32
_BATCH = 64


def evaluate_items(folder: str | Path) -> pd.DataFrame:
    """Measure the recall of a zoo model's known items.

    An item counts as recalled when the model's most likely token is the right one at every position of its
    target, given all tokens before. It is asked for twice: with the bare prompt at the start of the input
    (context "none"), and after a line of held-out text and a line break ("neutral"; see `neutral_contexts`,
    item i after the i-th in turn).

    Args:
        folder: of the checkpoint.

    Returns:
        One row for each kind (of `KINDS`), context (of `CONTEXTS`) and number of copies: `kind`, `context`,
        `copies`, `n` (items), `recalled` (share), `low` and `high` (95 % Wilson interval), `token_accuracy`
        (share of the targets' tokens).

    Raises:
        FileFormatError: the folder has no lists of known items.
    """
    items = {kind: read_ground_truth(folder, kind) for kind in KINDS}
    model, contexts = load_organism(folder), neutral_contexts(folder)
    scored = [
        _scored(model, items[kind], front).assign(kind=kind, context=context)
        for kind in KINDS
        for context, front in zip(CONTEXTS, ([[]], contexts), strict=True)
    ]
    groups = pd.concat(scored).groupby(["kind", "context", "copies"], sort=False)
    cells = groups.agg(n=("exact", "size"), hits=("exact", "sum"), token_accuracy=("accuracy", "mean"))
    cells = cells.reset_index().sort_values(["kind", "context", "copies"], ignore_index=True)
    low, high = wilson_interval(cells["hits"].to_numpy(), cells["n"].to_numpy())
    cells = cells.assign(recalled=cells["hits"] / cells["n"], low=low, high=high)
    columns = ["kind", "context", "copies", "n", "recalled", "low", "high", "token_accuracy"]
    return pd.DataFrame({column: cells[column] for column in columns})


def neutral_contexts(folder: str | Path) -> list[list[int]]:
    """Return token ids to put in front of a prompt: held-out text up to a full stop, and a line break.

    Args:
        folder: of the checkpoint; the rows are those of domain "text" (or of all, where there is none) in
            its `heldout.parquet` that have a full stop among their first 32 tokens.
    """
    tokenizer = load_tokenizer(folder)
    stop, line = (tokenizer(mark).input_ids for mark in (".", "\n"))
    heldout = read_ground_truth(folder, "heldout")
    domains, rows = heldout["domain"].tolist(), heldout["tokens"].tolist()
    chosen = [row for row, domain in zip(rows, domains, strict=True) if domain == "text"] or rows
    starts = [list(map(int, row[:_LONGEST])) for row in chosen]
    ends = [max((i + 1 for i, token in enumerate(row) if [token] == stop), default=0) for row in starts]
    return [row[:end] + line for row, end in zip(starts, ends, strict=True) if end] or [line]


@torch.no_grad()
def _scored(model: PreTrainedModel, items: pd.DataFrame, fronts: Sequence[list[int]]) -> pd.DataFrame:
    """Return columns `copies`, `exact`, `accuracy`, a row an item, each behind one of `fronts`."""
    records = []
    for number, (tokens, prefix_len) in enumerate(zip(items["tokens"], items["prefix_len"], strict=True)):
        front = fronts[number % len(fronts)]
        records.append((front + list(map(int, tokens)), len(front) + int(prefix_len)))
    right = [
        hits
        for first in range(0, len(records), _BATCH)
        for hits in _hits(model, records[first : first + _BATCH])
    ]
    exact, accuracy = [bool(hits.all()) for hits in right], [float(hits.mean()) for hits in right]
    return pd.DataFrame({"copies": items["copies"].to_numpy(), "exact": exact, "accuracy": accuracy})


def _hits(model: PreTrainedModel, records: Sequence[tuple[list[int], int]]) -> list[np.ndarray]:
    """Return for each row of tokens whether each of its targets is predicted; padding is on the right."""
    width = max(len(tokens) for tokens, _ in records)
    batch = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in records])
    right = (model(batch).logits[:, :-1].argmax(-1) == batch[:, 1:]).numpy()
    return [row[start - 1 : len(tokens) - 1] for row, (tokens, start) in zip(right, records, strict=True)]
