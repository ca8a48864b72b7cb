"""Sequences whose recall by a given model is known in advance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlens.sequences.set import SequenceSet
from tests.tiny import D_VOCAB, random_tokens


@torch.no_grad()
def plain_greedy(model: Any, seqs: SequenceSet) -> list[list[int]]:
    """Decode one sequence at a time, without a cache, by whole forward passes."""
    generated = []
    for row, prefix_len in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True):
        tokens = torch.tensor([row[:prefix_len]])
        while tokens.shape[1] < len(row):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        generated.append(tokens[0, prefix_len:].tolist())
    return generated


def graded(model: Any, *, seed: int = 0, n: int = 9) -> SequenceSet:
    """A ragged set: a third recalled exactly, a third with one wrong token, a third with random targets."""
    generator = torch.Generator().manual_seed(seed)
    prompts = random_tokens(n, 12, seed=seed)
    rows, prefix_lens = [], []
    for i in range(n):
        prefix_len = int(torch.randint(3, 12, (), generator=generator))
        length = prefix_len + int(torch.randint(2, 14, (), generator=generator))
        if i % 3 == 2:
            targets = torch.randint(0, D_VOCAB - 1, (length - prefix_len,), generator=generator)
            row = torch.cat([prompts[i, :prefix_len], targets])
        else:
            row = _continued(model, prompts[i, :prefix_len], length)
        if i % 3 == 1:
            wrong = int(torch.randint(prefix_len, length, (), generator=generator))
            row[wrong] = (row[wrong] + 1) % (D_VOCAB - 1)
        rows.append(row.tolist())
        prefix_lens.append(prefix_len)
    return SequenceSet.from_tokens(rows, prefix_lens)


@torch.no_grad()
def _continued(model: Any, prompt: Tensor, length: int) -> Tensor:
    tokens = prompt[None]
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0].clone()
