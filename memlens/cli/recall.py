"""Commands about recall: from how little something is recalled, and whether a twin recalls it too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from memlens.choices import Compression
from memlens.cli.commands import from_options
from memlens.cli.console import OUT, Json, Quiet, print_json, print_table, records
from memlens.errors import OptionError
from memlens.studies.registry import ModelChoice, SequenceChoice

if TYPE_CHECKING:
    import pandas as pd

    from memlens.results.result import Result

_SHOWN = 20
"""Most rows of a table that are printed."""

recall_app: App = App(name="recall", help="From how little is it recalled, and is it memory at all?")


def curve(
    where: ModelChoice,
    what: SequenceChoice,
    *,
    prefix_lengths: str | None = None,
    out: Path | None = None,
    figure: Path | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure recall of each continuation after the last tokens of its prefix, for several lengths.

    Example: memlens recall curve zoo/pythia-s --sequences zoo --prefix-lengths 4,16 --figure curve.html

    Args:
        where: The model.
        what: The sequences.
        prefix_lengths: Tokens of context, separated by commas (default: 8, 16, 32, …, up to the longest
            prefix).
        out: Also write each sequence's numbers: .parquet, .csv or .jsonl, or a result, .nc.
        figure: Also write the figure: .html.
    """
    import pandas as pd

    import memlens as ml
    from memlens.results.kinds import reading

    _check_files(out, figure)
    lengths = None if prefix_lengths is None else _whole_numbers(prefix_lengths)
    model = where.load()
    result = ml.recall.extraction_curve(model, what.load(model), lengths, progress=not quiet)
    means = result.mean_ci(metric=["exact_match", "target_accuracy"])
    extracted = (
        means["exact_match"].transpose("prefix_len", "statistic").sel(statistic=["mean", "low", "high"])
    )
    rows = pd.DataFrame(extracted.values, columns=pd.Index(["extracted", "low", "high"]))
    rows.insert(0, "tokens of context", means["prefix_len"].values)
    rows["targets right"] = means["target_accuracy"].sel(statistic="mean").values
    rows["sequences"] = means["n_exact_match"].values
    paths = _written(result, result.to_frame(), out, figure)
    if as_json:
        sequences = records(result.to_frame())
        told = {"reading": reading(result), "lengths": records(rows), "sequences": sequences}
        print_json({**paths, **told})
    else:
        _show(result, rows, "Recall by context", paths)


