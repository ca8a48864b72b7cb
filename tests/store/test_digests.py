"""Digests by their definition, written a second time: if they changed, no earlier run could go on."""

from __future__ import annotations

import abc
import cmath
import functools
import hashlib
import math
import string
import types
from collections import OrderedDict
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memlens.sequences.set import SequenceSet
from memlens.store import fingerprint as fingerprints
from memlens.store.fingerprint import fingerprint


def combined(*parts: bytes) -> bytes:
    """BLAKE2b in 16 bytes over parts, each after its length in 8 bytes."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def library_class(cls: type) -> bytes:
    """A class of a library counts by its name; the user has put no function into it or its bases."""
    name = f"{cls.__module__}.{cls.__qualname__}".encode()
    return combined(b"builtins.type", name, plainly([{} for _ in cls.__mro__]))


def plainly(value: Any) -> bytes:
    """The digest of plain data, from the definition."""
    name = f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if isinstance(value, bytes):
        return combined(name, value)
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return combined(name, repr(value).encode("utf-8", "surrogatepass"))
    if isinstance(value, (torch.dtype, torch.device, np.dtype, np.generic, PurePosixPath, range, slice)):
        return combined(name, repr(value).encode())
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().numpy().tobytes()
        facts = (str(value.dtype), tuple(value.shape), xxhash.xxh3_128(raw).hexdigest())
        return combined(name, repr(facts).encode())
    if isinstance(value, np.ndarray):
        facts = repr((value.dtype, value.shape)).encode()
        content = plainly(value.tolist()) if value.dtype == object else value.tobytes()
        return combined(name, facts, content)
    if isinstance(value, (list, tuple)):
        return combined(name, *(plainly(item) for item in value))
    if isinstance(value, (set, frozenset)):
        return combined(name, *sorted(plainly(item) for item in value))
    if isinstance(value, (dict, types.MappingProxyType)):
        return combined(name, *(plainly(part) for item in value.items() for part in item))
    assert isinstance(value, SequenceSet)
    return combined(name, *(plainly(part) for part in (value.tokens, value.mask, value.prefix_len)))


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
)
names = st.text(max_size=3)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(nested)
def test_plain_data(value: Any) -> None:
    assert fingerprint(value) == plainly(value).hex()


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).view(2, 3),
        torch.zeros(0, 2),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([True]),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.array(["a", "bc"]),
        np.array([1, "a", [2.5]], object),
        np.float32(0.1),
        np.dtype("<f8"),
        torch.float16,
        torch.device("cuda:1"),
        PurePosixPath("a/b"),
        range(1, 9, 2),
        slice(None, 3),
        {1, "a", 2.5},
        frozenset({b"x"}),
        types.MappingProxyType({"a": 1}),
        1 + 2j,
        "\ud800",
        SequenceSet.from_tokens([[1, 2, 3], [4, 5]], [1, 1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_content(value: Any) -> None:
    assert fingerprint(value) == plainly(value).hex()
    assert fingerprint([value, value]) == combined(b"builtins.list", *[plainly(value)] * 2).hex()


def test_objects_of_libraries_count_by_class_and_by_what_pickle_reads() -> None:
    template, pairs = string.Template("a"), OrderedDict(a=1, b=2)
    own = library_class(string.Template)
    none, arguments = plainly(None), combined(b"builtins.tuple", own)
    parts = (none, arguments, plainly({"template": "a"}), none, none)  # no maker: its class makes it
    state = combined(b"builtins.list", *parts)
    assert fingerprint(template) == combined(b"string.Template", own, state).hex()
    made = library_class(OrderedDict)
    items = plainly([("a", 1), ("b", 2)])
    state = combined(b"builtins.list", made, plainly(()), plainly(None), plainly(None), items)
    assert fingerprint(pairs) == combined(b"collections.OrderedDict", made, state).hex()


def test_objects_made_by_keywords_count_by_these() -> None:
    assert fingerprints._state(Keyed(size=1)) == [None, (Keyed, (), {"size": 1}), {"size": 1}, None, None]


def test_what_holds_itself_ends_where_it_meets_itself() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) == combined(b"builtins.list", plainly(1), b"itself").hex()


def test_the_model_is_named_by_a_word_and_not_followed() -> None:
    model = nn.Linear(2, 2)
    name = b"torch.nn.modules.linear.Linear"
    assert fingerprint([model], model) == combined(b"builtins.list", combined(name, b"the model")).hex()
    assert fingerprint([None], None) == plainly([None]).hex()


def test_a_method_is_its_function_and_its_object_and_a_partial_what_it_holds() -> None:
    call = functools.partial(len, "a", key=2)
    owner = combined(b"builtins.builtin_function_or_method", b"len", b"builtins")
    parts = (owner, plainly(("a",)), plainly({"key": 2}))
    assert fingerprint(call) == combined(b"functools.partial", *parts).hex()
    joined = combined(b"builtins.builtin_function_or_method", b"str.join", plainly("-"))
    assert fingerprint("-".join) == joined.hex()


class Number(int):
    """A number that carries more than its value."""


def noted(value: int, note: str) -> Number:
    found = Number(value)
    found.note = note  # type: ignore[attr-defined]
    return found


class ByName:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


class Keyed:
    """Made by keyword arguments, as `pickle` knows them."""

    def __new__(cls, *, size: int) -> Any:
        made = super().__new__(cls)
        made.size = size  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"size": self.size}  # type: ignore[attr-defined]


def with_attribute(value: int) -> Any:
    def made(x: Any) -> Any:
        return x

    made.strength = value  # type: ignore[attr-defined]
    return made


def with_setter(by: int) -> Any:
    class Made:
        @property
        def size(self) -> int:
            return 1

        @size.setter
        def size(self, value: int) -> None:
            self.kept = value + by

    return _named(Made, by)


def with_class_method(by: int) -> Any:
    class Made:
        @classmethod
        def size(cls) -> int:
            return by

    return Made


def with_cached(by: int) -> Any:
    class Made:
        @functools.cached_property
        def size(self) -> int:
            return by

    return Made


def with_constant(by: int) -> Any:
    class Made:
        strength = by

    return Made


def inheriting(by: int) -> Any:
    class Made(with_constant(by)):  # type: ignore[misc]
        pass

    return Made


def _named(cls: Any, by: int) -> Any:
    cls.size.fset.__defaults__ = (by,)
    return cls


def documented(text: str) -> Any:
    class Made:
        __slots__ = ("a",)

    Made.__doc__ = text
    return Made


def abstract() -> Any:
    class Made(abc.ABC):
        @abc.abstractmethod
        def size(self) -> int: ...

    return Made


UNEQUAL: dict[str, tuple[Any, Any]] = {
    "functions of one name": (math.sin, cmath.sin),
    "numbers with notes": (noted(1, "a"), noted(1, "b")),
    "numbers of one's own": (noted(1, "a"), 1),
    "objects by name": (ByName("a"), ByName("b")),
    "names of keywords": (lambda *, a: 0, lambda *, b: 0),
    "names of arguments": (lambda a: 0, lambda b: 0),
    "positional only": (lambda a, /: a, lambda a: a),
    "order of keywords": (lambda a, *, b: a, lambda b, *, a: a),
    "attributes of functions": (with_attribute(1), with_attribute(2)),
    "setters": (with_setter(1), with_setter(2)),
    "class methods": (with_class_method(1), with_class_method(2)),
    "cached properties": (with_cached(1), with_cached(2)),
    "constants of classes": (with_constant(1), with_constant(2)),
    "constants of bases": (inheriting(1), inheriting(2)),
    "arguments by keyword": (Keyed(size=1), Keyed(size=2)),
    "prefix lengths": (SequenceSet.from_tokens([[1, 2, 3]], 1), SequenceSet.from_tokens([[1, 2, 3]], 2)),
    "padding": tuple(SequenceSet.from_tokens([row, [1, 1, 1]], 1) for row in ([1, 2, 0], [1, 2])),
    "rows": (SequenceSet.from_tokens([[1, 2]], 1), SequenceSet.from_tokens([[1, 3]], 1)),
    "places in objects": (np.array([["a"], ["b"]], object), np.array(["a", "b"], object)),
    "parameters": (nn.Linear(2, 2), nn.Linear(2, 2).double()),
    "ellipses": (..., None),
    "types of numbers": (np.float32(1), np.float64(1)),
}  # fmt: skip


@pytest.mark.parametrize("what", UNEQUAL)
def test_other_contents_have_another_name(what: str) -> None:
    a, b = UNEQUAL[what]
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b)


EQUAL: dict[str, tuple[Any, Any]] = {
    "documentation": (documented("a"), documented("b")),
    "abstract classes": (abstract(), abstract()),
    "tables of sets": (
        SequenceSet.from_tokens([[1, 2]], 1).with_attrs(name="a"), SequenceSet.from_tokens([[1, 2]], 1)
    ),
    "objects in arrays": (
        np.array([float("1.5"), "".join(["a", "b"])], object), np.array([3 / 2, "ab"], object)
    ),
    "kept values": (noted(1, "a"), noted(1, "a")),
    "constants": (with_constant(1), with_constant(1)),
    "keywords": (Keyed(size=1), Keyed(size=1)),
}  # fmt: skip


@pytest.mark.parametrize("what", EQUAL)
def test_equal_contents_have_one_name(what: str) -> None:
    a, b = EQUAL[what]
    assert a is not b
    assert fingerprint(a) == fingerprint(b)


def test_stand_ins_are_followed_to_the_end() -> None:
    def meant(x: Any) -> Any:
        return x

    def between(x: Any) -> Any:
        return x + 1

    def watching(x: Any) -> Any:
        return x + 2

    between.stands_for, watching.stands_for = meant, between  # type: ignore[attr-defined]
    assert fingerprint(watching) == fingerprint(between) == fingerprint(meant)


def test_values_named_in_one_call_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = fingerprints._digest
    monkeypatch.setattr(fingerprints, "_digest", lambda raw: read.append(1) or plain(raw))
    tensor = torch.randn(5)
    assert fingerprint([tensor, tensor]) == combined(b"builtins.list", *[plainly(tensor)] * 2).hex()
    assert len(read) == 1


@pytest.mark.parametrize("n", [0, 1, 3, 5, 7, 8, 9, 61, 63])
@pytest.mark.parametrize("chunk", [2**24, 16])
def test_checksums_of_any_length_see_every_byte(n: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", chunk)
    raw = torch.arange(1, n + 1, dtype=torch.uint8)
    sums = {fingerprints._checksum(raw)}
    for place in range(n):
        changed = raw.clone()
        changed[place] += 100
        sums.add(fingerprints._checksum(changed))
    assert len(sums) == n + 1
    assert raw.tolist() == list(range(1, n + 1))
    assert all(0 <= value < 2**64 for value in sums)


def test_checksums_see_what_moves_from_chunk_to_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", 16)
    blocks = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2], [3, 1, 2, 0], [2, 3, 0, 1]]
    assert len({fingerprints._checksum(blocks[order].reshape(-1)) for order in orders}) == len(orders)


def test_tensors_of_inference_are_read_each_time_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_READ_EACH_TIME", set())
    monkeypatch.setattr(fingerprints, "_KEPT", {})
    with torch.inference_mode():
        inside = torch.ones(3)  # has no version counter
    assert fingerprint(inside) == plainly(torch.ones(3)).hex()
    assert not fingerprints._KEPT
    base = torch.arange(12)
    views = [base[:6], base[6:], base[:6].view(2, 3), base[::2], base[:6].view(torch.float64)]
    names = [fingerprint(view) for view in views]
    assert len(fingerprints._KEPT) == len(set(names)) == 5
    assert [fingerprint(view) for view in views] == names


NOT_IN_THE_LOGITS = [
    "device", "n_devices", "device_map", "seed", "init_mode", "init_weights", "initializer_range",
    "model_name", "n_params", "tokenizer_name", "trust_remote_code", "use_attn_result", "use_attn_in",
    "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
]  # fmt: skip


def test_configurations_count_but_for_what_is_not_in_the_logits() -> None:
    def read(ours: dict[str, Any], theirs: dict[str, Any] | None) -> list[dict[str, Any]]:
        config = None if theirs is None else SimpleNamespace(to_dict=lambda: theirs)
        model = SimpleNamespace(cfg=SimpleNamespace(**ours), original_model=SimpleNamespace(config=config))
        return fingerprints._configs(model)

    apart = dict.fromkeys(NOT_IN_THE_LOGITS, 1)
    assert read({"d_model": 3, **apart}, {"hidden_size": 3, **apart}) == [{"d_model": 3}, {"hidden_size": 3}]
    assert read({"eps": 3}, None) == [{"eps": 3}, {}]
    hooked = SimpleNamespace(cfg=SimpleNamespace(eps=3))
    assert fingerprints._configs(hooked) == [{"eps": 3}, {}]


def test_what_is_installed_is_told_from_what_a_user_wrote() -> None:
    for name in ("memlens", "memlens.store", "builtins", "collections.abc", "torch.nn", "numpy", "_thread"):
        assert fingerprints._is_installed(name), name
    for name in (__name__, "no.such.module", "", "memlens_of_mine"):
        assert not fingerprints._is_installed(name), name
    assert fingerprints._root("a.b.c") == "a"
    assert fingerprints._root(None) == ""
    assert fingerprints._is_own(Number)
    assert not fingerprints._is_own(int)


def test_the_default_device_does_not_count() -> None:
    tensor = torch.arange(9.0)
    name, checksum = plainly(tensor).hex(), fingerprints._checksum(tensor.view(torch.uint8))
    with torch.device("meta"):  # where new tensors would be made that do not say where
        assert fingerprint(tensor) == name
        assert fingerprints._checksum(tensor.view(torch.uint8)) == checksum
