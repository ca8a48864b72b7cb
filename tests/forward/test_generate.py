"""Continuations that a function draws: the tokens that a plain loop over whole passes gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memlens.forward import generate
from memlens.forward.generate import greedy_continuations, sampled_continuations
from memlens.sequences.set import SequenceSet
from tests.small import ragged


def second(logits: torch.Tensor) -> torch.Tensor:
    return logits.topk(2).indices[:, 1]


@torch.no_grad()
def plainly(model: Any, seqs: SequenceSet, choose: Any) -> list[list[int]]:
    """One sequence at a time, by whole forward passes."""
    drawn = []
    for row, prefix_len in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True):
        tokens = torch.tensor([row[:prefix_len]])
        while tokens.shape[1] < len(row):
            tokens = torch.cat([tokens, choose(model(tokens)[:, -1])[:, None]], 1)
        drawn.append(tokens[0, prefix_len:].tolist())
    return drawn


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "hooked"), ("olmo2", "hooked"), ("llama_gqa", "bridge")]
)
def test_each_sequence_gets_as_many_tokens_as_its_own(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged(6)
    expected = [row + [-1] * (seqs.max_targets - len(row)) for row in plainly(model, seqs, second)]
    sizes: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: sizes.append(len(x)))]):
        for batch_size in (None, 1, 4):
            sizes.clear()
            assert sampled_continuations(model, seqs, second, batch_size=batch_size).tolist() == expected
            assert set(sizes) == (
                {6} if batch_size is None else {min(batch_size, 6), 6 % batch_size or batch_size}
            )
    assert seqs.rows() == ragged(6).rows()


def test_memory_decides_how_many_are_drawn_together(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seqs, asked = tiny_model("gpt_neox", "bridge"), ragged(4), list[int]()

    def rows(model: Any, length: int) -> int:
        asked.append(length)
        return 3

    monkeypatch.setattr(generate, "_rows_per_cache", rows)
    sizes: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: sizes.append(len(x)))]):
        sampled_continuations(model, seqs, second)
    assert asked == [int(seqs.lengths.max())]
    assert set(sizes) == {3, 1}


def test_nothing_to_decode_runs_no_model() -> None:
    seqs = ragged(2)
    known = seqs.lengths
    tokens = generate._decode(None, seqs.tokens, known, seqs.lengths, second)
    assert torch.equal(tokens, seqs.tokens)


@torch.no_grad()
def test_decoding_goes_on_from_what_is_known_and_shows_its_bar(
    tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged(4)
    whole = plainly(model, seqs, lambda logits: logits.argmax(-1))
    rows, known = torch.tensor([3, 1]), torch.tensor([2, 1])
    started = seqs.tokens.clone()
    for row, n in zip(rows.tolist(), known.tolist(), strict=True):
        start = int(seqs.prefix_len[row])
        started[row, start : start + n] = torch.tensor(whole[row][:n])
    given = SequenceSet.from_tokens(
        [row[:n] for row, n in zip(started.tolist(), seqs.lengths.tolist(), strict=True)], seqs.prefix_len
    )
    capsys.readouterr()
    found = greedy_continuations(model, given, rows, known)
    assert capsys.readouterr() == ("", "")
    for made, row in zip(found.tolist(), rows.tolist(), strict=True):
        assert made[: len(whole[row])] == whole[row]
    greedy_continuations(model, given, rows, known, progress=True)
    shown = capsys.readouterr().err
    assert "decoding: 100%" in shown
    assert "2/2" in shown
    assert "seq" in shown
    first = torch.tensor([7, 9])  # a first token that is given is taken as it is
    forced = greedy_continuations(model, given, rows, known, first_token=first)
    assert forced[torch.arange(2), known].tolist() == first.tolist()
    banned = greedy_continuations(model, given, banned=whole[0][0])
    assert whole[0][0] not in banned[0].tolist()
