"""What a verdict on a model is about: the model in memory, and the process that computes with it.

Both are read in a fraction of the time of a forward pass, and give the same digest in every process.
"""

from __future__ import annotations

import platform
import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module

import memlens
from memlens.models.state import plain_facts, sampled

_SHOWN = 1024
"""How many numbers of each tensor are read."""
_PACKAGES = ("memlens", "torch", "transformers", "transformer_lens")
_FOLLOWED = ("memlens", "transformers", "transformer_lens")
"""Packages whose modules are read function by function, where a class of the model comes from one."""
_ALWAYS = (
    "torch.nn.functional",
    *(f"memlens.forward.{name}" for name in ("trunk", "hooks", "blocks")),
    *(f"memlens.forward.check.{name}" for name in ("comparison", "kinds", "model", "reference", "sites")),
    *(f"memlens.models.{name}" for name in ("bridge", "hooked", "hooked_forms", "huggingface", "state")),
)
"""Modules that are read for every model: what computes with it, builds it and checks it."""
_SWITCHES = (
    "fp32_precision",
    *(f"cuda.matmul.{name}" for name in ("allow_tf32", "fp32_precision", "allow_fp16_accumulation")),
    *(f"cuda.matmul.allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")),
    *(f"{name}.fp32_precision" for name in ("cudnn", "mkldnn", "mkldnn.matmul")),
)
_PLAIN = (bool, int, float, str, type(None))


def is_ordinary_process() -> bool:
    """Return whether nothing is switched on that changes what every module or every function does.

    That is a hook on all modules, or a mode of PyTorch that sees each function or operation.
    """
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return modes == 0 and not every_module._has_any_global_hook()


def process_facts(device: torch.device) -> dict[str, Any]:
    """Return the versions, the source of memlens, the hardware and the switches on which numbers depend."""
    root = Path(memlens.__file__).parent
    source = blake2b(digest_size=16)
    for folder in ("forward", "models"):
        for file in sorted((root / folder).rglob("*.py")):
            source.update(file.read_bytes())
    return {
        "python": sys.version,
        "versions": {name: version(name) for name in _PACKAGES},
        "source": source.hexdigest(),
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), str(device)],
        "device": _accelerator(device),
        "default dtype": str(torch.get_default_dtype()),
        "autocast": torch.is_autocast_enabled(device.type),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": _precision(),
    }


def _accelerator(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} {found.major}.{found.minor}"


def _precision() -> list[str]:
    """Whether sums of products may be taken in fewer bits, for which there are several switches."""
    found = [torch.get_float32_matmul_precision()]
    for name in _SWITCHES:
        try:
            found.append(f"{name}={attrgetter(name)(torch.backends)}")
        except (AttributeError, RuntimeError):  # not in this release; or set under its other name
            found.append(name)
    return found


def model_digest(model: nn.Module) -> str:
    """Return a digest of what a model computes with.

    It holds, module by module, its class, its plain attributes, functions that were put into it or hooked
    onto it, and of each tensor its form and a sample of its numbers; the configurations; and the code of the
    classes, of the functions in the modules that define them, and of what memlens builds and checks a model
    with, as it is in memory.
    """
    found = blake2b(digest_size=16)
    kinds: dict[type, None] = {}
    configs: dict[int, Any] = {}
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    for name, module in nn.Module.named_modules(model):
        facts, kind = vars(module), type(module)
        kinds |= dict.fromkeys(kind.__mro__[:-1])
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [hook for hook in hooks if not _only_watches(hook)]
        functions = [value for key, value in sorted(facts.items()) if isinstance(value, _FUNCTIONS)]
        own = sorted((key, value) for key, value in facts.items() if key[0] != "_" and _is_plain(value))
        code = [_code(value, seen) for value in (*functions, *hooks)]
        found.update(repr((name, _name(kind), own, code)).encode("utf-8", "surrogatepass"))
        tensors += [t for t in (*facts["_parameters"].values(), *facts["_buffers"].values()) if t is not None]
        for config in (facts.get("cfg"), facts.get("config")):
            if hasattr(config, "__dict__"):
                configs[id(config)] = config
    found.update("".join(plain_facts(vars(config)) for config in configs.values()).encode())
    forms = [(tuple(t.shape), t.stride(), str(t.dtype), str(t.device), t.requires_grad) for t in tensors]
    found.update(repr(forms).encode() + sampled(tensors, _SHOWN))
    modules = {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] in _FOLLOWED}
    for text in (*_of_classes(kinds, seen), *_of_modules(sorted(modules | {*_ALWAYS}), seen)):
        found.update(text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()


_FUNCTIONS = (types.FunctionType, types.MethodType, partial)


def _only_watches(hook: Any) -> bool:
    """Whether a hook is one that transformers sets on a model's first pass, to give hidden states."""
    return getattr(hook, "__module__", "").startswith("transformers.")


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, torch.dtype)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _of_classes(kinds: Iterable[type], seen: set[int]) -> Iterator[str]:
    """The functions and plain attributes of classes."""
    for kind in kinds:
        yield _name(kind)
        yield from (f"{name}={_code(value, seen)}" for name, value in sorted(vars(kind).items()))


def _of_modules(names: Iterable[str], seen: set[int]) -> Iterator[str]:
    """The functions that modules define or import, and the classes that they define."""
    for module in names:
        for name, value in sorted(vars(import_module(module)).items()):
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                yield f"{module}.{name}={_code(value, seen)}"
            elif isinstance(value, type) and value.__module__ == module and id(value) not in seen:
                seen.add(id(value))
                yield from _of_classes([value], seen)


def _code(value: Any, seen: set[int]) -> str:
    """What a function does, with those that it wraps; of other things, what they are."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return _code(value.__func__, seen)
    if isinstance(value, property):
        return "".join(_code(part, seen) for part in (value.fget, value.fset))
    if isinstance(value, partial):
        return repr([_code(part, seen) for part in (value.func, *value.args, *value.keywords.values())])
    if isinstance(value, types.FunctionType):
        if id(value) in seen:
            return value.__qualname__
        seen.add(id(value))
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return _code_text(value.__code__) + repr([_code(part, seen) for part in held])
    if _is_plain(value):
        return repr(value)
    kind = value if isinstance(value, type) else type(value)
    return _name(kind) + str(getattr(value, "__qualname__", ""))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a variable that has no value yet
        return False


def _code_text(code: types.CodeType) -> str:
    return repr((code.co_code, code.co_names, code.co_varnames, [*map(_constant, code.co_consts)]))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code_text(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
