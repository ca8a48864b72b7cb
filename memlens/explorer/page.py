"""An exploration as a static page, with its data as one JSON object of limited size.

The object always contains each sequence's tokens, lens map, effects and continuation by the unchanged model.
Continuations under edits are added while they fit, then attention maps. Both are added in rounds over the
sequences (one per sequence, then a second per sequence, …), largest effects first, up to the first that does
not fit. The page says what is missing.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from memlens.benchmark.recommend import ABLATIONS, what_is_known
from memlens.errors import EmptySetError, OptionError
from memlens.explorer.attention import pack_causal
from memlens.explorer.data import Continuation, Exploration, SequenceView, strongest_heads
from memlens.explorer.drawing import attention_figure, effects_figure, lens_figure, running_text
from memlens.figures.labels import metric_text, plain, visible
from memlens.files import json_text
from memlens.report.model import EXPLORER_FORMAT, ExplorerBlock, Section
from memlens.report.render import write_report

BUDGET = 1_500_000
"""Bytes of JSON: a report should stay below 8 MB, of which plotly takes 4.5."""
READING = (
    "Choose a sequence, then an edit of the model: the colors and the generated text change with it. "
    "Click a head in the map of effects to see where it attends on this sequence."
)
_STEPS = 65535
_LOG = logging.getLogger(__name__)


def caption_of(exploration: Exploration) -> str:
    """Return a paragraph about what was measured and how."""
    settings = exploration.settings
    metric = metric_text(exploration.metric)
    ablation, bypass = (str(settings[name]).replace("_", " ") for name in ("ablation", "bypass"))
    parts = [
        f"Effects are changes of {metric.axis} of this one sequence by ablating each head "
        f"({ablation}), ablating each MLP, and bypassing each layer's attention ({bypass}); "
        "the edits in the menu use the same modes.",
        "The model generates greedily, as many tokens as the continuation has.",
        f"Probabilities after each layer are by the {settings['lens']} lens.",
        "Attention is that of the unchanged model, in steps of 1/255.",
    ]
    if settings["ablation"] in ABLATIONS:
        family = str(settings.get("family", ""))
        parts.append(what_is_known(ABLATIONS[settings["ablation"]], "", "head", family))
    if settings["top_heads"]:
        parts.append(
            f"The menu has the heads ({settings['top_heads']}) whose ablation harms the recalled sequences "
            "shown here most (all sequences, if none is recalled): they are selected on the sequences that "
            "they are shown on."
        )
    return " ".join(parts)


def write_explorer(path: str | Path, exploration: Exploration) -> Path:
    """Write a page that shows an exploration without Python or a network, and return its path.

    Args:
        path: The `.html` file; written atomically.
        exploration: As returned by `explore_sequences`.
    """
    model = str(exploration.settings.get("model", "a model"))
    block = ExplorerBlock(explorer_payload(exploration), READING, caption_of(exploration))
    return write_report(
        path,
        title=f"{len(exploration)} sequences in {model}",
        findings=[],
        sections=[Section("Explorer", explorers=[block])],
        settings=exploration.settings,
    )


def explorer_payload(exploration: Exploration, *, budget: int = BUDGET) -> dict[str, Any]:
    """Return the JSON object that the page's script reads.

    Probabilities are in steps of 1/65535, ranks are clipped at 65535, attention is in steps of 1/255 (see
    `attention_maps` and `pack_causal`), and effects have four digits.

    Args:
        exploration: What is shown.
        budget: Bytes of the whole object as JSON.

    Raises:
        EmptySetError: There are no sequences.
        OptionError: The budget is below 0.
    """
    if not len(exploration):
        raise EmptySetError("there are no sequences to explore: give at least one.")
    if budget < 0:
        raise OptionError(f"budget={budget} is not a number of bytes: give 0 or more.")
    words = _Vocabulary()
    sequences = [_sequence(view, words) for view in exploration.views]
    payload = {
        "format": EXPLORER_FORMAT,
        "metric": metric_text(exploration.metric).label,
        "figures": _skeletons(exploration),
        "sequences": sequences,
        "words": words.entries,
    }
    room = budget - _size(payload)
    if room < 0:
        _LOG.warning(
            "the explorer page takes %d bytes without any edits: show fewer sequences", _size(payload)
        )
    room = _fill(sequences, "edited", [_edits(view, words) for view in exploration.views], room)
    _fill(sequences, "attention", [_attention(view) for view in exploration.views], room)
    return payload


class _Vocabulary:
    """All distinct tokens, each as running text and as an escaped label for figures."""

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
    for continuation in view.edited:  # room is counted with all words
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
    """Return the computed edits with their indices, the largest effect on the metric first."""
    places = sorted(range(len(view.edited)), key=lambda place: -_effect(view, view.edited[place]))
    return [(place, _continuation(view.edited[place], words)) for place in places]


def _effect(view: SequenceView, continuation: Continuation) -> float:
    """Return the largest effect of the single edits; joint effects were not measured."""
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
    """Add items in rounds until one does not fit; return the remaining room."""
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
    """Return the figures without values; the script inserts those of the sequence that is shown."""
    view = exploration.views[0]
    n = len(view.tokens)
    drawn = {  # heads and layers, the x values of the effects, are those of all sequences
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
    """Return the bytes as JSON, counting characters that the page escapes with their escapes."""
    text = json_text(value)
    return len(text.encode("utf-8", errors="backslashreplace")) + 5 * sum(map(text.count, "<>&"))


def _fixed(values: np.ndarray) -> str:
    """Return proportions as little-endian 16-bit integers in base64, with NaN as 0."""
    return _sixteen(np.nan_to_num(values) * _STEPS)


def _sixteen(values: np.ndarray) -> str:
    return _base64(np.clip(np.rint(values), 0, _STEPS).astype("<u2").tobytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _numbers(values: np.ndarray) -> Any:
    """Return numbers of four digits in nested lists, with None for NaN and infinity."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
