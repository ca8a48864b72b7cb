"""The files in an organism's folder: checkpoint, ground truth, training record and card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from memlens.errors import ResultError
from memlens.files import json_text, read_json, write_json, zoo_table
from memlens.models.quiet import quiet
from memlens.organisms.corpus.corpus import Corpus
from memlens.organisms.corpus.known_items import KINDS
from memlens.organisms.evaluate import (
    CONTEXTS,
    evaluate_items,
    evaluate_zoo_model,
    language_losses,
    read_ground_truth,
    read_training,
)
from memlens.organisms.training.routed import certify_routed, routed_organisms, routed_truth, routing_of
from memlens.organisms.training.train import kept_steps

_TRUTH, _CERTIFICATE = "truth.parquet", "certificate.json"


def write_folder(
    folder: Path, name: str, corpus: Corpus, model: PreTrainedModel, training: dict[str, Any]
) -> None:
    """Write all files of a finished organism; the card comes last, from the content of the other files.

    Args:
        folder: An existing folder.
        name: Name of the organism.
        corpus: Its training corpus.
        model: The trained model; it is converted to float16.
        training: The content of `training.json`.
    """
    with quiet():
        model.half().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    (folder / "model.safetensors").chmod(0o644)
    corpus.tokenizer.save_pretrained(folder)
    _write_lists(folder, f"zoo/{name}", corpus)
    # one key per line, but each list of numbers on one line
    text = re.sub(r"\[[-\d.e,\s]+\]", lambda m: " ".join(m[0].split()), json_text(training, indent=1))
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    if "routing" in training:
        organisms = routed_organisms(folder)
        routed_truth(organisms).to_parquet(folder / _TRUTH, index=False)
        write_json(folder / _CERTIFICATE, certify_routed(organisms, corpus.heldout).record())
    write_card(folder)


def _write_lists(folder: Path, source: str, corpus: Corpus) -> None:
    sequences = corpus.sequences.assign(source=source)
    if not corpus.spec.planted:
        sequences["copies"] = 0
    heldout = pd.DataFrame({"domain": corpus.heldout_domains, "tokens": corpus.heldout.tolist()})
    tables = {"sequences": sequences, "positions": corpus.positions(), "heldout": heldout}
    if corpus.spec.item_copies:
        for kind, table in corpus.items.tables().items():
            tables[kind] = table.assign(domain=kind.removesuffix("s"), source=source)
        tables["item_positions"] = corpus.item_positions
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)


def write_card(folder: str | Path) -> Path:
    """Evaluate an organism and write its card (README.md) from the content of its files.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        FileFormatError: The folder does not belong to a zoo model.
    """
    folder = Path(folder)
    training, sequences = read_training(folder), read_ground_truth(folder, "sequences")
    corpus, run = training["corpus"], training["training"]
    items = {kind: read_ground_truth(folder, kind) for kind in KINDS if zoo_table(folder, kind)}
    tables = zoo_table(folder, "sequences")
    card = _template().render(
        name=training["name"],
        facts=training["model"]["facts"],
        spec=corpus["spec"],
        corpus=corpus,
        run=run,
        command=training["command"],
        n_sequences=len(sequences),
        n_planted=int(sequences["copies"].to_numpy().sum()),
        n_carriers=corpus.get("n_carriers", 0),
        passes=f"{round(run['n_steps'] * run['spec']['batch_size'] / corpus['n_rows'], 2):g}",
        tables_of=f"zoo/{tables.parent.name}" if tables and tables.parent != folder else None,
        example=_planted_most(sequences).rstrip("\n"),
        often={kind: _planted_most(table) for kind, table in items.items()},
        curve=curve_table(evaluate_zoo_model(folder)),
        items_recalled=items_table(evaluate_items(folder)) if items else "",
        losses=loss_table(language_losses(folder)),
        checkpoints=kept_steps(folder),
        routing=_routing(folder) if "routing" in training else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder / "README.md"


def _routing(folder: Path) -> str:
    """Return what a routed organism's carriers hold as a Markdown table, one row per carrier."""
    facts = read_json(folder / _CERTIFICATE)["facts"]
    names = ("sequences", "recall", "recall_without", "recall_clean", "others_without")
    rows = [
        [number, carrier, *(f"{facts[f'{name}_{number}']:.3g}" for name in names)]
        for number, carrier in enumerate(routing_of(folder).carriers)
        if f"recall_{number}" in facts
    ]
    header = ["carrier", "weights", "sequences", "recall", "without it", "clean twin", "others without it"]
    return _markdown(header, rows)


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("memlens.organisms.training", "")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = "{:,}".format
    return environment.get_template("card.md.j2")


