"""The zoo: small models with planted memories, and planting into any other model."""

from memlens.forward.components import Component
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import Certificate, CertificateOptions, certify
from memlens.organisms.planting.folder import read_organism, save_organism, truth_table
from memlens.organisms.planting.plant import Organism, PlantingOptions, plant
from memlens.organisms.training.zoo import zoo_corpus as corpus
from memlens.organisms.training.zoo import zoo_overview as overview

__all__ = [
    "Carrier",
    "Certificate",
    "CertificateOptions",
    "Component",
    "Organism",
    "PlantingOptions",
    "certify",
    "corpus",
    "overview",
    "plant",
    "read_organism",
    "save_organism",
    "truth_table",
]
