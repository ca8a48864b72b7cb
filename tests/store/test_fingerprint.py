"""Equal contents have one name; any other content has another."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import memlens as ml
from memlens.forward.capture import ActivationSource
from memlens.models.names import has_hooked_transformer
from memlens.sequences.set import SequenceSet
from memlens.store import fingerprint as fingerprints
from memlens.store.fingerprint import fingerprint, model_fingerprint
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
    assert fingerprint(seqs) == fingerprint(ragged())
    assert fingerprint(seqs) != fingerprint(corrupted(seqs))
    assert fingerprint(seqs) != fingerprint(seqs[:3])


def changes(model: Any) -> dict[str, Any]:
    """Changes that move other logits, each undone by the function that it returns."""
    weight = dict(nn.Module.named_parameters(model))
    matrix = next(p for n, p in weight.items() if n.startswith("embed"))
    twin = next(p for p in weight.values() if p.dim() == 2 and p is not matrix)

    def rows() -> Any:
        matrix.data[[3, 5]] = matrix.data[[5, 3]].clone()
        return rows

    def signs() -> Any:
        twin.view(-1)[[2, 9]] *= -1
        return signs

    def frequencies() -> Any:
        buffers = nn.Module.named_buffers(model)
        buffer = next(b for n, b in buffers if n.endswith(("inv_freq", "rotary_sin")))
        old = buffer.clone()
        buffer *= 2
        return lambda: buffer.copy_(old)

    def config() -> Any:
        old, model.cfg.attention_dir = model.cfg.attention_dir, "bidirectional"
        return lambda: setattr(model.cfg, "attention_dir", old)

    def forward() -> Any:
        module = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        plain = module.forward
        vars(module)["forward"] = lambda *a, **k: plain(*a, **k) * 2
        return lambda: vars(module).pop("forward")

    def hook() -> Any:
        module = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        return module.register_forward_hook(lambda module, args, out: out * 2).remove

    found = (rows, signs, frequencies, config, forward, hook)
    return {fn.__name__: fn for fn in found}


@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_whatever_changes_the_logits_changes_the_fingerprint(tiny_folder: Any, backend: str) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = ml.load_model(tiny_folder("gpt_neox"), backend=backend)
    name = model_fingerprint(model)
    seen = {name}
    with torch.no_grad():
        for change in changes(model).values():
            undo = change()
            seen.add(model_fingerprint(model))
            undo()
            assert model_fingerprint(model) == name
    assert len(seen) == 1 + len(changes(model))


def test_random_changes_of_weights_and_tokens_do_not_collide() -> None:
    """Single and paired changes of one weight matrix and one set of sequences, 2,000 each."""
    rng = np.random.default_rng(0)
    weights, tokens = torch.randn(64, 64), torch.from_numpy(rng.integers(0, 100, (8, 20)))
    names = {fingerprint(weights), fingerprint(SequenceSet.from_tokens(tokens, 8))}
    done = set()
    for number in range(2000):
        places = tuple(sorted(rng.choice(64 * 64, 1 + number % 2, replace=False).tolist()))
        kind = number // 2 % 3 if len(places) == 2 else number // 2 % 2
        if (kind, places) in done:
            continue
        done.add((kind, places))
        changed = weights.clone().view(-1)
        if kind == 0:
            changed[list(places)] *= -1
        elif kind == 1:
            changed[list(places)] = (changed[list(places)].view(torch.int32) ^ 1).view(torch.float32)
        else:
            changed[list(places)] = changed[list(places[::-1])]
        names.add(fingerprint(changed.view(64, 64)))
    assert len(names) == 2 + len(done)
    rows = set()
    for number in range(2000):
        changed = tokens.clone().view(-1)
        for place in rng.choice(160, 1 + number % 2, replace=False):
            changed[place] = (changed[place] + int(rng.integers(1, 100))) % 100
        seqs = SequenceSet.from_tokens(changed.view(8, 20), 8)
        names.add(fingerprint(seqs))
        rows.add(tuple(changed.tolist()))
    assert len(names) == 2 + len(done) + len(rows)


def test_a_held_edit_is_the_same_model_each_time(tiny_model: Any) -> None:
    model, tokens = tiny_model("llama", "bridge"), torch.tensor([[1, 2, 3]])
    edit = ml.Intervention("half", [("blocks.0.hook_mlp_out", closing_over(0.5))])
    names = set()
    for _ in range(2):
        with ml.applied(model, edit):
            names.add(model_fingerprint(model))
            model(tokens)
            names.add(model_fingerprint(model))
    assert len(names) == 1
    assert model_fingerprint(model) not in names


def test_on_an_accelerator_a_digest_is_kept_until_the_tensor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_READ_EACH_TIME", set())
    read: list[int] = []
    plain = fingerprints._digest

    def counted(raw: torch.Tensor) -> str:
        read.append(len(raw))
        return plain(raw)

    monkeypatch.setattr(fingerprints, "_digest", counted)
    tensor = torch.randn(100, 8)
    first = fingerprint(tensor)
    assert fingerprint(tensor) == first
    assert len(read) == 1
    tensor.data[0, 0] = 7.0  # no version counter sees it
    assert fingerprint(tensor) != first
    tensor[0, 0] = 9.0
    assert len({first, fingerprint(tensor)}) == 2
    assert len(read) == 3


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
