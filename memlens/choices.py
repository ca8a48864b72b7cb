"""Closed choices that several modules share: instruments check against them, studies offer them as options.

Nothing but `typing` is imported here, so that options can be read without loading the instruments.
"""

from typing import Literal

Backend = Literal["auto", "hooked", "bridge"]
"""Which TransformerLens class runs a model; see `memlens.load_model`."""

OwnAblation = Literal["mean_of_other_heads", "zero", "mean", "resample"]
"""What replaces an ablated activation, taken from the model itself."""
AblationMode = Literal[OwnAblation, "donor"]
"""What replaces an ablated activation; "donor" takes it from another model."""
Positions = Literal["all", "prompt", "targets", "last_prompt"]
"""Every position; the prompt's; those that predict a target; the one that predicts the first target."""
NeuronSelection = Literal["dominant", "random", "norm_matched"]
"""Which neurons are knocked out: the dominant ones, or controls."""

BypassedTo = Literal["identity", "zero"]
"""What attention becomes in a bypass."""
BypassControl = Literal["uniform", "first_token"]
"""Other attention matrices for comparison. They need the whole text at once."""
BypassMode = Literal[BypassedTo, BypassControl]

Stream = Literal["resid_post", "resid_mid", "attn_out", "mlp_out"]
"""Which activation is decoded."""
PatchSite = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"
]
"""Which activation is patched."""
NoiseSite = Literal["resid_post", "resid_pre"]
"""Where noise is added."""
NoiseScale = Literal["norm", "std"]
"""What the strength of noise is relative to."""

Compression = Literal["keep_last", "keep_first", "greedy_deletion"]
"""Which end of a prompt is kept, or greedy deletion of tokens."""
TaskCost = Literal["max", "mean"]
"""Whether the cost of an intervention is the largest or the mean loss over tasks."""

CurvatureMatrix = Literal["in", "gate", "out", "q", "k", "v"]
"""A matrix of a layer: of the MLP (the gate where it has one), or of attention's queries, keys or values."""
