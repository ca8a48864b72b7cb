"""Where recall is stored: decode, patch, ablate, bypass, knock out, perturb, attribute."""

from memlens.attribution.ablation import ablate_heads, head_ablations
from memlens.attribution.bounds import attention_bypass_bounds
from memlens.attribution.bypass import bypass_attention, bypass_intervention, bypassed
from memlens.attribution.bypass_predictor import PredictorAgreement, bypass_predictor, predictor_agreement
from memlens.attribution.decoding import decode_residual
from memlens.attribution.gradients import attribute_ablation, attribute_gradients
from memlens.attribution.head_pairs import ablate_head_pairs
from memlens.attribution.head_sets import ablate_heads_cumulatively, head_set_ablations, rank_heads
from memlens.attribution.lens_training import train_tuned_lens
from memlens.attribution.lenses import TunedLens
from memlens.attribution.lm_eval_tasks import LM_EVAL_TASKS, as_lm_eval, tasks_from_lm_eval
from memlens.attribution.logit_attribution import attribute_logits
from memlens.attribution.mlps import ablate_mlps, mlp_ablations
from memlens.attribution.neuron_choice import dominant_neurons
from memlens.attribution.neuron_edits import neuron_knock_out
from memlens.attribution.neurons import knock_out_neurons
from memlens.attribution.noise import embedding_noise
from memlens.attribution.patching import activation_patches, patch_activations
from memlens.attribution.path_patching import patch_paths, path_patches
from memlens.attribution.perturbation import perturb_residual
from memlens.attribution.prefix_perturbation import perturb_prefix
from memlens.attribution.promotion import promotion_layers, promotion_summary
from memlens.attribution.screening import Screening, screen_then_verify
from memlens.attribution.serving import TransformersBypass, bypass_in_transformers
from memlens.attribution.task_evaluation import evaluate_tasks
from memlens.attribution.tasks import ChoiceTask

__all__ = [
    "LM_EVAL_TASKS",
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
]
