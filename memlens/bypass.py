"""Attention bypass beyond the sweep: sets of layers, bounds, a predictor, and Hugging Face models."""

from memlens.instruments.bypass.bounds import bypass_bounds as bounds
from memlens.instruments.bypass.layer_sets import LayerSetSearch, search_layer_sets
from memlens.instruments.bypass.predictor import PredictorAgreement, predictor_agreement
from memlens.instruments.bypass.predictor import bypass_predictor as predictor
from memlens.instruments.bypass.serving import TransformersBypass
from memlens.instruments.bypass.serving import bypass_in_transformers as in_transformers

__all__ = [
    "LayerSetSearch",
    "PredictorAgreement",
    "TransformersBypass",
    "bounds",
    "in_transformers",
    "predictor",
    "predictor_agreement",
    "search_layer_sets",
]
