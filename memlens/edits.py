"""Makers of interventions: lists of `Intervention` that `memlens.sweep` runs and `memlens.applied` holds."""

from memlens.instruments.ablate.branches import mlp_ablations
from memlens.instruments.ablate.heads import head_ablations, head_set_ablations
from memlens.instruments.ablate.neuron_edits import neuron_knock_out
from memlens.instruments.bypass.bypass import bypass_intervention
from memlens.instruments.noise.residual import embedding_noise
from memlens.instruments.patch.patching import activation_patches
from memlens.instruments.patch.path_patching import path_patches

__all__ = [
    "activation_patches",
    "bypass_intervention",
    "embedding_noise",
    "head_ablations",
    "head_set_ablations",
    "mlp_ablations",
    "neuron_knock_out",
    "path_patches",
]
