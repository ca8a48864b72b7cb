"""Lenses: training a tuned lens, and the layers at which a prediction is promoted."""

from memlens.instruments.decode.lens import TunedLens
from memlens.instruments.decode.lens_options import LensOptions
from memlens.instruments.decode.lens_training import train_tuned_lens
from memlens.instruments.decode.promotion import promotion_layers, promotion_summary

__all__ = ["LensOptions", "TunedLens", "promotion_layers", "promotion_summary", "train_tuned_lens"]
