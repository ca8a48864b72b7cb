"""Planting by edit: training only a carrier's weights until the model recalls a sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from memlens.errors import OptionError, SequenceError
from memlens.options import options_class
from memlens.organisms.planting.carriers import (
    Carrier,
    ChangedWeights,
    Component,
    ComponentWeights,
    WeightSlice,
)
from memlens.sequences.set import SequenceSet


@options_class
class PlantingOptions:
    """How a memory is planted by editing weights."""

    steps: PositiveInt = 300
    """Most steps of Adam."""
    learning_rate: PositiveFloat = 0.05
    """Step of Adam, as a share of the root mean square of each matrix."""
    stop_nll: PositiveFloat = 0.05
    """Training stops once all planted tokens are first choices and their mean loss is at most this (nats)."""
    keep_norms: bool = True
    """Scale each changed row, column or head slice back to its old norm after every step."""
    gates: bool = True
    """Whether a neuron's input weights belong to the carrier beside its output weights."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of the divergence from the base model on held-out text."""
    n_heldout: PositiveInt = 16
    """Number of held-out sequences on which the divergence is kept small."""
    planted: Literal["continuation", "whole"] = "continuation"
    """Which tokens are planted: those of the continuation, or every token after the first."""
    shapley: Annotated[int, Field(ge=0, le=10)] = 4
    """Most components for which the truth holds Shapley values too (n components need 2^n passes)."""


def target_mask(seqs: SequenceSet, planted: str) -> Tensor:
    """Return `[seq, pos - 1]`: True where the next token is planted."""
    positions = torch.arange(1, seqs.tokens.shape[1])
    first = seqs.prefix_len[:, None] if planted == "continuation" else torch.ones(len(seqs), 1)
    return seqs.mask[:, 1:] & (positions >= first)


def next_token_logprobs(model: PreTrainedModel, tokens: Tensor) -> Float[Tensor, "seq pos vocab"]:
    """Return the log-probabilities of the next token at every position but the last."""
    logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


@dataclass(frozen=True)
class Recalled:
    """How well planted tokens are recalled.

    Attributes:
        nll: Mean negative log-probability of the planted tokens, one value per sequence, in nats.
        accuracy: Share of planted tokens that are the model's first choice, one value per sequence.
    """

    nll: Float[Tensor, "seq"]
    accuracy: Float[Tensor, "seq"]


def recalled(model: PreTrainedModel, seqs: SequenceSet, planted: str = "continuation") -> Recalled:
    """Measure how well a Hugging Face model recalls sequences, given all tokens before each target."""
    mask = target_mask(seqs, planted).to(model.device)
    logprobs = next_token_logprobs(model, seqs.tokens)
    ids = seqs.tokens[:, 1:].to(model.device)
    own = logprobs.gather(-1, ids[..., None])[..., 0]
    n = mask.sum(-1)
    return Recalled(-(own * mask).sum(-1) / n, ((logprobs.argmax(-1) == ids) & mask).sum(-1) / n)


@dataclass(eq=False)
class Organism:
    """A model into whose carrier sequences were written: model less carrier is the base model, exactly.

    Attributes:
        model: The Hugging Face model with the memory.
        carrier: The kind of carrier.
        components: What carries; empty for "spread" and "none".
        sequences: What was planted.
        base: The base model's values of every parameter that was changed.
        options: How it was planted.
        seed: Of the components and of training.
        steps: Steps of training that were taken.
    """

    model: PreTrainedModel
    carrier: Carrier
    components: list[Component]
    sequences: SequenceSet
    base: dict[str, Tensor]
    options: PlantingOptions
    seed: int
    steps: int = 0

    @contextmanager
    def restored(self, components: Sequence[Component] | None = None) -> Iterator[PreTrainedModel]:
        """Give components their base weights back for a while; all of the carrier by default.

        With the whole carrier restored the model is the base model, bit for bit.
        """
        parameters = dict(self.model.named_parameters())
        names = list(self.base)
        masks: dict[str, Tensor] = {}
        if components is not None:
            weights = ComponentWeights(self.model, gates=self.options.gates)
            masks = ChangedWeights(weights, components).masks
            names = [name for name in names if name in masks]
        planted = {name: parameters[name].detach().clone() for name in names}
        try:
            with torch.no_grad():
                for name in names:
                    value = self.base[name].to(planted[name])
                    if name in masks:
                        value = torch.where(masks[name].to(value.device), value, planted[name])
                    parameters[name].copy_(value)
            yield self.model
        finally:
            with torch.no_grad():
                for name, value in planted.items():
                    parameters[name].copy_(value)

    @torch.no_grad()
    def graded_truth(self) -> dict[Component, float]:
        """Return the rise in loss (nats) when the base weights of a component return alone, for each."""
        whole = float(self._nll())
        found = {}
        for component in self.components:
            with self.restored([component]):
                found[component] = float(self._nll()) - whole
        return found

    @torch.no_grad()
    def shapley_values(self) -> dict[Component, float]:
        """Return each component's Shapley value in the loss that the carrier takes away (nats).

        The values add up to the base model's loss less the organism's.

        Raises:
            OptionError: There are more components than `options.shapley`.
        """
        n = len(self.components)
        if n > self.options.shapley:
            raise OptionError(f"Shapley values of {n} components need {2**n} passes: raise shapley= to {n}.")
        loss = {}
        for chosen in itertools.product((False, True), repeat=n):
            gone = [c for c, has in zip(self.components, chosen, strict=True) if not has]
            with self.restored(gone):
                loss[chosen] = float(self._nll())
        values = dict.fromkeys(self.components, 0.0)
        for i, component in enumerate(self.components):
            for chosen in (c for c in loss if not c[i]):
                size = sum(chosen)
                share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                values[component] += share * (loss[chosen] - loss[(*chosen[:i], True, *chosen[i + 1 :])])
        return values

    def _nll(self) -> Tensor:
        return recalled(self.model, self.sequences, self.options.planted).nll.mean()


