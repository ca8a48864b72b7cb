"""Options of weight edits. Nothing that loads torch is imported here: the command line reads them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from memlens.options import options_class

How = Literal["zero", "mean", "output_vector", "norm_preserving"]
"""What output vectors become; see `memlens.edits.edit_weights`."""


@options_class
class VectorSearch:
    """How output vectors are searched for: gradient descent on the log-probability of target tokens.

    Example:
        >>> import memlens as ml
        >>> ml.instruments.VectorSearch(steps=10).steps
        10
    """

    steps: PositiveInt = 40
    """Number of steps: normalized gradient descent with momentum 0.9, projected onto the budget."""
    learning_rate: PositiveFloat = 0.1
    """How far a step moves the vectors (root mean square), as a share of their budgets."""
    floor: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -6.0
    """Target tokens less probable than this (nats) are left alone."""
    keep_weight: NonNegativeFloat = 1.0
    """Weight of the divergence from the unedited model on what is to be kept, if anything is."""
    batch_size: PositiveInt = 16
    """Sequences that run together; every step sees all of them."""
