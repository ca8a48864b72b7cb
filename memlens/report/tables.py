"""How a report shows a table: names of columns in words, what matters first, cells as text."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import pandas as pd

from memlens.figures.labels import metric_text
from memlens.recall.columns import COLUMNS
from memlens.report.model import TableBlock

_WORDS = {
    "p_corrected": "p, corrected for all tests",
    "n_params": "parameters",
    "n_layers": "layers",
    "prefix_len": "prefix tokens",
    "n_tokens": "tokens",
    "n_sequences": "sequences",
    "nll": "negative log-prob",
    "nll_per_zlib_byte": "negative log-prob per zlib byte",
    "pmi": "pointwise mutual information",
    "min_k": "Min-K %",
    "min_k_plus_plus": "Min-K %++",
    "rouge_l": "ROUGE-L",
    "mean_m": "mean score M",
    "m_at_ends": "score M at its ends",
    "np_discoverable": "(n, p)-discoverable",
    "smd_before": "standardized difference before",
    "smd_after": "standardized difference after",
    "cohens_d": "Cohen's d",
    "copies_correlation": "correlation with copies",
    "on_frontier": "on the frontier",
    "exact_match_left": "exact match left",
    "alpha": "dose α",
    "full_top1": "top token after the whole prompt",
    "unigram_prob": "unigram probability",
    "bigram_prob": "bigram probability",
    "trigram_prob": "trigram probability",
    "attn_logprob": "attention layer",
    "mlp_logprob": "MLP",
}
"""Columns whose names are not words with underscores in between."""
_ENDS = {"low": "low end", "high": "high end", "p_corrected": _WORDS["p_corrected"]}
_NAMES = (
    "quantity", "covariate", "metric", "measure", "statistic", "of the scan", "direction", "criterion",
    "importance", "other", "patched", "selection", "edit", "predictor",
)  # fmt: skip
"""Columns whose cells are themselves names of quantities."""
_FIRST = (
    "id",
    "exact_match",
    "memorization_score",
    "matching_prefix",
    "target_accuracy",
    "copies",
    "group",
    "domain",
)
_NAME = re.compile(r"(?<![\w./`'])[a-z0-9]+(_[a-z0-9]+)+(?![\w`']|[./(]\w)")
"""A name of a column or of a choice in a note, which the table calls by words."""
_LONG = 600
"""Cells with more letters are folded: the rest opens on a click."""


def column_words(name: Hashable) -> str:
    """Return what a column is called in a report.

    >>> [column_words(name) for name in ("p_corrected", "removed_low", "minus_control", "target_logprob")]
    ['p, corrected for all tests', 'removed, low end', 'minus control', 'target log-prob']
    """
    text = str(name)
    if text in _WORDS:
        return _WORDS[text]
    for end, words in _ENDS.items():
        stem = text.removesuffix(f"_{end}").removesuffix(f" {end}")
        if stem != text:
            return f"{column_words(stem)}, {words}"
    return metric_text(text).label if "_" in text else text


def _hover(name: Hashable) -> str:
    """Return the column's own name, as in the file, and its meaning where it is known."""
    known = COLUMNS.get(str(name))
    return f"{name}: {known.meaning}" if known else str(name)


def with_first_things_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows and columns of a table so that it starts with what matters.

    Sequences are ordered by how well they are recalled, and their recall comes before everything else that is
    known of them; tests are ordered by p. Other tables keep the order that their makers gave them.

    >>> frame = pd.DataFrame({"text": ["a", "b"], "id": ["x", "y"], "exact_match": [0, 1]})
    >>> with_first_things_first(frame).to_dict("list")
    {'id': ['y', 'x'], 'exact_match': [1, 0], 'text': ['b', 'a']}
    """
    if {"id", "exact_match"} <= set(frame.columns):
        keys = [key for key in ("exact_match", "memorization_score", "target_accuracy") if key in frame]
        frame = frame.sort_values(keys, ascending=False, kind="stable")
        first = [name for name in _FIRST if name in frame]
        return frame.reindex(columns=[*first, *(name for name in frame if name not in first)])
    if "p_corrected" in frame and "layer" not in frame:
        return frame.sort_values("p_corrected", kind="stable")
    return frame


def shown_table(block: TableBlock) -> dict[str, Any]:
    """Return what the page's template needs of a table."""
    whole = with_first_things_first(block.frame)
    frame = whole.head(block.rows)
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    left = len(whole) - len(frame)
    said = _NAME.sub(lambda name: column_words(name.group()), block.note)
    note = " ".join(filter(None, (said, f"{left} more rows are not shown." if left else "")))
    return {
        "title": block.title,
        "columns": [_column(frame.iloc[:, place], name) for place, name in enumerate(frame.columns)],
        "rows": [
            [_shown(value, str(name) in _NAMES) for name, value in zip(frame.columns, row, strict=True)]
            for row in frame.itertuples(index=False, name=None)
        ],
        "note": note,
    }


def _column(values: pd.Series, name: Hashable) -> dict[str, str]:
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    longest = 0 if numeric or values.empty else int(values.map(cell_text).str.len().max())
    look = "numeric" if numeric else "short" if longest <= 24 else "long" if longest > 60 else ""
    return {"words": column_words(name), "hover": _hover(name), "look": look}


def _shown(value: object, is_name: bool) -> dict[str, str]:
    text = cell_text(value)
    if is_name and (text in _WORDS or re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", text)):
        return {"text": column_words(text), "hover": text, "rest": ""}
    short = len(text) <= _LONG
    return {"text": text if short else text[:_LONG], "hover": "", "rest": "" if short else text[_LONG:]}


def cell_text(value: object) -> str:
    """Return a value as a cell shows it.

    >>> [cell_text(value) for value in (None, 12345.6, 0.12345, True, "a")]
    ['–', '12,346', '0.1235', 'yes', 'a']
    """
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
