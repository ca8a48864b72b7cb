"""Several devices where there is only a CPU: tensors carry the name of one, and PyTorch's rules are kept.

Inside `Devices()` every tensor that is moved to or made on "cpu:0", "cpu:1" and so on claims to be there, and
an operation on tensors of two devices raises what it raises between two GPUs. All numbers stay on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
_FREE = {"copy_", "__setitem__", "__getitem__", "index_put_", "index_put", "set_", "__set__", "data"}
"""Functions in which tensors of the CPU may meet others."""


class Devices(TorchFunctionMode):
    """Keeps account of the devices that tensors claim to be on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(func, args, kwargs)
        if name == "__set__":
            place = place_of(args[1]) if len(args) > 1 and isinstance(args[1], Tensor) else None
            out = func(*args, **kwargs)
            if place is not None and getattr(func, "__self__", None) is Tensor.data:
                args[0]._place = place
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        wanted = _wanted(name, args, kwargs)
        if wanted is not None:
            args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
            kwargs |= {"device": CPU} if "device" in kwargs else {}
            args = tuple(CPU if isinstance(a, str) and a.startswith("cpu") else a for a in args)
            if name == "to" and place_of(given[0]) != wanted:
                kwargs["copy"] = True
        elif name == "cpu":
            wanted = CPU
        elif name not in ("__repr__", "to", "type_as", "grad"):
            wanted = _common(name, given)
        elif name == "to":
            wanted = place_of(given[-1])
            if place_of(given[0]) != wanted:
                kwargs["copy"] = True
        out = func(*args, **kwargs)
        if given and out is given[0]:
            out = out.clone() if place_of(given[0]) != (wanted or CPU) else out
        if name == "grad":
            for gradient, source in zip(out, _listed(args, kwargs), strict=False):
                if gradient is not None:
                    gradient._place = place_of(source)
            return out
        for t in _tensors(out):
            t.__dict__["_place"] = wanted or CPU
        return out

    def __enter__(self) -> Devices:
        self._make = torch.Tensor._make_subclass

        def make(cls: Any, data: Tensor, *args: Any) -> Tensor:
            out = self._make(cls, data, *args)
            out._place = place_of(data)
            return out

        torch.Tensor._make_subclass = staticmethod(make)  # of nn.Parameter
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor._make_subclass = self._make
        super().__exit__(*error)

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, torch.device):
            return place_of(args[0])
        if isinstance(out, Tensor):
            out._place = place_of(args[0])
        return out


def _tensors(out: Any) -> list[Tensor]:
    """The tensors among results, also in named tuples."""
    if isinstance(out, Tensor):
        return [out]
    return [t for each in out for t in _tensors(each)] if isinstance(out, (tuple, list)) else []


def _listed(args: Any, kwargs: Any) -> list[Tensor]:
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def place_of(t: Tensor) -> torch.device:
    """Return where a tensor claims to be."""
    return t.__dict__.get("_place", CPU)


def _wanted(name: str, args: Any, kwargs: Any) -> torch.device | None:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name == "to":
        found = [a for a in args[1:] if isinstance(a, (torch.device, str))]
        return torch.device(found[0]) if found else None
    return None


def _common(name: str, given: list[Tensor]) -> torch.device | None:
    places = {place_of(t) for t in given if t.ndim or place_of(t) != CPU}
    if name in _FREE:
        target = place_of(given[0]) if given else CPU
        others = places - {CPU, target}
        if others and name not in ("copy_", "set_"):
            raise RuntimeError(f"{name}: indices or values on {others}, the tensor on {target}")
        return target
    if len(places) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {places}")
    return next(iter(places), CPU)


def dispatched(hf_model: Any, boundary: int) -> None:
    """Let accelerate place a Hugging Face model: layers from `boundary` on and all after them on cpu:1."""
    from accelerate import dispatch_model

    device_map: dict[str, str] = {}
    inner, passed = hf_model.base_model_prefix, False
    for name, child in getattr(hf_model, inner).named_children():
        if isinstance(child, nn.ModuleList):
            passed = True
            layers = {f"{inner}.{name}.{i}": f"cpu:{int(i >= boundary)}" for i in range(len(child))}
            device_map |= layers
        else:
            device_map[f"{inner}.{name}"] = f"cpu:{int(passed)}"
    device_map |= {name: "cpu:1" for name, _ in hf_model.named_children() if name != inner}
    dispatch_model(hf_model, device_map, main_device="cpu:0", force_hooks=True)
