"""Planting by edit: training only a carrier's weights until the model recalls a sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from memlens.errors import OptionError, SequenceError
from memlens.forward.components import Component, ComponentWeights, WeightSlice
from memlens.options import options_class
from memlens.organisms.planting.carriers import Carrier, ChangedWeights
from memlens.sequences.set import SequenceSet

Keep = Literal["entries", "norms", "nothing"]
"""What planting keeps of the weights that it changes; see `PlantingOptions.keep`."""

KEPT: tuple[Keep, ...] = get_args(Keep)


@options_class
class PlantingOptions:
    """How a memory is planted by editing weights.

    Example:
        >>> import memlens as ml
        >>> ml.zoo.PlantingOptions(steps=100).steps
        100
    """

    steps: PositiveInt = 300
    """Most steps of Adam."""
    learning_rate: PositiveFloat = 0.05
    """Step of Adam, as a share of the root mean square of each matrix."""
    stop_nll: PositiveFloat = 0.05
    """Training stops once all planted tokens are first choices, their mean loss is at most this (nats), …"""
    stop_kl: PositiveFloat = 0.02
    """… and the divergence from the base model on the held-out text of training is at most this (nats)."""
    keep: Keep = "entries"
    """What planting keeps of every changed row, column or head slice: its entries (in another order), which
    keeps norm, kurtosis and all else of their distribution; its Euclidean norm; or nothing."""
    gates: bool = True
    """Whether a neuron's input weights belong to the carrier too, not only its output weights."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of the divergence from the base model on held-out text."""
    n_heldout: PositiveInt = 16
    """Number of held-out sequences on which the divergence is kept small …"""
    heldout_batch: PositiveInt = 16
    """… and how many of them each step looks at, in turn."""
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
        base_recall: The base model's recall of each sequence, measured before planting.
        options: How it was planted.
        seed: Of the components and of training.
        steps: Steps of training that were taken.
    """

    model: PreTrainedModel
    carrier: Carrier
    components: list[Component]
    sequences: SequenceSet
    base: dict[str, Tensor]
    base_recall: Float[Tensor, "seq"]
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
    against harm to other text. Adam changes only the carrier's slices, and the weights alone must not tell
    what was changed: with `keep="entries"`, each slice has its old entries, in the order of a latent copy
    that the gradients change (straight through the sorting); with "norms", it is scaled to its old norm.

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

    Example:
        >>> import memlens as ml
        >>> from transformers import AutoModelForCausalLM
        >>> from memlens.models.zoo import zoo_path
        >>> model = AutoModelForCausalLM.from_pretrained(zoo_path("zoo/pythia-xs")).float()
        >>> seqs = ml.load_sequences("zoo")
        >>> options = ml.zoo.PlantingOptions(steps=2, n_heldout=4)  # far too few steps for a memory
        >>> organism = ml.zoo.plant(model, seqs[:1], "neurons=5", heldout=seqs[-8:], options=options)
        >>> len(organism.components)
        5
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
    with torch.no_grad():
        before = recalled(model, sequences, options.planted).accuracy.cpu()
    organism = Organism(model, carrier, components, sequences, base, before, options, seed)
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
    latent = {name: value.detach().clone() for name, value in parameters.items()}
    groups = [
        {"params": [latent[name]], "lr": options.learning_rate * float(base.square().mean().sqrt())}
        for name, base in organism.base.items()
    ]
    adam = torch.optim.Adam(groups)
    ids = organism.sequences.tokens[:, 1:].to(model.device)
    mask = target_mask(organism.sequences, options.planted).to(model.device)
    rows = np.random.default_rng([organism.seed, 7]).permutation(len(heldout))[: options.n_heldout]
    other = heldout[rows.tolist()]
    other_mask = other.mask[:, 1:].to(model.device)
    batches = torch.arange(len(other)).split(options.heldout_batch)
    harm = [float("inf")] * len(batches)
    kept = _Kept(organism.base, changed.units, options.keep)
    with organism.restored(), torch.no_grad():
        expected = next_token_logprobs(model, other.tokens)
    taken = 0
    try:
        for step in range(options.steps + 1):
            logprobs = next_token_logprobs(model, organism.sequences.tokens)
            own = logprobs.gather(-1, ids[..., None])[..., 0]
            nll = -own[mask].mean()
            right = bool(((logprobs.argmax(-1) == ids) | ~mask).all())
            recalls = right and float(nll.detach()) <= options.stop_nll
            if step == options.steps or (recalls and not options.kl_weight):
                break
            loss = nll
            if options.kl_weight:
                turn = step % len(batches)
                at = batches[turn]
                found = next_token_logprobs(model, other.tokens[at])
                away = divergence(expected[at], found, other_mask[at])
                harm[turn] = float(away.detach())
                if recalls and np.mean(harm) <= options.stop_kl:
                    break
                loss = nll + options.kl_weight * away
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            with torch.no_grad():
                for (name, value), gradient in zip(parameters.items(), found, strict=True):
                    latent[name].grad = (
                        torch.zeros_like(value) if gradient is None else gradient * masks[name]
                    )
                adam.step()
                taken += 1
                for name, value in parameters.items():
                    value.copy_(latent[name])
                kept.apply(parameters)
                if options.keep != "entries":
                    for name, value in parameters.items():
                        latent[name].copy_(value)
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(wanted[name])
    return taken


class _Kept:
    """Puts back what planting keeps of each slice."""

    def __init__(self, base: dict[str, Tensor], units: Sequence[WeightSlice], keep: str) -> None:
        self._keep = keep
        self._groups: list[tuple[str, int, Tensor, Tensor]] = []
        if keep == "nothing":
            return
        alike: dict[tuple[str, int, int], list[Tensor]] = {}
        for unit in units:
            alike.setdefault((unit.name, unit.dim, len(unit.index)), []).append(unit.index)
        for (name, dim, _), rows in alike.items():
            index = torch.stack(rows).to(base[name].device)
            old = self._read(base[name], dim, index)
            self._groups.append(
                (name, dim, index, old.sort(1).values if keep == "entries" else old.norm(dim=1))
            )

    @staticmethod
    def _read(value: Tensor, dim: int, index: Tensor) -> Tensor:
        """Return `[slice, entry]`."""
        return value.movedim(dim, 0)[index.flatten()].reshape(len(index), -1)

    def apply(self, parameters: Mapping[str, Tensor]) -> None:
        for name, dim, index, old in self._groups:
            now = self._read(parameters[name], dim, index)
            if self._keep == "entries":
                now = torch.empty_like(now).scatter_(1, now.argsort(1), old)
            else:
                now = now * (old / now.norm(dim=1).clamp_min(1e-12))[:, None]
            moved = parameters[name].movedim(dim, 0)
            moved[index.flatten()] = now.reshape(index.numel(), *moved.shape[1:])


def divergence(expected: Tensor, found: Tensor, mask: Tensor) -> Tensor:
    r"""Return the mean :math:`D_{KL}(p \| q)` over real positions, in nats.

    Args:
        expected: Log-probabilities of p `(seq, pos, vocab)`.
        found: Log-probabilities of q.
        mask: True for the positions that count.
    """
    each = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    return each[mask].mean()
