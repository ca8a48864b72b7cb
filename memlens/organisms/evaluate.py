"""What an organism memorized and what else it learned, measured on its folder with plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from memlens.errors import FileFormatError
from memlens.files import read_json, zoo_table
from memlens.models.huggingface import load_config, load_weights
from memlens.models.names import resolve_source
from memlens.organisms.corpus.corpus import load_tokenizer
from memlens.organisms.corpus.known_items import KINDS
from memlens.results.statistics.intervals import wilson_interval
from memlens.sequences.parquet import read_table

_BATCH = 64
_LONGEST = 32
CONTEXTS = ("none", "neutral")


def load_organism(folder: str | Path) -> PreTrainedModel:
    """Return the model of a checkpoint folder as a Hugging Face model: float32, CPU, evaluation mode."""
    source = resolve_source(Path(folder))
    return load_weights(source, load_config(source), device=torch.device("cpu"), attention=None)


def read_training(folder: str | Path) -> dict[str, Any]:
    """Return the content of `training.json` in an organism's folder: specification, corpus, losses, versions.

    Raises:
        FileFormatError: The folder has no such file, so it does not belong to an organism.
    """
    path = Path(folder) / "training.json"
    if not path.is_file():
        raise FileFormatError(f"{path.parent} has no training.json: it is not the folder of a zoo model.")
    return read_json(path)


def read_ground_truth(folder: str | Path, name: str) -> pd.DataFrame:
    """Return a table of an organism's ground truth, its own or from a zoo model with the same corpus.

    Args:
        folder: Folder of the organism.
        name: Name of the table, such as "sequences".

    Raises:
        FileFormatError: There is no such table.
    """
    path = zoo_table(folder, name)
    if path is None:
        raise FileFormatError(
            f"{folder} has no {name}.parquet, nor does a zoo model with the same corpus: train it again."
        )
    return read_table(path)[0]


def evaluate_zoo_model(folder: str | Path) -> pd.DataFrame:
    """Measure the memorization curve of a zoo model on the sequences of its `sequences.parquet`.

    A sequence is an exact match if the model's most likely token is correct at every position of the
    continuation, given all tokens before it: its greedy continuation of the prefix is then the continuation.

    Args:
        folder: Folder of the checkpoint, as returned by `memlens.models.zoo.zoo_path`.

    Returns:
        One row per domain (and `"all"`) and number of copies: `domain`, `copies`, `n` (sequences),
        `exact_match` (share), `low` and `high` (95 % Wilson interval), `token_accuracy` (share of the
        continuations' tokens). `attrs` has `heldout_loss` and `unigram_entropy` over all domains (nats per
        token; see `language_losses`).

    Raises:
        FileFormatError: The folder does not belong to a zoo model.
    """
    losses = language_losses(folder).set_index("domain")
    sequences = read_ground_truth(folder, "sequences")
    scored = _scored(load_organism(folder), sequences).assign(domain=sequences["domain"].to_numpy())
    curve = _rates(pd.concat([scored, scored.assign(domain="all")]), ["domain", "copies"], "exact_match")
    curve = curve.set_index("domain").loc[losses.index].reset_index()
    curve.attrs.update({key: float(losses.at["all", key]) for key in ("heldout_loss", "unigram_entropy")})
    return curve


def _rates(scored: pd.DataFrame, keys: list[str], rate: str) -> pd.DataFrame:
    """Return for each group of `_scored` rows its size, the share of exact ones, and the token accuracy."""
    groups = scored.groupby(keys)
    cells = groups.agg(n=("exact", "size"), hits=("exact", "sum"), token_accuracy=("accuracy", "mean"))
    low, high = wilson_interval(cells["hits"].to_numpy(), cells["n"].to_numpy())
    cells = cells.assign(**{rate: cells["hits"] / cells["n"]}, low=low, high=high)
    return cells[["n", rate, "low", "high", "token_accuracy"]].reset_index()


def language_losses(folder: str | Path) -> pd.DataFrame:
    """Measure how well a zoo model predicts held-out rows of its corpus.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        One row per domain, then `"all"`: `domain`, `n` (rows), `heldout_loss` (mean cross-entropy over all
        positions after the first) and `unigram_entropy` (entropy of the domain's token frequencies in the
        corpus: the loss of a model that knows only these frequencies), both in nats per token.

    Raises:
        FileFormatError: The folder does not belong to a zoo model.
    """
    counts = {domain: np.array(c) for domain, c in read_training(folder)["corpus"]["token_counts"].items()}
    heldout = read_ground_truth(folder, "heldout")
    loss = row_losses(load_organism(folder), np.array(heldout["tokens"].tolist()))
    table = heldout.assign(loss=loss).groupby("domain", sort=False)["loss"].agg(["size", "mean"])
    rows = [
        (d, int(table.at[d, "size"]), float(table.at[d, "mean"]), entropy(counts[d])) for d in table.index
    ]
    rows.append(("all", len(heldout), float(loss.mean()), entropy(sum(counts.values(), np.zeros(1)))))
    return pd.DataFrame(rows, columns=["domain", "n", "heldout_loss", "unigram_entropy"])


def entropy(counts: Int[np.ndarray, "vocab"] | Float[np.ndarray, "vocab"]) -> float:
    """Return the entropy of relative frequencies, `-Σ p log p`, in nats.

    >>> round(entropy(np.array([5, 5, 0])), 4)
    0.6931
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: Int[np.ndarray, "row pos"]) -> Float[np.ndarray, "row"]:
    """Return a model's mean loss on each row of text, nats per token."""
    losses = []
    for batch in torch.from_numpy(rows).split(_BATCH):
        logits = model(batch).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1))
    return torch.cat(losses).double().numpy()


