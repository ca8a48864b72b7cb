"""Calls on one model from several threads give what they give one after the other, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import ModelInUseError
from memlens.forward.capture import captured_at_targets
from memlens.forward.exclusive import computes, exclusively
from tests.devices import dev
from tests.small import corrupted, ragged

THREADS = 4


def values(found: Any) -> dict[str, np.ndarray]:
    """The numbers of what a call returns."""
    if isinstance(found, ml.Result):
        return {str(name): array.values for name, array in found.data.data_vars.items()}
    if isinstance(found, ml.RecallScores):
        return {name: found.table[name].to_numpy() for name in found.table.select_dtypes("number")}
    return dict(found)


def calls_on(model: Any) -> list[Callable[[], Any]]:
    seqs, other = ragged(), corrupted(ragged())
    edits = ml.edits.head_ablations(model, seqs, layers=[0], mode="mean")
    shared = ml.edits.activation_patches(model, other, layers=[1], positions=[2, 4])

    def under_an_edit() -> dict[str, np.ndarray]:
        with ml.applied(model, edits[1]):
            return {"logits": model(seqs.tokens[:, :9]).detach().numpy(), **ml.measure(model, seqs)}

    def drawn() -> dict[str, np.ndarray]:
        """A generator of activations, read while others compute."""
        name = "blocks.1.hook_resid_post"
        parts = captured_at_targets(ml.Trunk(model), seqs, [name], batch_size=1, progress=False)
        return {str(i): part.acts[name].numpy() for i, part in enumerate(parts)}

    return [
        partial(ml.score_recall, model, seqs, generate=False, progress=False),
        partial(ml.sweep, model, seqs, edits, progress=False),
        partial(ml.sweep, model, other, shared, progress=False),
        partial(ml.sweep, model, seqs, shared, progress=False, engine="reference"),
        partial(ml.decode_residual, model, seqs, progress=False),
        partial(ml.attribute_gradients, model, seqs, other, site="z", over="head", progress=False),
        under_an_edit,
        drawn,
    ]


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "bridge"), ("olmo2", "hooked")])
def test_four_threads_give_what_one_gives(tiny_model: Any, family: str, backend: str) -> None:
    calls = calls_on(tiny_model(family, backend))
    alone = [values(call()) for call in calls]
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(calls)), 6))
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda i: values(calls[i]()), order))
    for i, found in zip(order, together, strict=True):
        assert found.keys() == alone[i].keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, alone[i][name], err_msg=f"call {i}, {name}")


def test_a_bridge_and_its_model_have_one_lock(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    entered = threading.Event()

    def enter() -> None:
        with exclusively(model.original_model):
            entered.set()

    other = threading.Thread(target=enter)
    with exclusively(model), exclusively(model):
        other.start()
        assert not entered.wait(0.2)
    other.join(10)
    assert entered.is_set()


def test_an_error_gives_the_model_back(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("no")

    edit = ml.Intervention("fails", [("blocks.0.hook_resid_pre", fail)])
    with pytest.raises(RuntimeError, match="no"):
        ml.sweep(model, ragged(), [edit], progress=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ml.measure, model, ragged()).result(timeout=60)


def test_a_generator_holds_the_model_only_while_it_computes(tiny_model: Any) -> None:
    model, seen = tiny_model("gpt_neox", "bridge"), list[bool]()

    @computes
    def numbers(model: Any) -> Iterator[int]:
        for i in range(3):
            with torch.no_grad():
                model(torch.tensor([[i]]))
            seen.append(torch.is_autocast_enabled("cpu"))
            yield i

    steps = numbers(model)
    assert next(steps) == 0
    with ThreadPoolExecutor(1) as pool:  # another thread gets it now, and may even go on with the generator
        pool.submit(ml.measure, model, ragged()).result(timeout=60)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pool.submit(next, steps).result(timeout=60) == 1
            assert next(steps) == 2
            assert torch.is_autocast_enabled("cpu")
        steps.close()
        pool.submit(ml.measure, model, ragged()).result(timeout=60)
    assert seen == [False, False, False]


def test_two_threads_that_wait_for_each_other_are_told(tiny_folder: Any) -> None:
    """Each holds the model that the other needs next."""
    one, other = (ml.load_model(tiny_folder("gpt_neox"), backend="bridge", device=dev()) for _ in range(2))
    met = threading.Barrier(2)

    def both(first: Any, second: Any) -> str:
        with exclusively(first):
            met.wait(30)
            try:
                with exclusively(second):
                    return "both"
            except ModelInUseError:
                return "told"

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(both, one, other), pool.submit(both, other, one)]
        assert sorted(f.result(timeout=60) for f in found) == ["both", "told"]
