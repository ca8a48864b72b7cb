"""The zoo: small models with planted memories."""

from memlens.organisms.training.zoo import zoo_corpus, zoo_overview

__all__ = ["zoo_corpus", "zoo_overview"]
