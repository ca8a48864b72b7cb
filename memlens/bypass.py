"""Attention bypass beyond the sweep: sets of layers, bounds, a predictor, and plain transformers models."""

from memlens.instruments.bypass.bounds import attention_bypass_bounds
from memlens.instruments.bypass.layer_sets import LayerSetSearch, search_layer_sets
from memlens.instruments.bypass.predictor import PredictorAgreement, bypass_predictor, predictor_agreement
from memlens.instruments.bypass.serving import TransformersBypass, bypass_in_transformers

__all__ = [
    "LayerSetSearch",
    "PredictorAgreement",
    "TransformersBypass",
    "attention_bypass_bounds",
    "bypass_in_transformers",
    "bypass_predictor",
    "predictor_agreement",
    "search_layer_sets",
]
