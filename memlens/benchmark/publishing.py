"""`publish`: what a run found, as the files that memlens and its documentation read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from memlens.benchmark.leaderboard import Leaderboard
from memlens.benchmark.recommend import method_name
from memlens.benchmark.running import read_benchmark
from memlens.benchmark.suites import model_family
from memlens.errors import FileFormatError
from memlens.files import expanded, write_atomically

_WORDS = {
    "head": "Heads", "neuron": "Neurons", "layer_mlp": "MLP of a layer",
    "layer_attention": "Attention of a layer",
}  # fmt: skip
_MARKS = "<!-- benchmark {}: written by memlens benchmark publish -->"
_ROWS = 10


def publish(
    folder: str | Path, to: str | Path | None = None, *, docs: str | Path | None = None
) -> list[Path]:
    """Write what a run found where `recommended` and `known` read it, and its tables into a page.

    Args:
        folder: Of a run.
        to: Folder for `recommended.yaml` and `leaderboard.csv`; memlens' own by default.
        docs: A Markdown page in which the text between the two marks `<!-- benchmark begin … -->` and
            `<!-- benchmark end … -->` is replaced.

    Returns:
        The files that were written.

    Raises:
        FileFormatError: The page has no marks.
        ResultError: The folder holds no run.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.publish("bench", to="published")  # the folder of a run  # doctest: +SKIP
    """
    board = read_benchmark(folder)
    target = Path(str(files("memlens.benchmark"))) if to is None else expanded(to)
    note = "# Written by memlens benchmark publish from a run that docs/localization.md shows.\n"
    text = note + yaml.safe_dump(board.recommendations(), sort_keys=False, allow_unicode=True)
    table = compact(board).to_csv(index=False, float_format="%.4g", lineterminator="\n")
    page = None if docs is None else _with_tables(expanded(docs), markdown(board))
    written = [
        write_atomically(target / "recommended.yaml", text.encode()),
        write_atomically(target / "leaderboard.csv", table.encode()),
    ]
    return written if page is None or docs is None else [*written, write_atomically(docs, page.encode())]


def compact(board: Leaderboard) -> pd.DataFrame:
    """Return one row per kind of component, localizer, variant and family of models, "" for all of them.

    Columns: `component`, `localizer`, `variant`, `family`, `control`, `twin`, `n`, `average_precision` and
    `recall_at_k` with `_low`, `_high` and `_chance` each, `average_precision_carrying`, `uniqueness`,
    `deletion_specific`, `forwards`, `forwards_others` and `cpu_seconds`. Carriers without a truth are left
    out.
    """
    planted: Any = board.planted
    families = planted["model"].map({name: model_family(name) for name in set(planted["model"])})
    parts = [compact_part(planted, "")]
    parts += [compact_part(own, str(family)) for family, own in planted.groupby(families) if family]
    return pd.concat(parts, ignore_index=True)


def compact_part(rows: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the rows of `compact` for one family."""
    part = Leaderboard(pd.DataFrame(), rows)
    keys = ["component", "localizer", "variant"]
    found = part.table("average_precision", by=()).rename(columns=_ends("average_precision"))
    columns = [*keys, "control", "twin", "n", *_ends("average_precision").values(), "average_precision"]
    found = found[[*columns, "forwards", "cpu_seconds"]]
    recall = part.table("recall_at_k", by=()).rename(columns=_ends("recall_at_k"))
    found = found.merge(recall[[*keys, "recall_at_k", *_ends("recall_at_k").values()]], on=keys)
    for name, middle in (
        ("average_precision_carrying", "mean"),
        ("uniqueness", "mean"),
        ("deletion_specific", "mean"),
        ("forwards_others", "median"),
    ):
        if name in rows:
            found = found.merge(rows.groupby(keys)[name].agg(middle).reset_index(), on=keys, how="left")
        else:
            found[name] = np.nan
    return found.assign(family=family)


def _ends(measure: str) -> dict[str, str]:
    return {end: f"{measure}_{end}" for end in ("low", "high", "chance")}


