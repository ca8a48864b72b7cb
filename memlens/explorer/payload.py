"""An exploration as one JSON object for the static page, within a number of bytes.

What always stands in it: each sequence's tokens, lens map, effects, and what the model writes as it is.
Then, while there is room: first what it writes under edits, then attention maps; each in rounds over the
sequences (one of every sequence, then a second of every sequence, …), in each sequence the largest effects
first, and nothing after the first that does not fit. Which are missing is said on the page.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import plotly.graph_objects as go

from memlens.errors import EmptySetError, OptionError
from memlens.explorer.attention import pack_causal
from memlens.explorer.data import Continuation, Exploration, SequenceView, strongest_heads
from memlens.explorer.drawing import attention_figure, effects_figure, lens_figure, running_text
from memlens.figures.labels import metric_text, plain, visible

FORMAT = "memlens explorer 1"
BUDGET = 1_500_000
"""Bytes of JSON: a report is to stay under 8 MB, of which plotly is 4.5."""
_STEPS = 65535
_LOG = logging.getLogger(__name__)


def explorer_payload(exploration: Exploration, *, budget: int = BUDGET) -> dict[str, Any]:
    """Return the JSON object that the page's script reads.

    Probabilities stand in steps of 1/65535, ranks are cut at 65535, attention has steps of 1/255 (see
    `attention_maps` and `pack_causal`), effects have four digits.

    Args:
        exploration: What is shown.
        budget: Bytes of the whole object as JSON.

    Raises:
        EmptySetError: There are no sequences.
        OptionError: A budget below 0.
    """
    if not len(exploration):
        raise EmptySetError("there are no sequences to explore: give at least one.")
    if budget < 0:
        raise OptionError(f"budget={budget} is no number of bytes: give 0 or more.")
    words = _Vocabulary()
    sequences = [_sequence(view, words) for view in exploration.views]
    payload = {
        "format": FORMAT,
        "metric": metric_text(exploration.metric).label,
        "figures": _skeletons(exploration),
        "sequences": sequences,
        "words": words.entries,
    }
    room = budget - _size(payload)
    if room < 0:
        _LOG.warning(
            "the page's explorer takes %d bytes without any edit: show fewer sequences", _size(payload)
        )
    edits = [_edits(view, words) for view in exploration.views]
    room = _fill(sequences, "edited", edits, room)
    maps = [_attention(view) for view in exploration.views]
    _fill(sequences, "attention", maps, room)
    return payload


class _Vocabulary:
    """Every token once: in running text, and as an escaped label of figures."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self._places: dict[str, int] = {}

    def places(self, tokens: Iterable[str]) -> list[int]:
        for token in tokens:
            if token not in self._places:
                self._places[token] = len(self.entries)
                self.entries.append((running_text(token), plain(visible(token))))
        return [self._places[token] for token in tokens]


def _sequence(view: SequenceView, words: _Vocabulary) -> dict[str, Any]:
    for continuation in view.edited:  # the words of what may be left out are known before room is counted
        words.places([*continuation.greedy, *continuation.tokens])
    return {
        "id": view.id,
        "label": view.label,
        "tokens": words.places(view.tokens),
        "prefix_len": view.prefix_len,
        "lens_probability": _fixed(view.lens_probability),
        "lens_rank": _sixteen(view.lens_rank),
        "heads": _numbers(view.head_effects),
        "mlp": _numbers(view.mlp_effects),
        "bypass": _numbers(view.bypass_effects),
        "as_it_is": _continuation(view.continuation, words),
        "edited": [],
        "attention": [],
        "left_out": {"edited": 0, "attention": view.head_effects.size - len(view.attention)},
    }


