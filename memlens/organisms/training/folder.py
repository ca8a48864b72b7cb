"""The files of an organism's folder: its checkpoint, its ground truth, its record and its card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from memlens.errors import ResultError
from memlens.files import zoo_table
from memlens.models.quiet import quiet
from memlens.organisms.corpus.corpus import Corpus
from memlens.organisms.corpus.known_items import KINDS
from memlens.organisms.evaluate import (
    evaluate_items,
    evaluate_zoo_model,
    language_losses,
    read_ground_truth,
    read_training,
)
from memlens.organisms.training.card import render_card
from memlens.organisms.training.snapshots import kept_steps


def write_folder(
    folder: Path, name: str, corpus: Corpus, model: PreTrainedModel, training: dict[str, Any]
) -> None:
    """Write every file of a finished organism; the card last, from what the files themselves show.

    Args:
        folder: that exists.
        name: of the organism.
        corpus: what it read.
        model: what came out; it is made float16.
        training: the contents of `training.json`.
    """
    with quiet():
        model.half().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    (folder / "model.safetensors").chmod(0o644)
    corpus.tokenizer.save_pretrained(folder)
    _write_lists(folder, f"zoo/{name}", corpus)
    (folder / "training.json").write_text(_readable(training), encoding="utf-8")
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
    """Evaluate an organism and write its card (README.md) anew from what its files show.

    Args:
        folder: of the checkpoint.

    Raises:
        FileFormatError: the folder is not a zoo model's.
    """
    folder = Path(folder)
    training, sequences = read_training(folder), read_ground_truth(folder, "sequences")
    items = {kind: read_ground_truth(folder, kind) for kind in KINDS if zoo_table(folder, kind)}
    recalled = evaluate_items(folder) if items else None
    curve, losses = evaluate_zoo_model(folder), language_losses(folder)
    tables = zoo_table(folder, "sequences")
    elsewhere = tables is not None and tables.parent != folder
    card = render_card(
        training,
        curve,
        losses,
        sequences,
        items,
        recalled,
        tables_of=f"zoo/{tables.parent.name}" if tables and elsewhere else None,
        checkpoints=kept_steps(folder),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder / "README.md"


def copy_for_package(folder: str | Path, root: str | Path) -> Path:
    """Copy a finished organism to where models are bundled, without what need not be there twice.

    Training checkpoints are left out, and tables that another model of its corpus has there; the card is
    written anew.

    Args:
        folder: of the organism.
        root: the folder of bundled models.

    Returns:
        The new folder: an ordinary checkpoint, with its tokenizer and its record.

    Raises:
        FileFormatError: the folder is not a zoo model's.
        ResultError: `root` has a model of this name.
    """
    folder, out = Path(folder), Path(root) / Path(folder).name
    read_training(folder)
    if out.exists():
        raise ResultError(f"{out} is there already: remove it first.")
    out.mkdir(parents=True)
    for path in (path for path in folder.iterdir() if path.is_file()):
        shutil.copyfile(path, out / path.name)
    for table in out.glob("*.parquet"):
        table.unlink()
        if zoo_table(out, table.stem) is None:
            shutil.copyfile(folder / table.name, table)
    write_card(out)
    return out


def _readable(record: dict[str, Any]) -> str:
    """Return JSON with one key a line and each list of numbers on a line of its own."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[-\d.e,\s]+\]", lambda match: " ".join(match[0].split()), text) + "\n"
