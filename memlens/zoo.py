"""The zoo: small models with planted memories."""

from memlens.organisms.training.zoo import zoo_corpus as corpus
from memlens.organisms.training.zoo import zoo_overview as overview

__all__ = ["corpus", "overview"]