def markdown(board: Leaderboard) -> str:
    """Return the tables of a run for the documentation: one per kind of component, then deletion and cost."""
    table: Any = compact(board)
    parts = []
    passed, effort = int(board.organisms["passed"].to_numpy(bool).sum()), board.effort()
    models = ", ".join(f"`{m}`" for m in sorted(set(board.organisms["model"])))
    spent = f"{effort['cpu_seconds'] / 3600:.1f} CPU hours, " if effort["cpu_seconds"] else ""
    memory = "" if np.isnan(effort["peak_mib"]) else f", {effort['peak_mib'] / 1024:.1f} GiB at most"
    parts.append(
        f"{passed} of {len(board.organisms)} organisms of {models} passed their certificates and were used; "
        f"{spent}{effort['seconds'] / 3600:.1f} hours{memory}. Means with 95 % intervals; chance is that of "
        'a random ranking; "carrying" leaves out planted components that carry nothing; cost in plain '
        "forward passes of the sequence, in brackets those on the other sequences, which are needed once per "
        "model."
    )
    every = table[table["family"] == ""]
    for component, own in every.groupby("component", sort=False):
        fair = own[~own["control"].astype(bool)].head(_ROWS)
        controls = own[own["control"].astype(bool) & (own["variant"] == "")]
        other = own[own["variant"] == "on another sequence"].head(1)
        rows = [_markdown_row(row) for row in pd.concat([fair, controls, other]).to_dict("records")]
        top = own.iloc[0]
        parts.append(
            f"**{_WORDS[str(component)]}**, {int(own['n'].max())} organisms; chance: average precision "
            f"{top['average_precision_chance']:.2f}, recall {top['recall_at_k_chance']:.2f}\n\n"
            "| method | variant | average precision | carrying | recall at k | uniqueness | deletion | cost "
            "| CPU s |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    if "deletion_specific" in board.rows:
        rows = [
            f"| {r['carrier_kind']} | {r['component']} | {r['n']} | {_number(r['tau'])} "
            f"[{_number(r['low'])}, {_number(r['high'])}] | {r['best_by_deletion']} | {r['best_by_truth']} | "
            f"{_number(r['precision_lost'])} |"
            for r in board.deletion_agreement().to_dict("records")
        ]
        parts.append(
            "**Does deletion order methods as the truth does?** Kendall's τ over methods within organisms, "
            "and the average precision lost by taking the method that deletion puts first\n\n"
            "| carrier | component | n | τ | best by deletion | best by truth | lost |\n"
            "|---|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    parts += [text for text in (_by_carrier(board), _without_truth(board)) if text]
    return "\n\n".join(parts)


def _by_carrier(board: Leaderboard) -> str:
    """Return a table of the first methods by carrier, for components that several carriers hold."""
    every: Any = Leaderboard(board.organisms, board.planted).table(by=("carrier",))
    fair = every[~every["control"].astype(bool) & ~every["twin"].astype(bool)]
    rows = []
    for (component, carrier), own in fair.groupby(["component", "carrier"], sort=False):
        if fair.loc[fair["component"] == component, "carrier"].nunique() < 2:
            continue
        first = [
            f"{method_name(r['localizer'], r['variant'])} {_number(r['average_precision'])} "
            f"[{_number(r['low'])}, {_number(r['high'])}]"
            for r in own.head(3).to_dict("records")
        ]
        chance = _number(own["chance"].iloc[0])
        rows.append(f"| {component} | {carrier} | {own['n'].max()} | {chance} | {' | '.join(first)} |")
    if not rows:
        return ""
    return (
        "**By carrier**, where several hold one kind of component: average precision of the first three "
        "methods that need no twin\n\n| component | carrier | n | chance | first | second | third |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _without_truth(board: Leaderboard) -> str:
    found = board.without_truth()
    if found.empty:
        return ""
    rows = [
        f"| {r['carrier_kind']} | {r['component']} | {r['n']} | {r['methods']} | "
        f"{_number(r['above_chance'], '{:+.3f}')} [{_number(r['low'], '{:+.3f}')}, "
        f"{_number(r['high'], '{:+.3f}')}] | {_number(r['most_above'], '{:+.2f}')} |"
        for r in found.to_dict("records")
    ]
    return (
        "**Nothing to find**: nothing planted, or a memory spread over all weights. Average precision less "
        "chance, for components drawn at random as if they had been planted. The draws of a seed are the "
        "same in every model of one shape, and intervals do not hold their noise\n\n"
        "| carrier | component | n | methods | mean over methods | highest method |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _markdown_row(row: Mapping[Any, Any]) -> str:
    low, high = _number(row["average_precision_low"]), _number(row["average_precision_high"])
    cost = _number(row["forwards"], "{:.3g}")
    if row["variant"] in ("less others", "z-scored") and row["forwards_others"] > 0:
        cost += f" (+ {row['forwards_others']:.3g})"
    cells = [
        row["localizer"], row["variant"], f"{_number(row['average_precision'])} [{low}, {high}]",
        *(_number(row[n]) for n in ("average_precision_carrying", "recall_at_k", "uniqueness")),
        _number(row["deletion_specific"]), cost, _number(row["cpu_seconds"], "{:.2g}"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _number(value: float, form: str = "{:.2f}") -> str:
    return form.format(value) if np.isfinite(value) else "–"


def _with_tables(page: Path, tables: str) -> str:
    text = page.read_text(encoding="utf-8")
    begin, end = _MARKS.format("begin"), _MARKS.format("end")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise FileFormatError(f"{page} has no lines {begin!r} and {end!r} to write the tables between.")
    return pattern.sub(lambda _: f"{begin}\n\n{tables}\n\n{end}", text)
