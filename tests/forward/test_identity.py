"""What a digest of a model in memory sees, on small modules: each change on which numbers depend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memlens.forward.check import identity
from memlens.forward.check.identity import is_ordinary_process, model_digest, process_facts
from memlens.forward.check.kept import _files
from memlens.models.names import Source

CPU = torch.device("cpu")


class Part(nn.Module):
    """A module with everything that a digest may read."""

    limit = 3
    inner: Any = int

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.linear.weight.data = torch.arange(6.0).reshape(2, 3)
        self.linear.bias.data = torch.ones(2)
        self.register_buffer("table", torch.arange(4.0))
        self.rate, self.kind, self.flag, self.count, self.nothing = 0.5, "soft", True, 7, None
        self.precision = torch.float32
        self.cfg = SimpleNamespace(width=3, more={"deep": [1, 2]})
        self.config = SimpleNamespace(eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)

    @staticmethod
    def scaled(x: float, by: float = 2.0) -> float:
        return x * by

    @classmethod
    def named(cls) -> str:
        return "a"

    @property
    def size(self) -> int:
        return 1

    @size.setter
    def size(self, value: int) -> None:
        self.count = value


class Alike(nn.Linear):
    """Another class that does the same."""


def adding(what: Any, *, twice: Any = 0) -> Callable[[Any], Any]:
    def add(x: Any) -> Any:
        return x + what + 2 * twice

    return add


def plus(x: Any, y: Any = 1, *, z: Any = 2) -> Any:
    return x + y + z


def plus_other(x: Any, y: Any = 3, *, z: Any = 2) -> Any:
    return x + y + z


def with_defaults(*defaults: Any, **keywords: Any) -> Callable[..., Any]:
    def named(x: Any, y: Any = 0, *, z: Any = 0) -> Any:
        return x + y + z

    named.__defaults__, named.__kwdefaults__ = defaults, keywords
    return named


def put(**attributes: Any) -> Callable[[Part], object]:
    return lambda part: vars(part).update(attributes)


CHANGES: dict[str, Callable[[Part], object]] = {
    "number of a weight": lambda part: part.linear.weight.data[1, 2].add_(1),
    "number of a buffer": lambda part: part.table.data[3].add_(1),  # type: ignore[operator]
    "shape": lambda part: setattr(part.linear.weight, "data", part.linear.weight.data.reshape(3, 2)),
    "stride": lambda part: setattr(part.linear.weight, "data", part.linear.weight.data.t().contiguous().t()),
    "type of numbers": lambda part: setattr(part.linear.weight, "data", part.linear.weight.data.half()),
    "without gradients": lambda part: part.linear.weight.requires_grad_(False),
    "name": lambda part: part.add_module("other", part._modules.pop("linear")),
    "class": lambda part: setattr(part.linear, "__class__", Alike),
    "number": put(rate=0.25),
    "text": put(kind="hard"),
    "switch": put(flag=False),
    "one instead of a switch": put(flag=1),
    "whole number": put(count=8),
    "something instead of nothing": put(nothing=0),
    "precision": put(precision=torch.bfloat16),
    "one more": put(more=None),
    "attribute of a part": lambda part: setattr(part.linear, "in_features", 4),
    "cfg": lambda part: setattr(part.cfg, "width", 4),
    "deep in cfg": lambda part: part.cfg.more["deep"].append(3),
    "config": lambda part: setattr(part.config, "eps", 1e-6),
    "function": put(act=lambda x: x),
    "another function": put(act=lambda x: x + 1),
    "another constant": put(act=lambda x: x + 2),
    "a function in it": put(act=lambda x: (lambda y: y + 1)(x)),
    "a function in it with another constant": put(act=lambda x: (lambda y: y + 2)(x)),
    "a set": put(act=lambda x: x in {1, 2, 3}),
    "another set": put(act=lambda x: x in {1, 2, 4}),
    "closure": put(act=adding(1)),
    "another closure": put(act=adding(2)),
    "a function in a closure": put(act=adding(plus)),
    "another function in a closure": put(act=adding(plus_other)),
    "two in a closure": put(act=adding(1, twice=1)),
    "defaults": put(act=with_defaults(1, z=2)),
    "another default": put(act=with_defaults(3, z=2)),
    "another default of a keyword": put(act=with_defaults(1, z=3)),
    "partial": put(act=partial(plus, 1)),
    "partial of another": put(act=partial(plus_other, 1)),
    "another argument": put(act=partial(plus, 2)),
    "a keyword": put(act=partial(plus, 1, y=4)),
    "another keyword": put(act=partial(plus, 1, y=5)),
    "method": lambda part: vars(part).update(forward=part.linear.forward),
    "another method": lambda part: vars(part).update(forward=part.linear.extra_repr),
    "hook": lambda part: part.linear.register_forward_hook(lambda *args: None),
    "another hook": lambda part: part.linear.register_forward_hook(lambda *args: args[0]),
    "hook before": lambda part: part.linear.register_forward_pre_hook(lambda *args: 1),
}
OF_THE_CLASS: dict[str, dict[str, Any]] = {
    "method of the class": {"forward": lambda self, x: x},
    "static method": {"scaled": staticmethod(lambda x, by=3.0: x * by)},
    "class method": {"named": classmethod(lambda cls: "b")},
    "getter": {"size": property(lambda self: 2, Part.size.fset)},
    "setter": {"size": property(Part.size.fget, lambda self, value: None)},
    "number of the class": {"limit": 4},
    "type of the class": {"inner": float},
}


def test_each_thing_that_a_model_computes_with_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_ALWAYS", ())  # memlens' own modules, which takes most of the time
    found = {"nothing": model_digest(Part())}
    for name, change in CHANGES.items():
        part = Part()
        change(part)
        found[name] = model_digest(part)
    for name, change in OF_THE_CLASS.items():
        with monkeypatch.context() as context:
            for attribute, value in change.items():
                context.setattr(Part, attribute, value)
            found[name] = model_digest(Part())
    alike = [name for name in found if [*found.values()].count(found[name]) > 1]
    assert alike == []
    assert model_digest(Part()) == found["nothing"]


def test_what_changes_no_number_is_not_seen() -> None:
    def watching(*args: Any) -> None:
        return None

    first = model_digest(Part())
    watching.__module__ = "transformers.utils.output_capturing"
    for change in (
        put(_calls=3),
        put(thing=object(), _lambda_free=object()),
        lambda part: part.linear.register_forward_hook(watching),
        lambda part: part.linear.register_parameter("none", None),
    ):
        part = Part()
        change(part)
        assert model_digest(part) == first
    turned = Part()
    for name in ("rate", "kind"):  # set in another order
        vars(turned)[name] = vars(turned).pop(name)
    assert model_digest(turned) == first
    watching.__module__ = "not_transformers"
    part = Part()
    part.linear.register_forward_hook(watching)
    assert model_digest(part) != first


def test_functions_and_classes_beside_a_followed_class_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(package: str, **contents: Any) -> str:
        module = ModuleType(f"{package}.made_by_hand")
        kind = type("Made", (nn.Module,), {"__module__": module.__name__})
        vars(module).update(Made=kind, **contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return model_digest(kind())

    def helper(value: int) -> Any:
        return type("Helper", (), {"__module__": "transformers.made_by_hand", "value": value})

    found = [
        digest("transformers"),
        digest("transformers", turn=plus),
        digest("transformers", turn=plus_other),
        digest("transformers", turn=len),
        digest("transformers", turn=sum),
        digest("transformers", Helper=helper(1)),
        digest("transformers", Helper=helper(2)),
        digest("memlens", turn=plus),
        digest("memlens", turn=plus_other),
        digest("transformer_lens", turn=plus),
        digest("transformer_lens", turn=plus_other),
    ]
    assert len({*found}) == len(found)
    assert digest("transformers", turn=plus) == found[1]
    assert digest("transformers", a_number=1) == found[0]  # only functions and classes are code


def test_a_variable_of_a_closure_may_have_no_value_yet() -> None:
    def without_value() -> Callable[[], Any]:
        def inner() -> Any:
            return later

        if inner.__closure__ is None:
            later = 1
        return inner

    digests = []
    for function in (without_value(), without_value()):
        part = Part()
        part.act = function
        digests.append(model_digest(part))
    assert digests[0] == digests[1]


SWITCHES = (
    "fp32_precision",
    "cuda.matmul.allow_tf32",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.fp32_precision",
    "mkldnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
)


class _Refusing:
    @property
    def allow_tf32(self) -> bool:
        raise RuntimeError("mix of the legacy and new APIs")


def test_each_switch_of_precision_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for `torch.backends`, as some of them cannot be set on every machine."""

    def facts(**changed: str) -> list[str]:
        root = SimpleNamespace()
        for name in SWITCHES:
            *parents, leaf = name.split(".")
            place = root
            for parent in parents:
                vars(place).setdefault(parent, SimpleNamespace())
                place = getattr(place, parent)
            setattr(place, leaf, changed.get(name, "as ever"))
        with monkeypatch.context() as context:
            context.setattr(torch, "backends", root)
            return identity._precision()

    found = [facts(), *(facts(**{name: "changed"}) for name in SWITCHES)]
    assert len({*map(tuple, found)}) == len(SWITCHES) + 1
    with monkeypatch.context() as context:
        context.setattr(torch, "backends", SimpleNamespace(cuda=SimpleNamespace(matmul=_Refusing())))
        assert identity._precision() == [torch.get_float32_matmul_precision(), *SWITCHES]


