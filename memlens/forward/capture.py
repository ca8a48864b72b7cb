"""Activations of a set: at the positions that predict targets, of a source set, and their means.

`FunctionalPass` runs the unchanged model by its blocks as functions. TransformerLens' modules rearrange
weights and fire hooks that nobody has set at every call, which takes longer than a short sequence itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import SequenceError, SiteError
from memlens.forward.batches import Batch, Targets, at_positions, at_targets, make_batches
from memlens.forward.blocks import FunctionalBlocks, agreed_widths, captured_site, has_hooks
from memlens.forward.exclusive import computation, computation_number, computes, kept_of
from memlens.forward.hooks import HookFn, attached, capturing, hook_name, layer_of
from memlens.forward.trunk import Trunk, has_own_forward
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

if TYPE_CHECKING:
    from memlens.sweeps.interventions import Intervention


def run_capturing(
    trunk: Trunk, tokens: Int[Tensor, "batch pos"], names: Sequence[str], *, before_hooks: bool = False
) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
    """Run tokens; return the last layer's output and the activations at `names` (see `capturing`).

    All of them are on the trunk's device, wherever their layer is.
    """
    with capturing(trunk.model, names, before_hooks=before_hooks) as store:
        final = trunk.run(trunk.embed(tokens))
    return final, _gathered(trunk, store)


def _gathered(trunk: Trunk, store: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: activation.to(trunk.device) for name, activation in store.items()}


def _activations(trunk: Trunk, tokens: Int[Tensor, "batch pos"], names: Sequence[str]) -> dict[str, Tensor]:
    """The activations alone, also of a model whose forward as a whole the user has replaced."""
    if not has_own_forward(trunk.model):
        return run_capturing(trunk, tokens, names)[1]
    with capturing(trunk.model, names) as store:
        trunk.model(tokens)
    return _gathered(trunk, store)


@dataclass(frozen=True)
class AtTargets:
    """One batch.

    Attributes:
        targets: The targets, and where they are predicted.
        acts: Each activation at the predicting positions, ``{name: [batch, target, …]}``.
        final: The residual after the last layer there, `[batch, target, d_model]`.
    """

    targets: Targets
    acts: dict[str, Tensor]
    final: Float[Tensor, "batch target d_model"]


@computes
@torch.no_grad()
def captured_at_targets(
    trunk: Trunk,
    seqs: SequenceSet,
    names: Sequence[str],
    *,
    cache: Any = None,
    batch_size: int = 16,
    progress: bool = True,
    desc: str = "",
) -> Iterator[AtTargets]:
    """Yield activations at the predicting positions, batch by batch.

    Args:
        trunk: The model.
        seqs: The sequences.
        names: Hook names (inside layers only).
        cache: An `ActivationCache` (or mapping) of the model on exactly ``seqs.tokens``; computed if None.
        batch_size: Sequences at a time.
        progress: Show a progress bar.
        desc: Its description.

    Raises:
        EmptySetError: No sequences.
        SequenceError: The cache has another number of sequences or positions.
        SiteError: An activation is missing from the cache.
    """
    check_sequences(seqs, trunk.model, on_eos="keep")
    last = hook_name("resid_post", trunk.n_layers - 1)
    with tqdm(total=len(seqs), disable=not progress, desc=desc, unit="seq") as bar:
        for batch, targets in make_batches(seqs, batch_size, trunk.device):
            if cache is None:
                _, full = run_capturing(trunk, batch.tokens, [*names, last])
            else:
                full = {n: _from_cache(cache, n, seqs)[batch.rows] for n in {*names, last}}
            picked = {n: at_targets(a.to(trunk.device), targets) for n, a in full.items()}
            yield AtTargets(targets, {n: picked[n] for n in names}, picked[last])
            bar.update(len(batch.rows))


def _from_cache(cache: Any, name: str, seqs: SequenceSet) -> Tensor:
    try:
        value = cache[name]
    except KeyError as error:
        raise SiteError(
            f"the cache has no {name!r}: make it with names_filter=None, or leave cache= out."
        ) from error
    if value.shape[0] != len(seqs) or value.shape[1] < int(seqs.lengths.max()):
        raise SequenceError(
            f"the cache's {name!r} has the shape {tuple(value.shape)} and the set "
            f"{tuple(seqs.tokens.shape)}: make the cache from sequences.tokens."
        )
    return value


class FunctionalPass:
    """The unchanged model's pass by its blocks as functions, in about half the time of its modules.

    `of` compares it with the model's own pass, once for each content of its weights and length. It is made
    once in a computation, and keeps the final residuals of short sequences until that ends.

    Args:
        blocks: All blocks of the model.
        width: The largest number of positions.
    """

    blocks: FunctionalBlocks
    width: int

    def __init__(self, blocks: FunctionalBlocks, width: int) -> None:
        self.blocks, self.width = blocks, width
        self._finals: dict[tuple[Any, ...], Tensor] = {}
        self._free = _KEPT_FINALS

    @staticmethod
    def of(trunk: Trunk, tokens: Int[Tensor, "batch pos"], names: Sequence[str]) -> FunctionalPass | None:
        """Return the pass, or None where the model itself has to run.

        Args:
            trunk: The model.
            tokens: What it will run on; the first row serves for the comparison.
            names: The hooks at which activations will be captured.
        """
        if has_hooks(trunk.model) or any(captured_site(name) is None for name in names):
            return None
        every, width, known = range(trunk.n_layers), tokens.shape[1], agreed_widths(trunk)
        failed = f"a pass of {width} or more positions with {sorted(names)}"
        if failed in known:
            return None
        kept = kept_of(trunk.model)
        found: FunctionalPass | None = kept.get("pass")
        if _are_known(known, (*every, trunk.n_layers, *names), width):
            if found is None or not found._serves(trunk, width):
                found = FunctionalPass(FunctionalBlocks(trunk, every, width), width)
        else:
            layers = {hook_name("resid_pre", layer): layer for layer in every}
            final, acts = run_capturing(trunk, tokens[:1], sorted({*layers, *names}))
            resid = {layer: acts[name] for name, layer in layers.items()} | {trunk.n_layers: final}
            blocks = FunctionalBlocks.of(trunk, resid, {name: acts[name] for name in names})
            if blocks is None:
                known[failed] = width
                return None
            found = FunctionalPass(blocks, width)
        kept["pass"] = found
        return found

    def of_model(
        self, trunk: Trunk, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> FunctionalPass | None:
        """Return what `of` returns, which is this pass itself where it serves and no hook was set since."""
        width = tokens.shape[1]
        if self._serves(trunk, width) and _are_known(agreed_widths(trunk), names, width):
            return self
        return self.of(trunk, tokens, names)

    def _serves(self, trunk: Trunk, width: int) -> bool:
        own = self.blocks.trunk
        return own.model is trunk.model and own.dtype == trunk.dtype and width <= self.width

    def run(
        self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
        """Run tokens; return the last layer's output and the activations at `names`, as `run_capturing`."""
        key = (*tokens.shape, tokens.cpu().numpy().tobytes())
        if not names and key in self._finals:
            return self._finals[key], {}
        resid, store = self.blocks.trunk.embed(tokens), {}
        for layer in range(self.blocks.trunk.n_layers):
            here = [n for n in names if layer_of(n) == layer]
            resid, found = self.blocks.captured(layer, resid, here)
            store |= found
        if key not in self._finals and resid.nbytes <= self._free:
            self._finals[key] = resid
            self._free -= resid.nbytes
        return resid, store


