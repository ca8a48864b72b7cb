"""Equal contents have one name; any other content has another."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.forward.capture import ActivationSource
from memlens.store.fingerprint import fingerprint, model_fingerprint, sequences_fingerprint
from tests.small import corrupted, ragged

FACTOR = 2


def uses_a_global(x: Any, hook: Any) -> Any:
    return x * FACTOR


def calls_another(x: Any, hook: Any) -> Any:
    return uses_a_global(x, hook)


class ByFactor:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def bind(self, batch: Any) -> Any:
        return lambda x, hook: x * self.factor


def closing_over(value: Any) -> Any:
    return lambda x, hook: x * value


UNEQUAL: dict[str, tuple[Any, Any]] = {
    "numbers": (1, 1.0),
    "signed zeros": (0.0, -0.0),
    "texts": ("a", b"a"),
    "nesting": ([1, [2]], [[1], 2]),
    "order": ((1, 2), (2, 1)),
    "tensors": (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])),
    "tensors in another order": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "shapes": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "types": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    "arrays": (np.arange(3), np.arange(3) + 1),
    "closures": (closing_over(1.0), closing_over(2.0)),
    "closures over tensors": (closing_over(torch.ones(2)), closing_over(torch.zeros(2))),
    "objects": (ByFactor(1), ByFactor(2)),
    "partial": (functools.partial(pow, 2), functools.partial(pow, 3)),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "defaults": (lambda x, a=1: x, lambda x, a=2: x),
    "generators": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("what", UNEQUAL)
def test_other_contents_have_another_name(what: str) -> None:
    a, b = UNEQUAL[what]
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize(
    "make",
    [lambda: closing_over(torch.ones(3)), lambda: ByFactor(3), lambda: {"a": {1, 2}, "b": [np.ones(2)]}],
)
def test_made_anew_it_has_the_same_name(make: Any) -> None:
    assert fingerprint(make()) == fingerprint(make())


def test_globals_count_also_through_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(calls_another)
    monkeypatch.setattr(f"{__name__}.FACTOR", 3)
    assert fingerprint(calls_another) != before


def test_what_holds_itself_has_a_name() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


def test_what_cannot_be_read_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="memlens"):
        fingerprint(threading.Lock())
    assert "no readable state" in caplog.text


def test_a_patch_is_named_by_its_source(tiny_model: Any) -> None:
    model, a, b = tiny_model("gpt_neox", "bridge"), ragged(), corrupted(ragged())
    name = fingerprint(ml.edits.activation_patches(model, a), model)
    used = ml.edits.activation_patches(model, a)
    ml.sweep(model, b, used[:2], progress=False)
    assert fingerprint(used, model) == name  # what its source holds for the moment is no part of it
    assert fingerprint(ml.edits.activation_patches(model, b), model) != name
    source = ActivationSource(model, a, ["blocks.0.hook_mlp_out"])
    assert fingerprint(source, model) != fingerprint(
        ActivationSource(model, a, ["blocks.1.hook_mlp_out"]), model
    )


def test_sequences_are_named_by_their_tokens() -> None:
    seqs = ragged()
    assert sequences_fingerprint(seqs) == sequences_fingerprint(ragged())
    assert sequences_fingerprint(seqs) != sequences_fingerprint(corrupted(seqs))
    assert sequences_fingerprint(seqs) != sequences_fingerprint(seqs[:3])


def test_a_model_is_named_by_weights_and_hooks(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neo"), backend="bridge")
    name = model_fingerprint(model)
    assert model_fingerprint(ml.load_model(tiny_folder("gpt_neo"), backend="bridge")) == name
    model.add_hook("blocks.0.hook_mlp_out", closing_over(2.0))
    assert model_fingerprint(model) != name
    model.reset_hooks()
    assert model_fingerprint(model) == name
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[-1] += 1e-6
    assert model_fingerprint(model) != name
