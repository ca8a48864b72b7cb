"""The teacher-forced pass: its order, further numbers, and the bar that it shows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import NonFiniteError
from memlens.forward.baseline import teacher_forced, teacher_forced_stats
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import captured_at_targets, mean_activations
from memlens.forward.metrics import target_stats
from tests.small import ragged


@torch.no_grad()
def test_statistics_and_further_numbers_are_those_of_each_sequence_alone(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    seen: list[torch.Size] = []

    def second(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(ids)
        seen.append(logits.shape)
        return logits.topk(2).values[:, 1]

    def own(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, ids[:, None])[:, 0].double()

    for batch_size in (None, 1, 4):
        stats, extras = teacher_forced(
            model, seqs, {"second": second, "own": own}, batch_size=batch_size, progress=False
        )
        assert list(extras) == ["second", "own"]
        for i, (row, prefix) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
            n = len(row) - prefix
            logits = model(torch.tensor([row]))[:, prefix - 1 : -1]
            ids = torch.tensor([row[prefix:]])
            alone = target_stats(logits, ids, torch.ones(1, n, dtype=torch.bool))
            for name, values in vars(alone).items():
                torch.testing.assert_close(getattr(stats, name)[i, :n], values[0], rtol=1e-4, atol=1e-4)
            assert stats.mask[i].tolist() == [k < n for k in range(seqs.max_targets)]
            torch.testing.assert_close(
                extras["second"][i, :n], logits[0].topk(2).values[:, 1], rtol=1e-4, atol=1e-4
            )
            assert extras["own"].dtype == torch.float64
            assert not extras["own"][i, n:].any()
    assert sum(shape[0] for shape in seen) == 3 * int(seqs.n_targets.sum())
    plain = teacher_forced_stats(model, seqs, progress=False)
    assert plain.rank.tolist() == stats.rank.tolist()
    banned = teacher_forced_stats(model, seqs, banned=int(plain.argmax[0, 0]), progress=False)
    assert int(banned.argmax[0, 0]) != int(plain.argmax[0, 0])
    assert banned.rank[0, 0] <= plain.rank[0, 0]


def test_bars_name_what_is_done_and_count_sequences(
    tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(4)
    trunk, names = ml.Trunk(model), ["blocks.1.hook_resid_pre"]
    calls: dict[str, Any] = {
        "scoring": lambda **bar: teacher_forced(model, seqs, {}, **bar),
        "scoring:": lambda **bar: teacher_forced_stats(model, seqs, **bar),
        "reading": lambda **bar: list(captured_at_targets(trunk, seqs, names, desc="reading", **bar)),
    }
    capsys.readouterr()
    for said, call in calls.items():
        call(progress=False)
        assert capsys.readouterr() == ("", "")
        for bar in ({}, {"progress": True}):
            call(**bar)
            shown = capsys.readouterr().err
            assert f"{said.rstrip(':')}: 100%" in shown
            assert "4/4" in shown
            assert "seq" in shown
    mean_activations(model, seqs, names)
    assert capsys.readouterr() == ("", "")


def test_default_batches_of_activations(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ml.SequenceSet.from_tokens([[1, 2, 3]] * 40, 1)
    trunk, name = ml.Trunk(model), "blocks.1.hook_resid_pre"
    sizes = [len(part.final) for part in captured_at_targets(trunk, seqs, [name], progress=False)]
    assert sizes == [16, 16, 8]
    seen: list[int] = []
    with model.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(len(x)))]):
        mean_activations(model, seqs, [name])
    assert seen[-2:] == [32, 8]


def test_numbers_that_are_not_finite_are_refused_by_layer(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(3)

    def spoil_one(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[-1, -1] = torch.inf
        return x

    with (
        model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", spoil_one)]),
        pytest.raises(NonFiniteError, match="first after layer 2;"),
    ):
        teacher_forced_stats(model, seqs[:1], progress=False)


@pytest.mark.parametrize(("dtype", "as_functions"), [(torch.float32, True), (torch.bfloat16, False)])
def test_many_batches_run_as_functions_unless_a_hook_or_rounding_forbids_it(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, as_functions: bool
) -> None:
    model, seqs = deepcopy(tiny_model("gpt_neox", "hooked")).to(dtype), ragged(6)
    ran: list[int] = []
    run_all = FunctionalBlocks.run_all

    def counting(self: FunctionalBlocks, resid: torch.Tensor) -> torch.Tensor:
        ran.append(len(resid))
        return run_all(self, resid)

    monkeypatch.setattr(FunctionalBlocks, "run_all", counting)

    def stats(batch_size: int) -> torch.Tensor:
        ran.clear()
        return teacher_forced_stats(model, seqs, batch_size=batch_size, progress=False).logprob

    own = stats(2)
    assert ran == []  # three batches
    many = stats(1)
    assert ran == [1] * 6 * as_functions
    torch.testing.assert_close(many, own, rtol=0, atol=1e-5 if as_functions else 0.1)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: 0 * x)]):
        hooked = stats(1)
    assert ran == []
    assert (hooked - many).abs().max() > 1e-3
