"""How many sequences go through a model at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memlens.errors import OptionError
from memlens.forward import generate
from memlens.forward.memory import (
    Budget,
    default_budget,
    logits_bytes,
    position_bytes,
    row_bytes,
    rows_per_batch,
    unembedding_rows,
)
from memlens.models.families import find_model
from memlens.sequences.set import SequenceSet
from memlens.sweeps.plan import plan_shape

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def shape(width: int, heads: int) -> Any:
    """The configuration of a model with an MLP of four times its width."""
    return SimpleNamespace(d_model=width, d_mlp=4 * width, n_heads=heads)


@pytest.mark.parametrize("length", [1, 8, 32, 64, 100, 512])
@pytest.mark.parametrize("width", [128, 512, 2048])
def test_a_batch_on_a_cpu_holds_as_many_positions_as_are_fastest(length: int, width: int) -> None:
    """From 1,024 to 4,096 positions were measured to be within 10 % of the best; see docs/benchmarks.md."""
    rows = rows_per_batch(shape(width, 8), length, CPU)
    assert 1024 <= rows * length <= 4096
    assert rows * row_bytes(shape(width, 8), length) < default_budget(CPU)


def test_a_batch_holds_at_least_one_sequence_and_no_more_than_fits() -> None:
    assert rows_per_batch(shape(512, 8), 100_000, CPU) == 1
    wide = shape(16_384, 128)
    rows = rows_per_batch(wide, 64, CPU)
    assert rows * row_bytes(wide, 64) <= default_budget(CPU) / 4 < (rows + 1) * row_bytes(wide, 64)


def test_on_a_gpu_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))
    free = 2**36
    assert rows_per_batch(shape(512, 8), 64, GPU) == 256
    free = 2**26
    rows = rows_per_batch(shape(512, 8), 64, GPU)
    assert 1 <= rows < 256
    assert rows * row_bytes(shape(512, 8), 64) <= 0.4 * free / 4


def test_what_a_pass_takes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    with_mlp, without = (SimpleNamespace(d_model=10, d_mlp=d_mlp, n_heads=2) for d_mlp in (30, None))
    # a token: 12 residuals, 3 MLP activations, 4 rows of the pattern per head
    assert row_bytes(with_mlp, 5) == 4 * 5 * (120 + 90 + 40)
    assert row_bytes(with_mlp, 5, itemsize=2) == 2 * 5 * (120 + 90 + 40)
    assert row_bytes(without, 5) == 4 * 5 * (120 + 120 + 40)  # an MLP of four times the width
    for cfg, d_mlp in ((with_mlp, 30), (without, 40)):
        assert position_bytes(trunk(cfg=cfg), 5) == 4 * (6 * 10 + 2 * d_mlp + 2 * 5)
    assert position_bytes(trunk(cfg=with_mlp, dtype=torch.bfloat16), 5) == 2 * (60 + 60 + 10)
    assert [logits_bytes(50, itemsize) for itemsize in (2, 4, 8)] == [1200, 1200, 2400]  # float32 at least
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**36))
    assert (default_budget(CPU), default_budget(GPU)) == (2**30, 400)


def trunk(device: torch.device = CPU, dtype: torch.dtype = torch.float32, cfg: Any = None) -> Any:
    """What a budget asks of a model: 10 features, 2 heads, 3 layers, 50 tokens, 30 neurons."""
    model = SimpleNamespace(cfg=cfg or SimpleNamespace(d_mlp=30))
    return SimpleNamespace(
        model=model, device=device, dtype=dtype, d_model=10, n_heads=2, n_layers=3, d_vocab=50
    )


def texts(n: int) -> SequenceSet:
    """`n` sequences, the longest of ten tokens."""
    return SequenceSet.from_tokens([[1] * 10, *[[1] * 7] * (n - 1)], 2)


@pytest.mark.parametrize(
    ("device", "total", "n", "batch_size", "expected"),
    [
        # a position takes 560 bytes (60 % of the budget: 1071 fit), what is kept of a sequence 4,800
        # (25 %: 52), a target 1,200 while its logits are reduced (15 %: 125), and before that 200 on a CPU
        # (10 %: 500, but no more than 256)
        (CPU, 10**6, 200, None, (10**6, 52, 1071, 256, 125)),
        (CPU, 10**6, 3, None, (10**6, 3, 1071, 256, 125)),
        (CPU, 10**6, 3, 200, (10**6, 200, 2000, 256, 125)),
        (CPU, 10**9, 200, None, (10**9, 64, 2048, 256, 256)),
        (GPU, 10**9, 200, None, (10**9, 64, 1_071_428, 125_000, 125_000)),
        (GPU, 10**9, 20, None, (10**9, 20, 1_071_428, 125_000, 125_000)),
        (CPU, 30_000, 200, None, (30_000, 1, 32, 15, 3)),
        (CPU, 100, 200, None, (100, 1, 10, 1, 1)),
        (CPU, None, 200, None, (2**30, 64, 2048, 256, 256)),
    ],
)
def test_a_budget_is_divided(
    device: torch.device, total: int | None, n: int, batch_size: int | None, expected: tuple[int, ...]
) -> None:
    found = Budget.of(trunk(device), texts(n), total, batch_size)
    assert tuple(vars(found).values()) == expected


def test_logits_have_a_share_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 2**36))
    assert unembedding_rows(50, GPU) == (50, 50)  # 15 % of 40 % of a million bytes, 1,200 each
    assert unembedding_rows(50, GPU, itemsize=8) == (25, 25)
    assert unembedding_rows(50, CPU) == (256, 256)
    assert [unembedding_rows(size, CPU)[1] for size in (1024, 8192, 8193, 50304)] == [128, 16, 16, 16]
    assert unembedding_rows(10**6, CPU) == (26, 6)


@pytest.mark.parametrize(("family", "kv_heads"), [("gpt_neox", 4), ("llama_gqa", 2)])
def test_as_many_sequences_are_decoded_together_as_their_keys_and_values_fit(
    family: str, kv_heads: int, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seqs, sizes = tiny_model(family, "bridge"), texts(8), list[int]()
    row = 2 * 3 * kv_heads * 8 * 10 * 4  # keys and values, layers, heads, features, tokens, bytes
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: sizes.append(len(x)))]):
        for n, chunks in {3: {3, 2}, 5: {5, 3}, 1000: {8}}.items():
            monkeypatch.setattr(generate, "default_budget", lambda device, n=n: 4 * n * row)
            sizes.clear()
            found = generate.greedy_continuations(model, seqs)
            assert set(sizes) == chunks
            assert found.shape == (8, 8)
            sizes.clear()
            generate.greedy_continuations(model, seqs, batch_size=2)
            assert set(sizes) == {2}


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_a_sequence_is_refused(batch_size: int) -> None:
    with pytest.raises(OptionError, match=f"batch_size={batch_size} holds no sequence"):
        Budget.of(trunk(), texts(3), None, batch_size)


@pytest.mark.parametrize("memory_budget", [0, -1])
def test_a_budget_of_nothing_is_refused(memory_budget: int) -> None:
    with pytest.raises(OptionError, match=f"memory_budget={memory_budget} bytes hold nothing"):
        Budget.of(trunk(), texts(3), memory_budget, None)
    pythia = find_model("pythia-70m")[1].shape
    for on in (None, "h100-sxm"):
        with pytest.raises(OptionError, match=f"memory_budget={memory_budget} bytes hold nothing"):
            plan_shape(pythia, texts(3), [], memory_budget=memory_budget, on=on)
