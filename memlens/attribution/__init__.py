"""Where recall is stored: decode, patch, ablate, bypass, attribute."""

from memlens.attribution.ablation import ablate_heads, head_ablations
from memlens.attribution.bypass import bypass_attention, bypass_intervention, bypassed
from memlens.attribution.decoding import decode_residual, promotion_layers
from memlens.attribution.logit_attribution import attribute_logits
from memlens.attribution.patching import activation_patches, patch_activations

__all__ = [
    "ablate_heads",
    "activation_patches",
    "attribute_logits",
    "bypass_attention",
    "bypass_intervention",
    "bypassed",
    "decode_residual",
    "head_ablations",
    "patch_activations",
    "promotion_layers",
]
