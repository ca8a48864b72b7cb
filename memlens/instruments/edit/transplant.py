"""Weight transplants: components get their weights from another model; which changes carry the memory?"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import torch

from memlens.errors import OptionError, check_option
from memlens.forward.components import Component, ComponentKind, NormPart
from memlens.forward.exclusive import computes
from memlens.forward.metrics import MetricLike
from memlens.forward.read_weights import Linear, Norm
from memlens.instruments.donors import check_donor, donor_settings
from memlens.instruments.edit.weight_edit import OUTPUTS, EditMaker, WeightChange, WeightEdit
from memlens.models.provenance import describe
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_sweep
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import SweepOptions, sweep

Transplanted = Literal["heads", "neurons", "mlps", "attention", "layers"]
"""Every component of one kind."""
_KINDS: dict[str, ComponentKind | Literal["layer"]] = {
    "heads": "head", "neurons": "neuron", "mlps": "layer_mlp", "attention": "layer_attention",
    "layers": "layer",
}  # fmt: skip
Chosen = Transplanted | Sequence[Component | str] | Mapping[str, Sequence[Component | str]]
_INNER: tuple[NormPart, ...] = ("q_norm", "k_norm")


@computes
def transplant_weights(
    model: Any,
    sequences: SequenceSet,
    donor: Any,
    components: Chosen = "heads",
    *,
    together: bool = False,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[SweepOptions],
) -> Result:
    """Give components the weights of another model, one at a time or in sets, and measure recall.

    Between a model and its clean twin this says which components' *change* carries a memory: recall is lost
    where the model gets the weights of the twin back. No copy of the model is made, and the effect equals
    that of changed parameters to 1e-5 in float32.

    - A head takes its rows of the query, key and value projections with their biases (keys and values only
      where each head has its own) and its columns of the output projection.
    - A neuron takes its rows of the MLP's input matrices with their biases and its column of the output
      matrix.
    - "mlps" and "attention" take everything in them, with all biases and the norms of queries and keys.
    - "layers" take all this with all norms of the layer.

    The embedding, the unembedding and the final norm stay the model's.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        donor: Where the weights come from: a model of the same architecture, shape and vocabulary. A model as
            its own donor changes nothing, bit for bit.
        components: "heads", "neurons", "mlps", "attention" or "layers": each of a kind in turn; a list of
            components (`memlens.zoo.Component`, or texts such as "L3H1", "L3N20", "L3 MLP", "L3 attention"
            and "L3"); or sets of them by name.
        together: Transplant all of them at once.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "weight_transplant": each metric `(sequence, layer, head)`, `(sequence, layer, neuron)` or
        `(sequence, layer)`, for a mixed list `(sequence, component)`, for sets `(sequence, set)`; and its
        baseline `(sequence)`. An effect is with the donor's weights minus without.

    Raises:
        OptionError: An unknown kind, or no components.
        SiteError: A component that does not exist.
        DonorError: The donor does not fit the model.
        UnsupportedModelError: A layer of unknown form.

    Source: ours.

    Example:
        >>> import memlens as ml
        >>> model, twin = ml.load_model("zoo/pythia-s"), ml.load_model("zoo/pythia-s-clean")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> transplant = ml.instruments.transplant_weights
        >>> transplant(model, seqs, twin, ["L0H1", "L3H7"], progress=False)["target_logprob"].dims
        ('sequence', 'layer', 'head')
        >>> whole = transplant(model, seqs, twin, "layers", together=True, progress=False)
        >>> whole["set"].values.tolist()
        ['all layers']
    """
    check_donor(model, donor, sequences)
    edits = weight_transplants(model, donor, components, together=together)
    word = components if isinstance(components, str) else "chosen components"
    settings = {"components": word, "together": together, **donor_settings(donor)}
    return sweep(model, sequences, edits, metrics, kind="weight_transplant", settings=settings, **options)


@computes
def weight_transplants(
    model: Any, donor: Any, components: Chosen = "heads", *, together: bool = False
) -> list[WeightEdit]:
    """Return the interventions that `transplant_weights` runs; see there for the arguments.

    Example:
        >>> import memlens as ml
        >>> model, twin = ml.load_model("zoo/pythia-s"), ml.load_model("zoo/pythia-s-clean")
        >>> edits = ml.edits.weight_transplants(model, twin, "mlps")
        >>> edits[2]
        WeightEdit('weights of L2 MLP from zoo/pythia-s-clean', L2 in, L2 out)
    """
    check_donor(model, donor)
    maker, giver = EditMaker(model), EditMaker(donor)
    name = str(describe(donor)["model"])
    edits = []
    for label, some, coords in _sets(maker, components, together=together):
        changes = [change for c in some for change in _transplanted(maker, giver, c)]
        about = {"how": "transplant", "donor": name}
        edits.append(maker.edit(f"weights of {label} from {name}", changes, some, coords, about))
    return edits


def _sets(
    maker: EditMaker, components: Chosen, *, together: bool
) -> Iterator[tuple[str, list[Component], dict[str, Hashable]]]:
    """What is transplanted at a time: a name, components and coordinates."""
    if isinstance(components, Mapping):
        sets = {name: maker.components(some) for name, some in components.items()}
        if together:
            sets = {" + ".join(sets): [c for some in sets.values() for c in some]}
    else:
        every = _all_of(maker, components) if isinstance(components, str) else maker.components(components)
        if together:
            words = f"all {components}" if isinstance(components, str) else " + ".join(map(str, every))
            sets = {words: every}
        else:
            yield from _single(every)
            sets = {}
            if every:
                return
    if not sets or not all(sets.values()):
        raise OptionError("components holds nothing to transplant: give at least one component.")
    for name, some in sets.items():
        yield name, list(dict.fromkeys(some)), {"set": name}


def _single(every: Sequence[Component]) -> Iterator[tuple[str, list[Component], dict[str, Hashable]]]:
    kinds = {component.kind for component in every}
    for component in every:
        coords: dict[str, Hashable] = {"layer": component.layer}
        if len(kinds) > 1:
            coords = {"component": str(component)}
        elif component.kind in ("head", "neuron"):
            coords[component.kind] = component.index
        yield str(component), [component], coords


def _all_of(maker: EditMaker, kind: str) -> list[Component]:
    check_option("components", kind, get_args(Transplanted))
    counts = {"heads": maker.trunk.n_heads, "neurons": maker.parts(0).maps["out"].weight.shape[1]}
    return [
        Component(_KINDS[kind], layer, index)
        for layer in range(maker.trunk.n_layers)
        for index in range(counts.get(kind, 1))
    ]


def _transplanted(maker: EditMaker, giver: EditMaker, component: Component) -> Iterator[WeightChange]:
    """The changes that make a component the donor's; none where the weights are the same."""
    layer, whole = component.layer, component.kind not in ("head", "neuron")
    mine, theirs = maker.parts(layer), giver.parts(layer)
    for part, index in maker.owned(component):
        new = _piece(theirs.maps[part], part in OUTPUTS, index.to(theirs.maps[part].weight.device), whole)
        old = _piece(mine.maps[part], part in OUTPUTS, index, whole)
        if not _same(new, old):
            bias = new.bias if new.bias is not None or old.bias is None else torch.zeros_like(old.bias)
            yield WeightChange(layer, part, new.weight, index, bias)
    norms = {"layer": tuple(mine.norms), "layer_attention": _INNER}.get(component.kind, ())
    for part in norms:
        if part in mine.norms and not _same(theirs.norms[part], mine.norms[part]):
            yield WeightChange(layer, part, theirs.norms[part].weight, None, theirs.norms[part].bias)


def _piece(linear: Linear, columns: bool, index: torch.Tensor, whole: bool) -> Linear:
    if not columns:
        return Linear(linear.weight[index], None if linear.bias is None else linear.bias[index])
    return Linear(linear.weight[:, index], linear.bias if whole else None)


def _same(new: Linear | Norm, old: Linear | Norm) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        if a is None or b is None:
            return all(t is None or not bool(t.any()) for t in (a, b))
        return torch.equal(a.to(b), b)

    return equal(new.weight, old.weight) and equal(new.bias, old.bias)


register_kind("weight_transplant", plot=plot_sweep, reading=read_effects)
