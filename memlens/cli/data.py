"""Commands about public sets of sequences: `memlens data`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cyclopts import App

from memlens.cli.console import OUT, Json, print_json, print_table, records

data_app: App = App(name="data", help="Public sets of sequences that are known by name.")


@data_app.command(name="list")
def data_list(*, as_json: Json = False) -> None:
    """List the sets that --sequences takes by name, with their license and what they were made for.

    Example: memlens data list
    """
    from memlens.sequences.named import named_sets

    table = named_sets()
    if as_json:
        print_json(records(table))
    else:
        shown = table.filter(["name", "parts", "rows", "families", "license", "made_for"])
        shown["rows"] = ["" if rows is None else f"{rows:,}" for rows in table["rows"]]
        shown["parts"] = [_few(parts) for parts in table["parts"]]
        shown["license"] = table["license"].replace("", "not known")
        print_table(shown, "Sets of sequences")


@data_app.command(name="show")
def data_show(name: str, *, as_json: Json = False) -> None:
    """Print all that is known about a set: its parts, where they are, and how they are read.

    Example: memlens data show hubble:passages_wikipedia

    Args:
        name: Name of a set, with or without a part.
    """
    import pandas as pd

    from memlens.report.bibliography import REFERENCES
    from memlens.sequences.named import find_set

    entry = find_set(name)
    paper = REFERENCES[entry.cite]
    facts = _stated(entry)
    facts["paper"] = f"{paper.authors} ({paper.year}). {paper.title}. {paper.url}"
    facts |= {"license": entry.license or "not known", "checksum": entry.checksum or "not known"}
    parts = [{"name": part.name, "rows": part.rows, **_stated(part)} for part in entry.parts]
    if as_json:
        print_json({**facts, "parts": parts})
        return
    for key, value in facts.items():
        OUT.print(f"{key}: {', '.join(value) if isinstance(value, tuple) else value}", markup=False)
    table = pd.DataFrame(parts).astype(object)
    table["rows"] = ["not known" if part["rows"] is None else f"{part['rows']:,}" for part in parts]
    print_table(table.where(table.notna(), ""), "Parts")


def _stated(entry: Any) -> dict[str, Any]:
    """Return the fields of a set or part that are not at their defaults, without the parts."""
    pairs = [(field.name, getattr(entry, field.name), field.default) for field in fields(entry)]
    return {name: value for name, value, default in pairs if value != default and name != "parts"}


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"
