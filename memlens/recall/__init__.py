"""Did the model recall it: metrics, the memorization score, and the sets that follow."""

from memlens.recall.generation import greedy_continuations
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.recall.targets import METRICS, TargetStats, reduce_metric, target_stats

__all__ = [
    "METRICS",
    "RecallScores",
    "TargetStats",
    "greedy_continuations",
    "reduce_metric",
    "score_recall",
    "target_stats",
]
