"""The explorer as a page of its own, and as a block of a report."""

from __future__ import annotations

from pathlib import Path

from memlens.explorer.data import Exploration
from memlens.explorer.payload import BUDGET, explorer_payload
from memlens.figures.labels import metric_text
from memlens.report.model import ExplorerBlock, Section
from memlens.report.render import write_report

READING = (
    "Pick a sequence, then an edit of the model: the colors and what the model writes change with it. "
    "Click a head in the map of effects to see where it attends on this sequence."
)


def caption_of(exploration: Exploration) -> str:
    """Return what was measured and how, in one paragraph."""
    settings = exploration.settings
    metric = metric_text(exploration.metric)
    parts = [
        f"Effects are the change of {metric.axis} of this one sequence: each head ablated "
        f"({settings['ablation']}), each MLP taken away, each layer's attention bypassed "
        f"({settings['bypass']}); the edits in the menu are of the same modes.",
        "What the model writes is decoded greedily, as many tokens as the continuation has.",
        f"Probabilities after each layer: {settings['lens']} lens.",
        "Attention is that of the unchanged model, in steps of 1/255.",
    ]
    if settings["top_heads"]:
        parts.append(
            f"Heads in the menu ({settings['top_heads']}): those whose ablation harms most the shown "
            "sequences that are recalled (all, where none is), chosen on what they are shown on."
        )
    return " ".join(parts)


def write_explorer(
    path: str | Path, exploration: Exploration, *, title: str | None = None, budget: int = BUDGET
) -> Path:
    """Write a page that shows an exploration and needs no Python and no network; return its path.

    Args:
        path: The `.html` file; written whole or not at all.
        exploration: What `explore_sequences` measured.
        title: The heading.
        budget: Bytes of data at most; see `explorer_payload` for what is left out where there is more.
    """
    model = str(exploration.settings.get("model", "a model"))
    block = ExplorerBlock(explorer_payload(exploration, budget=budget), READING, caption_of(exploration))
    return write_report(
        path,
        title=title or f"{len(exploration)} sequences in {model}",
        findings=[],
        sections=[Section("Explorer", explorers=[block])],
        settings=exploration.settings,
    )
