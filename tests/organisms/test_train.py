from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from memlens.errors import EmptySetError, OptionError, ResultError
from memlens.organisms.training.architectures import ModelSpec, build_model
from memlens.organisms.training.train import TrainLog, TrainSpec, rows_of_step, train
from tests.devices import dev

SPEC = TrainSpec(batch_size=4, passes=3, warmup=0.2)
ROWS = np.random.default_rng(0).integers(0, 50, (14, 16))


def fresh() -> PreTrainedModel:
    return build_model(ModelSpec(d_model=16, n_layers=2, n_heads=2), 50, seed=0)


def run(model: PreTrainedModel, **options: object) -> TrainLog:
    return train(model, ROWS, SPEC, device=dev(), progress=False, **options)


def equal(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_training_is_deterministic_and_learns() -> None:
    first, second = fresh(), fresh()
    log, again = run(first), run(second)
    assert log.losses == again.losses
    assert equal(first, second)
    assert not equal(first, fresh())
    assert log.finished
    longer = train(fresh(), ROWS, replace(SPEC, steps=80), device=dev(), progress=False).losses
    assert np.mean(longer[-5:]) < np.mean(longer[:5]) - 0.4


def test_a_run_in_three_sittings_equals_one_bit_for_bit(tmp_path: Path) -> None:
    whole = fresh()
    log = run(whole)
    for sitting in range(3):
        model = fresh()
        parts = run(model, checkpoint=tmp_path / "state.pt", stop_after=4 if sitting < 2 else None)
        assert parts.finished == (sitting == 2)
    assert parts.losses == log.losses
    assert equal(model, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_resume_false_starts_over(tmp_path: Path) -> None:
    run(fresh(), checkpoint=tmp_path / "state.pt", stop_after=3)
    log = run(fresh(), checkpoint=tmp_path / "state.pt", stop_after=1, resume=False)
    assert len(log.losses) == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(fresh(), checkpoint=tmp_path / "state.pt", stop_after=1)
    other = replace(SPEC, learning_rate=1e-4)
    with pytest.raises(ResultError, match="another learning_rate"):
        train(fresh(), ROWS, other, checkpoint=tmp_path / "state.pt", device=dev(), progress=False)
    with pytest.raises(ResultError, match="another fingerprint"):
        train(fresh(), ROWS[::-1], SPEC, checkpoint=tmp_path / "state.pt", device=dev(), progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ResultError, match=r"state\.pt is damaged"):
        run(fresh(), checkpoint=tmp_path / "state.pt")


def test_each_pass_reads_every_row_once_and_the_first_in_order() -> None:
    n_steps = SPEC.n_steps(len(ROWS))
    order = [row for step in range(n_steps) for row in rows_of_step(SPEC, step, len(ROWS))]
    assert order[:14] == list(range(14))
    assert sorted(order[14:28]) == list(range(14)) != order[14:28]
    assert n_steps == 3 * 14 // 4
    assert max(Counter(order).values()) <= 3


def test_the_batches_trained_on_are_those_of_rows_of_step() -> None:
    model, log = fresh(), run(fresh(), stop_after=1)
    rows = torch.from_numpy(ROWS[rows_of_step(SPEC, 0, len(ROWS))])
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert log.losses[0] == pytest.approx(float(loss), rel=1e-5)


def test_learning_rate_rises_then_falls_to_the_final_ratio() -> None:
    rates = [SPEC.rate(step, 100) for step in range(100)]
    assert np.argmax(rates) in (19, 20)
    assert max(rates) == pytest.approx(SPEC.learning_rate)
    assert rates[-1] == pytest.approx(SPEC.final_ratio * SPEC.learning_rate)
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_building_a_model_is_seeded_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    assert equal(fresh(), fresh())
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(fresh(), build_model(ModelSpec(d_model=16, n_layers=2, n_heads=2), 50, seed=1))


def test_no_rows_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(EmptySetError, match="no rows"):
        train(fresh(), ROWS[:0], SPEC, device=dev(), progress=False)
    with pytest.raises(OptionError, match="n_heads=3"):
        ModelSpec(d_model=16, n_heads=3)
    with pytest.raises(OptionError, match=r"'pythai'.*Did you mean 'pythia'"):
        ModelSpec(family="pythai")
