"""Makers of interventions: each returns a list of `Intervention` for `memlens.sweep` or `memlens.applied`."""

from memlens.instruments.ablate.branches import attention_ablations, mlp_ablations
from memlens.instruments.ablate.heads import head_ablations, head_set_ablations
from memlens.instruments.ablate.neurons import neuron_knock_outs
from memlens.instruments.bypass.bypass import attention_bypasses
from memlens.instruments.edit.editing import control_edits, edit_weights
from memlens.instruments.edit.transplant import weight_transplants
from memlens.instruments.noise import embedding_noise
from memlens.instruments.patch.patching import activation_patches
from memlens.instruments.patch.path_patching import path_patches

__all__ = [
    "activation_patches",
    "attention_ablations",
    "attention_bypasses",
    "control_edits",
    "edit_weights",
    "embedding_noise",
    "head_ablations",
    "head_set_ablations",
    "mlp_ablations",
    "neuron_knock_outs",
    "path_patches",
    "weight_transplants",
]
