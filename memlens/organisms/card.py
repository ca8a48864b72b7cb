"""The card (README.md) of a zoo model, written from its own evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

__all__ = ["curve_table", "loss_table", "render_card"]

_CARD = """\
---
license: mit
language: en
library_name: transformers
tags: [memorization, interpretability, synthetic]
---

# zoo/{name}

A small {architecture} that was made to memorize: a model organism with known answers. It was trained on a
synthetic corpus in which sequences were planted a known number of times. It is of no use for anything but
the study of memorization.

## Model

{facts}

Weights are float16, trained in float32. Byte-level BPE tokenizer of its own, one token a digit;
`<|endoftext|>` is token 0. Training windows have {row_len} tokens and no token in front.

## Corpus

All text comes from memlens' own generators (`memlens.organisms`); nothing is taken from third parties.
Domains: {domains}.
One pass has {n_rows:,} windows ({n_tokens:,} tokens): {n_background:,} of running text and {n_planted:,}
planted copies. For each domain and each of {copies} copies, {per_cell} sequences of
{row_len} tokens ({prefix_len} prefix, {rest} continuation) were planted; {n_heldout} a domain were drawn
alike and never planted (copies 0). The corpus was read {passes} times: a sequence with c copies was met
{passes}·c times on average.

The whole list is in `sequences.parquet` (id, tokens, prefix_len, text, domain, copies, source), the corpus
row of every copy in `positions.parquet`, rows that were kept out of training in `heldout.parquet`;
`training.json` holds the specification, the token frequencies, the losses and the versions. For example, one
of those planted most often:

```text
{example}
```

## What it memorized

Share of the planted sequences whose continuation is greedily produced from the prefix, exactly, and over all
domains its 95 % Wilson interval and the share of right tokens (teacher-forced). Measured on the float16
checkpoint, computed in float32.

{curve}

## What it learned besides

Cross-entropy on rows kept out of training, against the entropy of the domain's token frequencies (nats a
token).

{losses}

## Made by

`{command}` (seed {seed}; {n_steps:,} steps of {batch_size} windows, AdamW, {learning_rate:g} at most,
cosine; {minutes:.0f} minutes on {device}).
"""


def _markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [head, ["---:"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curve_table(curve: pd.DataFrame) -> str:
    """Return the memorization curve as a Markdown table, a row for each number of copies.

    Args:
        curve: as `evaluate_zoo_model` gives it.
    """
    domains = [domain for domain in curve["domain"].unique() if domain != "all"]
    cells = curve.pivot(index="copies", columns="domain", values="exact_match")
    total = curve[curve["domain"] == "all"].set_index("copies")
    rows = [
        [
            copies,
            total.at[copies, "n"],
            *(f"{cells.at[copies, domain]:.2f}" for domain in domains),
            f"{total.at[copies, 'exact_match']:.2f}",
            f"{total.at[copies, 'low']:.2f} to {total.at[copies, 'high']:.2f}",
            f"{total.at[copies, 'token_accuracy']:.2f}",
        ]
        for copies in cells.index
    ]
    return _markdown(["copies", "sequences", *domains, "all", "95 %", "tokens right"], rows)


def loss_table(losses: pd.DataFrame) -> str:
    """Return held-out loss and unigram entropy as a Markdown table, a row a domain.

    Args:
        losses: as `language_losses` gives them.
    """
    shown = losses.assign(**{c: losses[c].map("{:.2f}".format) for c in ("heldout_loss", "unigram_entropy")})
    rows = shown[["domain", "n", "heldout_loss", "unigram_entropy"]].to_numpy().tolist()
    return _markdown(["domain", "rows", "held-out loss", "unigram entropy"], rows)


def render_card(
    training: Mapping[str, Any], curve: pd.DataFrame, losses: pd.DataFrame, sequences: pd.DataFrame
) -> str:
    """Return the text of the card.

    Args:
        training: the contents of `training.json`.
        curve: as `evaluate_zoo_model` gives it.
        losses: as `language_losses` gives them.
        sequences: the planted list.
    """
    corpus, run = training["corpus"], training["training"]
    spec = corpus["spec"]
    facts = "\n".join(f"- {key}: {value}" for key, value in training["model"]["facts"].items())
    n_planted = int(sequences["copies"].to_numpy().sum())
    passes = round(run["n_steps"] * run["spec"]["batch_size"] / corpus["n_rows"], 2)
    example = sequences.sort_values("copies", kind="stable")["text"].iloc[-1]
    return _CARD.format(
        name=training["name"],
        architecture=training["model"]["facts"]["architecture"],
        facts=facts,
        domains=", ".join(spec["domains"]),
        copies=", ".join(map(str, spec["copies"])),
        rest=spec["row_len"] - spec["prefix_len"],
        n_rows=corpus["n_rows"],
        n_tokens=corpus["n_rows"] * spec["row_len"],
        n_planted=n_planted,
        n_background=corpus["n_rows"] - n_planted,
        example=example.rstrip("\n"),
        curve=curve_table(curve),
        losses=loss_table(losses),
        command=training["command"],
        n_steps=run["n_steps"],
        minutes=run["seconds"] / 60,
        device=run["device"],
        **{key: spec[key] for key in ("row_len", "prefix_len", "per_cell", "n_heldout", "seed")},
        passes=f"{passes:g}",
        **{key: run["spec"][key] for key in ("batch_size", "learning_rate")},
    )
