"""Look into sequences one by one: live in Jupyter, or as a static page.

`explore` gives an `Explorer` on a model. `explore_sequences` measures what it shows, `explorer_payload` makes
a JSON object of it for the report, and `write_explorer` a page of its own.
"""

from __future__ import annotations

from memlens.explorer.data import Continuation, Exploration, SequenceView
from memlens.explorer.edits import Edits, edit_interventions
from memlens.explorer.explorer import Explorer, explore
from memlens.explorer.measuring import ExploreOptions, explore_sequences
from memlens.explorer.page import caption_of, write_explorer
from memlens.explorer.payload import explorer_payload

__all__ = [
    "Continuation",
    "Edits",
    "Exploration",
    "ExploreOptions",
    "Explorer",
    "SequenceView",
    "caption_of",
    "edit_interventions",
    "explore",
    "explore_sequences",
    "explorer_payload",
    "write_explorer",
]