def evaluate_items(folder: str | Path) -> pd.DataFrame:
    """Measure the recall of a zoo model's known items.

    An item is recalled if the model's most likely token is correct at every position of its target, given all
    tokens before it. Every item is tested in two contexts: the bare prompt at the start of the input
    ("none"), and the prompt after a line of held-out text ("neutral"; see `neutral_contexts`, which the items
    use in turn).

    Args:
        folder: Folder of the checkpoint.

    Returns:
        One row per kind (of `KINDS`), context (of `CONTEXTS`) and number of copies: `kind`, `context`,
        `copies`, `n` (items), `recalled` (share), `low` and `high` (95 % Wilson interval), `token_accuracy`
        (share of the targets' tokens).

    Raises:
        FileFormatError: The folder has no lists of known items.
    """
    items = {kind: read_ground_truth(folder, kind) for kind in KINDS}
    model = load_organism(folder)
    fronts = {"none": [[]], "neutral": neutral_contexts(folder)}
    scored = [
        _scored(model, items[kind], fronts[context]).assign(kind=kind, context=context)
        for kind in KINDS
        for context in CONTEXTS
    ]
    return _rates(pd.concat(scored), ["kind", "context", "copies"], "recalled")


def neutral_contexts(folder: str | Path) -> list[list[int]]:
    """Return token ids to prepend to a prompt: held-out text up to a full stop, and a line break.

    Args:
        folder: Folder of the checkpoint. The texts are the rows of domain "text" (or of all domains, if there
            is none) in its `heldout.parquet` that have a full stop among their first 32 tokens.
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
def _scored(model: PreTrainedModel, rows: pd.DataFrame, fronts: Sequence[list[int]] = ([],)) -> pd.DataFrame:
    """Return columns `copies`, `exact`, `accuracy`, with one row per item, each after one of `fronts`."""
    records = []
    for number, (tokens, prefix_len) in enumerate(zip(rows["tokens"], rows["prefix_len"], strict=True)):
        front = fronts[number % len(fronts)]
        records.append((front + list(map(int, tokens)), len(front) + int(prefix_len)))
    right = [
        hits
        for first in range(0, len(records), _BATCH)
        for hits in _hits(model, records[first : first + _BATCH])
    ]
    exact, accuracy = [bool(hits.all()) for hits in right], [float(hits.mean()) for hits in right]
    return pd.DataFrame({"copies": rows["copies"].to_numpy(), "exact": exact, "accuracy": accuracy})


def _hits(model: PreTrainedModel, records: Sequence[tuple[list[int], int]]) -> list[np.ndarray]:
    """Return for each row of tokens whether each target is predicted; padding is on the right."""
    width = max(len(tokens) for tokens, _ in records)
    batch = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in records])
    right = (model(batch).logits[:, :-1].argmax(-1) == batch[:, 1:]).numpy()
    return [row[start - 1 : len(tokens) - 1] for row, (tokens, start) in zip(right, records, strict=True)]
