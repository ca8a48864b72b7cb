"""A model's blocks as plain functions of the residual, for some positions only.

`FunctionalBlocks` computes what the model's own blocks compute without hooks, but can do three things that a
module's forward cannot: it skips positions before the first changed one (their keys and values are passed
in), queries the last block at chosen positions only, and uses the fused attention kernel.
`FunctionalBlocks.of` compares each block with the model's own and returns None if they differ or the form is
unknown; then the model itself runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.errors import UnsupportedModelError
from memlens.forward.attention_maps import AttentionMaps, Turn
from memlens.forward.batches import at_positions
from memlens.forward.exclusive import known_of
from memlens.forward.hooks import hook_name, hook_points, layer_of
from memlens.forward.read_blocks import BlockWeights, read_block, read_unembedding
from memlens.forward.read_weights import Linear, Norm
from memlens.forward.trunk import Trunk, module_of

KeysValues = tuple[Float[Tensor, "row kv_head pos d_head"], Float[Tensor, "row kv_head pos d_head"]]
"""Keys (rotated) and values of one layer."""


class Stack(NamedTuple):
    """What a block reads of some rows; see `FunctionalBlocks.run`."""

    resid: Float[Tensor, "row pos d_model"]
    past: KeysValues | None = None
    queries: Int[Tensor, "row query"] | None = None

    def to(self, device: torch.device) -> Stack:
        """Return the same on a device."""
        past = None if self.past is None else (self.past[0].to(device), self.past[1].to(device))
        return Stack(self.resid.to(device), past, None if self.queries is None else self.queries.to(device))


class Unchanged(NamedTuple):
    """What a layer computes for a batch, so that a change at one position need not compute it again.

    Attributes:
        q: Queries as used.
        k: Keys as used; zeros may follow them.
        v: Values as used, likewise.
        rest: What attention's output is added to: the layer's input, together with what the MLP adds in a
            parallel block.
        visible: True where a query (row) sees a key (column).
    """

    q: Float[Tensor, "row head pos d_head"]
    k: Float[Tensor, "row kv_head key d_head"]
    v: Float[Tensor, "row kv_head key d_head"]
    rest: Float[Tensor, "row pos d_model"]
    visible: Bool[Tensor, "pos key"]


class Trace(dict[str, Tensor]):
    """Intermediate results of a block by name, filled while it runs.

    Args:
        wanted: Which: of the fields of `memlens.instruments.bypass.traces.BlockTrace`, `z` (each head's mixed
            values) and `mlp_added` (what the MLP adds to the residual).
    """

    wanted: frozenset[str]

    def __init__(self, wanted: Iterable[str]) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}


_KEPT_BYTES = 2**27
"""The largest size of the maps to queries, keys and values that are kept, rather than made at each use."""

_AT_ONCE = 16
"""Numbers that a processor's fused attention takes at a time."""

_TRACED: Mapping[str, str] = MappingProxyType(
    {"v": "v", "z": "z", "attn_out": "added", "resid_mid": "mlp_from", "mlp_out": "mlp_added"}
)
"""Sites inside a block, and what they are called there; `resid_pre` and `resid_post` need no trace."""

_LIBRARIES = ("transformer_lens.", "transformers.", "memlens.")
"""Libraries whose own hooks change nothing that functional blocks do not reproduce."""


