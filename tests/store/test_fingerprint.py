"""Equal contents have one name; any other content has another."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import memlens as ml
from memlens.errors import FingerprintError
from memlens.forward.capture import ActivationSource
from memlens.forward.trunk import Trunk
from memlens.models.names import has_hooked_transformer
from memlens.registry import Plugin
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


def in_a_nested_function(x: Any, hook: Any) -> Any:
    return (lambda: x * FACTOR)()


def in_two_nested_functions(x: Any, hook: Any) -> Any:
    return (lambda: x * FACTOR)(), (lambda: (lambda: x)())()


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Caching:
    """What it has cached is no part of it."""

    def __init__(self, factor: float) -> None:
        self.factor, self.cache = factor, torch.randn(3)

    def __getstate__(self) -> Any:
        return self.factor


def named_alike(by: int) -> Any:
    class Alike:
        def method(self) -> int:
            return by

    Alike.method.__defaults__ = (by,)
    return Alike


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
    "empty tensors": (torch.zeros(0, 2), torch.zeros(0, 3)),
    "conjugates": (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj()),
    "imaginary parts": (torch.tensor([1 + 2j]).imag, torch.tensor([1 + 2j]).conj().imag),
    "arrays": (np.arange(3), np.arange(3) + 1),
    "shapes of arrays": (np.zeros((2, 3)), np.zeros((3, 2))),
    "types of arrays": (np.zeros(2, "<i4"), np.zeros(2, ">i4")),
    "arrays of objects": (np.array([1, "a"], object), np.array([2, "a"], object)),
    "truth": (True, 1),
    "bytes": (b"a", b"b"),
    "half a letter": ("\ud800", "\udc00"),
    "ranges": (range(3), range(4)),
    "slices": (slice(0, 3), slice(0, 3, 1)),
    "paths": (Path("a"), Path("b")),
    "devices": (torch.device("cpu"), torch.device("meta")),
    "scalars": (np.float32(0.1), np.float32(0.2)),
    "sets": ({1, 2}, {1, 3}),
    "keys": ({"a": 1}, {"b": 1}),
    "values": ({"a": 1}, {"a": 2}),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "lists and tuples": ([1], (1,)),
    "methods": (ByFactor(1).bind, ByFactor(1).__init__),
    "methods of objects": (ByFactor(1).bind, ByFactor(2).bind),
    "slots": (Slotted(1), Slotted(2)),
    "states": (Caching(1), Caching(2)),
    "classes": (ByFactor, Slotted),
    "classes of one name": (named_alike(1), named_alike(2)),
    "built-in functions": (len, sum),
    "modules": (functools, logging),
    "layers": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "buffers": (nn.BatchNorm1d(2), nn.BatchNorm1d(2).requires_grad_(False).double()),
    "functions called": (lambda x: x.exp(), lambda x: x.log()),
    "keyword defaults": (lambda x, *, a=1: x, lambda x, *, a=2: x),
    "nested code": (lambda x: (lambda y: y + 1)(x), lambda x: (lambda y: y + 2)(x)),
    "arguments of partial": (functools.partial(pow, exp=2), functools.partial(pow, exp=3)),
    "functions of partial": (functools.partial(pow, 2), functools.partial(divmod, 2)),
    "closures": (closing_over(1.0), closing_over(2.0)),
    "closures over tensors": (closing_over(torch.ones(2)), closing_over(torch.zeros(2))),
    "objects": (ByFactor(1), ByFactor(2)),
    "partial": (functools.partial(pow, 2), functools.partial(pow, 3)),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "defaults": (lambda x, a=1: x, lambda x, a=2: x),
    "generators": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "generators of numpy": (np.random.default_rng(0), np.random.default_rng(1)),
    "signatures": (lambda x: x, lambda *x: x),
    "iterators": (iter([1, 2]), iter([1, 3])),
    "getters": (operator.itemgetter(1), operator.itemgetter(2)),
    "methods of builtins": (torch.ones(2).mul, torch.zeros(2).mul),
    "masked arrays": (np.ma.masked_equal([1, 2], 1), np.ma.masked_equal([1, 2], 2)),
    "tables": (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [2]})),
    "kept calls": (functools.lru_cache(lambda x: x), functools.lru_cache(lambda x: x + 1)),
    "default values": (defaultdict(lambda: 1), defaultdict(lambda: 2)),
    "slopes": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "classes of modules": (nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())),
    "modes": (nn.Dropout(0.5), nn.Dropout(0.5).eval()),
}


@pytest.mark.parametrize("what", UNEQUAL)
def test_other_contents_have_another_name(what: str) -> None:
    a, b = UNEQUAL[what]
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: closing_over(torch.ones(3)),
        lambda: ByFactor(3),
        lambda: {"a": {1, 2}, "b": [np.ones(2)]},
        lambda: Caching(1),
        lambda: named_alike(1),
        lambda: np.array([1, "a"], object),
        lambda: "\ud800",
    ],
)
def test_made_anew_it_has_the_same_name(make: Any) -> None:
    assert fingerprint(make()) == fingerprint(make())


def test_globals_count_also_through_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(calls_another)
    nested = [fingerprint(fn) for fn in (in_a_nested_function, in_two_nested_functions)]
    monkeypatch.setattr(f"{__name__}.FACTOR", 3)
    assert fingerprint(calls_another) != before
    assert fingerprint(in_a_nested_function) != nested[0]
    assert fingerprint(in_two_nested_functions) != nested[1]


def test_how_contents_lie_in_memory_does_not_count() -> None:
    table = np.arange(6).reshape(2, 3)
    assert fingerprint(table.T) == fingerprint(table.T.copy())
    assert fingerprint(torch.arange(6)[1:4:5]) == fingerprint(torch.tensor([1]))
    assert fingerprint(torch.from_numpy(table).T) == fingerprint(torch.from_numpy(table).T.contiguous())
    assert fingerprint({1, 2, 30}) == fingerprint({30, 2, 1})
    assert fingerprint(torch.tensor([1 + 2j]).conj()) == fingerprint(torch.tensor([1 - 2j]))
    with torch.inference_mode():
        inside = torch.ones(3)
    assert fingerprint(inside) == fingerprint(torch.ones(3))


def test_the_pieces_in_which_a_tensor_is_read_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(50)
    whole = fingerprint(tensor)
    monkeypatch.setattr(fingerprints, "_CHUNK", 24)
    assert fingerprint(tensor) == whole


@pytest.mark.parametrize("chunk", [2**24, 24])
def test_every_changed_bit_changes_the_checksum(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", chunk)
    raw = torch.arange(60, dtype=torch.uint8)
    sums = {fingerprints._checksum(raw)}
    for place in range(60):
        for bit in range(8):
            changed = raw.clone()
            changed[place] ^= 1 << bit
            sums.add(fingerprints._checksum(changed))
    assert len(sums) == 1 + 60 * 8
    assert fingerprints._checksum(raw.view(-1, 4).flip(0).reshape(-1)) not in sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_changed_signs_change_the_checksum(dtype: torch.dtype) -> None:
    values = torch.randn(16, dtype=dtype)
    signs = [torch.ones(16, dtype=dtype) for _ in range(121)]
    for number, (a, b) in enumerate(itertools.combinations(range(16), 2), 1):
        signs[number][[a, b]] = -1
    sums = {fingerprints._checksum((values * sign).view(torch.uint8)) for sign in (*signs, -signs[0])}
    assert len(sums) == 122


def test_the_swept_model_is_not_followed(tiny_model: Any) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(closing_over(model), model) == fingerprint(closing_over(other), other)
    assert fingerprint(closing_over(model), other) != fingerprint(closing_over(other), model)
    assert fingerprint(closing_over(None), None) != fingerprint(closing_over(model), model)
    trunks = [Trunk(tiny_model(family, "bridge")) for family in ("gpt_neo", "llama")]
    assert fingerprint(trunks[0], trunks[0].model) == fingerprint(trunks[1], trunks[1].model)
    assert fingerprint(trunks[0]) != fingerprint(trunks[1])


def test_a_watching_function_is_named_by_the_one_it_stands_for() -> None:
    def watching(x: Any, hook: Any) -> Any:
        return uses_a_global(x, hook)

    watching.stands_for = uses_a_global  # type: ignore[attr-defined]
    assert fingerprint(watching) == fingerprint(uses_a_global)


def test_an_unfilled_cell_has_a_name() -> None:
    def later() -> Any:
        return value

    before = fingerprint(later)
    value = 1
    assert fingerprint(later) != before


def test_what_holds_itself_has_a_name() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


@pytest.mark.parametrize("unreadable", [
    threading.Lock(), (number for number in range(3)), torch.jit.script(nn.ReLU()),
    torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    torch.ones(2, device="meta"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_cannot_be_read_is_refused_for_a_folder(
    unreadable: Any, tiny_model: Any, tmp_path: Path
) -> None:
    def hook(x: Any, hook: Any) -> Any:
        return x * 2 if unreadable is not None else x

    model, edit = tiny_model("llama", "bridge"), ml.Intervention("twice", [("blocks.0.hook_mlp_out", hook)])
    with pytest.raises(FingerprintError, match=f"{type(unreadable).__name__} cannot be read.*out=None"):
        ml.sweep(model, ragged(), [edit], out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    ml.sweep(model, ragged(), [edit], progress=False)


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(2 * sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(FingerprintError, match=r"nested too deeply.*out=None"):
        fingerprint(deep)


_SHIFT = """
class Shift:
    lock = LOCK

    def bind(self, batch):
        return lambda x, hook: x + AMOUNT
