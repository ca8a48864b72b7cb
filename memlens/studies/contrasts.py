"""Whether what was found differs from its controls, judged by the strictest of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import xarray as xr

from memlens.errors import ResultError
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import Estimate

_VALUE = "value"


@dataclass(frozen=True)
class Contrast:
    """A group against one control.

    Attributes:
        control: Its name.
        difference: The mean of the group minus that of the control, over sequences or pairs.
        p: Of a two-sided permutation test.
        clear: Whether the difference has the expected sign, its interval excludes 0 and p is below 0.05.
    """

    control: str
    difference: Estimate
    p: float
    clear: bool


def strictest(
    own: xr.DataArray, controls: Mapping[str, xr.DataArray], *, sign: int, seed: int = 0
) -> Contrast | None:
    """Compare a group with each of its controls, and return the comparison that says least for it.

    Args:
        own: One value per sequence.
        controls: The same of each control. One with the coordinate `match` or `matched_to` is compared pair
            by pair, as `compare_groups` does.
        sign: 1 if the group is expected above its controls, -1 if below.
        seed: Of the bootstrap and the permutations.

    Returns:
        The control whose difference is least clear: one that is not clear before one that is, and of these
        the one whose interval reaches furthest towards the unexpected side. Two sequences give no interval:
        such a control is named if no other is unclear. None without a control that can be compared: both need
        two sequences.
    """
    found: list[Contrast] = []
    for name, values in controls.items():
        try:
            table = compare_groups(_result(own), _result(values), _VALUE, seed=seed)
        except ResultError:
            continue
        difference, low, high, p = (float(table[key]) for key in ("difference", "low", "high", "p"))
        estimate = Estimate(difference, low, high, min(table.attrs["n_a"], table.attrs["n_b"]))
        clear = estimate.excludes(0.0) and sign * difference > 0 and p < 0.05
        found.append(Contrast(name, estimate, p, clear))

    def strength(contrast: Contrast) -> tuple[bool, bool, float]:
        found = contrast.difference
        end = found.low if sign > 0 else found.high
        return contrast.clear, not found.known, sign * (end if found.known else found.value)

    return min(found, key=strength, default=None)


def against_controls(contrast: Contrast | None, more: str, unit: str = "") -> str:
    """Return the sentence on whether the effect differs from that on the strictest control.

    Args:
        contrast: From `strictest`.
        more: What holds if it does, such as "more than".
        unit: Of the difference.

    >>> found = Contrast("random neurons", Estimate(0.5, 0.2, 0.8, 9), 0.01, True)
    >>> print(against_controls(found, "more than"))
    That is more than with random neurons, the strictest control (difference 0.5 [0.2, 0.8], p = 0.01).
    """
    if contrast is None:
        return "There is no control with enough sequences to tell whether that is special."
    unit = f" {unit}" if unit else ""
    numbers = f"(difference {contrast.difference}{unit}, p = {contrast.p:.2g})"
    if contrast.clear:
        return f"That is {more} with {contrast.control}, the strictest control {numbers}."
    return f"That is not clearly {more} with {contrast.control}, the strictest control {numbers}."


def _result(values: xr.DataArray) -> Result:
    return Result.create(xr.Dataset({_VALUE: values.astype(float)}), kind="contrast")
