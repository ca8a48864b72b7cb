"""Greedy continuations, decoded only from the first error on.

Up to its first error a greedy continuation equals the truth, so those tokens are not decoded. Rows with
first errors at different positions share one key-value cache in lockstep: at every step, a row that is still
before its error is fed its true token, and the others what they decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.forward.exclusive import computes
from memlens.forward.memory import default_budget, fitting
from memlens.forward.trunk import Trunk, is_bridge
from memlens.sequences.set import SequenceSet

MOST_DECODED = 256
"""Most sequences that are decoded together."""


@computes
def greedy_continuations(
    model: Any,
    seqs: SequenceSet,
    rows: Int[Tensor, "row"] | None = None,
    first_error: Int[Tensor, "row"] | None = None,
    *,
    first_token: Int[Tensor, "row"] | None = None,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = False,
) -> Int[Tensor, "row target"]:
    """Return the greedy continuation of each prefix, with as many tokens as the true continuation.

    Args:
        model: A TransformerLens model.
        seqs: The set.
        rows: Which sequences; all by default.
        first_error: For each of them, the target at which decoding first differs from the truth (0 where this
            is unknown, so that everything is decoded).
        first_token: The token decoded there, if known, which saves one step.
        batch_size: Sequences decoded together; chosen by the size of the cache by default.
        banned: A token that decoding may not emit.
        progress: Show a progress bar.

    Returns:
        Token ids, padded with -1 where a sequence has fewer targets than the longest of the set.
    """
    rows = torch.arange(len(seqs)) if rows is None else rows
    tokens = seqs.tokens[rows].clone()
    known = seqs.prefix_len[rows] + (0 if first_error is None else first_error)
    if first_token is not None:
        tokens[torch.arange(len(rows)), known] = first_token
        known = known + 1
    size = batch_size or _rows_per_cache(model, int(seqs.lengths.max()))
    order = known.argsort(stable=True)
    with torch.no_grad(), tqdm(total=len(rows), desc="decoding", unit="seq", disable=not progress) as bar:
        for chunk in order.split(size):
            lengths = seqs.lengths[rows[chunk]]
            tokens[chunk] = _decode(model, tokens[chunk], known[chunk], lengths, _likeliest, banned)
            bar.update(len(chunk))
    return _targets_of(tokens, seqs, rows)


@computes
@torch.no_grad()
def sampled_continuations(
    model: Any,
    seqs: SequenceSet,
    choose: Callable[[Float[Tensor, "row vocab"]], Int[Tensor, "row"]],
    *,
    batch_size: int | None = None,
) -> Int[Tensor, "seq target"]:
    """Return a continuation of each prefix whose tokens `choose` draws, with as many as the true one has.

    Args:
        model: A TransformerLens model.
        seqs: The set, decoded in its order.
        choose: From the logits of the next token to one token id per row.
        batch_size: Sequences decoded together; chosen by the size of the cache by default.

    Returns:
        Token ids, padded with -1 as by `greedy_continuations`.
    """
    tokens, rows = seqs.tokens.clone(), torch.arange(len(seqs))
    for chunk in rows.split(batch_size or _rows_per_cache(model, int(seqs.lengths.max()))):
        tokens[chunk] = _decode(model, tokens[chunk], seqs.prefix_len[chunk], seqs.lengths[chunk], choose)
    return _targets_of(tokens, seqs, rows)


def _likeliest(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, "row"]:
    return logits.argmax(-1)


def _decode(
    model: Any,
    tokens: Tensor,
    known: Tensor,
    lengths: Tensor,
    choose: Callable[[Tensor], Tensor],
    banned: int | None = None,
) -> Tensor:
    """Fill in the tokens from `known` to `lengths`; both `[row]`."""
    start, end = int(known.min()), int(lengths[known < lengths].max()) if (known < lengths).any() else 0
    if start >= end:
        return tokens
    tokens = tokens.clone()
    decoder = _BridgeDecoder(model) if is_bridge(model) else _HookedDecoder(model, len(tokens))
    fed = tokens[:, :start]
    for position in range(start, end):
        logits = decoder.step(fed)
        if banned is not None:
            logits[:, banned] = float("-inf")
        decoded = choose(logits).cpu()
        tokens[:, position] = torch.where(position < known, tokens[:, position], decoded)
        fed = tokens[:, position : position + 1]
    return tokens


def _targets_of(tokens: Tensor, seqs: SequenceSet, rows: Tensor) -> Tensor:
    positions, mask = seqs.target_positions[rows], seqs.target_mask[rows]
    return torch.where(mask, tokens.gather(1, positions.clamp_min(0)), -1)


def _rows_per_cache(model: Any, length: int) -> int:
    """Return how many sequences' keys and values fit into the memory budget."""
    parameter = next(model.parameters())
    cfg = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    row_bytes = cache_bytes(cfg.n_layers, heads, cfg.d_head, length, parameter.element_size())
    return fitting(row_bytes, default_budget(parameter.device), most=MOST_DECODED)


def cache_bytes(n_layers: int, n_kv_heads: int, d_head: int, length: int, itemsize: int) -> int:
    """Return what the keys and values of one sequence take."""
    return 2 * n_layers * n_kv_heads * d_head * length * itemsize


class _HookedDecoder:
    """`HookedTransformer` with its own cache; only the last position is unembedded."""

    def __init__(self, model: Any, n_rows: int) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self.model, self.trunk = model, Trunk(model)
        self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, n_rows)

    def step(self, tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
        """Process the next tokens and return the logits after the last of them."""
        # Without a mask TransformerLens would take end-of-text tokens for padding.
        resid = self.model(
            tokens.to(self.trunk.device),
            past_kv_cache=self.cache,
            attention_mask=torch.ones_like(tokens),
            stop_at_layer=self.trunk.n_layers,
        )
        return self.trunk.unembed(resid[:, -1])


class _BridgeDecoder:
    """The bridge's Hugging Face model with its own cache; TransformerLens hooks also act there.

    A model that returns no such cache (a recurrent one) reads the whole text at each step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.original_model
        self.device = next(model.parameters()).device
        self.past: Any = None
        self.text: Tensor = torch.empty((0,), dtype=torch.long, device=self.device)

    def step(self, tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
        """As that of `_HookedDecoder`."""
        new = tokens.to(self.device)
        self.text = torch.cat([self.text, new], 1) if self.text.ndim == 2 else new
        read = self.text if self.past is None else new
        out = self.model(input_ids=read, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = getattr(out, "past_key_values", None)
        return out.logits[:, -1].clone()