_KEPT_FINALS = 2**24
"""Bytes of final residuals that a pass keeps: a source run's metrics are asked for after its activations."""


def _are_known(known: Mapping[int | str, int], keys: Iterable[int | str], width: int) -> bool:
    return all(known.get(key, 0) >= width for key in keys)


class ActivationSource:
    """Activations of a source set, row by row for the sequences of the running batch.

    Where the source rows are the running batch itself, as for another model on the same sequences, its
    activations are those of the batch to the last bit, padding included.

    Args:
        model: The TransformerLens model whose activations are wanted: the one that runs, or a donor.
        source: The set whose activations are wanted.
        names: Hook names.
        rows: The source row for each sequence; the same row number by default.
        under: An intervention under which the source runs.
    """

    trunk: Trunk
    source: SequenceSet
    names: list[str]
    under: Intervention | None
    rows: Tensor

    def __init__(
        self,
        model: Any,
        source: SequenceSet,
        names: Sequence[str],
        rows: Int[Tensor, " seq"] | None = None,
        under: Intervention | None = None,
    ) -> None:
        self.trunk, self.source, self.names, self.under = Trunk(model), source, list(names), under
        self.rows = torch.arange(len(source)) if rows is None else rows
        self._key: tuple[Any, ...] | None = None
        self._store: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What identifies it, without the activations it currently holds."""
        return {**self.__dict__, "_key": None, "_store": {}}

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{name: [batch, pos, …]}``; a shorter source row is repeated from its beginning."""
        with computation(self.trunk.model):
            return self._of(batch)

    def _of(self, batch: Batch) -> dict[str, Tensor]:
        key = (computation_number(), self.trunk.dtype, batch.by is None, *batch.rows.tolist())
        if key != self._key:
            rows, width = self.rows[batch.rows], batch.tokens.shape[1]
            lengths, here = self.source.lengths[rows], batch.tokens.device
            tokens = self.source.tokens[rows, : int(lengths.max())].to(here)
            places: Tensor | None = torch.arange(width)[None] % lengths[:, None]
            if torch.equal(tokens[:, :width], batch.tokens):
                tokens, places = batch.tokens, None
            there = tokens.to(self.trunk.device)
            store = (
                self._activations(there, batch.by) if self.under is None else self._edited(there, batch, rows)
            )
            self._key, self._store = key, {n: _placed(n, a.to(here), places) for n, a in store.items()}
        return self._store

    def _activations(self, tokens: Int[Tensor, "batch pos"], by: FunctionalPass | None) -> dict[str, Tensor]:
        """The activations of the source without `under`."""
        own = None
        if by is not None and not has_own_forward(self.trunk.model):
            own = by.of_model(self.trunk, tokens, self.names)
        return _activations(self.trunk, tokens, self.names) if own is None else own.run(tokens, self.names)[1]

    def _edited(self, tokens: Int[Tensor, "batch pos"], batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        """The activations under the intervention: exactly those of the batch's pass where unchanged."""
        with attached(self.trunk.model, self._edit(rows)):
            edited = _activations(self.trunk, tokens, self.names)
        if batch.by is None:
            return edited
        plain, same = _activations(self.trunk, tokens, self.names), self._activations(tokens, batch.by)
        return {n: torch.where(edited[n] == plain[n], same[n], edited[n]) for n in self.names}

    def _edit(self, rows: Int[Tensor, " batch"]) -> list[tuple[str, HookFn]]:
        if self.under is None:
            return []
        ((beside, _),) = make_batches(self.source[rows], len(rows), self.trunk.device)
        return self.under.bound(replace(beside, rows=rows))


def _placed(name: str, activation: Tensor, places: Int[Tensor, "batch pos"] | None) -> Tensor:
    """Select positions; attention weights, which have two position axes, are left as they are."""
    if places is None or name.endswith("hook_pattern"):
        return activation
    return at_positions(activation, places)


@computes
@torch.no_grad()
def mean_activations(
    model: Any, sequences: SequenceSet, names: Sequence[str], batch_size: int = 32
) -> dict[str, Float[Tensor, "..."]]:
    """Return the mean of each activation over all real positions of a set, by hook name."""
    trunk = Trunk(model)
    sums: dict[str, Tensor] = {}
    for batch, _ in make_batches(sequences, batch_size, trunk.device):
        store = _activations(trunk, batch.tokens, names)
        for name in names:
            part = store[name][batch.mask].sum(0, dtype=torch.float64)
            sums[name] = sums.get(name, torch.zeros_like(part)) + part
    n = int(sequences.mask.sum())
    return {name: (total / n).to(trunk.dtype) for name, total in sums.items()}
