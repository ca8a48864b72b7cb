r"""Edits of what components write: to zero, to a constant, or to output vectors that are searched for.

A neuron writes :math:`a_i w_i`: its activation times its output vector, a column of the MLP's output matrix.
A head writes the columns of attention's output matrix, times its mixed values. All edits change these columns
only, so that activations inside the component stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError, check_option
from memlens.forward.batches import Batch, Targets, at_targets, logits_at, make_batches
from memlens.forward.capture import mean_activations
from memlens.forward.components import Component, Part
from memlens.forward.exclusive import computes
from memlens.forward.hooks import attached, hook_name
from memlens.instruments.edit.options import How, VectorSearch
from memlens.instruments.edit.weight_edit import OUTPUTS, EditMaker, WeightChange, WeightEdit
from memlens.instruments.screen.backward import parameters_at_rest
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

HOWS: tuple[str, ...] = get_args(How)
_SEARCHED = ("output_vector", "norm_preserving")
_USED: dict[str, tuple[str, ...]] = {
    "zero": (),
    "mean": ("sequences", "reference"),
    **dict.fromkeys(_SEARCHED, ("sequences", "keep", "search")),
}
"""Which options a kind of edit has besides its strength."""


@computes
@torch.inference_mode(False)  # a search needs gradients, whatever the caller switched off
def edit_weights(
    model: Any,
    components: Iterable[Component | str],
    how: How = "zero",
    *,
    sequences: SequenceSet | None = None,
    keep: SequenceSet | None = None,
    reference: SequenceSet | None = None,
    strength: float = 1.0,
    search: VectorSearch | None = None,
    name: str | None = None,
    progress: bool = True,
) -> WeightEdit:
    r"""Change what components write, by changing their output vectors.

    With :math:`w_i` the columns of the output matrix that the components own, and :math:`s` the `strength`:

    - ``"zero"``: :math:`w_i' = (1 - s)\,w_i`. A whole MLP or attention loses its bias in the same way.
    - ``"mean"``: the same, and :math:`s \sum_i \bar a_i w_i` is added to the output's bias, with the mean
      activations :math:`\bar a_i` over all positions of `reference`.
    - ``"output_vector"``: :math:`w_i' = w_i + \delta_i`, where :math:`\delta` minimizes the mean
      log-probability of the target tokens of `sequences` under the budget
      :math:`\|\delta_i\| \le s\,\|w_i\|`. With `keep`, the divergence from the unedited model on the
      continuations there is added (see `VectorSearch`).
    - ``"norm_preserving"``: the same, and :math:`w_i'` is scaled to the norm of :math:`w_i`.

    At :math:`s = 1`, zeroing and an output-vector edit may change a vector by the same amount.

    Args:
        model: A TransformerLens model, which stays as it is.
        components: Heads, neurons, or layers' MLPs or attention: `memlens.zoo.Component`, or texts such as
            "L3H1" and "L3N20"; from any localizer's ranking (`memlens.benchmark.Ranking.top`).
        how: One of the above.
        sequences: What is to be forgotten, for the two searched edits. Judge the edit on other sequences. For
            "mean", the set to average over.
        keep: What is to stay, for the two searched edits.
        reference: The set for "mean", in place of `sequences`.
        strength: As above.
        search: Parameters of the search, for the two searched edits.
        name: Of the edit; by default what it does.
        progress: Show a bar during the search.

    Returns:
        The edit, an `Intervention` that can also be exported (`export_edited`). `about` records how it was
        found, with the mean log-probability of the targets before and after.

    Raises:
        OptionError: Unknown `how`, a strength that is not a number above 0 (for "zero" and "mean" also
            above 1), no components, or a whole layer; or an option that this kind of edit does not use.
        SiteError: A component that does not exist.
        SequenceError: `sequences` is missing, or `keep` is empty.

    Source: arXiv 2606.18767 edits the output vectors of few located neurons, by a constrained edit that adds
    a distractor in the space of the vocabulary. Only its abstract was known to us: the objective, the budget
    and all parameters here are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> how = {"how": "output_vector", "sequences": seqs, "progress": False}
        >>> edit = ml.edits.edit_weights(model, ["L0N5", "L1N7"], **how)
        >>> edit.about["target_logprob_after"] < edit.about["target_logprob_before"]
        True
    """
    check_option("how", how, HOWS)
    check_used([how], sequences=sequences, keep=keep, reference=reference, search=search)
    if how == "mean" and sequences is not None and reference is not None:
        raise OptionError("how='mean' averages over one set: give reference or sequences, not both.")
    if search is not None and not isinstance(search, VectorSearch):
        raise OptionError(f"search={search!r}: give memlens.instruments.VectorSearch(…).")
    most = 1.0 if how in ("zero", "mean") else float("inf")
    number = isinstance(strength, Real)
    if not (number and 0 < strength <= most and math.isfinite(strength)):
        bound = "" if math.isinf(most) else f" and at most {most:g}"
        raise OptionError(f"strength={strength!r} with how={how!r}: give a number above 0{bound}.")
    maker = EditMaker(model)
    chosen = maker.components(components)
    if not chosen or any(component.kind == "layer" for component in chosen):
        raise OptionError("components: give at least one head, neuron, MLP or attention, and no whole layer.")
    columns = owned_columns(maker, chosen)
    about: dict[str, Any] = {"how": how, "strength": strength}
    if how in _SEARCHED:
        if sequences is None or not len(sequences):
            raise SequenceError(f"how={how!r} searches on sequences: give those that are to be forgotten.")
        if keep is not None and not len(keep):
            raise SequenceError("keep holds no sequences: leave it out, or give what is to stay.")
        options = search or VectorSearch()
        if keep is None and options.keep_weight != VectorSearch.keep_weight:
            raise OptionError(
                f"keep_weight={options.keep_weight:g} weighs what is to stay: give keep, or leave it out."
            )
        found = _Search(maker, columns, how, strength, options, sequences, keep)
        changes = found.run(progress)
        about |= {**asdict(options), **found.facts}
    else:
        changes = _scaled(maker, chosen, columns, how, strength, reference or sequences)
    words = f"{how} " + (" ".join(map(str, chosen)) if len(chosen) <= 4 else f"{len(chosen)} components")
    return maker.edit(name or words, changes, chosen, about=about)


def check_used(hows: Sequence[str], **given: Any) -> None:
    """Raise `OptionError` for an option, or a field of `VectorSearch`, that none of some kinds of edit uses.

    >>> check_used(["zero", "mean"], reference=1, keep=None)
    >>> check_used(["zero"], reference=1)
    Traceback (most recent call last):
    memlens.errors.OptionError: how='zero' does not use reference: leave it out, or choose how='mean'.
    """
    for name, value in given.items():
        known = "search" if hasattr(VectorSearch, name) else name
        users = [how for how in HOWS if known in _USED[how]]
        if value is not None and not set(users) & set(hows):
            raise OptionError(
                f"how={' and '.join(map(repr, hows))} does not use {name}: leave it out, or choose "
                f"how={' or '.join(map(repr, users))}."
            )


def used_by(how: str, **given: Any) -> dict[str, Any]:
    """Return those of some options that a kind of edit uses.

    >>> used_by("zero", sequences=1, keep=2), used_by("mean", sequences=1, reference=None)
    ({}, {'sequences': 1, 'reference': None})
    """
    return {name: value for name, value in given.items() if name in _USED[how]}


Columns = dict[tuple[int, Part], Int[Tensor, " k"]]
"""The columns of output maps that components own, by layer and map."""


def owned_columns(maker: EditMaker, components: Sequence[Component]) -> Columns:
    """Return the columns that components own together, each once."""
    found: dict[tuple[int, Part], list[Tensor]] = {}
    for component in components:
        part, index = maker.output(component)
        found.setdefault((component.layer, part), []).append(index)
    return {place: torch.cat(some).unique() for place, some in found.items()}


def _scaled(
    maker: EditMaker,
    components: Sequence[Component],
    columns: Columns,
    how: str,
    strength: float,
    reference: SequenceSet | None,
) -> list[WeightChange]:
    whole = {(c.layer, maker.output(c)[0]) for c in components if c.kind.startswith("layer")}
    means: Mapping[str, Tensor] = {}
    if how == "mean":
        if reference is None:
            raise SequenceError("how='mean' needs what to average over: give sequences or reference.")
        check_sequences(reference, maker.model, on_eos="keep")
        names = [hook_name("z" if part == "o" else "mlp_post", layer) for layer, part in columns]
        means = mean_activations(maker.model, reference, names)
    changes = []
    for (layer, part), index in columns.items():
        old = maker.parts(layer).maps[part]
        weight = old.weight[:, index]
        bias = torch.zeros_like(weight[:, 0]) if old.bias is None else old.bias
        after = bias
        if how == "mean":
            mean = means[hook_name("z" if part == "o" else "mlp_post", layer)].flatten()
            after = bias + strength * (weight @ mean[index].to(weight))
        elif (layer, part) in whole:
            after = (1 - strength) * bias
        moved = None if torch.equal(after, bias) else after
        changes.append(WeightChange(layer, part, (1 - strength) * weight, index, moved))
    return changes


class _Search:
    """Gradient descent on output vectors.

    Attributes:
        facts: What was found.
    """

    facts: dict[str, Any]

    def __init__(
        self,
        maker: EditMaker,
        columns: Columns,
        how: str,
        strength: float,
        options: VectorSearch,
        sequences: SequenceSet,
        keep: SequenceSet | None,
    ) -> None:
        self.maker, self.columns, self.how, self.strength, self.options = (
            maker,
            columns,
            how,
            strength,
            options,
        )
        self.first = min(layer for layer, _ in columns)
        for seqs in (sequences, keep):
            if seqs is not None:
                check_sequences(seqs, maker.model, on_eos="keep")
        self.old = {
            (layer, part): maker.parts(layer).maps[part].weight[:, index].float()
            for (layer, part), index in columns.items()
        }
        self.share = {place: torch.zeros_like(old, requires_grad=True) for place, old in self.old.items()}
        self.sequences, self.keep = sequences, keep
        self.facts = {"sequences": len(sequences), "kept_sequences": 0 if keep is None else len(keep)}

    def run(self, progress: bool) -> list[WeightChange]:
        """Search, and return the changes."""
        options = self.options
        with parameters_at_rest(self.maker.model):
            forget, keep = self._prepared(self.sequences), self._prepared(self.keep)
            before = self._mean_logprob(forget)
            momentum = [torch.zeros_like(share) for share in self.share.values()]
            for _ in tqdm(range(options.steps), disable=not progress, desc=f"{self.how} edit", unit="step"):
                for run in forget:
                    self._loss(run, len(self.sequences)).backward()
                for run in keep:
                    assert self.keep is not None
                    (options.keep_weight * self._divergence(run, len(self.keep))).backward()
                self._step(momentum)
            after = self._mean_logprob(forget)
        self.facts |= {"target_logprob_before": before, "target_logprob_after": after}
        return [WeightChange(c.layer, c.part, c.weight.detach(), c.index) for c in self._changes()]

    @torch.no_grad()
    def _prepared(self, seqs: SequenceSet | None) -> list[_Run]:
        """The batches of a set with the residual at the first edited layer, and the unedited logits."""
        if seqs is None or not len(seqs):
            return []
        trunk, found = self.maker.trunk, []
        for batch, targets in make_batches(seqs, self.options.batch_size, trunk.device):
            resid = trunk.run(trunk.embed(batch.tokens), 0, self.first)
            logits = self._unembedded(trunk.run(resid, self.first), targets)
            found.append((batch, targets, resid, logits.log_softmax(-1)))
        return found

    def _unembedded(self, final: Tensor, targets: Targets) -> Float[Tensor, "batch target vocab"]:
        return logits_at(self.maker.trunk.unembed, at_targets(final, targets), targets.mask).float()

    def _changes(self) -> list[WeightChange]:
        found = []
        for (layer, part), index in self.columns.items():
            old = self.old[layer, part]
            new = old + self.share[layer, part] * old.norm(dim=0)
            if self.how == "norm_preserving":
                new = F.normalize(new, dim=0) * old.norm(dim=0)
            found.append(WeightChange(layer, part, new, index))
        return found

    def _logprobs(self, run: _Run) -> Float[Tensor, "batch target vocab"]:
        _, targets, resid, _ = run
        edit = self.maker.edit("search", self._changes())
        with attached(self.maker.model, edit.bound(None)):
            final = self.maker.trunk.run(resid, self.first)
        return self._unembedded(final, targets).log_softmax(-1)

    def _loss(self, run: _Run, n: int) -> Tensor:
        """The mean over sequences of the mean log-probability of targets, none of them below the floor."""
        targets = run[1]
        own = self._logprobs(run).gather(-1, targets.ids[..., None])[..., 0].clamp_min(self.options.floor)
        return ((own * targets.mask).sum(-1) / targets.mask.sum(-1)).sum() / n

    def _divergence(self, run: _Run, n: int) -> Tensor:
        """The mean over sequences of the mean divergence of the edited from the unedited model, in nats."""
        mask, plain = run[1].mask, run[3]
        each = (plain.exp() * (plain - self._logprobs(run))).sum(-1)
        return ((each * mask).sum(-1) / mask.sum(-1)).sum() / n

    @torch.no_grad()
    def _step(self, momentum: Sequence[Tensor]) -> None:
        """Move against the gradient, which is relative to the vectors' norms, and back into the budget."""
        for moving, share in zip(momentum, self.share.values(), strict=True):
            assert share.grad is not None
            moving.mul_(0.9).add_(share.grad)
            share.grad = None
        mean = torch.cat([moving.square().sum(0) for moving in momentum]).mean().sqrt().clamp_min(1e-30)
        for moving, share in zip(momentum, self.share.values(), strict=True):
            share.sub_(moving * (self.options.learning_rate * self.strength / mean))
            share.mul_((self.strength / share.norm(dim=0).clamp_min(1e-12)).clamp_max(1.0))

    @torch.no_grad()
    def _mean_logprob(self, runs: Sequence[_Run]) -> float:
        found = []
        for run in runs:
            targets = run[1]
            own = self._logprobs(run).gather(-1, targets.ids[..., None])[..., 0]
            found.append((own * targets.mask).sum(-1) / targets.mask.sum(-1))
        return float(torch.cat(found).mean())