"""


def _shift(folder: Path, package: str, amount: int) -> Any:
    """An object of a package's class; the class has a lock, which cannot be read."""
    place = folder / package
    place.mkdir(parents=True, exist_ok=True)
    module = types.ModuleType(package)
    module.__file__ = str(place / "__init__.py")
    lock = "__import__('threading').Lock()" if package == "anywhere" else "None"
    exec(_SHIFT.replace("AMOUNT", str(amount)).replace("LOCK", lock), vars(module))
    sys.modules[package] = module
    return vars(module)["Shift"]()


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is known of packages is that of this test alone."""
    for name in ("anywhere", "extends"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    plugins = [Plugin("all", "extends.metric", "extends 1.0")]
    monkeypatch.setattr(fingerprints, "named_plugins", lambda: plugins)
    remembered = (fingerprints._is_installed, fingerprints._extending)
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("folder", ["lib/python3.11/site-packages", "usr/lib/python3/dist-packages"])
def test_a_package_installed_outside_this_environment_is_not_followed(folder: str, tmp_path: Path) -> None:
    """As of an environment that sees the packages of another: there torch itself is in such a folder."""
    assert fingerprint(_shift(tmp_path / folder, "anywhere", 1))
    fingerprints._is_installed.cache_clear()
    with pytest.raises(FingerprintError, match="lock cannot be read"):
        fingerprint(_shift(tmp_path / "mine", "anywhere", 1))


@pytest.mark.usefixtures("forgotten")
def test_an_installed_package_that_extends_memlens_is_followed(tmp_path: Path) -> None:
    """Its author installs it anew after each change."""
    names = {fingerprint(_shift(tmp_path / "site-packages", "extends", amount)) for amount in (1, 2)}
    assert len(names) == 2


@contextmanager
def set_to(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


class Settings:
    factor = 2

    @property
    def half(self) -> float:
        return self.factor / 2

    @staticmethod
    def twice(x: Any) -> Any:
        return 2 * x

    def __call__(self, x: Any, hook: Any) -> Any:
        return self.twice(x) * self.half


class Inheriting(Settings):
    pass


CONSTANTS: Any = types.ModuleType("constants_of_a_user")
vars(CONSTANTS).update(factor=2, inner=types.ModuleType("constants_of_a_user.inner"))
vars(CONSTANTS.inner)["bias"] = 1


def by_class(x: Any, hook: Any) -> Any:
    return x * Settings.factor


def by_module(x: Any, hook: Any) -> Any:
    return x * CONSTANTS.factor + CONSTANTS.inner.bias


def by_import(x: Any, hook: Any) -> Any:
    import constants_of_a_user  # pyright: ignore[reportMissingImports]

    return x * constants_of_a_user.factor


LINEAR = nn.Linear(2, 2)


def through_a_module(x: Any, hook: Any) -> Any:
    return LINEAR(x)


@pytest.mark.parametrize(("hook", "owner", "name", "value"), [
    (by_class, Settings, "factor", 3),
    (Settings(), Settings, "factor", 3),
    (Settings(), Settings, "half", property(lambda self: 1.0)),
    (Settings(), Settings, "twice", staticmethod(lambda x: x)),
    (Inheriting(), Settings, "__call__", lambda self, x, hook: x),
    (by_module, CONSTANTS, "factor", 3),
    (by_module, CONSTANTS.inner, "bias", 3),
    (by_import, CONSTANTS, "factor", 3),
    (through_a_module, LINEAR, "training", False),
    (through_a_module, LINEAR, "_forward_hooks", {0: closing_over(3)}),
    (through_a_module, nn.Linear, "forward", lambda self, x: x),
])  # fmt: skip
def test_what_a_hook_names_counts(
    hook: Any, owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constants_of_a_user", CONSTANTS)
    before = fingerprint(hook)
    with set_to(owner, name, value):
        assert fingerprint(hook) != before
    assert fingerprint(hook) == before


def test_a_source_is_named_by_its_donor(tiny_folder: Any) -> None:
    model, seqs = ml.load_model(tiny_folder("llama"), backend="bridge"), ragged()
    donors = [ml.load_model(tiny_folder("llama"), backend="bridge") for _ in range(2)]
    donors[1].blocks[0].mlp.out.original_component.weight.data.mul_(2)
    hooks = ["blocks.1.hook_mlp_out"]
    names = {fingerprint(ActivationSource(donor, seqs, hooks), model) for donor in (model, *donors)}
    assert len(names) == 3


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

    def bound_hook() -> Any:
        module = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        return module.register_forward_hook(functools.partial(lambda k, module, args, out: out * k, 3)).remove

    def every_hook() -> Any:
        return register_module_forward_hook(lambda module, args, out: None).remove

    def class_forward() -> Any:
        cls = type(next(m for n, m in model.named_modules() if n.endswith("mlp")))
        plain = cls.forward
        cls.forward = lambda *a, **k: plain(*a, **k) * 2
        return lambda: setattr(cls, "forward", plain)

    def training() -> Any:
        model.train()
        return model.eval

    def number() -> Any:
        module = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        vars(module)["n_groups"] = 3
        return lambda: vars(module).pop("n_groups")

    found = (
        rows,
        signs,
        frequencies,
        config,
        forward,
        hook,
        bound_hook,
        every_hook,
        class_forward,
        training,
        number,
    )
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


def test_random_changes_of_weights_do_not_collide() -> None:
    """10,000 changes of an embedding: of one or two weights, or of the order of its rows."""
    rng, embedding = np.random.default_rng(0), torch.randn(24, 16)
    contents, names = {embedding.numpy().tobytes()}, {fingerprint(embedding)}
    for number in range(10_000):
        changed = embedding.clone()
        flat = changed.view(-1)
        places = rng.choice(flat.numel(), 1 + number // 5 % 2, replace=False).tolist()
        if number % 5 == 0:
            flat[places] *= -1
        elif number % 5 == 1:
            flat[places] = (flat[places].view(torch.int32) ^ 1).view(torch.float32)
        elif number % 5 == 2:
            flat[places] += float(rng.normal()) * torch.tensor([1.0, -1.0])[: len(places)]  # equal sums
        elif number % 5 == 3:
            a, b, c, d = rng.choice(24, 4, replace=False).tolist()
            changed[[a, b, c, d]] = embedding[[b, a, d, c] if number // 5 % 2 else [b, a, c, d]]
        else:
            changed = embedding[torch.from_numpy(rng.permutation(24))]
        contents.add(changed.numpy().tobytes())
        names.add(fingerprint(changed))
    assert len(contents) > 7_000
    assert len(names) == len(contents)


def test_random_changes_of_tokens_do_not_collide() -> None:
    """10,000 changes of one or two tokens of a set of sequences, half of them swaps."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 100, (8, 20)))
    seqs = SequenceSet.from_tokens(tokens, 8)
    contents, names = {tokens.numpy().tobytes()}, {fingerprint(seqs)}
    for number in range(10_000):
        changed = tokens.clone().view(-1)
        places = rng.choice(160, 1 + number % 2, replace=False)
        if number % 4 == 3:
            changed[places] = changed[places[::-1].copy()]
        else:
            changed[places] = (changed[places] + torch.from_numpy(rng.integers(1, 100, len(places)))) % 100
        contents.add(changed.numpy().tobytes())
        object.__setattr__(seqs, "tokens", changed.view(8, 20))  # making a set takes ten times as long
        names.add(fingerprint(seqs))
    assert len(contents) > 7_000
    assert len(names) == len(contents)