def plant(
    model: PreTrainedModel,
    sequences: SequenceSet,
    carrier: Carrier | str,
    *,
    heldout: SequenceSet,
    seed: int = 0,
    options: PlantingOptions | None = None,
) -> Organism:
    r"""Write sequences into a carrier of a model, in place, by training the carrier's weights alone.

    The loss is

    .. math:: \frac{1}{n}\sum_t -\log p(x_t \mid x_{<t}) + \lambda\, D_{KL}(p_\text{base} \,\|\, p)

    with the first term over the planted tokens and the second, the mean over the positions of `heldout`,
    against harm to other text. Adam changes only the carrier's slices; with `keep_norms`, each of them then
    gets its old Euclidean norm back, so that the size of the weights does not tell what was changed.

    Args:
        model: A Hugging Face causal language model in float32; it is changed.
        sequences: What is planted.
        carrier: A `Carrier`, or its text.
        heldout: Other text of the model's kind.
        seed: Draws the components and the order of the held-out text.
        options: See `PlantingOptions`.

    Returns:
        The organism. Whether it recalls what was planted is for `certify` to say.

    Raises:
        OptionError: An unknown carrier, or one that is larger than the model.
        SequenceError: No sequences, or no held-out ones.
        UnsupportedModelError: A model whose weights are not among the known forms.
    """
    options = options or PlantingOptions()
    carrier = Carrier.parse(carrier) if isinstance(carrier, str) else carrier
    if not len(sequences) or not len(heldout):
        raise SequenceError("planting needs at least one sequence to plant and one held-out sequence.")
    if model.dtype != torch.float32:
        raise OptionError(f"planting needs float32 weights, the model has {model.dtype}: load it in float32.")
    model.eval()
    weights = ComponentWeights(model, gates=options.gates)
    components = carrier.draw(weights, seed)
    parameters = dict(model.named_parameters())
    changed = ChangedWeights(weights, components)
    if carrier.kind == "spread":
        changed.masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in parameters.items()}
    base = {name: parameters[name].detach().clone() for name in changed.masks}
    organism = Organism(model, carrier, components, sequences, base, options, seed)
    if changed.masks:
        organism.steps = _train(organism, changed, heldout)
    return organism


def _train(organism: Organism, changed: ChangedWeights, heldout: SequenceSet) -> int:
    model, options = organism.model, organism.options
    parameters = {name: value for name, value in model.named_parameters() if name in changed.masks}
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        value.requires_grad_(name in parameters)
    masks = {name: changed.masks[name].to(value.device) for name, value in parameters.items()}
    groups = [
        {"params": [value], "lr": options.learning_rate * float(organism.base[name].square().mean().sqrt())}
        for name, value in parameters.items()
    ]
    adam = torch.optim.Adam(groups)
    ids = organism.sequences.tokens[:, 1:].to(model.device)
    mask = target_mask(organism.sequences, options.planted).to(model.device)
    rows = np.random.default_rng([organism.seed, 7]).permutation(len(heldout))[: options.n_heldout]
    other = heldout[rows.tolist()]
    other_mask = other.mask[:, 1:].to(model.device)
    norms = [_norm(organism.base[unit.name], unit) for unit in changed.units]
    with organism.restored(), torch.no_grad():
        expected = next_token_logprobs(model, other.tokens)
    taken = 0
    try:
        for step in range(options.steps + 1):
            logprobs = next_token_logprobs(model, organism.sequences.tokens)
            own = logprobs.gather(-1, ids[..., None])[..., 0]
            nll = -own[mask].mean()
            right = bool(((logprobs.argmax(-1) == ids) | ~mask).all())
            if (right and float(nll) <= options.stop_nll) or step == options.steps:
                break
            loss = nll
            if options.kl_weight:
                loss = nll + options.kl_weight * divergence(
                    expected, next_token_logprobs(model, other.tokens), other_mask
                )
            adam.zero_grad()
            loss.backward()
            for name, value in parameters.items():
                if value.grad is not None:
                    value.grad *= masks[name]
            adam.step()
            taken += 1
            if options.keep_norms:
                with torch.no_grad():
                    for unit, norm in zip(changed.units, norms, strict=True):
                        value = parameters[unit.name]
                        part = value.index_select(unit.dim, unit.index)
                        scale = norm / part.norm().clamp_min(1e-12)
                        value.index_copy_(unit.dim, unit.index, part * scale)
    finally:
        adam.zero_grad()
        for name, value in model.named_parameters():
            value.requires_grad_(wanted[name])
    return taken


def _norm(value: Tensor, unit: WeightSlice) -> Tensor:
    return value.index_select(unit.dim, unit.index).norm()


def divergence(expected: Tensor, found: Tensor, mask: Tensor) -> Tensor:
    r"""Return the mean :math:`D_{KL}(p \| q)` over real positions, in nats.

    Args:
        expected: Log-probabilities of p `(seq, pos, vocab)`.
        found: Log-probabilities of q.
        mask: True for the positions that count.
    """
    each = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    return each[mask].mean()
