"""Lenses: train a tuned lens, and read when a prediction is promoted."""

from memlens.instruments.decode.lens import TunedLens
from memlens.instruments.decode.lens_training import train_tuned_lens
from memlens.instruments.decode.promotion import promotion_layers, promotion_summary

__all__ = ["TunedLens", "promotion_layers", "promotion_summary", "train_tuned_lens"]
