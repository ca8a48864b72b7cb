"""From an intervention to weights: an affine change of an activation is folded into the matrix that reads it.

Hooks are functions, so what they do is found by calling them: an activation of zeros gives the constant,
unit vectors give the matrix, and random activations at several positions must confirm both. Ablations to
zero, to a mean or to the mean of other heads, scaled heads and neurons, and zeroed branches are all found in
this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import InterventionError
from memlens.forward.components import NormPart, Part
from memlens.forward.exclusive import computes
from memlens.forward.hooks import SITES, HookFn, hook_name, layer_of, resolve_hook
from memlens.forward.read_weights import Linear
from memlens.instruments.edit.weight_edit import EditMaker, WeightChange, WeightEdit
from memlens.sweeps.interventions import BatchHook, Intervention, Reads

_SITES: dict[str, Part] = {"z": "o", "mlp_post": "out", "attn_out": "o", "mlp_out": "out"}
"""The sites that fold, and the map whose input (`z`, `mlp_post`) or output they are."""
_REASONS = {
    "v": "values come from a matrix, but memlens folds only what heads and neurons write",
    "q": "queries decide attention scores, which are not affine in the weights",
    "k": "keys decide attention scores, which are not affine in the weights",
    "pattern": "attention scores and patterns are computed, not stored in weights",
}
_CHUNK = 512
_ROUNDING = 1e-6
_AGREES = 1e-5


@computes
@torch.no_grad()
def as_weight_edit(model: Any, intervention: Intervention) -> WeightEdit:
    """Return an intervention as a change of weights.

    Every hook must be at `hook_z`, `mlp.hook_post`, `hook_attn_out` or `hook_mlp_out` and make an affine
    function of the activation, the same at every position and for every sequence. Behind a norm (OLMo 2 and
    3), `hook_attn_out` and `hook_mlp_out` can only be set to 0.

    Args:
        model: The model for which the intervention was made.
        intervention: A weight edit is returned as it is.

    Raises:
        InterventionError: Weights cannot express it, or a weight edit was made for a model of another size;
            the message says why.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edit = ml.edits.head_set_ablations(model, seqs, {"two heads": [(1, 3), (2, 0)]}, mode="zero")[0]
        >>> as_weight_edit(model, edit)
        WeightEdit('two heads', L1 o, L2 o)
    """
    maker = EditMaker(model)
    if isinstance(intervention, WeightEdit):
        for change in intervention.changes:
            maker.check_fits(change)
        return intervention
    chains: dict[tuple[int, str], list[HookFn]] = {}
    for name, fn in intervention.hooks:
        layer, site = _foldable(intervention, name, fn)
        call: Any = fn  # `_foldable` refuses hooks by batch
        chains.setdefault((layer, site), []).append(_called(call, resolve_hook(model, name)))
    changes: list[WeightChange] = []
    for layer in sorted({layer for layer, _ in chains}):
        for inside, outside in (("z", "attn_out"), ("mlp_post", "mlp_out")):
            fold = _Fold(intervention.name, maker, layer, _SITES[inside])
            if (layer, inside) in chains:
                shape = (maker.trunk.n_heads, maker.trunk.d_head) if inside == "z" else None
                fold.input(chains[layer, inside], shape)
            if (layer, outside) in chains:
                fold.output(chains[layer, outside])
            changes += fold.changes()
    about = {"how": "intervention", "hooks": [name for name, _ in intervention.hooks]}
    return maker.edit(intervention.name, changes, coords=intervention.coords, about=about)


def _refusal(name: str, why: str) -> InterventionError:
    return InterventionError(f"weights cannot express {name!r}: {why}.")


def _foldable(intervention: Intervention, name: str, fn: Any) -> tuple[int, str]:
    """Return the layer and the site of a hook that may fold."""
    if isinstance(fn, Reads):
        raise _refusal(
            intervention.name,
            f"what it writes depends on what it reads at {name!r} (an attention bypass to the identity is "
            "served by memlens.bypass.in_transformers)",
        )
    if isinstance(fn, BatchHook):
        raise _refusal(
            intervention.name,
            f"its hook on {name!r} differs by sequence or position, as resampling, positions= and neurons "
            "per sequence do",
        )
    layer = layer_of(name)
    site = next((s for s in SITES if layer is not None and hook_name(s, layer) == name), "")
    if layer is None or site not in _SITES:
        raise _refusal(intervention.name, _REASONS.get(site, f"there is no matrix to fold {name!r} into"))
    return layer, site


def _called(fn: HookFn, point: Any) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        new = fn(x, hook=point)
        return x if new is None else new

    return call


class _Fold:
    """One output map of a layer, into which changes of its input and of its output are folded in turn."""

    part: Part

    def __init__(self, name: str, maker: EditMaker, layer: int, part: Part) -> None:
        self.name, self.layer, self.part = name, layer, part
        self.old = maker.parts(layer).maps[part]
        post: NormPart = "attn_post_norm" if part == "o" else "mlp_post_norm"
        self.normed = post in maker.parts(layer).norms
        self.weight = self.old.weight.double()
        none = torch.zeros_like(self.weight[:, 0])
        self.bias = none if self.old.bias is None else self.old.bias.double()
        self.touched = torch.zeros(self.weight.shape[1], dtype=torch.bool)

    def input(self, chain: Sequence[HookFn], shape: tuple[int, ...] | None) -> None:
        """Fold a change of what the map reads."""
        found = self._affine(chain, shape or (self.weight.shape[1],))
        self.touched |= (found.weight != torch.eye(len(found.weight)).to(found.weight)).any(0).cpu()
        assert found.bias is not None
        self.bias = self.bias + self.weight @ found.bias
        self.weight = self.weight @ found.weight

    def output(self, chain: Sequence[HookFn]) -> None:
        """Fold a change of what the map's layer adds to the residual."""
        found = self._affine(chain, (self.weight.shape[0],))
        assert found.bias is not None
        if self.normed and bool(found.weight.any() or found.bias.any()):
            raise _refusal(
                self.name, f"a norm follows the output of layer {self.layer}, which can only be set to 0"
            )
        self.touched |= True
        self.bias = found.weight @ self.bias + found.bias
        self.weight = found.weight @ self.weight

    def changes(self) -> list[WeightChange]:
        """Return what changed."""
        own = self.old.bias
        same = torch.equal(self.bias, torch.zeros_like(self.bias) if own is None else own.double())
        index = torch.nonzero(self.touched)[:, 0].to(self.weight.device)
        if same and not len(index):
            return []
        bias = None if same else self.bias
        return [WeightChange(self.layer, self.part, self.weight[:, index], index, bias)]

    def _affine(self, chain: Sequence[HookFn], shape: tuple[int, ...]) -> Linear:
        """Find the matrix `[out, in]` and the constant of a chain of hooks, and confirm them."""
        width, like = self.weight.shape[0 if shape == self.weight.shape[:1] else 1], self.old.weight

        def run(x: Float[Tensor, "batch pos d"]) -> Tensor:
            value = x.clone().unflatten(-1, shape)  # hooks may write in place
            for fn in chain:
                value = fn(value)
            return value.flatten(2).double() if len(shape) > 1 else value.double()

        try:
            dtype = torch.float64
            run(torch.zeros(1, 1, width, dtype=dtype, device=like.device))
        except (RuntimeError, TypeError):  # a hook with weights of its own
            dtype = like.dtype
        constant = run(torch.zeros(1, 1, width, dtype=dtype, device=like.device))[0, 0]
        rows = []
        for start in range(0, width, _CHUNK):
            places = torch.arange(start, min(start + _CHUNK, width), device=like.device)
            unit = torch.nn.functional.one_hot(places, width).to(dtype)[:, None]
            rows.append(run(unit)[:, 0] - constant)
        matrix = torch.cat(rows).T
        near = matrix.round()
        matrix = torch.where((matrix - near).abs() < _ROUNDING, near, matrix)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, 5, width, generator=generator).to(like.device, dtype)
        got, want = run(probe), probe.double() @ matrix.T + constant
        if float((got - want).abs().max()) > _AGREES * max(1.0, float(want.abs().max())):
            raise _refusal(
                self.name,
                f"its change in layer {self.layer} is not an affine function of the activation that is the "
                "same at every position",
            )
        return Linear(matrix, constant)
