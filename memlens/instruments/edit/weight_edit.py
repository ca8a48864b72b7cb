"""`WeightEdit`: components of a model and what their weights become, as an intervention and as parameters.

As an intervention it computes what the model with these weights would, from activations that the model has
anyway. Changed rows of the maps into queries, keys, values and hidden units are computed from the layer's
normalized input and written to `hook_q`, `hook_k`, `hook_v` and `mlp.hook_post`; a change of the columns of
an output matrix adds ``(w_new - w_old) · activation`` to what attention or the MLP writes. There is no second
copy of the model. `memlens.instruments.edit.writing` writes the same record into parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from memlens.errors import InterventionError, OptionError, SiteError
from memlens.forward.components import Component, NormPart, Part
from memlens.forward.exclusive import computes, known_of
from memlens.forward.hooks import HookFn, check_layer, hook_name
from memlens.forward.read_blocks import LayerParts, read_parts
from memlens.forward.read_weights import Linear, Norm
from memlens.forward.trunk import Trunk
from memlens.store.fingerprint import fingerprint
from memlens.sweeps.interventions import Intervention, Reads

OUTPUTS: tuple[Part, ...] = ("o", "out")
"""The maps whose columns heads and neurons own; they own rows of the others."""
_NORMS = get_args(NormPart)


@dataclass(frozen=True, eq=False)
class WeightChange:
    """New values of some rows or columns of one map of a layer, or of a norm.

    Attributes:
        layer: The layer.
        part: The map or norm, by its name in `memlens.forward.components`.
        weight: The new values: `[k, d_in]` rows of `q`, `k`, `v`, `in` and `gate`, `[d_out, k]` columns of
            `o` and `out`, `[d]` of a norm.
        index: Which rows or columns; None for a norm.
        bias: New biases: `[k]` of the rows, or the whole bias of `o`, `out` or a norm. None keeps them.

    Example:
        >>> import torch
        >>> import memlens as ml
        >>> change = ml.instruments.WeightChange(0, "mlp_out", torch.zeros(2, 8), index=torch.tensor([3, 5]))
        >>> change.layer
        0
    """

    layer: int
    part: Part | NormPart
    weight: Float[Tensor, "..."]
    index: Int[Tensor, " k"] | None = None
    bias: Float[Tensor, " d"] | None = None


@dataclass(frozen=True, repr=False)
class WeightEdit(Intervention):
    """An intervention that stands for changed weights, made by `weight_edit` for one model.

    It can be swept, applied and added to other interventions like any `Intervention`. Two weight edits are
    joined by `join_edits`.

    Attributes:
        changes: The new weights, at most one entry for each layer and part.
        components: The components that were edited.
        about: How the edit was made, for the card of an exported model.
    """

    changes: tuple[WeightChange, ...] = ()
    components: tuple[Component, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = dict.fromkeys(f"L{change.layer} {change.part}" for change in self.changes)
        return f"WeightEdit({self.name!r}, {', '.join(parts) or 'no change'})"

    def __add__(self, other: Intervention) -> Intervention:
        """As of `Intervention`; two weight edits cannot be added.

        Raises:
            InterventionError: Both are weight edits.
        """
        if isinstance(other, WeightEdit):
            raise InterventionError(
                f"{self.name!r} and {other.name!r} are both weight edits: join them with "
                "memlens.instruments.edit.join_edits, which changes each weight once."
            )
        return super().__add__(other)

    @property
    def size(self) -> float:
        """The Euclidean norm of all changed output columns; see `edit_size`."""
        return float(self.about.get("size", float("nan")))


@dataclass(frozen=True, eq=False)
class _MadeFor:
    """Raises for a model whose weights are not those that an edit replaces."""

    name: str
    changes: tuple[WeightChange, ...]
    digest: str

    def __call__(self, model: Any) -> None:
        known = known_of(model)
        maker = known.get("weight edits") or EditMaker(model)
        known["weight edits"] = maker
        for change in self.changes:
            maker.check_fits(change)
        if maker.digest(self.changes) != self.digest:
            raise InterventionError(
                f"{self.name!r} was made for other weights than this model's: make it for this model, and "
                "again if the weights changed since."
            )


class EditMaker:
    """Makes the weight edits of one model, whose layers it reads once.

    Args:
        model: A TransformerLens model with unprocessed weights.
    """

    model: Any
    trunk: Trunk

    def __init__(self, model: Any) -> None:
        self.model, self.trunk = model, Trunk(model)
        self._parts: dict[int, LayerParts] = {}

    def parts(self, layer: int) -> LayerParts:
        """Return a layer's weights.

        Raises:
            UnsupportedModelError: A part has an unknown form.
        """
        if layer not in self._parts:
            self._parts[layer] = read_parts(self.model, layer, parallel=self.trunk.parallel)
        return self._parts[layer]

    def components(self, given: Iterable[Component | str]) -> list[Component]:
        """Return components, each once; texts are parsed by `Component.parse`.

        Raises:
            OptionError: A text names no component, or something is neither a component nor a text.
            SiteError: The model has no such component.
        """
        if not isinstance(given, Iterable) and not isinstance(given, Component):
            raise OptionError(
                f"components is a {type(given).__name__}: give a list of texts such as 'L3H1' or 'L3N20', or "
                "the first of a ranking, ranking.top(n)."
            )
        given = [given] if isinstance(given, (str, Component)) else list(given)
        for one in given:
            if not isinstance(one, (Component, str)):
                raise OptionError(f"{one!r} is not a component: write texts such as 'L3H1' or 'L3N20'.")
        found = dict.fromkeys(Component.parse(c) if isinstance(c, str) else c for c in given)
        for component in found:
            self._check(component)
        return list(found)

    def _check(self, component: Component) -> None:
        check_layer(component.layer, self.trunk.n_layers)
        width = self.parts(component.layer).maps["out"].weight.shape[1]
        counts = {"head": self.trunk.n_heads, "neuron": width}
        if not 0 <= component.index < counts.get(component.kind, 1):
            raise SiteError(
                f"{component} does not exist: each layer has {self.trunk.n_heads} heads and {width} neurons."
            )

    def output(self, component: Component) -> tuple[Part, Int[Tensor, " k"]]:
        """Return the output map of a component (not of a whole layer) and the columns that it owns."""
        part: Part = "o" if component.kind in ("head", "layer_attention") else "out"
        return part, self._own(part, component)

    def owned(self, component: Component) -> list[tuple[Part, Int[Tensor, " k"]]]:
        """Return every map in which a component owns rows or columns, and which.

        A head owns rows of `k` and `v` where each head has its own.
        """
        inside: tuple[Part, ...] = ("q", "k", "v", "o")
        if component.kind == "head" and self.trunk.n_kv_heads != self.trunk.n_heads:
            inside = ("q", "o")
        mlp: tuple[Part, ...] = ("in", "gate", "out")
        parts = {"head": inside, "layer_attention": inside, "layer": inside + mlp}.get(component.kind, mlp)
        known = self.parts(component.layer).maps
        return [(part, self._own(part, component)) for part in parts if part in known]

    def _own(self, part: Part, component: Component) -> Tensor:
        weight = self.parts(component.layer).maps[part].weight
        if component.kind == "head":
            places = torch.arange(self.trunk.d_head) + component.index * self.trunk.d_head
        elif component.kind == "neuron":
            places = torch.tensor([component.index])
        else:
            places = torch.arange(weight.shape[1 if part in OUTPUTS else 0])
        return places.to(weight.device)

    def edit(
        self,
        name: str,
        changes: Iterable[WeightChange],
        components: Sequence[Component] = (),
        coords: Mapping[str, Hashable] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> WeightEdit:
        """Return the edit of some changes; arguments as of `weight_edit`."""
        merged = merged_changes(self._fitted(change) for change in changes)
        by_layer: dict[int, dict[Part | NormPart, WeightChange]] = {}
        for change in merged:
            by_layer.setdefault(change.layer, {})[change.part] = change
        hooks = [
            hook
            for layer, some in sorted(by_layer.items())
            for hook in _Layer(layer, self.parts(layer), some, self.model.hook_dict).hooks()
        ]
        size = float(torch.stack([self._output_size(c) for c in merged]).sum().sqrt()) if merged else 0.0
        facts = {"size": size, **(about or {})}
        return WeightEdit(
            name,
            hooks,
            dict(coords or {}),
            checks=(_MadeFor(name, merged, self.digest(merged)),),
            changes=merged,
            components=tuple(components),
            about=facts,
        )

    def digest(self, changes: Iterable[WeightChange]) -> str:
        """Return a fingerprint of the weights that changes replace."""
        return fingerprint([self._replaced(change) for change in changes])

    def _replaced(self, change: WeightChange) -> list[Tensor | None]:
        old, norm = _pieces(self.parts(change.layer), change.part)
        if norm is not None:
            return [norm.weight, norm.bias]
        assert old is not None  # `check_fits` has looked
        index = _index(change)
        if change.part in OUTPUTS:
            return [old.weight[:, index], None if change.bias is None else old.bias]
        return [old.weight[index], None if old.bias is None else old.bias[index]]

    def check_fits(self, change: WeightChange) -> None:
        """Check that the model has the rows, columns or norm of a change, at its size.

        Raises:
            InterventionError: It has not, as where the change was made for another model.
            UnsupportedModelError: A part has an unknown form.
        """
        wanted: tuple[int, ...] | None = None
        if 0 <= change.layer < self.trunk.n_layers:
            parts = self.parts(change.layer)
            linear, norm = _pieces(parts, change.part)
            if linear is not None:
                index, dim = _index(change), 1 if change.part in OUTPUTS else 0
                size = list(linear.weight.shape)
                inside = len(index) == 0 or 0 <= int(index.min()) <= int(index.max()) < size[dim]
                size[dim] = len(index)
                wanted = tuple(size) if inside else None
            elif norm is not None:
                wanted = tuple(norm.weight.shape)
        if wanted != tuple(change.weight.shape):
            raise InterventionError(
                f"the model has no weights of {change.part!r} in layer {change.layer} that the edit's could "
                "replace: was it made for another model?"
            )

    def _fitted(self, change: WeightChange) -> WeightChange:
        """The same in the device and precision of the layer."""
        self.check_fits(change)
        like = self.parts(change.layer).maps["o"].weight
        index, bias = change.index, change.bias
        return WeightChange(
            change.layer,
            change.part,
            change.weight.to(like),
            index if index is None else index.to(like.device),
            bias if bias is None else bias.to(like),
        )

    def _output_size(self, change: WeightChange) -> Tensor:
        if change.part not in OUTPUTS:
            return torch.zeros((), device=change.weight.device)
        old = self.parts(change.layer).maps[change.part].weight[:, change.index]
        return (change.weight.detach() - old).float().square().sum()


@computes
def weight_edit(
    model: Any,
    name: str,
    changes: Iterable[WeightChange],
    *,
    components: Sequence[Component] = (),
    coords: Mapping[str, Hashable] | None = None,
    about: Mapping[str, Any] | None = None,
) -> WeightEdit:
    """Return the intervention after which a model computes with changed weights.

    It equals the model with changed parameters to 1e-5 in float32, also while it generates with a cache.

    Args:
        model: A TransformerLens model.
        name: As of `Intervention`.
        changes: The new weights, in any order.
        components: The components to which they belong, for the record.
        coords: As of `Intervention`.
        about: How they were made, for the record.

    Raises:
        InterventionError: Two changes give one weight different values, or the model has no such weights.
        UnsupportedModelError: A layer has an unknown form.

    Example:
        >>> import memlens as ml
        >>> from memlens.instruments.edit.weight_edit import WeightChange, weight_edit
        >>> model = ml.load_model("zoo/pythia-s")
        >>> zero = torch.zeros(model.cfg.d_model, 2)
        >>> weight_edit(model, "two neurons", [WeightChange(1, "out", zero, torch.tensor([4, 7]))])
        WeightEdit('two neurons', L1 out)
    """
    return EditMaker(model).edit(name, changes, components, coords, about)


@computes
def join_edits(model: Any, edits: Sequence[WeightEdit], name: str | None = None) -> WeightEdit:
    """Return one edit that makes all changes of several edits of a model.

    Raises:
        InterventionError: Two edits give one weight different values, or were made for another model; there
            are none; or something is not a weight edit.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> twin = ml.load_model("zoo/pythia-s-clean")
        >>> edits = ml.edits.weight_transplants(model, twin, ["L2 MLP", "L3 MLP"])
        >>> ml.instruments.join_edits(model, edits, "two MLPs of the twin")
        WeightEdit('two MLPs of the twin', L2 in, L2 out, L3 in, L3 out)
    """
    some: list[Any] = [edits] if isinstance(edits, WeightEdit) else list(edits)
    if not some or not all(isinstance(edit, WeightEdit) for edit in some):
        raise InterventionError(f"edits={some}: give at least one weight edit (see as_weight_edit).")
    return weight_edit(
        model,
        name or " + ".join(edit.name for edit in some),
        [change for edit in some for change in edit.changes],
        components=[component for edit in some for component in edit.components],
        about={"edits": [edit.name for edit in some]},
    )


def merged_changes(changes: Iterable[WeightChange]) -> tuple[WeightChange, ...]:
    """Return the same changes with one entry for each layer and part.

    Raises:
        InterventionError: Two of them give one weight different values.
    """
    groups: dict[tuple[int, Part | NormPart], list[WeightChange]] = {}
    for change in changes:
        groups.setdefault((change.layer, change.part), []).append(change)
    return tuple(some[0] if len(some) == 1 else _merged(some) for some in groups.values())


def _merged(some: Sequence[WeightChange]) -> WeightChange:
    layer, part = some[0].layer, some[0].part
    biases = [c.bias for c in some if c.bias is not None]
    if part in _NORMS:
        _check_same([c.weight for c in some], layer, part)
        _check_same(biases, layer, part)
        return some[0]
    index, place = torch.cat([_index(c) for c in some]).unique(return_inverse=True)
    first = torch.full_like(index, len(place)).scatter_reduce(
        0, place, torch.arange(len(place), device=place.device), "amin"
    )
    dim = 1 if part in OUTPUTS else 0
    rows = torch.cat([c.weight.movedim(dim, 0) for c in some])
    _check_same([rows, rows[first][place]], layer, part)
    if part in OUTPUTS:
        _check_same(biases, layer, part)
        bias = biases[0] if biases else None
    elif biases:
        if len(biases) < len(some):
            raise _conflict(layer, part)
        _check_same([torch.cat(biases), torch.cat(biases)[first][place]], layer, part)
        bias = torch.cat(biases)[first]
    else:
        bias = None
    return WeightChange(layer, part, rows[first].movedim(0, dim), index, bias)


def _check_same(values: Sequence[Tensor], layer: int, part: str) -> None:
    if not all(torch.equal(values[0], value) for value in values[1:]):
        raise _conflict(layer, part)


def _conflict(layer: int, part: str) -> InterventionError:
    return InterventionError(
        f"two changes give weights of {part!r} in layer {layer} different values: leave one of them out."
    )


def _pieces(parts: LayerParts, part: Part | NormPart) -> tuple[Linear | None, Norm | None]:
    """The map or the norm of a layer by its name; None for what it is not."""
    key: Any = part
    return parts.maps.get(key), parts.norms.get(key)


def _index(change: WeightChange) -> Tensor:
    if change.index is None:
        raise InterventionError(f"a change of {change.part!r} needs an index: say which rows or columns.")
    return change.index


class _Seen:
    """What the hooks of a layer have seen in the running forward pass; no part of a fingerprint."""

    x: Tensor
    active: Tensor

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Layer:
    """Hooks after which a layer computes with changed weights."""

    def __init__(
        self,
        layer: int,
        parts: LayerParts,
        changes: Mapping[Part | NormPart, WeightChange],
        points: Mapping[str, Any],
    ) -> None:
        self.layer, self.parts, self.changes, self.points = layer, parts, changes, points

    def hooks(self) -> list[tuple[str, HookFn]]:
        """Return them in the order in which the layer runs."""
        return [*self._attention_inputs(), *self._output("o"), *self._mlp_inputs(), *self._output("out")]

    def _norm(self, part: NormPart) -> Norm | None:
        old, change = self.parts.norms.get(part), self.changes.get(part)
        if old is None or change is None:
            return old
        return Norm(change.weight, old.bias if change.bias is None else change.bias, old.eps, old.centered)

    def _rows(self, part: Part, index: Tensor | None = None) -> tuple[Tensor | None, Linear]:
        """The rows of a map that are computed anew (None: all of them), and the map to them."""
        old, change = self.parts.maps[part], self.changes.get(part)
        if change is None:
            return index, old if index is None else _taken(old, index)
        own = _index(change)
        bias = change.bias if change.bias is not None else old.bias if old.bias is None else old.bias[own]
        if index is not None and torch.equal(index, own):
            return own, Linear(change.weight, bias)
        weight = old.weight.index_copy(0, own, change.weight)
        whole = Linear(
            weight, None if old.bias is None or bias is None else old.bias.index_copy(0, own, bias)
        )
        return index, whole if index is None else _taken(whole, index)

    def _attention_inputs(self) -> list[tuple[str, HookFn]]:
        normed = "attn_norm" in self.changes
        wanted: list[Part] = [p for p in ("q", "k", "v") if normed or p in self.changes]
        norms = [self._inner_norm(part) for part in ("q_norm", "k_norm") if part in self.changes]
        if not wanted:
            return norms
        seen = _Seen()
        look = _remembering(seen, self._norm("attn_norm"))
        found: list[tuple[str, HookFn]] = [(hook_name("resid_pre", self.layer), look)]
        for part in wanted:
            index, rows = self._rows(part, None if normed else _index(self.changes[part]))
            found.append((hook_name(part, self.layer), _writing(seen, rows, index)))
        return [*found, *norms]

    def _inner_norm(self, part: NormPart) -> tuple[str, HookFn]:
        """The norm of queries or keys: its output is multiplied by the ratio of the new gains to the old."""
        gain = self.parts.norms[part].weight
        if not bool(gain.all()):
            raise InterventionError(
                f"the gain of {part!r} in layer {self.layer} holds a 0: leave that norm as it is."
            )
        names = [f"blocks.{self.layer}.attn.{part}.{hook}" for hook in ("hook_out", "hook_normalized")]
        name = next(name for name in names if name in self.points)
        return name, _scaling(self.changes[part].weight / gain)

    def _mlp_inputs(self) -> list[tuple[str, HookFn]]:
        changed = [self.changes[part] for part in ("in", "gate") if part in self.changes]
        normed = "mlp_norm" in self.changes
        if not changed and not normed:
            return []
        index = None if normed else torch.cat([_index(change) for change in changed]).unique()
        into = self._rows("in", index)[1]
        gate = self._rows("gate", index)[1] if "gate" in self.parts.maps else None
        seen = _Seen()
        site = "resid_pre" if self.parts.parallel else "resid_mid"
        return [
            (hook_name(site, self.layer), _remembering(seen, self._norm("mlp_norm"))),
            (hook_name("mlp_post", self.layer), _activating(seen, into, gate, self.parts.act, index)),
        ]

    def _output(self, part: Part) -> list[tuple[str, HookFn]]:
        post: NormPart = "attn_post_norm" if part == "o" else "mlp_post_norm"
        change = self.changes.get(part)
        if change is None and post not in self.changes:
            return []
        old, more = self.parts.maps[part], None
        if change is not None:
            own = _index(change)
            shift = None if change.bias is None else change.bias - (0 if old.bias is None else old.bias)
            more = own, Linear(change.weight - old.weight[:, own], shift)
        seen = _Seen()
        inside, outside = ("z", "attn_out") if part == "o" else ("mlp_post", "mlp_out")
        whole = old if post in self.parts.norms else None
        return [
            (hook_name(inside, self.layer), _remembering_activations(seen, part)),
            (hook_name(outside, self.layer), _adding(seen, more, whole, self._norm(post))),
        ]


def _taken(linear: Linear, index: Tensor) -> Linear:
    return Linear(linear.weight[index], None if linear.bias is None else linear.bias[index])


def _remembering(seen: _Seen, norm: Norm | None) -> Reads:
    def look(resid: Tensor, hook: Any) -> None:
        seen.x = resid if norm is None else norm(resid)

    return Reads(look)


def _remembering_activations(seen: _Seen, part: Part) -> Reads:
    def look(x: Tensor, hook: Any) -> None:
        seen.active = x.flatten(2) if part == "o" else x

    return Reads(look)


def _writing(seen: _Seen, rows: Linear, index: Tensor | None) -> HookFn:
    def write(x: Tensor, hook: Any) -> Tensor:
        new = _apply(rows, seen.x).to(x.dtype)
        return (new if index is None else x.flatten(2).index_copy(2, index, new)).view_as(x)

    return write


def _activating(
    seen: _Seen,
    into: Linear,
    gate: Linear | None,
    act: Callable[[Tensor], Tensor],
    index: Tensor | None,
) -> HookFn:
    def write(x: Tensor, hook: Any) -> Tensor:
        up = _apply(into, seen.x)
        new = (act(up) if gate is None else act(_apply(gate, seen.x)) * up).to(x.dtype)
        return new if index is None else x.index_copy(2, index, new)

    return write


def _adding(
    seen: _Seen, more: tuple[Tensor, Linear] | None, whole: Linear | None, post: Norm | None
) -> HookFn:
    def add(x: Tensor, hook: Any) -> Tensor:
        out = x if whole is None else _apply(whole, seen.active)
        if more is not None:
            index, linear = more
            out = out + _apply(linear, seen.active[..., index]).to(x.dtype)
        return (out if post is None else post(out)).to(x.dtype)

    return add


def _scaling(ratio: Tensor) -> HookFn:
    return lambda x, hook: x * ratio.to(x.dtype)


def _apply(linear: Linear, x: Tensor) -> Tensor:
    """The map in the precision of what it is applied to, which may be wider than the weights' own."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)