class FunctionalBlocks:
    """Blocks as functions; see the module docstring.

    In a model that is spread over devices a block runs where its weights are; its output is on the device of
    its input.

    Args:
        trunk: The model.
        layers: Which blocks.
        width: The largest number of positions.

    Raises:
        UnsupportedModelError: A block has an unknown form.
    """

    n_heads: int
    n_kv: int
    d_head: int
    final_norm: Norm
    unembedding: Linear

    def __init__(self, trunk: Trunk, layers: Sequence[int], width: int) -> None:
        self.trunk = trunk
        self.n_heads, self.n_kv, self.d_head = trunk.n_heads, trunk.n_kv_heads, trunk.d_head
        around = trunk.surroundings(width)
        self.blocks: Mapping[int, BlockWeights] = {
            layer: read_block(trunk.model, layer, around[layer], parallel=trunk.parallel) for layer in layers
        }
        self._turns = {layer: Turn.of(around[layer].rotary, self.d_head) for layer in layers}
        self.final_norm, self.unembedding = read_unembedding(trunk.model)
        size = (self.n_heads + 2 * self.n_kv) * self.d_head * trunk.d_model * trunk.dtype.itemsize
        self._kept: dict[int, AttentionMaps] | None = {} if size * trunk.n_layers <= _KEPT_BYTES else None

    @staticmethod
    def of(
        trunk: Trunk, resid: Mapping[int, Tensor], acts: Mapping[str, Tensor] = MappingProxyType({})
    ) -> FunctionalBlocks | None:
        """Return the blocks, or None where they would not reproduce the model.

        Args:
            trunk: The model.
            resid: The model's own residual `[batch, pos, d_model]` at the input of consecutive layers; the
                last one is the output of the last block to compare.
            acts: The model's own activations at hooks in these layers that `captured` has to reproduce, too.
        """
        layers = sorted(resid)
        if has_hooks(trunk.model):
            return None
        width = resid[layers[0]].shape[1]
        known = agreed_widths(trunk)
        new = {key for key in (*layers[:-1], *acts) if known.get(key, 0) < width}
        try:
            blocks = FunctionalBlocks(trunk, layers[:-1], width)
            hooks = {n: {k: acts[k] for k in acts if k in new and layer_of(k) == n} for n in layers[:-1]}
            close = all(blocks._agrees(n, resid, own) for n, own in hooks.items() if own or n in new)
            if trunk.n_layers not in known:
                final = resid[layers[-1]][:, -1]
                close = close and agree(blocks.unembed(final), trunk.unembed(final))
        except (AttributeError, KeyError, RuntimeError, TypeError, UnsupportedModelError):
            return None
        if not close:
            return None
        known |= dict.fromkeys([trunk.n_layers, *new], width)
        return blocks

    def _agrees(self, layer: int, resid: Mapping[int, Tensor], acts: Mapping[str, Tensor]) -> bool:
        """Whether a layer gives what the model gave after it, and at its hooks."""
        out, found = self.captured(layer, resid[layer], list(acts))
        return agree(out, resid[layer + 1]) and all(
            found[n].shape == acts[n].shape and agree(found[n], acts[n]) for n in acts
        )

    def captured(
        self, layer: int, resid: Float[Tensor, "row pos d_model"], names: Iterable[str]
    ) -> tuple[Float[Tensor, "row pos d_model"], dict[str, Tensor]]:
        """Run a layer; return its output and the activations at its hooks `names` (see `captured_site`)."""
        sites = {name: site for name in names if (site := captured_site(name))}
        trace = Trace(_TRACED[site] for site in sites.values() if site in _TRACED)
        out = self.run(layer, resid, trace=trace)
        store = {}
        for name, site in sites.items():
            value = trace[_TRACED[site]] if site in _TRACED else resid if site == "resid_pre" else out
            if site == "z":
                value = value.unflatten(-1, (self.n_heads, self.d_head))
            store[name] = value.transpose(1, 2) if site == "v" else value
        return out, store

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Return the logits of final residuals."""
        logits = self.unembedding(self.final_norm(resid.to(self.unembedding.weight.device)))
        return self.trunk.finish_logits(logits.to(resid.device))

    def _home(self, layer: int) -> torch.device:
        return self.blocks[layer].o.weight.device

    def keys_values(self, layer: int, resid: Float[Tensor, "row pos d_model"], first: int = 0) -> KeysValues:
        """Return a layer's keys and values of residuals at positions ``first ..``."""
        block, read, x = self.blocks[layer], self._read(layer), resid.to(self._home(layer))
        x = x if block.attn_norm is None else block.attn_norm(x)
        kv = read.qkv.rows(slice(self.n_heads * self.d_head, None))(x)
        k, v = self._keys_values(block, read, kv, slice(first, first + x.shape[1]))
        return k.to(resid.device), v.to(resid.device)

    def _read(self, layer: int) -> AttentionMaps:
        """Return a layer's maps to queries, keys and values with the pairs that rotate side by side."""
        if self._kept is not None and layer in self._kept:
            return self._kept[layer]
        found = AttentionMaps.of(self.blocks[layer], self._turns[layer], self.n_heads, self.n_kv)
        if self._kept is not None:
            self._kept[layer] = found
        return found

    def run(
        self,
        layer: int,
        resid: Float[Tensor, "row pos d_model"],
        past: KeysValues | None = None,
        queries: Int[Tensor, "row query"] | None = None,
        *,
        trace: Trace | None = None,
        bypass: bool = False,
    ) -> Float[Tensor, "row query d_model"]:
        """Return a block's output.

        Args:
            layer: The block.
            resid: Its input at the positions after those of `past`.
            past: Keys and values of the positions before.
            queries: The positions whose output is wanted, counted from the first of `resid`; all by default.
            trace: Filled with copies of intermediate results.
            bypass: Attention mixes nothing: each position keeps its own values.
        """
        norm = self.blocks[layer].attn_norm
        x, past, queries = Stack(resid, past, queries).to(self._home(layer))
        attn = self.attention(
            layer, x if norm is None else norm(x), past, queries, trace=trace, bypass=bypass
        )
        out = self.add(layer, x if queries is None else at_positions(x, queries), attn, trace=trace)
        if trace is not None:
            trace |= {name: value.to(resid.device) for name, value in trace.items()}
        return out.to(resid.device)

    def run_together(self, layer: int, stacks: Sequence[Stack]) -> list[Float[Tensor, "row query d_model"]]:
        """Return a block's outputs for stacks of any lengths; each matrix product takes all their positions.

        Args:
            layer: The block.
            stacks: What `run` takes for each. Either all or none have queries.
        """
        if len(stacks) == 1:
            return [self.run(layer, *stacks[0])]
        block, read, home = self.blocks[layer], self._read(layer), self._home(layer)
        place, split = stacks[0].resid.device, self.n_heads * self.d_head
        stacks = [stack.to(home) for stack in stacks]
        asked = [stack.queries for stack in stacks if stack.queries is not None]
        sizes = [stack.resid.shape[:2] for stack in stacks]
        wanted = [at.shape for at in asked] or sizes

        def at_queries(x: Tensor) -> Tensor:
            parts = zip(_parted(x, sizes), asked, strict=True)
            return torch.cat([at_positions(*part).flatten(0, 1) for part in parts])

        resid = torch.cat([stack.resid.flatten(0, 1) for stack in stacks])
        x = resid if block.attn_norm is None else block.attn_norm(resid)
        if asked:
            kv = read.qkv.rows(slice(split, None))(x)
            q = read.qkv.rows(slice(0, split))(at_queries(x))
            resid = at_queries(resid)
        else:
            q, kv = read.qkv(x).split([split, read.qkv.weight.shape[0] - split], dim=-1)
        del x
        z = [
            self._mixed(block, read, queries, own, stack.past, stack.queries).flatten(0, 1)
            for queries, own, stack in zip(_parted(q, wanted), _parted(kv, sizes), stacks, strict=True)
        ]
        del q, kv
        return _parted(self.add(layer, resid, block.o(torch.cat(z))).to(place), wanted)

    def unchanged(
        self, layer: int, resid: Float[Tensor, "row pos d_model"], out: Float[Tensor, "row pos d_model"]
    ) -> Unchanged:
        """Return what `run_changed` needs of a layer, from its input and its output."""
        block, home, trace = self.blocks[layer], self._home(layer), Trace("qkv")
        x = resid.to(home)
        attn = self.attention(layer, x if block.attn_norm is None else block.attn_norm(x), trace=trace)
        width = x.shape[1]
        more = _keys_to_add(width, home)
        k, v = (_between(None, trace[name], more) for name in "kv")
        visible = F.pad(block.around.visible[:width, :width], (0, more))
        return Unchanged(trace["q"], k, v, out.to(home) - attn if block.parallel else x, visible)

    def run_changed(
        self, layer: int, base: Unchanged, changes: Sequence[tuple[int, Float[Tensor, "row d_model"]]]
    ) -> list[Float[Tensor, "row pos d_model"]]:
        """Return a block's outputs where its input changed at one position, from that position on.

        The later positions keep their queries, keys and values and, in a parallel block, what the MLP adds.

        Args:
            layer: The block.
            base: What it computes unchanged.
            changes: The position, and what the input becomes there for copies of the batch.
        """
        block, read, home = self.blocks[layer], self._read(layer), self._home(layer)
        width = base.rest.shape[1]
        low, sizes = min(first for first, _ in changes), [len(rows) for _, rows in changes]
        places = torch.tensor([first for first, _ in changes]).repeat_interleave(torch.tensor(sizes))
        later = (torch.arange(low, width) >= places[:, None]).flatten().nonzero()[:, 0].to(home)
        x = torch.cat([rows for _, rows in changes]).to(home)
        every, at = torch.arange(len(x), device=home), places.to(home)
        own = every % len(base.rest)
        qkv = read.qkv(x if block.attn_norm is None else block.attn_norm(x))[:, None]
        step = max(1, 2 * len(later) // width)  # rows whose keys take no more than what the MLP takes
        portions = ((qkv[some], own[some], at[some]) for some in every.split(step))
        z = torch.cat([self._mixed_after(block, read, base, *some, low) for some in portions])
        z = z.flatten(0, 1)[later]
        rest = base.rest[own, low:]
        rest[every, at - low] = self._mlp(block, x, None).add_(x) if block.parallel else x
        attn, rest = block.o(z), rest.flatten(0, 1)[later]
        out = attn.add_(rest) if block.parallel else self.add(layer, rest, attn)
        wanted = [(len(rows), width - first) for first, rows in changes]
        return _parted(out.to(changes[0][1].device), wanted)

    def _mixed_after(
        self,
        block: BlockWeights,
        read: AttentionMaps,
        base: Unchanged,
        qkv: Float[Tensor, "row 1 n"],
        own: Int[Tensor, " row"],
        at: Int[Tensor, " row"],
        low: int,
    ) -> Float[Tensor, "row pos n"]:
        """Return mixed values at positions ``low ..`` where one position of each row has new projections.

        Args:
            block: The block.
            read: Its maps.
            base: What it computes unchanged.
            qkv: The changed position's projections.
            own: The row of the batch that each row is a copy of.
            at: The position that changed.
            low: The lowest of them.
        """
        split, every = self.n_heads * self.d_head, torch.arange(len(at), device=at.device)
        q, k, v = base.q[own, :, low:], base.k[own], base.v[own]
        new = self._shaped(block, qkv[..., :split], read.q_norm, self.n_heads, (read.turn, at[:, None]))
        q[every, :, at - low] = new[:, :, 0]
        new_k, new_v = self._keys_values(block, read, qkv[..., split:], at[:, None])
        k[every, :, at], v[every, :, at] = new_k[:, :, 0], new_v[:, :, 0]
        return self._attend(block, q, k, v, base.visible[low:])

    def run_all(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Return the output of the last block from the input of the first."""
        for layer in sorted(self.blocks):
            resid = self.run(layer, resid)
        return resid

    def attention(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        past: KeysValues | None = None,
        queries: Int[Tensor, "row query"] | None = None,
        *,
        trace: Trace | None = None,
        bypass: bool = False,
    ) -> Float[Tensor, "row query d_model"]:
        """Return attention's projected output from what it reads; arguments as of `run`.

        All of them are on the block's device, and so is the output.
        """
        block, read = self.blocks[layer], self._read(layer)
        split, qkv = self.n_heads * self.d_head, read.qkv
        if queries is None:
            q, kv = qkv(x).split([split, qkv.weight.shape[0] - split], dim=-1)
        else:
            kv = qkv.rows(slice(split, None))(x)
            q = qkv.rows(slice(0, split))(at_positions(x, queries))
        _keep(trace, attn_in=x)
        del qkv, x  # free before attention and the MLP take their memory
        return block.o(self._mixed(block, read, q, kv, past, queries, trace=trace, bypass=bypass))

    def _mixed(
        self,
        block: BlockWeights,
        read: AttentionMaps,
        q: Float[Tensor, "row query n"],
        kv: Float[Tensor, "row pos m"],
        past: KeysValues | None,
        queries: Int[Tensor, "row query"] | None,
        *,
        trace: Trace | None = None,
        bypass: bool = False,
    ) -> Float[Tensor, "row query n"]:
        """Return the heads' mixed values, side by side, from projected queries, keys and values."""
        first = 0 if past is None else past[0].shape[2]
        here = slice(first, first + kv.shape[1])
        asked: slice | Tensor
        if queries is None:
            visible, asked = block.around.visible[here, : here.stop], here
        else:
            asked = queries + first
            visible = block.around.visible[:, : here.stop][asked][:, None]
        k, v = self._keys_values(block, read, kv, here)
        q = self._shaped(block, q, read.q_norm, self.n_heads, (read.turn, asked))
        _keep(trace, q=q, k=k, v=v)
        del kv
        if bypass:
            return v.repeat_interleave(self.n_heads // self.n_kv, 1).transpose(1, 2).flatten(-2)
        more = _keys_to_add(here.stop, v.device)
        before = (None, None) if past is None else past
        k, v = (_between(old, new, more) for old, new in zip(before, (k, v), strict=True))
        z = self._attend(block, q, k, v, F.pad(visible, (0, more)) if more else visible)
        _keep(trace, z=z)
        return z

    def add(
        self,
        layer: int,
        resid: Float[Tensor, "*batch d_model"],
        attn: Float[Tensor, "*batch d_model"],
        *,
        trace: Trace | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """Return a block's output from its input and its attention's projected output, before a post-norm."""
        block = self.blocks[layer]
        _keep(trace, projected=attn)
        attn = attn if block.attn_post_norm is None else block.attn_post_norm(attn)
        _keep(trace, added=attn)
        if not block.parallel:
            return self.add_mlp(layer, attn.add_(resid), trace=trace)
        return self._mlp(block, resid, trace).add_(attn).add_(resid)

    def add_mlp(
        self, layer: int, resid_mid: Float[Tensor, "*batch d_model"], *, trace: Trace | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """Return a sequential block's output from the residual between attention and MLP."""
        x = resid_mid.to(self._home(layer))
        return self._mlp(self.blocks[layer], x, trace).add_(x).to(resid_mid.device)

    def _mlp(self, block: BlockWeights, resid: Tensor, trace: Trace | None) -> Tensor:
        x = resid if block.mlp_norm is None else block.mlp_norm(resid)
        out = block.mlp(x)
        _keep(trace, mlp_from=resid, mlp_in=x, mlp_raw=out)
        out = out if block.mlp_post_norm is None else block.mlp_post_norm(out)
        _keep(trace, mlp_added=out)
        return out

    def pattern(
        self, layer: int, q: Float[Tensor, "row head pos d_head"], k: Float[Tensor, "row kv_head pos d_head"]
    ) -> Float[Tensor, "row head query key"]:
        """Return the attention weights of queries and keys from position 0 on."""
        block, width = self.blocks[layer], q.shape[2]
        k = k.repeat_interleave(self.n_heads // self.n_kv, 1)
        scores = q @ k.transpose(-1, -2) * block.scale
        visible = block.around.visible[:width, :width].to(scores.device)
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)

    def attention_output(
        self, layer: int, z: Float[Tensor, "*batch head d_head"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return what attention adds to the residual from each head's mixed values."""
        block = self.blocks[layer]
        out = block.o(z.flatten(-2).to(self._home(layer)))
        return (out if block.attn_post_norm is None else block.attn_post_norm(out)).to(z.device)

    def head_output_change(
        self, layer: int, dz: Float[Tensor, "*batch head d_head"], heads: slice
    ) -> Float[Tensor, "*batch d_model"] | None:
        """Return what a change of some heads' `z` adds to the residual; None where this is not linear."""
        block = self.blocks[layer]
        if block.attn_post_norm is not None:
            return None
        columns = slice(heads.start * self.d_head, heads.stop * self.d_head)
        return F.linear(dz.flatten(-2).to(self._home(layer)), block.o.weight[:, columns]).to(dz.device)

    def _keys_values(
        self, block: BlockWeights, read: AttentionMaps, kv: Tensor, places: slice | Tensor
    ) -> KeysValues:
        k, v = kv.chunk(2, dim=-1)
        return (
            self._shaped(block, k, read.k_norm, self.n_kv, (read.turn, places)),
            self._shaped(block, v, None, self.n_kv),
        )

    def _shaped(
        self,
        block: BlockWeights,
        x: Tensor,
        norm: Norm | None,
        heads: int,
        turn: tuple[Turn | None, slice | Tensor] = (None, slice(0)),
    ) -> Tensor:
        """Norm, clip, split into heads and rotate: `[row, head, pos, d_head]`."""
        if norm is not None and norm.weight.numel() == self.d_head:
            x = norm(x.unflatten(-1, (heads, self.d_head))).flatten(-2)
        elif norm is not None:
            x = norm(x)
        x = x if block.clip is None else x.clamp(-block.clip, block.clip)
        x = x.unflatten(-1, (heads, self.d_head))
        if turn[0] is not None:
            x = turn[0](x, turn[1])
        return x.transpose(1, 2)

    def _attend(self, block: BlockWeights, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        if self.n_kv != self.n_heads:
            groups = self.n_heads // self.n_kv
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=block.scale)
        return z.transpose(1, 2).flatten(-2)


def _keys_to_add(keys: int, device: torch.device) -> int:
    """Return how many keys up to the next multiple of 16 save time on a CPU: fewer than half of it, or none.

    The fused kernel works on sixteen at a time, and on what remains one by one.
    """
    missing = -keys % _AT_ONCE if device.type == "cpu" else 0
    return missing if missing < _AT_ONCE // 2 else 0


def _between(
    before: Float[Tensor, "row head first d_head"] | None,
    own: Float[Tensor, "row head pos d_head"],
    more: int,
) -> Float[Tensor, "row head key d_head"]:
    """Return keys or values after those of earlier positions, followed by so many zeros."""
    zeros = own.new_zeros(()).expand(*own.shape[:2], more, own.shape[3])
    parts = [part for part in (before, own, zeros) if part is not None and part.shape[2]]
    return own if len(parts) == 1 else torch.cat(parts, 2)


def _parted(x: Float[Tensor, "all n"], sizes: Sequence[Sequence[int]]) -> list[Float[Tensor, "row pos n"]]:
    """Divide what lies one after another into stacks of these rows and positions."""
    return [
        part.unflatten(0, tuple(n)) for part, n in zip(x.split([a * b for a, b in sizes]), sizes, strict=True)
    ]


def _keep(trace: Trace | None, **values: Tensor) -> None:
    """Store copies of intermediate results, since blocks continue in place."""
    if trace is not None:
        trace |= {name: value.clone() for name, value in values.items() if name in trace.wanted}


def has_hooks(model: Any) -> bool:
    """Whether the model has a user's hook: then only its own forward is correct."""
    if any(point.fwd_hooks for point in hook_points(model).values()):
        return True
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(not module_of(h).startswith(_LIBRARIES) for h in hooks)


def agreed_widths(trunk: Trunk) -> dict[int | str, int]:
    """Return on how many positions a layer, or what is captured at a hook, was found equal to the model's.

    The number of layers stands for the unembedding.
    """
    return known_of(trunk.model).setdefault(f"widths on which blocks agree in {trunk.dtype}", {})


def captured_site(name: str) -> str | None:
    """Return the site of a hook at which blocks give the activation; None for other hooks."""
    layer = layer_of(name)
    sites = ("resid_pre", "resid_post", *_TRACED)
    return None if layer is None else next((s for s in sites if hook_name(s, layer) == name), None)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a block are equal up to rounding in their dtype."""
    return bool((a - b).abs().max() <= _TOLERANCE[a.dtype] * b.abs().max())
