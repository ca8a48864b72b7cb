r"""The time of a sweep on hardware that need not be here, by the roofline.

An operator of :math:`F` floating-point operations that moves :math:`B` bytes takes at least

.. math:: t = \max(F / P, B / W)

on a device of peak rate :math:`P` and memory bandwidth :math:`W`: its attainable rate is
:math:`\min(P, I W)` at the arithmetic intensity :math:`I = F / B` (Yuan et al., arXiv 2402.16363). The times
of all operators are added. Real kernels reach a part of both rates, so the sum is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import yaml

from memlens.errors import OptionError, near_matches
from memlens.sweeps.operators import KINDS, Operators

if TYPE_CHECKING:
    import pandas as pd

LEFT_OUT: tuple[str, ...] = (
    "launches of kernels",
    "Python and other work of the host",
    "transfers between host and device",
    "what the hooks themselves compute",
    "keys and values of unchanged positions, once per layer and batch",
)
"""What a roofline does not count. The first two decide with small models, whatever their operators take."""
HERE = "here"
"""The name of the device that is measured."""


@dataclass(frozen=True)
class Device:
    """A device as the roofline sees it.

    Attributes:
        peak: Floating-point operations of matrix products per second: of 16-bit numbers, and of all others
            where `float32` is None.
        bandwidth: Bytes per second from and to its memory.
        memory: Bytes of its memory; None: unlimited or not known.
        float32: The rate of float32 products, where it differs from `peak`.
        kind: "cuda" or "cpu": on a CPU sweeps run smaller stacks.
        name: A name.
        source: Where the figures come from.

    Raises:
        OptionError: A figure that is not above 0, or an unknown kind.

    Example:
        >>> half = Device(peak=100e12, bandwidth=1e12, memory=16e9)
        >>> half.seconds(flops=1e14, moved=1e10), half.seconds(flops=1e12, moved=1e10)
        (1.0, 0.01)
    """

    peak: float
    bandwidth: float
    memory: float | None = None
    float32: float | None = None
    kind: str = "cuda"
    name: str = "a device of your own"
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("peak", "bandwidth", "memory", "float32"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name}={value!r} of a device: give a number above 0.")
        if self.kind not in ("cuda", "cpu"):
            raise OptionError(f"kind={self.kind!r} of a device: choose 'cuda' or 'cpu'.")

    def rate(self, itemsize: int) -> float:
        """Return the peak rate for numbers of so many bytes.

        Raises:
            OptionError: Double precision, of which the figures say nothing.
        """
        if itemsize <= 2 or self.float32 is None:
            return self.peak
        if itemsize > 4:
            raise OptionError(
                f"{self.name} has no figure for float64: plan in float32, or give a Device with this peak."
            )
        return self.float32

    def seconds(self, flops: float, moved: float, itemsize: int = 2) -> float:
        """Return the least time of an operator of so many operations and bytes."""
        return max(flops / self.rate(itemsize), moved / self.bandwidth)

    def holds(self, size: float) -> bool | None:
        """Whether so many bytes fit its memory; None where that is not known."""
        return None if self.memory is None else size <= self.memory


def _declared(name: str, facts: Mapping[str, float | str]) -> Device:
    return Device(
        peak=1e12 * float(facts["tflops"]),
        bandwidth=1e9 * float(facts["gigabytes_per_second"]),
        memory=1e9 * float(facts["gigabytes"]),
        float32=1e12 * float(facts["tflops_float32"]),
        name=name,
        source=str(facts["source"]),
    )


_FILE = resources.files("memlens.sweeps").joinpath("devices.yaml")
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        name: _declared(name, facts)
        for name, facts in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items()
    }
)
"""The devices with published figures, by name."""


def device_for(on: Device | str, here: torch.device, dtype: torch.dtype) -> Device:
    """Return a device, the device of this name, or this machine's, which is measured.

    Args:
        on: A `Device`, one of `DEVICES` (upper or lower case), or "here".
        here: What is measured for "here".
        dtype: The data type in which it is measured.

    Raises:
        OptionError: No device has this name.
    """
    if isinstance(on, Device):
        return on
    name = str(on).lower()
    if name == HERE:
        return measured_device(here, dtype)
    if name not in DEVICES:
        known = [*DEVICES, HERE]
        raise OptionError(
            f"on={on!r} is not a device with published figures: choose from {', '.join(known)}, or give a "
            f"memlens.sweeps.roofline.Device(peak=…, bandwidth=…).{near_matches(name, known)}"
        )
    return DEVICES[name]


def measured_device(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Device:
    """Measure a device of this machine: a matrix product of 2,048 rows, and a copy of 128 MiB.

    Args:
        device: Which.
        dtype: The data type of the product.
        repeats: The fastest of so many counts.
        clock: Returns seconds; `time.process_time` with one thread, where other work shares the processor.
    """
    place = torch.device(device)
    rows, width = 2048, 1024
    x, weight = (
        torch.ones(shape, dtype=dtype, device=place) for shape in ((rows, width), (4 * width, width))
    )
    source = torch.ones(2**27, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    product = _fastest(partial(torch.nn.functional.linear, x, weight), place, repeats, clock)
    copy = _fastest(partial(target.copy_, source), place, repeats, clock)
    cuda = place.type == "cuda"
    return Device(
        peak=2 * rows * width * 4 * width / product,
        bandwidth=2 * source.numel() / copy,
        memory=float(torch.cuda.mem_get_info(place)[1]) if cuda else None,
        kind="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name(place) if cuda else f"this {place.type}",
        source="measured",
    )


def _fastest(
    work: Callable[[], object], place: torch.device, repeats: int, clock: Callable[[], float]
) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = clock()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(clock() - start)
    return max(min(times[1:]), 1e-9)


@dataclass(frozen=True)
class OperatorCost:
    """All calls of one kind of operator.

    Attributes:
        kind: One of `KINDS`.
        calls: How many.
        flops: Their floating-point operations.
        bytes: What they read and write.
        seconds: Their least time on the device.
        memory_seconds: The part of `seconds` of calls that memory binds.
    """

    kind: str
    calls: int
    flops: int
    bytes: int
    seconds: float
    memory_seconds: float

    @property
    def bound(self) -> str:
        """What binds most of its time: "memory" or "arithmetic"."""
        return _bound(self.memory_seconds, self.seconds)

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roofline:
    """The least time of a sweep on a device, and whether it fits.

    Attributes:
        device: The device.
        operators: The kinds of operators that occur, in the order of `KINDS`.
        weights: Bytes of the model's weights.
        activations: Peak bytes of activations, with the joined weights of one layer's queries, keys and
            values, which functional blocks make for the time of a call.
        left_out: What is not counted.
    """

    device: Device
    operators: tuple[OperatorCost, ...]
    weights: int
    activations: int
    left_out: tuple[str, ...] = LEFT_OUT

    @staticmethod
    def of(operators: Operators, device: Device, *, weights: int, activations: int) -> Roofline:
        """Return the roofline of counted operators."""
        itemsize = operators.shape.itemsize
        found: dict[str, list[tuple[int, int, int, float, float]]] = {}
        for (kind, flops, moved), n in operators.calls.items():
            each = device.seconds(flops, moved, itemsize)
            bound = each if each > flops / device.rate(itemsize) else 0.0
            found.setdefault(kind, []).append((n, n * flops, n * moved, n * each, n * bound))
        costs = [OperatorCost(k, *_summed(found[k])) for k in KINDS if k in found]
        return Roofline(device, tuple(costs), weights, activations)

    @property
    def seconds(self) -> float:
        """The least time of all operators."""
        return sum(cost.seconds for cost in self.operators)

    @property
    def memory_share(self) -> float:
        """The share of the time in operators that memory binds."""
        return sum(cost.memory_seconds for cost in self.operators) / max(self.seconds, 1e-300)

    @property
    def bound(self) -> str:
        """What binds most of the time: "memory" or "arithmetic"."""
        return _bound(self.memory_share, 1.0)

    @property
    def fits(self) -> bool | None:
        """Whether weights and activations fit the device's memory; None where that is not known."""
        return self.device.holds(self.weights + self.activations)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per kind of operator: its fields, `intensity`, `bound` and `share` of the time."""
        import pandas as pd

        names = [field.name for field in fields(OperatorCost)]
        rows = [
            {
                **{name: getattr(cost, name) for name in names},
                "intensity": cost.intensity,
                "bound": cost.bound,
                "share": cost.seconds / self.seconds,
            }
            for cost in self.operators
        ]
        return pd.DataFrame(rows, columns=[*names, "intensity", "bound", "share"])

    def __str__(self) -> str:
        share = self.memory_share if self.bound == "memory" else 1 - self.memory_share
        needs = f"{self.weights / 1e9:,.1f} GB of weights and {self.activations / 1e9:,.1f} of activations"
        fits = {True: "fit", False: "do not fit", None: "are needed"}[self.fits]
        room = "" if self.device.memory is None else f" into {self.device.memory / 1e9:,.0f} GB"
        return (
            f"on {self.device.name} at least {self.seconds:.2g} s, {share:.0%} of it bound by {self.bound}; "
            f"{needs} {fits}{room}; not counted: {', '.join(self.left_out)}"
        )


def _summed(rows: Iterable[tuple[int, int, int, float, float]]) -> tuple[int, int, int, float, float]:
    calls, flops, moved, seconds, bound = zip(*rows, strict=True)
    return sum(calls), sum(flops), sum(moved), sum(seconds), sum(bound)


def _bound(memory: float, total: float) -> str:
    return "memory" if 2 * memory > total else "arithmetic"
