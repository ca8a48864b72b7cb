"""The command line's `memlens lens`: tuned lenses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App
from rich.table import Table

from memlens.cli.commands import from_options
from memlens.cli.console import OUT, Json, Quiet, Switch, print_json, records
from memlens.errors import OptionError
from memlens.studies.registry import ModelChoice

if TYPE_CHECKING:
    import numpy as np


lens_app = App(name="lens", help="Tuned lenses: affine translators for residual decoding.")


def lens_train(
    where: ModelChoice,
    *,
    out: Path,
    text: Path | None = None,
    tokens: Path | None = None,
    zoo_corpus: Annotated[bool, Switch] = False,
    steps: int = 250,
    lr: float | None = None,
    batch_size: int = 16,
    optimizer: str = "sgd",
    weight_decay: float = 1e-3,
    holdout: float = 0.1,
    window: int = 128,
    limit: int | None = None,
    published: Annotated[bool, Switch] = False,
    seed: int = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tuned lens on text that will not be decoded later; write it, and print what it gained.

    Example: memlens lens train zoo/pythia-s --zoo-corpus --steps 100 --out my-lens

    Args:
        where: The model.
        out: Folder for the lens.
        text: A text file (UTF-8), which is cut into windows.
        tokens: Token ids: .npy, or another file of sequences.
        zoo_corpus: The text that a zoo model was trained on, without what was planted in it.
        steps: Number of updates.
        lr: Learning rate (default: 1 for sgd, 1e-3 for adam).
        batch_size: Windows per update.
        optimizer: sgd or adam.
        weight_decay: Pull towards the logit lens.
        holdout: Share of the windows that is held out.
        window: Tokens per window of text.
        limit: Use at most this many windows.
        published: Also write config.json and params.pt in the format of tuned-lens.
        seed: Seed of every random choice.
    """
    import memlens as ml
    from memlens.sequences.natural import text_windows

    given = [text is not None, tokens is not None, zoo_corpus]
    if sum(given) != 1:
        raise OptionError(
            f"{sum(given)} sources of text were given: give one of --text, --tokens, --zoo-corpus."
        )
    loaded = where.load()
    if text is not None:
        rows = text_windows(getattr(loaded, "tokenizer", None), text, window)
    elif tokens is not None:
        rows = ml.load_sequences(str(tokens), loaded, prefix_len=1)
    else:
        rows = zoo_rows(where.model)
    trained = ml.lens.train_tuned_lens(
        loaded,
        rows if limit is None else rows[:limit],
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,
        weight_decay=weight_decay,
        holdout=holdout,
        seed=seed,
        progress=not quiet,
    )
    folder = trained.save(out)
    if published:
        trained.save(out, layout="published")
    if as_json:
        print_json({"lens": folder, "heldout_kl": records(trained.heldout_kl())})
    else:
        _print_gain(trained)
        OUT.print(f"lens: {folder}")


lens_app.command(from_options(lens_train), name="train")


def zoo_rows(name: str) -> np.ndarray:
    """Return the rows that a zoo model was trained on, rebuilt from its recipe, without planted ones.

    Raises:
        ModelNotFoundError: The zoo has no such model.
        FileFormatError: The model's folder does not record its recipe.
    """
    from memlens.organisms.corpus.corpus import BACKGROUND
    from memlens.organisms.training.zoo import zoo_corpus

    corpus = zoo_corpus(name)
    return corpus.rows[corpus.row_sequence == BACKGROUND]


def _print_gain(trained: Any) -> None:
    table = Table(title="Divergence from the model on held-out text (nats per token)")
    for column in ("after block", "logit lens", "tuned lens"):
        table.add_column(column, justify="right")
    for layer, before, after, _ in trained.heldout_kl().itertuples(index=False):
        table.add_row("embedding" if layer < 0 else str(layer), f"{before:.4g}", f"{after:.4g}")
    OUT.print(table)
