"""The report of a run of the benchmark, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from memlens.benchmark.fingerprint import FINGERPRINT
from memlens.benchmark.leaderboard import Leaderboard
from memlens.benchmark.recommend import method_name
from memlens.benchmark.running import read_benchmark
from memlens.errors import ResultError
from memlens.figures import theme
from memlens.figures.labels import plain
from memlens.files import expanded, parsing
from memlens.report.model import FigureBlock, Finding, Section, TableBlock
from memlens.report.render import write_report
from memlens.store.keyed_folder import read_manifest

_SHOWN = 12
"""Methods in a figure of the leaderboard."""
_LINES = 6
"""Methods in a figure of calibration."""


def report(folder: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of a run's folder, finished or not, and return its path.

    It shows the leaderboard by carrier with intervals, cost against precision, calibration, whether deletion
    agrees with the truth, what the weights alone tell, where every method fails, and what the run took.

    Args:
        folder: Of the run.
        to: The file; `report.html` in the folder by default.

    Raises:
        ResultError: The folder holds no finished organism.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.report("bench")  # the folder of a run  # doctest: +SKIP
        PosixPath('bench/report.html')
    """
    folder = expanded(folder)
    board = read_benchmark(folder)
    suite = read_manifest(folder / "manifest.json", "benchmark", 1)["about"]["suite"]
    sections = [] if board.rows.empty else [*_leaderboards(board), *_more(board)]
    stored = folder / FINGERPRINT
    if stored.exists():
        with parsing(stored, ResultError, "make it again with memlens benchmark fingerprint"):
            sections.append(_planted_ways(pd.read_parquet(stored)))
    return write_report(
        folder / "report.html" if to is None else to,
        title="Which localizer finds a memory whose place is known?",
        lead="Sequences were written into declared components of models; methods that never see the answer "
        "rank the components. Means are over organisms with 95 % intervals, which draw base models first "
        "where there are three or more.",
        findings=[] if board.rows.empty else list(_findings(board)),
        sections=[*sections, _certificates(board)],
        settings={"benchmark": suite, "effort": board.effort()},
        command=f"memlens benchmark report {folder.name}",
    )


def _findings(board: Leaderboard) -> Iterator[Finding]:
    """Say which method to use for each kind of component."""
    for component in dict.fromkeys(board.planted["component"]):
        best = board.best(str(component))
        method = method_name(best["localizer"], best["variant"])
        yield Finding(
            f"Which {str(component).replace('_', ' ')}",
            f"Use {method}: its mean average precision is {best['average_precision']:.2f}.",
            best["average_precision"], best["low"], best["high"], "average precision", int(best["n"]),
            f"a random ranking: {best['chance']:.2f}",
        )  # fmt: skip


def _named(table: pd.DataFrame) -> pd.DataFrame:
    names = [method_name(*pair) for pair in zip(table["localizer"], table["variant"], strict=True)]
    return table.assign(method=names)


def _leaderboards(board: Leaderboard) -> Iterator[Section]:
    table = _named(board.table())
    groups: Any = table.groupby(["carrier_kind", "component"], sort=False)
    for (carrier, component), own in groups:
        fair = own[~own["control"].astype(bool)].head(_SHOWN)
        shown = pd.concat([fair, own[own["control"].astype(bool) & (own["variant"] == "")]])
        words = str(component).replace("_", " ")
        title = f"Carrier {carrier}: {words}"
        first = own.iloc[0]
        note = (
            f"{first['method']} comes first with {first['average_precision']:.2f}; a random ranking has "
            f"{first['chance']:.2f} on average (dotted line). Gray: controls."
        )
        columns = [
            "method", "control", "twin", "n", "average_precision", "low", "high", "interval", "chance",
            "forwards", "cpu_seconds", "seconds", "behind_best", "note",
        ]  # fmt: skip
        yield Section(
            title, "", [FigureBlock(_dots(shown, title), note)], [TableBlock("All methods", own[columns])]
        )


