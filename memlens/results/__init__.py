"""The labelled array every analysis returns, its statistics and its file.

`Result` wraps an `xarray.Dataset` with one value per sequence and site; nothing is averaged away before it
is asked for. `load_result` reads what `Result.save` wrote. `compare_groups` sets two results against each
other (memorized against controls), and `overlay` draws several in one figure.
"""

from __future__ import annotations

from memlens.results.comparison import compare_groups
from memlens.results.dispatch import overlay
from memlens.results.groups import join_groups
from memlens.results.restored import restored_share
from memlens.results.result import Result
from memlens.results.statistics import mean_interval
from memlens.results.storage import load_result

__all__ = [
    "Result",
    "compare_groups",
    "join_groups",
    "load_result",
    "mean_interval",
    "overlay",
    "restored_share",
]
