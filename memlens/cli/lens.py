"""The command line's `memlens lens`: tuned lenses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from memlens.cli.console import (
    OUT,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    RevisionOption,
    SeedOption,
    print_json,
    records,
)
from memlens.errors import OptionError

if TYPE_CHECKING:
    import numpy as np


lens_app: typer.Typer = typer.Typer(
    help="Tuned lenses: affine translators for residual decoding.", no_args_is_help=True
)


@lens_app.callback()
def lens() -> None:
    """Tuned lenses: affine translators for residual decoding."""


@lens_app.command("train")
def lens_train(
    model: Annotated[str, typer.Argument(help="Hub name, checkpoint folder, .gguf file or zoo name.")],
    out: Annotated[Path, typer.Option(help="Folder for the lens.")],
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8), cut into windows.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, or another file of sequences.")
    ] = None,
    zoo_corpus: Annotated[
        bool, typer.Option("--zoo-corpus", help="What a zoo model was trained on, without what was planted.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Updates.")] = 250,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate (default: 1 for sgd, 1e-3 for adam).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of an update.")] = 16,
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    weight_decay: Annotated[float, typer.Option(help="Pull towards the logit lens.")] = 1e-3,
    holdout: Annotated[float, typer.Option(help="Share of the windows that is held out.")] = 0.1,
    window: Annotated[int, typer.Option(help="Tokens of a window of text.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also write config.json and params.pt as tuned-lens does.")
    ] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a tuned lens on text that is not to be decoded later; write it, and what it gained.

    Example: memlens lens train zoo/pythia-s --zoo-corpus --steps 100 --out my-lens
    """
    import memlens as ml
    from memlens.sequences.natural import text_windows

    given = [text is not None, tokens is not None, zoo_corpus]
    if sum(given) != 1:
        raise OptionError(
            f"{sum(given)} sources of text were given: give one of --text, --tokens, --zoo-corpus."
        )
    loaded = ml.load_model(model, backend=backend, dtype=dtype, device=device, revision=revision)
    if text is not None:
        rows = text_windows(getattr(loaded, "tokenizer", None), text, window)
    elif tokens is not None:
        rows = ml.load_sequences(str(tokens), loaded, prefix_len=1)
    else:
        rows = zoo_rows(model)
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


def zoo_rows(name: str) -> np.ndarray:
    """Return the rows that a zoo model was trained on, made anew from its recipe, without planted ones.

    Raises:
        ModelNotFoundError: The zoo has no such model.
        FileFormatError: The model's folder does not tell its recipe.
    """
    from memlens.organisms.corpus.corpus import BACKGROUND
    from memlens.organisms.training.zoo import zoo_corpus

    corpus = zoo_corpus(name)
    return corpus.rows[corpus.row_sequence == BACKGROUND]


def _print_gain(trained: Any) -> None:
    table = Table(title="Divergence from the model on held-out text (nats a token)")
    for column in ("after block", "logit lens", "tuned lens"):
        table.add_column(column, justify="right")
    for layer, before, after, _ in trained.heldout_kl().itertuples(index=False):
        table.add_row("embedding" if layer < 0 else str(layer), f"{before:.4g}", f"{after:.4g}")
    OUT.print(table)