_Run = tuple[Batch, Targets, Tensor, Tensor]
"""A batch, its targets, the residual at the first edited layer, and the unedited log-probabilities."""


@computes
def control_edits(
    model: Any, edit: WeightEdit, kind: Literal["direction", "components"], *, n: int = 3, seed: int = 0
) -> list[WeightEdit]:
    r"""Return random edits of the same size as an edit of output vectors.

    Args:
        model: The model for which the edit was made.
        edit: An edit that changes output vectors only.
        kind: "direction": every vector changes by as much as in the edit (:math:`\|\delta_i\|`), in a random
            direction. "components": other heads or neurons of the same layers, drawn at random, change by as
            much relative to their norms: a scaled vector (as by zeroing) is scaled in the same way, others
            change in a random direction.
        n: How many.
        seed: Of the draws.

    Raises:
        OptionError: An unknown kind; the edit changes other weights than output vectors; or, for
            "components", it edits whole MLPs or attention, or a layer has too few others.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> edit = ml.edits.edit_weights(model, ["L0N5", "L1N7"])
        >>> [control.name for control in control_edits(model, edit, "direction", n=2)]
        ['random direction 0', 'random direction 1']
    """
    check_option("kind", kind, ("direction", "components"))
    if not isinstance(edit, WeightEdit) or n < 0:
        raise OptionError(
            f"{n} controls of a {type(edit).__name__}: give a weight edit (see as_weight_edit), and n from 0."
        )
    if not edit.changes or any(change.part not in OUTPUTS for change in edit.changes):
        raise OptionError(
            f"{edit.name!r} changes more than output vectors: it has no random edit of its size."
        )
    maker = EditMaker(model)
    found = []
    for draw in range(n):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
        changes = []
        for change in edit.changes:
            part: Any = change.part
            old = maker.parts(change.layer).maps[part].weight
            assert change.index is not None
            own = old[:, change.index]
            delta = change.weight.to(own) - own
            index, size = change.index, delta.norm(dim=0)
            if kind == "components":
                width = maker.trunk.d_head if change.part == "o" else 1
                index = _others(change, old.shape[1], width, generator)
                size = size / own.norm(dim=0).clamp_min(1e-12) * old[:, index].norm(dim=0)
            noise = torch.randn(delta.shape, generator=generator).to(delta)
            new = old[:, index] + F.normalize(noise, dim=0) * size
            if kind == "components":
                scale = (own * change.weight).sum(0) / own.square().sum(0).clamp_min(1e-12)
                scaled = (change.weight - scale * own).norm(dim=0) < 1e-4 * own.norm(dim=0)
                new = torch.where(scaled, scale * old[:, index], new)
            changes.append(WeightChange(change.layer, change.part, new, index))
        about = {"how": f"random {kind}", "of": edit.name, "seed": seed, "draw": draw}
        found.append(maker.edit(f"random {kind} {draw}", changes, about=about))
    return found


def _others(change: WeightChange, width: int, each: int, generator: torch.Generator) -> Tensor:
    """As many other components' columns, in random order; a component has `each` columns."""
    assert change.index is not None
    used = (change.index // each).unique().tolist()
    free = torch.tensor([c for c in range(width // each) if c not in set(used)], dtype=torch.long)
    if len(free) < len(used) or len(used) * each != len(change.index):
        raise OptionError(
            f"layer {change.layer} has {len(free)} components beside the {len(used)} edited ones: there are "
            "no others of the same size."
        )
    chosen = free[torch.randperm(len(free), generator=generator)[: len(used)]]
    return (chosen[:, None] * each + torch.arange(each)).flatten().to(change.index.device)
