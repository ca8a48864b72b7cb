"""Statistics over sequences: intervals, comparisons and agreement."""

from memlens.results.statistics.agreement import roc_area
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.intervals import mean_interval, restored_share

__all__ = ["compare_groups", "mean_interval", "restored_share", "roc_area"]
