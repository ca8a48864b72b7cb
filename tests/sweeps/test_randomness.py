"""Hooks that draw random numbers: repeatable with a seed, and warned of without."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import memlens as ml
from memlens.sweeps.randomness import with_watched_draws
from tests.tiny import random_tokens


def noise(x: Tensor, hook: Any) -> Tensor:
    return x + torch.randn_like(x)


def numpy_noise(x: Tensor, hook: Any) -> Tensor:
    return x * (2 + float(np.random.normal()))  # noqa: NPY002


def python_noise(x: Tensor, hook: Any) -> None:
    x *= 1 + random.random()


def fresh_generator(x: Tensor, hook: Any) -> Tensor:
    return x * float(np.random.default_rng().normal())


def halve(x: Tensor, hook: Any) -> Tensor:
    return x / 2


def edits(fn: Any, n: int = 3) -> list[ml.Intervention]:
    return [ml.Intervention(f"{i}", [("blocks.1.hook_mlp_out", fn)], {"draw": i}) for i in range(n)]


@pytest.fixture
def run(tiny_model: Callable[..., Any]) -> Callable[..., tuple[np.ndarray, list[str]]]:
    model = tiny_model("gpt_neox")
    seqs = ml.SequenceSet.from_tokens(random_tokens(4, 10), 6)

    def values(fn: Any, **options: Any) -> tuple[np.ndarray, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = ml.sweep(model, seqs, edits(fn), ("target_logprob",), progress=False, **options)
        assert result.settings.get("seed") == options.get("seed")
        said = [str(warning.message) for warning in caught if "the hook on" in str(warning.message)]
        return result["target_logprob"].values, said

    return values


@pytest.mark.parametrize("fn", [noise, numpy_noise, python_noise])
def test_a_seed_fixes_the_draws_on_either_engine_and_in_parts(run: Any, fn: Any, tmp_path: Path) -> None:
    first, said = run(fn, seed=1, batch_size=2)
    assert said == []
    assert (np.abs(np.diff(first, axis=1)) > 1e-4).all()  # each intervention draws its own
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  # what ran before does not matter
    for same in ({}, {"out": tmp_path}, {"out": tmp_path, "batch_size": 2}):
        assert (run(fn, seed=1, **{"batch_size": 2, **same})[0] == first).all()
    assert run(fn, seed=1, batch_size=2, engine="reference")[0] == pytest.approx(first, abs=1e-5)
    assert np.abs(run(fn, seed=2, batch_size=2)[0] - first).min() > 1e-5


def test_a_folder_of_one_seed_is_not_continued_with_another(run: Any, tmp_path: Path) -> None:
    run(noise, seed=1, out=tmp_path)
    with pytest.raises(ml.errors.OtherRunError):
        run(noise, seed=2, out=tmp_path)


@pytest.mark.parametrize("fn", [noise, numpy_noise, python_noise])
def test_a_hook_that_draws_is_warned_of_once(run: Any, fn: Any) -> None:
    (said,) = run(fn)[1]
    assert "the hook on 'blocks.1.hook_mlp_out' of intervention '0' draws random numbers" in said


def test_what_no_seed_reaches_is_warned_of(run: Any) -> None:
    (said,) = run(fresh_generator)[1]
    assert "gives two values for one activation" in said
    (said,) = run(fresh_generator, seed=1)[1]
    assert "which seed= does not reach" in said


def test_the_generators_go_on_as_if_there_had_been_no_sweep(run: Any) -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    run(noise, seed=3)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002


def test_a_hook_without_draws_is_the_same_with_a_seed_and_called_twice_at_most(run: Any) -> None:
    calls = []

    def counted(x: Tensor, hook: Any) -> Tensor:
        calls.append(len(x))
        return x / 2

    def looks(x: Tensor, hook: Any) -> None:
        calls.append(len(x))

    plain, said = run(halve)
    assert said == []
    assert (run(halve, seed=1)[0] == plain).all()
    run(counted)
    assert len(calls) == 3 + 1
    calls.clear()
    run(looks)
    assert len(calls) == 3  # it changed nothing, and is not called again


def test_what_a_batch_hook_draws_when_it_is_bound_is_fixed_too(run: Any) -> None:
    class Shift:
        def bind(self, batch: Any) -> Any:
            shift = torch.rand(len(batch.rows), 1, 1)
            return lambda x, hook: x + shift

    first, said = run(Shift(), seed=1)
    assert said == []
    assert (run(Shift(), seed=1)[0] == first).all()


def test_interventions_of_memlens_are_left_alone(tiny_model: Callable[..., Any]) -> None:
    own = ml.edits.attention_bypasses(tiny_model("gpt_neox"))
    assert all(a is b for a, b in zip(with_watched_draws(own, 1), own, strict=True))
