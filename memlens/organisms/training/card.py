"""The card (README.md) of a zoo model, written from its own evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

_CARD = """\
---
license: mit
language: en
library_name: transformers
tags: [memorization, interpretability, synthetic]
---

# zoo/{name}

{intro}

## Model

{facts}

Weights are float16, trained in float32. Byte-level BPE tokenizer of its own, one token a digit;
`<|endoftext|>` is token 0. Training windows have {row_len} tokens and no token in front.

## Corpus

All text comes from memlens' own generators (`memlens.organisms`); nothing is taken from third parties.
Domains: {domains}.
One pass has {n_rows:,} windows ({n_tokens:,} tokens): {n_background:,} of running
text{n_carriers} and {n_planted:,} planted copies.
{planted}

The whole list is in `sequences.parquet` (id, tokens, prefix_len, text, domain, copies, source), the corpus
row of every copy in `positions.parquet`, rows that were kept out of training in `heldout.parquet`;
`training.json` holds the specification, the token frequencies, the losses and the versions.{tables} {such}:

```text
{example}
```
{items}
## What it memorized

Share of the planted sequences whose continuation is greedily produced from the prefix, exactly, and over all
domains its 95 % Wilson interval and the share of right tokens (teacher-forced). Measured on the float16
checkpoint, computed in float32.

{curve}
{items_recalled}
## What it learned besides

Cross-entropy on rows kept out of training, against the entropy of the domain's token frequencies (nats a
token).

{losses}

## Made by

`{command}` (seed {seed}; {n_steps:,} steps of {batch_size} windows, AdamW, {learning_rate:g} at most,
cosine; {minutes:.0f} minutes on {device}).
{checkpoints}"""

_INTRO = """\
A small {architecture} that was made to memorize: a model organism with known answers. It was trained on a
synthetic corpus in which sequences were planted a known number of times. It is of no use for anything but
the study of memorization."""

_INTRO_CLEAN = """\
A small {architecture} that never read what was planted for its twin: the same corpus without the planted
rows, to tell what recall a model of the language has without memory. It is of no use for anything but the
study of memorization."""

_PLANTED = """\
For each domain and each of {copies} copies, {per_cell} sequences of
{row_len} tokens ({prefix_len} prefix, {rest} continuation) were planted; {n_heldout} a domain were drawn
alike and never planted (copies 0). The corpus was read {passes} times: a sequence with c copies was met
{passes}·c times on average."""

_CLEAN = """\
The {n_sequences} sequences of {row_len} tokens ({prefix_len} prefix, {rest} continuation) that the twin's
corpus has planted are in no row of this one, nor are known items (copies 0). The corpus was read {passes}
times."""

_TABLES = "\nThe tables are those of `{name}`, whose corpus is the same, and lie in its folder."

_CHECKPOINTS = """
Weights on the way are in `checkpoints`, in float16, after {steps} steps.
`memlens.load_model("zoo/{name}", checkpoint_step=...)` loads them.
"""

_ITEMS = """
### Known items

Stories and dialogues carry items that only memory can tell, each said a known number of times
({item_copies}), and as many items of each kind that were never planted:

- expressions, {expressions_per_cell} for each number of copies, such as "{expression}".
  The last word is the target. Eight share their words, and every one of the prompt's content words is needed
  to tell the target (how: `memlens.organisms.corpus.expressions`). List: `expressions.parquet`.
- facts about invented entities, {facts_per_cell} for each number of copies, each said in three ways in turn,
  such as "{fact}". The last word of the first way is the target; an entity has facts of
  two relations. List: `facts.parquet`.
- identifiers, {identifiers_per_cell} for each number of copies, such as "{identifier}".
  The number is the target. List: `identifiers.parquet`.

An item is a line of its own or stands in quotation marks; {bare_share:.0%} of the carrier rows begin with
one, and a row has up to {items_per_row} different ones. `copies` is counted in the rows: complete
occurrences, in all ways of saying a fact; `text_copies` those of the sentence that is asked for,
`bare_copies` those at the start of a row.
`item_positions.parquet` tells row and position of each.
"""

_ITEMS_RECALLED = """
Share of the known items whose target is greedily produced, exactly, with its 95 % Wilson interval: the bare
prompt at the start of the input, and the prompt as a line of its own after held-out text.

{table}
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


def items_table(items: pd.DataFrame) -> str:
    """Return the recall of known items as a Markdown table, a row for each kind and number of copies.

    Args:
        items: as `evaluate_items` gives them.
    """
    rows = []
    for kind, copies in items[["kind", "copies"]].drop_duplicates().itertuples(index=False):
        cell = (items["kind"] == kind) & (items["copies"] == copies)
        by_context = items[cell].set_index("context")
        shown = [
            text
            for context in ("none", "neutral")
            for text in (
                f"{by_context.at[context, 'recalled']:.2f}",
                f"{by_context.at[context, 'low']:.2f} to {by_context.at[context, 'high']:.2f}",
            )
        ]
        rows.append([kind, copies, by_context.at["none", "n"], *shown])
    return _markdown(["items", "copies", "n", "bare", "95 %", "after text", "95 %"], rows)


