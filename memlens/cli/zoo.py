"""The command line's `memlens zoo`: models with known memories, bundled or trained on demand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from memlens.cli.console import OUT, Json, Quiet, print_json, print_table, records, resumable
from memlens.errors import OptionError

if TYPE_CHECKING:
    import pandas as pd


zoo_app = App(name="zoo", help="Models with known memories, bundled or trained on demand.")

_DEFAULT = "pythia-s"


@zoo_app.command(name="list")
def zoo_list(*, as_json: Json = False) -> None:
    """List the models of the zoo: bundled, trained into the cache, or a recipe that can be trained.

    Example: memlens zoo list
    """
    from memlens.organisms.training.zoo import zoo_overview

    if as_json:
        print_json(records(zoo_overview()))
    else:
        print_table(zoo_overview(), "Zoo")


@zoo_app.command(name="train")
def zoo_train(
    names: list[str] | None = None,
    *,
    family: str | None = None,
    size: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train zoo models from their recipes, one after the other: same corpus, same seed, same models.

    Finished models are skipped, and so are bundled ones that were chosen by family and size.

    Example: memlens zoo train pythia-s olmo2-s --seed 0

    Example: memlens zoo train --family all --size all

    Args:
        names: Recipes, such as olmo2-s (default: pythia-s).
        family: All recipes of a family: pythia, gpt-neo, olmo1, …, or all.
        size: All recipes of a size: xs, s, m or all.
        out: Folder, for one model (default: the user's cache).
        steps: Fewer or more steps than the recipe has.
        device: cpu, cuda or mps; by default cuda where there is one.
        seed: Seed of every random choice.
        resume: Continue interrupted runs and skip finished ones.
    """
    from memlens.organisms.evaluate import evaluate_zoo_model
    from memlens.organisms.training.zoo import train_zoo_model

    chosen = list(names or ()) or ([] if family or size else [_DEFAULT])
    bundled: list[str] = []
    if family or size:
        selected, bundled = _selection(family or "all", size or "all")
        chosen = list(dict.fromkeys([*chosen, *selected]))
    if out is not None and len(chosen) != 1:
        raise OptionError(f"out={str(out)!r} is the folder of one model, but {len(chosen)} were chosen.")
    curves: dict[str, tuple[Path, pd.DataFrame]] = {}
    for name in bundled if not as_json else []:
        OUT.print(f"zoo/{name}: bundled")
    for name in chosen:
        with resumable(out):
            folder = train_zoo_model(
                name, out, seed=seed, steps=steps, device=device, progress=not quiet, resume=resume
            )
        curves[name] = folder, evaluate_zoo_model(folder)
        if not as_json:
            _print_model(name, *curves[name], table=len(chosen) == 1)
    if as_json:
        print_json([_told(name, *found) for name, found in curves.items()])


def _told(name: str, folder: Path, curve: pd.DataFrame) -> dict[str, Any]:
    """Return what JSON says of a model."""
    told = {"model": f"zoo/{name.removeprefix('zoo/')}", "folder": folder}
    return {**told, "heldout_loss": curve.attrs["heldout_loss"], "recall": records(curve)}


def _selection(family: str, size: str) -> tuple[list[str], list[str]]:
    """Return the recipes of a family and size to train, and those that are bundled already."""
    from memlens.organisms.training.recipes import select_recipes
    from memlens.organisms.training.zoo import zoo_overview

    table = zoo_overview()
    there = set(table.loc[table["status"] == "bundled", "model"])
    wanted = select_recipes(family, size)
    bundled = [name for name in wanted if f"zoo/{name}" in there]
    return [name for name in wanted if name not in bundled], bundled


def _print_model(name: str, folder: Path, curve: pd.DataFrame, *, table: bool) -> None:
    """Print what a model remembers: a table by copies, or one line where there are several models."""
    total = curve.loc[curve["domain"] == "all"]
    if table:
        print_table(total, "Exact match by copies in the corpus")
        OUT.print(f"model: {folder}")
        return
    often = total.iloc[-1]
    OUT.print(
        f"zoo/{name.removeprefix('zoo/')}: {often['exact_match']:.0%} of the sequences with "
        f"{often['copies']} copies exact, held-out loss {curve.attrs['heldout_loss']:.2f} nats; {folder}"
    )
