"""How many sequences go through a model at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memlens.forward.memory import default_budget, row_bytes, rows_per_batch

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