def compress(
    where: ModelChoice,
    what: SequenceChoice,
    *,
    method: Compression = "keep_last",
    budget: int | None = None,
    out: Path | None = None,
    figure: Path | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fewest prefix tokens from which greedy decoding still gives the whole continuation.

    Sequences that are not recalled from their whole prefix have no number.

    Example: memlens recall compress zoo/pythia-s --sequences zoo --method greedy_deletion --budget 200

    Args:
        where: The model.
        what: The sequences.
        method: keep_last and keep_first shorten the prefix from one end; greedy_deletion removes any tokens.
        budget: Most prompts tried per sequence (default: all).
        out: Also write each sequence's numbers: .parquet, .csv or .jsonl, or a result, .nc.
        figure: Also write the figure: .html.
    """
    import memlens as ml
    from memlens.recall.scores import GROUPS
    from memlens.results.kinds import reading

    _check_files(out, figure)
    model = where.load()
    seqs = what.load(model)
    result = ml.recall.prompt_compression(model, seqs, method, budget=budget, progress=not quiet)
    numbers = [name for name in result.metrics if result[name].dims == ("sequence",)]
    rows = result.to_frame([name for name in (*GROUPS, *numbers) if name in result.data.variables])
    paths = _written(result, rows, out, figure)
    if as_json:
        print_json({**paths, "reading": reading(result), "sequences": records(rows)})
        return
    recalled = rows.query("recalled == 1").sort_values("fewest_tokens", kind="stable")
    title = f"Fewest tokens of prefix: {min(len(recalled), _SHOWN)} of {len(recalled)} recalled sequences"
    _show(result, recalled.drop(columns="recalled").head(_SHOWN), title, paths)


def counterfactual(
    where: ModelChoice,
    what: SequenceChoice,
    *,
    clean: str,
    by: str | None = None,
    generate: bool = True,
    out: Path | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's recall minus that of a twin that was trained without the sequences.

    Example: memlens recall counterfactual zoo/pythia-s --clean zoo/pythia-s-clean --sequences zoo

    Args:
        where: The model.
        what: The sequences.
        clean: The twin: a model trained the same way on text without the sequences.
        by: A column of the sequences by which means are given (default: copies, or domain, or none).
        generate: Decode, for the score M.
        out: Also write a table, one row per sequence: .parquet, .csv or .jsonl.
    """
    import memlens as ml
    from memlens.recall.counterfactual import METRICS
    from memlens.recall.scores import table_suffix, write_table

    if out is not None:
        table_suffix(out)
    if clean == where.model:
        raise OptionError(f"clean={clean!r} is the model itself: give a twin that never saw the sequences.")
    model, twin = where.load(), where.load(clean)
    seqs = what.load(model)
    found = ml.recall.counterfactual_memorization(model, twin, seqs, generate=generate, progress=not quiet)
    by = by or next((name for name in ("copies", "domain") if name in found.table), None)
    whole = [_mean(found, metric) for metric in METRICS if metric in found.table]
    groups = None if by is None else found.means(by)
    paths = {} if out is None else {"table": write_table(found.table, out)}
    if as_json:
        rows = {} if groups is None else {"by": by, "groups": records(groups)}
        print_json({**paths, "summary": whole, **rows, "sequences": records(found.table)})
        return
    import pandas as pd

    print_table(pd.DataFrame(whole), "Recall with and without having seen the sequences")
    if groups is not None:
        print_table(groups, "Share of targets right (intervals of the difference)")
    _print_paths(paths)


def _mean(found: Any, metric: str) -> dict[str, Any]:
    """Return one metric's means over all sequences, with the interval of the difference."""
    import xarray as xr

    from memlens.results.statistics.intervals import mean_interval

    table = found.table
    difference = xr.DataArray(table[f"{metric}_counterfactual"].to_numpy(float), dims="sequence")
    mean, low, high = mean_interval(difference, method="bootstrap").values
    seen, unseen = table[metric].mean(), table[f"{metric}_clean"].mean()
    return {
        "metric": metric, "model": seen, "twin": unseen, "difference": mean, "low": low, "high": high,
    }  # fmt: skip


def _check_files(out: Path | None, figure: Path | None) -> None:
    """Refuse files that cannot be written, before the work."""
    from memlens.recall.scores import table_suffix

    if out is not None and out.suffix.lower() != ".nc":
        table_suffix(out)
    if figure is not None and figure.suffix.lower() != ".html":
        raise OptionError(f"{figure} ends in {figure.suffix!r}: a figure is written as .html.")


def _written(result: Result, rows: pd.DataFrame, out: Path | None, figure: Path | None) -> dict[str, Path]:
    """Write what was asked for; return the paths by what they are."""
    from memlens.files import replacing
    from memlens.recall.scores import write_table

    paths: dict[str, Path] = {}
    if out is not None and out.suffix.lower() == ".nc":
        paths["result"] = result.save(out)
    elif out is not None:
        paths["table"] = write_table(rows, out)
    if figure is not None:
        with replacing(figure) as part:
            result.plot().write_html(part)
        paths["figure"] = figure
    return paths


def _show(result: Result, rows: pd.DataFrame, title: str, paths: dict[str, Path]) -> None:
    from memlens.results.kinds import reading

    print_table(rows, title)
    OUT.print(reading(result), markup=False)
    _print_paths(paths)


def _whole_numbers(text: str) -> list[int]:
    """Return numbers that are separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"prefix_lengths={text!r}: give whole numbers, separated by commas, such as 8,16,32."
        ) from None


def _print_paths(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        OUT.print(f"{name}: {path}", markup=False)


recall_app.command(from_options(curve), name="curve")
recall_app.command(from_options(compress), name="compress")
recall_app.command(from_options(counterfactual), name="counterfactual")
