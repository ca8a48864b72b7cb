"""Options of the training of a tuned lens, for Python, the command line and the lens' record."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from memlens.options import options_class

Share = Annotated[float, Field(gt=0, lt=1)]


@options_class
class LensOptions:
    """How `train_tuned_lens` trains.

    Example:
        >>> import memlens as ml
        >>> ml.lens.LensOptions(steps=100).steps
        100
    """

    steps: PositiveInt = 250
    """Number of updates."""
    lr: PositiveFloat | None = None
    """Highest learning rate, from which it falls linearly to 0. By default 1 for sgd, which multiplies it by
    1 - momentum, and 0.001 for adam."""
    batch_size: PositiveInt = 16
    """Sequences per update."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd (with Nesterov momentum, as in Belrose et al. 2023) or adam (AMSGrad, with a warm-up over a fifth
    of the steps, at most 1,000)."""
    momentum: Share = 0.9
    """Momentum of sgd; the first beta of adam."""
    weight_decay: NonNegativeFloat = 1e-3
    """Pulls translators towards the identity (the logit lens)."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient of all translators together."""
    holdout: Share = 0.1
    """Share of the sequences that is held out."""
    max_holdout: PositiveInt = 128
    """Most sequences that are held out."""
    seed: int = 0
    """Seed of the split and of the order of the sequences. The same seed gives the same lens on the same
    device and number of threads."""

    @property
    def highest_lr(self) -> float:
        """The learning rate at its highest."""
        return (1.0 if self.optimizer == "sgd" else 1e-3) if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: a linear fall to 0, for adam after a warm-up."""
        warm = min(1000, self.steps // 5) if self.optimizer == "adam" else 0
        return (step + 1) / warm if step < warm else (self.steps - step) / (self.steps - warm)
