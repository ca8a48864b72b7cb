"""Detectors: what in a model tells recalled sequences from matched ones, beyond known confounds."""

from memlens.instruments.detect.attention import (
    attention_by_class,
    attention_difference,
    attention_statistics,
    class_differences,
)
from memlens.instruments.detect.behaviour import (
    BehaviourOptions,
    behaviour_neurons,
    projection,
    steered,
    steering_curve,
    steering_doses,
)
from memlens.instruments.detect.beyond import BeyondOptions, beyond_confounds
from memlens.instruments.detect.buckets import (
    BucketStatistics,
    error_similarity,
    identifier_errors,
    popularity_buckets,
)
from memlens.instruments.detect.confounds import confounds
from memlens.instruments.detect.context.comparing import condition_difference, context_heads, which_wins
from memlens.instruments.detect.context.measure import context_or_weights
from memlens.instruments.detect.context.patching import context_patching
from memlens.instruments.detect.context.sets import ContextOptions, ContextSets, context_sets, longest_targets
from memlens.instruments.detect.curvature import curvature_edits
from memlens.instruments.detect.dimension import DimensionOptions, intrinsic_dimension, local_dimension
from memlens.instruments.detect.exposure import (
    ExposureOptions,
    digit_slots,
    exposure,
    other_characters,
    other_digits,
)
from memlens.instruments.detect.generalizing import (
    GeneralizingOptions,
    RecallOrGeneralize,
    answered_questions,
    recall_or_generalize,
)
from memlens.instruments.detect.groups import Groups
from memlens.instruments.detect.invariance import InvarianceOptions, invariance, prediction_invariance
from memlens.instruments.detect.modular import carrying_neurons, modular_view
from memlens.instruments.detect.separation import SeparationOptions, separating_neurons, separation

__all__ = [
    "BehaviourOptions",
    "BeyondOptions",
    "BucketStatistics",
    "ContextOptions",
    "ContextSets",
    "DimensionOptions",
    "ExposureOptions",
    "GeneralizingOptions",
    "Groups",
    "InvarianceOptions",
    "RecallOrGeneralize",
    "SeparationOptions",
    "answered_questions",
    "attention_by_class",
    "attention_difference",
    "attention_statistics",
    "behaviour_neurons",
    "beyond_confounds",
    "carrying_neurons",
    "class_differences",
    "condition_difference",
    "confounds",
    "context_heads",
    "context_or_weights",
    "context_patching",
    "context_sets",
    "curvature_edits",
    "digit_slots",
    "error_similarity",
    "exposure",
    "identifier_errors",
    "intrinsic_dimension",
    "invariance",
    "local_dimension",
    "longest_targets",
    "modular_view",
    "other_characters",
    "other_digits",
    "popularity_buckets",
    "prediction_invariance",
    "projection",
    "recall_or_generalize",
    "separating_neurons",
    "separation",
    "steered",
    "steering_curve",
    "steering_doses",
    "which_wins",
]
