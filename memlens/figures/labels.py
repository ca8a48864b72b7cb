"""Text in figures: token labels, and the words for metrics.

Plotly reads a small part of HTML in every label (`<b>`, `<br>`, `<a href>`) and LaTeX between dollar signs.
Text that comes from sequences is therefore escaped, so that it is shown and never interpreted.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from memlens.registry import Registry

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "": "∅"}
_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
_LONGEST_NAME = 40
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class MetricText:
    """The words for a metric in figures and readings.

    Attributes:
        label: Its name in words.
        unit: `nats`, `tokens`, …; empty for a plain number.
        better: 1 if a higher value means better recall, -1 if a lower one does, 0 if unknown.
        whole: The size at which a map's colors end, for a ratio with wild tails; 0 for the largest value.
    """

    label: str
    unit: str = ""
    better: int = 0
    whole: float = 0.0

    @property
    def axis(self) -> str:
        """Label and unit, as on an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


_RUNS = "0 = corrupt, 1 = clean"
_KNOWN: Registry[MetricText] = Registry("metric", modules=["memlens.forward.metrics"])
for _name, _text in {
    "memorization_score": MetricText("memorization score M", "share of tokens", 1),
    "restored_share": MetricText("recall restored", _RUNS, 1, whole=1.0),
    "normalized_effect": MetricText("recall restored (mean of ratios)", _RUNS, 1, whole=1.0),
    "probability": MetricText("probability of the target", "", 1),
    "rank": MetricText("rank of the target", "0 = top", -1),
    "entropy": MetricText("entropy", "nats", -1),
    "kl_to_final": MetricText("KL to the final layer", "nats", -1),
    "predicted_probability": MetricText("probability of the final prediction", "", 1),
    "predicted_rank": MetricText("rank of the final prediction", "0 = top", -1),
    "head_logit": MetricText("direct effect on the target logit", "logits", 1),
    "heads": MetricText("direct effect on the target logit", "logits", 1),
    "attn": MetricText("attention", "logits", 1),
    "mlp": MetricText("MLP", "logits", 1),
    "prediction_flipped": MetricText("prediction flipped", "share of sequences", -1),
    "target_missed": MetricText("first target missed", "share of sequences", -1),
    "similarity": MetricText("similarity to the clean residual", "cosine", 1),
    "similarity_at_noise": MetricText("similarity right after the noise", "cosine", 1),
    "recovery": MetricText("similarity regained", "cosine", 1),
    "dominance": MetricText("dominance", "coefficient × norm"),
    "accuracy": MetricText("accuracy", "share of questions", 1),
    "accuracy_norm": MetricText("accuracy by length", "share of questions", 1),
    "accuracy_chance_corrected": MetricText("accuracy corrected for chance", "0 = guessing", 1),
    "relative_drop": MetricText("relative drop in accuracy", "share", -1),
    "relative_drop_chance_corrected": MetricText("relative drop, corrected for chance", "share", -1),
}.items():
    _KNOWN.add(_name, _text)


_DERIVED = ("restored_share", "normalized_effect", "prediction_flipped", "target_missed")
"""Quantities made from a metric, whose attributes older files give them."""


def describe_quantity(name: str, attrs: Mapping[Any, Any]) -> None:
    """Register the words for a quantity, used for arrays without attributes (such as those of old files)."""
    _KNOWN.add(name, _text_of(attrs))


def _text_of(attrs: Mapping[Any, Any]) -> MetricText:
    """Return the words in the attributes of an array that a `memlens.Metric` made; an axis shows means."""
    unit = "share of sequences" if attrs.get("proportion") else str(attrs.get("units", ""))
    return MetricText(str(attrs["label"]), unit, {"higher": 1, "lower": -1}.get(attrs.get("better", ""), 0))


def metric_text(name: str, array: xr.DataArray | None = None) -> MetricText:
    """Return label, unit and direction of a metric.

    The array's attributes (`label`, `units`, `better`, see `memlens.Metric`) take precedence over the words
    registered for the name, except for what memlens makes from a metric. Other arrays are described by a
    short `long_name` and their `units`. The label of an array of differences (attribute `of="effect"`) says
    so.

    >>> metric_text("target_logprob").axis
    'target log-prob (nats)'
    """
    given = {} if array is None else array.attrs
    attrs = {} if name in _DERIVED else given
    long_name = str(attrs.get("long_name", ""))
    words = long_name if 0 < len(long_name) <= _LONGEST_NAME else choice_words(name)
    if "label" in attrs:
        known = _text_of(attrs)
    else:
        known = _KNOWN.get(name) or MetricText(words, str(attrs.get("units", "")))
    label, unit = known.label, known.unit
    change = "change in " if given.get("of") == "effect" else ""
    return MetricText(change + plain(str(label)), plain(str(unit)), known.better, known.whole)


def choice_words(name: object) -> str:
    """Return the name of a choice, such as what is done to a layer, in words.

    >>> choice_words("norm_matched"), choice_words("mlp_zero")
    ('norm matched', 'MLP zero')
    """
    return " ".join("MLP" if word == "mlp" else word for word in str(name).split("_"))


def plain(text: object) -> str:
    """Return text escaped so that plotly shows it literally: no markup, no LaTeX, no hover variables.

    >>> plain("<b>5 & $x$</b>")
    '&lt;b&gt;5 &amp; &#36;x&#36;&lt;/b&gt;'
    """
    return html.escape(str(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def hover(
    *lines: str, low: int | None = 0, unit: str = "", n: int | None = None, counted: str = " sequences"
) -> str:
    """Return a hover template: lines, the last with an interval and a unit, then the number of sequences.

    Args:
        lines: The lines; the last ends with the mean.
        low: Index of the lower end in `customdata`, followed by that of the upper; None without an interval.
        unit: Unit of the mean.
        n: Index of the count in `customdata`; None without one.
        counted: What `n` counts.

    >>> hover("layer %{x}", "%{y:.4g}", unit="nats")
    'layer %{x}<br>%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}] nats<extra></extra>'
    """
    ends = "" if low is None else f" [%{{customdata[{low}]:.4g}}, %{{customdata[{low + 1}]:.4g}}]"
    count = "" if n is None else f"<br>n = %{{customdata[{n}]:d}}{counted}"
    return "<br>".join(lines) + ends + (f" {unit}" if unit else "") + count + "<extra></extra>"


def visible(token: str, *, longest: int = 20) -> str:
    r"""Return a token with blanks and non-printing characters made visible, cut at `longest` characters.

    >>> visible(" the"), visible("\n"), visible("a\u202eb")
    ('·the', '↵', 'a\\u202eb')
    """
    shown = _MARKS[""] if token == "" else "".join(_visible_letter(letter) for letter in token)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _visible_letter(letter: str) -> str:
    if letter in _MARKS:
        return _MARKS[letter]
    if letter not in _JOINERS and (unicodedata.category(letter) in _HIDDEN or letter.isspace()):
        return f"\\u{ord(letter):04x}"
    return letter


def unique_tokens(tokens: Sequence[str], places: Iterable[int] | None = None) -> list[str]:
    """Return one label per position, unique by its number (0, 1, … unless given), escaped for plotly.

    >>> unique_tokens([" the", "<b>", " the"])
    ['·the_0', '&lt;b&gt;_1', '·the_2']
    """
    numbers = range(len(tokens)) if places is None else places
    return [f"{plain(visible(str(token)))}_{place}" for place, token in zip(numbers, tokens, strict=True)]
