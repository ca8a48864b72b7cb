"""Did the model recall it: metrics, the memorization score, and the sets that follow."""

from memlens.recall.build_memorized import build_memorized_set
from memlens.recall.calibration import calibrate_criteria
from memlens.recall.columns import COLUMNS, METRIC_GROUPS
from memlens.recall.compression import prompt_compression
from memlens.recall.criteria import score_criteria
from memlens.recall.criteria_options import CriteriaOptions
from memlens.recall.criteria_scores import CriteriaScores
from memlens.recall.duplicates import count_duplicates
from memlens.recall.extraction import extraction_curve
from memlens.recall.frequency import InfiniGram, token_counts
from memlens.recall.generation import greedy_continuations
from memlens.recall.memorized_set import MemorizedSet
from memlens.recall.ngrams import NgramReference
from memlens.recall.sampling import Sampling, samples_needed
from memlens.recall.scan import PredictableRule
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.recall.targets import METRICS, TargetStats, reduce_metric, target_stats
from memlens.recall.trivial import TrivialRules, trivial_continuations

__all__ = [
    "COLUMNS",
    "METRICS",
    "METRIC_GROUPS",
    "CriteriaOptions",
    "CriteriaScores",
    "InfiniGram",
    "MemorizedSet",
    "NgramReference",
    "PredictableRule",
    "RecallScores",
    "Sampling",
    "TargetStats",
    "TrivialRules",
    "build_memorized_set",
    "calibrate_criteria",
    "count_duplicates",
    "extraction_curve",
    "greedy_continuations",
    "prompt_compression",
    "reduce_metric",
    "samples_needed",
    "score_criteria",
    "score_recall",
    "target_stats",
    "token_counts",
    "trivial_continuations",
]
