"""The peers: the same work without memlens, as in TransformerLens' documentation or published code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import memlens as ml


def patch_with_transformer_lens(
    model: Any, function: str, site: str, clean: ml.SequenceSet, corrupt: ml.SequenceSet
) -> np.ndarray:
    """Run `transformer_lens.patching` on the last token's log-probability: `[layer, position or head]`."""
    from transformer_lens import patching

    given = slice(0, int(clean.prefix_len[0]))
    answer = int(clean.target_ids[0, 0])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1].log_softmax(-1)[answer]

    device = model.cfg.device
    _, cache = model.run_with_cache(
        clean.tokens[:, given].to(device), names_filter=lambda n: n.endswith(site)
    )
    with contextlib.redirect_stderr(io.StringIO()):
        found = getattr(patching, function)(model, corrupt.tokens[:, given].to(device), cache, metric)
    return found.cpu().numpy()


def zero_head(layer: int, head: int) -> tuple[str, Callable[..., torch.Tensor]]:
    """Return a plain TransformerLens hook that ablates one head."""

    def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head] = 0
        return z

    return f"blocks.{layer}.attn.hook_z", hook


def heads_teacher_forced(
    model: Any, seqs: ml.SequenceSet, sites: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Run one full forward pass per head: mean target log-probability and exact match, `[site, sequence]`."""
    tokens = seqs.tokens.to(model.cfg.device)
    start = int(seqs.prefix_len[0])
    logprob, match = [], []
    for site in sites:
        logits = model.run_with_hooks(tokens, fwd_hooks=[zero_head(*site)])[:, start - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, tokens[:, start:, None])[..., 0]
        logprob.append(logp.mean(-1).cpu())
        match.append((logits.argmax(-1) == tokens[:, start:]).all(-1).cpu())
    return torch.stack(logprob).numpy(), torch.stack(match).numpy()


def generated(
    model: Any, seqs: ml.SequenceSet, edits: Sequence[Sequence[tuple[str, Callable[..., Any]]]]
) -> np.ndarray:
    """Run one cached greedy `generate` per edit: exact match `[edit, sequence]`."""
    start = int(seqs.prefix_len[0])
    prefix, want = seqs.tokens[:, :start].to(model.cfg.device), seqs.tokens[:, start:]
    out = []
    for hooks in edits:
        with model.hooks(fwd_hooks=list(hooks)):
            got = model.generate(
                prefix, max_new_tokens=want.shape[1], do_sample=False, stop_at_eos=False, verbose=False
            )
        out.append((got[:, start:].cpu() == want).all(-1))
    return torch.stack(out).numpy()


def identity_attention(layer: int) -> list[tuple[str, Callable[..., Any]]]:
    """Bypass one layer's attention as a TransformerLens user would: mixed values := own values."""
    kept: list[torch.Tensor] = []

    def remember(v: torch.Tensor, hook: Any) -> None:
        kept[:] = [v]

    return [
        (f"blocks.{layer}.attn.hook_v", remember),
        (f"blocks.{layer}.attn.hook_z", lambda z, hook: kept.pop()),
    ]