def test_random_changes_of_a_model_do_not_collide(tiny_folder: Any) -> None:
    """The same kinds of changes, made in a model: signs in pairs, swapped rows, a permuted embedding."""
    model, rng = ml.load_model(tiny_folder("gpt_neox"), backend="bridge"), np.random.default_rng(0)
    weights = [p for p in nn.Module.parameters(model) if p.dim() == 2]
    names, done = {model_fingerprint(model)}, 0
    for number in range(60):
        weight = weights[number % len(weights)]
        before = weight.detach().clone()
        with torch.no_grad():
            if number % 3 == 0:
                weight.view(-1)[rng.choice(weight.numel(), 2, replace=False).tolist()] *= -1
            elif number % 3 == 1:
                a, b = rng.choice(len(weight), 2, replace=False).tolist()
                weight[[a, b]] = before[[b, a]]
            else:
                weight.copy_(before[torch.from_numpy(rng.permutation(len(weight)))])
            done += not torch.equal(before, weight)
            names.add(model_fingerprint(model))
            weight.copy_(before)
    assert done == 60
    assert len(names) == 61


WITHOUT_EFFECT = [
    "device", "n_devices", "device_map", "seed", "init_mode", "init_weights", "initializer_range",
    "model_name", "n_params", "tokenizer_name", "trust_remote_code", "use_attn_result", "use_attn_in",
    "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens",
]  # fmt: skip
HUGGING_FACE = {
    "transformers_version": "4",
    "use_cache": False,
    "initializer_range": 3.0,
    "return_dict": False,
    "output_hidden_states": True,
}


