"""memlens: find where in a language model a memorized sequence is recalled.

The names below are loaded on first use, so that `import memlens` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlens import errors

if TYPE_CHECKING:
    from memlens.attribution import (
        ChoiceTask,
        PredictorAgreement,
        Screening,
        TransformersBypass,
        TunedLens,
        ablate_head_pairs,
        ablate_heads,
        ablate_heads_cumulatively,
        ablate_mlps,
        activation_patches,
        as_lm_eval,
        attention_bypass_bounds,
        attribute_ablation,
        attribute_gradients,
        attribute_logits,
        bypass_attention,
        bypass_in_transformers,
        bypass_intervention,
        bypass_predictor,
        bypassed,
        decode_residual,
        dominant_neurons,
        embedding_noise,
        evaluate_tasks,
        head_ablations,
        head_set_ablations,
        knock_out_neurons,
        mlp_ablations,
        neuron_knock_out,
        patch_activations,
        patch_paths,
        path_patches,
        perturb_prefix,
        perturb_residual,
        predictor_agreement,
        promotion_layers,
        promotion_summary,
        rank_heads,
        screen_then_verify,
        tasks_from_lm_eval,
        train_tuned_lens,
    )
    from memlens.attribution.layer_set_results import LayerSetSearch
    from memlens.attribution.layer_sets import search_layer_sets
    from memlens.explorer import ExploreOptions, Explorer, explore
    from memlens.models.families import families_table
    from memlens.models.loading import load_model
    from memlens.models.trunk import Trunk
    from memlens.organisms.local_tasks import local_tasks
    from memlens.organisms.zoo import zoo_overview
    from memlens.recall.build_memorized import build_memorized_set
    from memlens.recall.calibration import calibrate_criteria
    from memlens.recall.compression import prompt_compression
    from memlens.recall.counterfactual import CounterfactualScores, counterfactual_memorization
    from memlens.recall.criteria import CriteriaOptions, score_criteria
    from memlens.recall.criteria_scores import CriteriaScores
    from memlens.recall.duplicates import count_duplicates
    from memlens.recall.extraction import extraction_curve
    from memlens.recall.frequency import InfiniGram, token_counts
    from memlens.recall.memorized_set import MemorizedSet
    from memlens.recall.ngrams import NgramReference
    from memlens.recall.sampling import Sampling, samples_needed
    from memlens.recall.scan import PredictableRule
    from memlens.recall.score import score_recall
    from memlens.recall.scores import RecallScores
    from memlens.recall.targets import METRICS
    from memlens.recall.trivial import TrivialRules, trivial_continuations
    from memlens.results import Result, compare_groups, load_result, overlay, restored_share
    from memlens.results.agreement import roc_area
    from memlens.results.frontier import join_frontier
    from memlens.results.task_summary import task_summary
    from memlens.results.tradeoff import edit_tradeoff
    from memlens.sequences import (
        SequenceSet,
        check_sequences,
        corrupt,
        fact_sequences,
        identifier_sequences,
        load_sequences,
        natural_controls,
    )
    from memlens.sequences.idioms import idiom_defects
    from memlens.studies import (
        BypassInputs,
        BypassOptions,
        ComparativeOptions,
        IdiomOptions,
        LocalizeOptions,
        StudyModel,
        localize,
        study_attention_bypass,
        study_comparative,
        study_idioms,
    )
    from memlens.sweeps import BatchHook, Intervention, Plan, applied, measure, plan, sweep

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    name: module
    for module, names in {
        "memlens.attribution": (
            "ChoiceTask",
            "PredictorAgreement",
            "Screening",
            "TransformersBypass",
            "TunedLens",
            "ablate_head_pairs",
            "ablate_heads",
            "ablate_heads_cumulatively",
            "ablate_mlps",
            "activation_patches",
            "as_lm_eval",
            "attention_bypass_bounds",
            "attribute_ablation",
            "attribute_gradients",
            "attribute_logits",
            "bypass_attention",
            "bypass_in_transformers",
            "bypass_intervention",
            "bypass_predictor",
            "bypassed",
            "decode_residual",
            "dominant_neurons",
            "embedding_noise",
            "evaluate_tasks",
            "head_ablations",
            "head_set_ablations",
            "knock_out_neurons",
            "mlp_ablations",
            "neuron_knock_out",
            "patch_activations",
            "patch_paths",
            "path_patches",
            "perturb_prefix",
            "perturb_residual",
            "predictor_agreement",
            "promotion_layers",
            "promotion_summary",
            "rank_heads",
            "screen_then_verify",
            "tasks_from_lm_eval",
            "train_tuned_lens",
        ),
        "memlens.models.families": ("families_table",),
        "memlens.models.loading": ("load_model",),
        "memlens.models.trunk": ("Trunk",),
        "memlens.recall.build_memorized": ("build_memorized_set",),
        "memlens.recall.memorized_set": ("MemorizedSet",),
        "memlens.recall.scan": ("PredictableRule",),
        "memlens.recall.compression": ("prompt_compression",),
        "memlens.recall.extraction": ("extraction_curve",),
        "memlens.recall.sampling": ("Sampling", "samples_needed"),
        "memlens.recall.trivial": ("TrivialRules", "trivial_continuations"),
        "memlens.recall.duplicates": ("count_duplicates",),
        "memlens.recall.frequency": ("InfiniGram", "token_counts"),
        "memlens.recall.scores": ("RecallScores",),
        "memlens.recall.score": ("score_recall",),
        "memlens.recall.targets": ("METRICS",),
        "memlens.results": (
            "Result",
            "compare_groups",
            "load_result",
            "overlay",
            "restored_share",
        ),
        "memlens.sequences": (
            "SequenceSet",
            "check_sequences",
            "corrupt",
            "fact_sequences",
            "identifier_sequences",
            "load_sequences",
            "natural_controls",
        ),
        "memlens.studies": (
            "BypassInputs",
            "BypassOptions",
            "ComparativeOptions",
            "IdiomOptions",
            "LocalizeOptions",
            "StudyModel",
            "localize",
            "study_attention_bypass",
            "study_comparative",
            "study_idioms",
        ),
        "memlens.sweeps": ("BatchHook", "Intervention", "Plan", "applied", "measure", "plan", "sweep"),
        "memlens.recall.calibration": ("calibrate_criteria",),
        "memlens.recall.counterfactual": ("CounterfactualScores", "counterfactual_memorization"),
        "memlens.recall.criteria": (
            "CriteriaOptions",
            "score_criteria",
        ),
        "memlens.recall.criteria_scores": ("CriteriaScores",),
        "memlens.recall.ngrams": ("NgramReference",),
        "memlens.results.agreement": ("roc_area",),
        "memlens.results.frontier": ("join_frontier",),
        "memlens.results.task_summary": ("task_summary",),
        "memlens.sequences.idioms": ("idiom_defects",),
        "memlens.organisms.local_tasks": ("local_tasks",),
        "memlens.attribution.layer_set_results": ("LayerSetSearch",),
        "memlens.attribution.layer_sets": ("search_layer_sets",),
        "memlens.organisms.zoo": ("zoo_overview",),
        "memlens.results.tradeoff": ("edit_tradeoff",),
        "memlens.explorer": ("ExploreOptions", "Explorer", "explore"),
    }.items()
    for name in names
}

__all__ = [
    "METRICS",
    "BatchHook",
    "BypassInputs",
    "BypassOptions",
    "ChoiceTask",
    "ComparativeOptions",
    "CounterfactualScores",
    "CriteriaOptions",
    "CriteriaScores",
    "ExploreOptions",
    "Explorer",
    "IdiomOptions",
    "InfiniGram",
    "Intervention",
    "LayerSetSearch",
    "LocalizeOptions",
    "MemorizedSet",
    "NgramReference",
    "Plan",
    "PredictableRule",
    "PredictorAgreement",
    "RecallScores",
    "Result",
    "Sampling",
    "Screening",
    "SequenceSet",
    "StudyModel",
    "TransformersBypass",
    "TrivialRules",
    "Trunk",
    "TunedLens",
    "__version__",
    "ablate_head_pairs",
    "ablate_heads",
    "ablate_heads_cumulatively",
    "ablate_mlps",
    "activation_patches",
    "applied",
    "as_lm_eval",
    "attention_bypass_bounds",
    "attribute_ablation",
    "attribute_gradients",
    "attribute_logits",
    "build_memorized_set",
    "bypass_attention",
    "bypass_in_transformers",
    "bypass_intervention",
    "bypass_predictor",
    "bypassed",
    "calibrate_criteria",
    "check_sequences",
    "compare_groups",
    "corrupt",
    "count_duplicates",
    "counterfactual_memorization",
    "decode_residual",
    "dominant_neurons",
    "edit_tradeoff",
    "embedding_noise",
    "errors",
    "evaluate_tasks",
    "explore",
    "extraction_curve",
    "fact_sequences",
    "families_table",
    "head_ablations",
    "head_set_ablations",
    "identifier_sequences",
    "idiom_defects",
    "join_frontier",
    "knock_out_neurons",
    "load_model",
    "load_result",
    "load_sequences",
    "local_tasks",
    "localize",
    "measure",
    "mlp_ablations",
    "natural_controls",
    "neuron_knock_out",
    "overlay",
    "patch_activations",
    "patch_paths",
    "path_patches",
    "perturb_prefix",
    "perturb_residual",
    "plan",
    "predictor_agreement",
    "promotion_layers",
    "promotion_summary",
    "prompt_compression",
    "rank_heads",
    "restored_share",
    "roc_area",
    "samples_needed",
    "score_criteria",
    "score_recall",
    "screen_then_verify",
    "search_layer_sets",
    "study_attention_bypass",
    "study_comparative",
    "study_idioms",
    "sweep",
    "task_summary",
    "tasks_from_lm_eval",
    "token_counts",
    "train_tuned_lens",
    "trivial_continuations",
    "zoo_overview",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'memlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