def test_facts_of_the_process_that_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [process_facts(CPU)]
    torch.use_deterministic_algorithms(True)
    try:
        found.append(process_facts(CPU))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(identity.platform, "machine", lambda: "another")
    found.append(process_facts(CPU))
    changed = [{key for key in found[0] if found[0][key] != each[key]} for each in found[1:]]
    assert changed == [{"deterministic"}, {"machine"}]
    assert process_facts(CPU)["device"] == ""
    for name, capability in (("A", (8, 0)), ("B", (9, 0)), ("B", (9, 1))):
        properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        facts = process_facts(torch.device("cuda:1"))
        assert facts["device"] == f"{name} {capability[0]}.{capability[1]}"
        assert facts["machine"][-1] == "cuda:1"


def test_a_process_with_modes_or_hooks_on_everything_is_not_ordinary() -> None:
    assert is_ordinary_process()
    with torch.device("cpu"):
        assert not is_ordinary_process()
        with TorchDispatchMode():
            assert not is_ordinary_process()
    with TorchDispatchMode():
        assert not is_ordinary_process()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
    try:
        assert not is_ordinary_process()
    finally:
        handle.remove()
    assert is_ordinary_process()


def test_files_of_a_hub_s_model_are_those_of_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--some--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("b" * 40)
    for commit in ("a" * 40, "b" * 40):
        folder = home / "snapshots" / commit
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "quantized.gguf"):
            (folder / name).write_text("")
    (home / "snapshots" / ("a" * 40) / "pytorch_model.bin").write_text("")

    def files(config: Any, **source: Any) -> list[str]:
        found = _files(Source("some/model", "some/model", local=False, **source), config)
        return [str(file.relative_to(home / "snapshots")).replace(file.parent.name, "at") for file in found]

    old, none = SimpleNamespace(_commit_hash="a" * 40), SimpleNamespace()
    assert files(old) == ["at/model.safetensors", "at/pytorch_model.bin"]
    assert files(SimpleNamespace(_commit_hash="b" * 40)) == files(none) == ["at/model.safetensors"]
    assert files(old, gguf_file="quantized.gguf") == ["at/quantized.gguf"]
    assert files(SimpleNamespace(_commit_hash="c" * 40)) == []
    (home / "snapshots" / ("a" * 40) / "config.json").unlink()  # which a GGUF file does without
    assert files(old) == []
    assert files(old, gguf_file="quantized.gguf") == ["at/quantized.gguf"]