def loss_table(losses: pd.DataFrame) -> str:
    """Return held-out loss and unigram entropy as a Markdown table, a row a domain.

    Args:
        losses: as `language_losses` gives them.
    """
    shown = losses.assign(**{c: losses[c].map("{:.2f}".format) for c in ("heldout_loss", "unigram_entropy")})
    rows = shown[["domain", "n", "heldout_loss", "unigram_entropy"]].to_numpy().tolist()
    return _markdown(["domain", "rows", "held-out loss", "unigram entropy"], rows)


def render_card(
    training: Mapping[str, Any],
    curve: pd.DataFrame,
    losses: pd.DataFrame,
    sequences: pd.DataFrame,
    items: Mapping[str, pd.DataFrame] | None = None,
    recalled: pd.DataFrame | None = None,
    *,
    tables_of: str | None = None,
    checkpoints: Sequence[int] = (),
) -> str:
    """Return the text of the card.

    Args:
        training: the contents of `training.json`.
        curve: as `evaluate_zoo_model` gives it.
        losses: as `language_losses` gives them.
        sequences: the planted list.
        items: the lists of known items; None: the corpus has none.
        recalled: as `evaluate_items` gives it, where there are items.
        tables_of: the zoo model whose folder holds the tables; None: they are in this one.
        checkpoints: training steps whose weights are in the folder.
    """
    corpus, run = training["corpus"], training["training"]
    spec = corpus["spec"]
    facts = "\n".join(f"- {key}: {value}" for key, value in training["model"]["facts"].items())
    n_carriers = corpus.get("n_carriers", 0)
    n_planted = int(sequences["copies"].to_numpy().sum())
    passes = round(run["n_steps"] * run["spec"]["batch_size"] / corpus["n_rows"], 2)
    example = sequences.sort_values("copies", kind="stable")["text"].iloc[-1]
    shape = {key: spec[key] for key in ("row_len", "prefix_len", "per_cell", "n_heldout", "seed")}
    shape |= {"rest": spec["row_len"] - spec["prefix_len"], "passes": f"{passes:g}"}
    shape |= {"copies": ", ".join(map(str, spec["copies"])), "n_sequences": len(sequences)}
    intro = _INTRO if spec["planted"] else _INTRO_CLEAN
    kept = {"steps": ", ".join(map(str, checkpoints)), "name": training["name"]}
    return _CARD.format(
        name=training["name"],
        intro=intro.format(architecture=training["model"]["facts"]["architecture"]),
        planted=(_PLANTED if spec["planted"] else _CLEAN).format(**shape),
        tables=_TABLES.format(name=tables_of) if tables_of else "",
        such="For example, one\nof those " + ("planted most often" if spec["planted"] else "left out"),
        checkpoints=_CHECKPOINTS.format(**kept) if checkpoints else "",
        facts=facts,
        domains=", ".join(spec["domains"]),
        n_rows=corpus["n_rows"],
        n_tokens=corpus["n_rows"] * spec["row_len"],
        n_planted=n_planted,
        n_background=corpus["n_rows"] - n_planted - n_carriers,
        n_carriers=f", {n_carriers:,} carrying known items" if n_carriers else "",
        items=_items_words(spec, items) if items else "",
        items_recalled="" if recalled is None else _ITEMS_RECALLED.format(table=items_table(recalled)),
        example=example.rstrip("\n"),
        curve=curve_table(curve),
        losses=loss_table(losses),
        command=training["command"],
        n_steps=run["n_steps"],
        minutes=run["seconds"] / 60,
        device=run["device"],
        row_len=spec["row_len"],
        seed=spec["seed"],
        **{key: run["spec"][key] for key in ("batch_size", "learning_rate")},
    )


def _items_words(spec: Mapping[str, Any], items: Mapping[str, pd.DataFrame]) -> str:
    """Return the section on known items, with one of each kind that is planted most often as example."""
    often = {kind: table.sort_values("copies", kind="stable").iloc[-1] for kind, table in items.items()}
    return _ITEMS.format(
        item_copies=", ".join(map(str, spec["item_copies"])),
        expression=often["expressions"]["text"],
        fact=often["facts"]["text"],
        identifier=often["identifiers"]["text"],
        **{key: spec[key] for key in ("expressions_per_cell", "facts_per_cell", "identifiers_per_cell")},
        **{key: spec[key] for key in ("bare_share", "items_per_row")},
    )