def _continuation(continuation: Continuation, words: _Vocabulary) -> dict[str, Any]:
    return {
        "name": continuation.edits.name,
        "probability": _fixed(continuation.probability),
        "rank": _sixteen(continuation.rank),
        "greedy": words.places(continuation.greedy),
        "correct": "".join("01"[int(right)] for right in continuation.correct),
        "tokens": words.places(continuation.tokens),
        "same": "".join("01"[int(same)] for same in continuation.same),
        "bypassed": list(continuation.edits.bypassed),
        "ablated": [list(head) for head in continuation.edits.ablated],
    }


def _edits(view: SequenceView, words: _Vocabulary) -> list[tuple[int, dict[str, Any]]]:
    """Return the edits that were tried, the largest effect on the metric first, with their places."""
    places = sorted(range(len(view.edited)), key=lambda place: -_effect(view, view.edited[place]))
    return [(place, _continuation(view.edited[place], words)) for place in places]


def _effect(view: SequenceView, continuation: Continuation) -> float:
    """The largest effect of the single edits, as those of several together were not swept."""
    edits = continuation.edits
    sizes = [abs(float(view.bypass_effects[layer])) for layer in edits.bypassed]
    sizes += [abs(float(view.head_effects[head])) for head in edits.ablated]
    return max((size for size in sizes if math.isfinite(size)), default=0.0)


def _attention(view: SequenceView) -> list[tuple[int, dict[str, Any]]]:
    order = [head for head in strongest_heads(view.head_effects) if head in view.attention]
    return [
        (place, {"layer": layer, "head": head, "map": _base64(pack_causal(view.attention[layer, head]))})
        for place, (layer, head) in enumerate(order)
    ]


def _fill(
    sequences: Sequence[dict[str, Any]],
    part: str,
    items: Sequence[list[tuple[int, dict[str, Any]]]],
    room: int,
) -> int:
    """Add items in rounds until one does not fit; return the room that is left."""
    chosen: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in sequences]
    rounds = (
        (row, item) for turn in zip_longest(*items) for row, item in enumerate(turn) if item is not None
    )
    for row, item in rounds:
        room -= _size(item[1]) + 1  # and a comma
        if room < 0:
            break
        chosen[row].append(item)
    for sequence, some, every in zip(sequences, chosen, items, strict=True):
        sequence[part] = [item for _, item in sorted(some, key=lambda pair: pair[0])]
        sequence["left_out"][part] += len(every) - len(some)
    return room


def _skeletons(exploration: Exploration) -> dict[str, Any]:
    """Return the figures without values: the script puts in those of the sequence that is shown."""
    view = exploration.views[0]
    n = len(view.tokens)
    drawn = {  # heads and layers are the same for all sequences: places in the map of effects stay
        "lens": lens_figure(view),
        "effects": effects_figure(view, exploration.metric, (0, 0)),
        "attention": attention_figure(view, (0, 0), np.zeros((n, n), np.uint8)),
    }
    return {name: _skeleton(figure, keep="x" if name == "effects" else "") for name, figure in drawn.items()}


def _skeleton(figure: go.Figure, *, keep: str) -> dict[str, Any]:
    spec = json.loads(str(figure.to_json()))
    for trace in spec["data"]:
        for key in {"x", "y", "z", "customdata"} - {keep}:
            trace.pop(key, None)
    spec["layout"]["title"] = None
    spec["layout"]["margin"]["t"] = 40  # for plotly's own buttons
    return spec


def _size(value: Any) -> int:
    """Bytes as JSON; the marks that a page writes as escapes are counted as such."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode("utf-8", errors="backslashreplace")) + 5 * sum(map(text.count, "<>&"))


def _fixed(values: np.ndarray) -> str:
    """Shares as 16-bit integers in rows, little end first, in base64; NaN as 0."""
    return _sixteen(np.nan_to_num(values) * _STEPS)


def _sixteen(values: np.ndarray) -> str:
    return _base64(np.clip(np.rint(values), 0, _STEPS).astype("<u2").tobytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _numbers(values: np.ndarray) -> Any:
    """Numbers of four digits in nested lists; None where there is none, which JSON has no number for."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