def _dots(shown: pd.DataFrame, title: str) -> go.Figure:
    """One dot per method with its interval, the best at the top."""
    shown = shown.iloc[::-1]
    control = shown["control"].to_numpy(bool)
    colors = [theme.OKABE_ITO[6] if c else theme.OKABE_ITO[0] for c in control]
    mean, low, high = (shown[c].to_numpy(float) for c in ("average_precision", "low", "high"))
    bars = theme.error_bars(mean, low, high, theme.INK)
    dots = go.Scatter(
        x=mean, y=[plain(m) for m in shown["method"]], mode="markers", error_x=bars, showlegend=False,
        marker={"color": colors, "size": 9}, customdata=np.stack([low, high, shown["n"]], 1),
        hovertemplate="%{y}: %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n = %{customdata[2]}"
        "<extra></extra>",
    )  # fmt: skip
    fig = go.Figure(dots)
    fig.add_vline(x=float(shown["chance"].iloc[0]), line_dash="dot", line_color="#9aa5b1")
    fig.update_xaxes(title_text="average precision", range=[0, 1.03])
    n = shown["n"].max()
    return theme.figure(fig, title=title, subtitle=f"{n} organisms", height=200 + 24 * len(shown))


def _more(board: Leaderboard) -> Iterator[Section]:
    planted = Leaderboard(board.organisms, board.planted)
    if planted.rows.empty:
        return
    table: Any = _named(planted.table(by=()))
    table = table[~table["control"].astype(bool)]
    costly = table[table["forwards"] > 0]
    if len(costly):
        figures = [
            FigureBlock(_cost(own, str(component)), "Up is better, left is cheaper; hover for the method.")
            for component, own in costly.groupby("component", sort=False)
        ]
        lead = "Cost is in plain forward passes of the sequences, without the passes on other sequences."
        yield Section("Cost against precision", lead, figures)
    kinds: tuple[tuple[Literal["rank", "z"], str], ...] = (("rank", "rank"), ("z", "z-score"))
    for by, x in kinds:
        try:
            found: Any = _named(planted.calibration(by))
        except ResultError:  # a run of an earlier version
            continue
        if found.empty:
            continue
        figures = []
        for component, own in found.groupby("component", sort=False):
            best = table.loc[table["component"] == component, "method"]
            names = [m for m in best if m in set(own["method"])][:_LINES]
            figure = _calibration(own[own["method"].isin(names)], names, str(component), x)
            figures.append(FigureBlock(figure, f"The share of planted components at each {x}."))
        yield Section(f"Calibration by {x}", "How sure is the top of a ranking?", figures)
    if "deletion_specific" in planted.rows:
        lead = (
            "Methods are often compared by deletion, which needs no truth: how much is lost when the first k "
            "components are set to zero. tau says whether that orders methods as the truth does."
        )
        tables = [TableBlock("Agreement over methods within each organism", planted.deletion_agreement())]
        tables.append(
            TableBlock("Uniqueness", planted.table("uniqueness", by=()).dropna(subset="uniqueness"))
        )
        yield Section("Deletion and uniqueness", lead, [], tables)
    rows: Any = planted.rows
    norms = rows[rows["localizer"] == "weight norm"]
    tables = []
    if len(norms):
        means = norms.groupby(["carrier", "component"], sort=False)[
            ["roc_auc", "average_precision", "chance"]
        ]
        tables.append(TableBlock("What the norm of the weights alone finds", means.mean().reset_index()))
    if tables:
        lead = (
            "At a ROC AUC of 0.5 the weights tell nothing; where it is near 1, planting left a fingerprint."
        )
        yield Section("Fingerprint", lead, [], tables)
    yield _failures(rows, board.organisms)
    nothing = board.without_truth()
    if len(nothing):
        lead = (
            "Nothing was planted, or into all weights alike. Components drawn at random count as planted, so "
            "chance is the best that a method can do."
        )
        yield Section("Nothing to find", lead, [], [TableBlock("Average precision less chance", nothing)])


def _planted_ways(table: pd.DataFrame) -> Section:
    """Show what the weights alone tell by what planting keeps of each row."""
    lead = (
        "What the weights alone tell of a carrier, without any input, by what planting keeps of each changed "
        "row. Where it keeps nothing, a method that reads norms finds what was planted whatever sequence it "
        "looks at. auc_base is that of the same components in the base model."
    )
    return Section("Fingerprint by the way of planting", lead, [], [TableBlock("Ways of planting", table)])