def _planted_most(table: pd.DataFrame) -> str:
    return table.sort_values("copies", kind="stable")["text"].iloc[-1]


def _markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [head, ["---:"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curve_table(curve: pd.DataFrame) -> str:
    """Return the memorization curve as a Markdown table, one row per number of copies.

    Args:
        curve: As returned by `evaluate_zoo_model`.
    """
    domains = [domain for domain in curve["domain"].unique() if domain != "all"]
    cells = curve.pivot(index="copies", columns="domain", values="exact_match")
    total = curve[curve["domain"] == "all"].set_index("copies")
    rows = []
    for copies in cells.index:
        row = total.loc[copies]
        shares = [f"{share:.2f}" for share in (*cells.loc[copies, domains], row["exact_match"])]
        interval = _ends(row)
        rows.append([copies, int(row["n"]), *shares, interval, f"{row['token_accuracy']:.2f}"])
    return _markdown(["copies", "sequences", *domains, "all", "95 %", "correct tokens"], rows)


def _ends(row: pd.Series) -> str:
    return f"{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else "too few"


def items_table(items: pd.DataFrame) -> str:
    """Return the recall of known items as a Markdown table, one row per kind and number of copies.

    Args:
        items: As returned by `evaluate_items`.
    """
    rows = []
    for kind, copies in items[["kind", "copies"]].drop_duplicates().itertuples(index=False):
        cell = (items["kind"] == kind) & (items["copies"] == copies)
        contexts = [items[cell].set_index("context").loc[name] for name in CONTEXTS]
        bare, after = ((f"{c['recalled']:.2f}", _ends(c)) for c in contexts)
        rows.append([kind, copies, int(contexts[0]["n"]), *bare, *after])
    return _markdown(["items", "copies", "n", "bare", "95 %", "after text", "95 %"], rows)


def loss_table(losses: pd.DataFrame) -> str:
    """Return held-out loss and unigram entropy as a Markdown table, one row per domain.

    Args:
        losses: As returned by `language_losses`.
    """
    shown = losses.assign(**{c: losses[c].map("{:.2f}".format) for c in ("heldout_loss", "unigram_entropy")})
    rows = shown[["domain", "n", "heldout_loss", "unigram_entropy"]].to_numpy().tolist()
    return _markdown(["domain", "rows", "held-out loss", "unigram entropy"], rows)


def copy_for_package(folder: str | Path, root: str | Path) -> Path:
    """Copy a finished organism to the folder of bundled models, without duplicates.

    Training checkpoints are omitted, and so are tables that a bundled model of the same corpus has. The card
    is written again.

    Args:
        folder: Folder of the organism.
        root: The folder of bundled models.

    Returns:
        The new folder: an ordinary checkpoint with its tokenizer and its record.

    Raises:
        FileFormatError: The folder does not belong to a zoo model.
        ResultError: `root` already has a model of this name.
    """
    folder, out = Path(folder), Path(root) / Path(folder).name
    read_training(folder)
    if out.exists():
        raise ResultError(f"{out} already exists: remove it first.")
    out.mkdir(parents=True)
    for path in (path for path in folder.iterdir() if path.is_file()):
        shutil.copyfile(path, out / path.name)
    for table in out.glob("*.parquet"):
        if table.name == _TRUTH:  # of this model, not of its corpus
            continue
        table.unlink()
        if zoo_table(out, table.stem) is None:
            shutil.copyfile(folder / table.name, table)
    write_card(out)
    return out