def test_configuration_on_which_no_logit_depends_does_not_count(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), backend="bridge")
    before, config = model_fingerprint(model), model.original_model.config
    for name in WITHOUT_EFFECT:
        value = getattr(model.cfg, name, None)
        setattr(model.cfg, name, "another")
        assert model_fingerprint(model) == before, name
        setattr(model.cfg, name, value)
    for name, value in HUGGING_FACE.items():
        assert config.to_dict().get(name) != value
        setattr(config, name, value)
        assert model_fingerprint(model) == before, name
    rotary_dim, model.cfg.rotary_dim = model.cfg.rotary_dim, 4
    assert model_fingerprint(model) != before
    model.cfg.rotary_dim = rotary_dim
    assert model_fingerprint(model) == before
    config.hidden_act = "relu"
    assert model_fingerprint(model) != before


def test_what_modules_compute_with_counts(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), backend="bridge")
    modules = dict(nn.Module.named_modules(model))
    mlp = next(m for m in modules.values() if callable(vars(m).get("act")))
    norm = next(m for m in modules.values() if isinstance(vars(m).get("eps"), float))
    seen = [model_fingerprint(model)]
    norm.eps *= 2
    seen.append(model_fingerprint(model))
    mlp.register_forward_pre_hook(lambda module, args: args)
    seen.append(model_fingerprint(model))
    mlp.act = torch.nn.functional.relu
    seen.append(model_fingerprint(model))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    "name", ["act", "act_fn", "activation", "activation_fn", "activation_func", "forward"]
)
def test_a_replaced_function_counts_by_any_of_its_names(name: str) -> None:
    module = nn.Identity()
    seen = [fingerprint(fingerprints._module_facts(module))]
    for function in (torch.relu, torch.tanh, functools.partial(torch.clamp, min=0), Caching(1).__getstate__):
        vars(module)[name] = function
        seen.append(fingerprint(fingerprints._module_facts(module)))
    assert len(set(seen)) == 5
    vars(module)["another"] = torch.relu
    assert fingerprint(fingerprints._module_facts(module)) == seen[-1]


def test_rates_and_modes_count() -> None:
    modules = [nn.Dropout(p).train(training) for p in (0.0, 0.5) for training in (True, False)]
    assert len({fingerprint(fingerprints._module_facts(module)) for module in modules}) == 4


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


def test_facts_of_a_model_that_count_are_those_behind_its_numbers(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    facts = {
        "architecture": "a", "backend": "b", "dtype": "c", "processed_weights": False,
        "transformer_lens": "d", "model": "e", "device": "f", "memlens": "g",
    }  # fmt: skip
    names = {}
    for changed in (None, *facts):
        given = facts if changed is None else {**facts, changed: "another"}
        monkeypatch.setattr(fingerprints, "describe", lambda model, given=given: given)
        names[changed] = model_fingerprint(model)
    counting = {changed for changed, name in names.items() if name != names[None]}
    assert counting == {"architecture", "backend", "dtype", "processed_weights", "transformer_lens"}
    assert len(set(names.values())) == 6