def _cost(own: pd.DataFrame, component: str) -> go.Figure:
    fig = go.Figure(
        go.Scatter(
            x=own["forwards"], y=own["average_precision"], mode="markers", showlegend=False,
            text=[plain(m) for m in own["method"]], marker={"color": theme.OKABE_ITO[0], "size": 9},
            hovertemplate="%{text}: %{y:.3f} for %{x:.3g} passes<extra></extra>",
        )
    )  # fmt: skip
    fig.update_xaxes(type="log", title_text="forward passes")
    fig.update_yaxes(title_text="average precision", range=[0, 1.03])
    title = f"Cost against precision: {component.replace('_', ' ')}"
    return theme.figure(fig, title=title, subtitle="all carriers that hold some", height=420)


def _calibration(own: pd.DataFrame, names: list[str], component: str, x: str) -> go.Figure:
    fig = go.Figure()
    for name, color in zip(names, theme.group_colors(names), strict=True):
        line: Any = own[own["method"] == name]
        share, low, high = (line[c].to_numpy(float) for c in ("share", "low", "high"))
        bars = theme.error_bars(share, low, high, color)
        fig.add_scatter(
            x=line["bin"], y=share, error_y=bars, mode="lines+markers", name=plain(name),
            line_color=color, showlegend=True, customdata=line["components"],
            hovertemplate="%{x}: %{y:.3f} of %{customdata}<extra>" + plain(name) + "</extra>",
        )  # fmt: skip
    fig.update_xaxes(type="category", title_text=x)
    fig.update_yaxes(title_text="share planted", range=[0, 1.03])
    title = f"Calibration by {x}: {component.replace('_', ' ')}"
    return theme.figure(fig, title=title, subtitle="the methods with the best precision", height=460)


def _failures(rows: Any, organisms: pd.DataFrame) -> Section:
    """Show the organisms on which even the best method does worst, and what their certificates say of it."""
    fair = _named(rows[~rows["control"].astype(bool)])
    keys = ["model", "carrier", "seed", "component"]
    best: Any = fair.loc[fair.groupby(keys)["average_precision"].idxmax()]
    columns = [*keys, "average_precision", "chance", "method"]
    reported = [name for name in ("shared", "sufficiency") if name in organisms]
    table = best.sort_values("average_precision")[columns].rename(
        columns={"average_precision": "best_average_precision", "method": "best_method"}
    )
    if reported:
        told: Any = organisms[[*keys[:3], *reported]]
        table = table.merge(told, on=keys[:3], how="left")
    lead = (
        "The best of all methods on each organism, worst organisms first; choosing the best afterwards is "
        "optimistic. Where even it is near chance, the memory has other carriers, or its parts replace each "
        "other. shared: components outside the carrier without which the memory is lost too; sufficiency: "
        "how much of it the carrier brings back on its own."
    )
    return Section("Where every method fails", lead, [], [TableBlock("By organism", table, rows=40)])


def _certificates(board: Leaderboard) -> Section:
    organisms: Any = board.organisms
    passed = organisms["passed"].astype(bool)
    groups = organisms.assign(passed=passed).groupby(["model", "carrier"], sort=False)
    counts = groups["passed"].agg(["size", "sum"]).rename(columns={"size": "organisms", "sum": "passed"})
    tables = [TableBlock("Organisms", counts.reset_index())]
    if not passed.all():
        tables.append(TableBlock("Organisms that failed", organisms[~passed].dropna(axis=1, how="all")))
    effort = board.effort()
    lead = (
        f"{int(passed.sum())} of {len(organisms)} organisms passed and were used. The run took "
        f"{effort['seconds'] / 60:.1f} minutes and {effort['cpu_seconds'] / 60:.1f} CPU minutes"
    )
    memory = effort["peak_mib"]
    return Section("Organisms", lead + (f", and {memory:.0f} MiB." if memory == memory else "."), [], tables)
