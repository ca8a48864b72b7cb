"""Figures of a sequence, and its tokens as escaped HTML."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import UInt8

from memlens.explorer.data import Continuation, SequenceView
from memlens.figures.exploring import heatmap_attention, heatmap_effects, heatmap_lens
from memlens.figures.labels import unique_tokens, visible
from memlens.instruments.ablate.heads import Head, head_label

FIGURES = ("lens", "effects", "attention")
"""The kinds of figures of a sequence."""
_RIGHT, _WRONG = "0,114,178", "213,94,0"  # Okabe and Ito's blue and vermilion
_WHOLE = 10**9


def lens_figure(view: SequenceView) -> go.Figure:
    """Return the probability of each target after each layer."""
    arrays = {"probability": view.lens_probability, "rank": view.lens_rank}
    data = xr.Dataset(
        {name: (("layer", "target"), array) for name, array in arrays.items()},
        {"layer": list(range(len(view.lens_probability)))},
    )
    places = range(view.prefix_len, len(view.tokens))
    return heatmap_lens(data, unique_tokens(list(view.targets), places))


def effects_figure(view: SequenceView, metric: str, chosen: Head | None = None) -> go.Figure:
    """Return the effects of heads, MLPs and layers' attention, with a frame around the chosen head."""
    coords = {"layer": list(range(len(view.head_effects)))}
    heads = xr.DataArray(view.head_effects, coords, dims=("layer", "head"))
    branches = xr.Dataset(
        {"mlp": ("layer", view.mlp_effects), "bypass": ("layer", view.bypass_effects)}, coords
    )
    return heatmap_effects(heads, branches, metric=metric, chosen=chosen)


def attention_figure(view: SequenceView, head: Head, weights: UInt8[np.ndarray, "query key"]) -> go.Figure:
    """Return a head's attention on the sequence."""
    data = xr.DataArray(weights / 255, dims=("query", "key"))
    title = f"Attention of {head_label(head)} in the unchanged model"
    return heatmap_attention(data, unique_tokens(list(view.tokens)), boundary=view.prefix_len, title=title)


def shade(probability: float, right: bool) -> str:
    """Return the color of a target: blue if it is the most likely token, otherwise vermilion.

    A deeper blue means a more likely target, a deeper vermilion a less likely one.

    >>> shade(1.0, True), shade(0.0, False)
    ('rgba(0,114,178,0.45)', 'rgba(213,94,0,0.45)')
    """
    depth = 0.1 + 0.35 * (probability if right else 1 - probability)
    return f"rgba({_RIGHT if right else _WRONG},{depth:.2f})"


def tokens_html(view: SequenceView, continuation: Continuation) -> str:
    """Return the sequence's tokens with targets colored by recall; hovering shows the prediction."""
    given = "".join(
        f"<span style='opacity:.6'>{_text(token)}</span>" for token in view.tokens[: view.prefix_len]
    )
    parts = []
    for place, token in enumerate(view.targets):
        p, right = float(continuation.probability[place]), bool(continuation.correct[place])
        greedy = visible(continuation.greedy[place], longest=_WHOLE)
        says = f"target {place}: {visible(token, longest=_WHOLE)}\ngreedy: {greedy}\n"
        says += f"probability {p:.3f}, rank {int(continuation.rank[place])}"
        line = "" if right else ";text-decoration:underline wavy"
        parts.append(
            f"<span title='{escape(says)}' style='background:{shade(p, right)}{line}'>{_text(token)}</span>"
        )
    return _block(given + "".join(parts))


def written_html(view: SequenceView, continuation: Continuation) -> str:
    """Return what the model generates after the prefix, with wrong tokens underlined."""
    marks = zip(continuation.tokens, continuation.same, strict=True)
    parts = [
        _text(token) if same else f"<u style='background:rgba({_WRONG},.25)'>{_text(token)}</u>"
        for token, same in marks
    ]
    right, score = continuation.correct.mean(), continuation.memorization_score
    said = (
        f"of the targets {right:.0%} are right, each after the true tokens before it; of what is generated "
        f"without them, below, {score:.0%} of the tokens are (memorization score)"
    )
    return f"<div><b>{escape(continuation.edits.name)}</b>: {said}</div>" + _block("".join(parts))


def running_text(token: str) -> str:
    r"""Return a token for running text: unprintable characters are named, line ends are marked.

    >>> running_text(" a\n"), running_text("\u202e")
    (' a↵\n', '\\u202e')
    """
    keep = {" ": " ", "\n": "↵\n", "\t": "⇥\t"}
    return "".join(keep.get(letter) or visible(letter) for letter in token) or visible("")


def _text(token: str) -> str:
    return f"<bdi>{escape(running_text(token))}</bdi>"


def _block(content: str) -> str:
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.9"
    return f"<div style='{style}'>{content}</div>"
