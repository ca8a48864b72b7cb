"""`Estimate`: a value with its interval, for findings, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats

from memlens.results.result import Result
from memlens.results.statistics.intervals import FEWEST, mean_interval, ratio_interval

_DRAWN = 2**22
"""Values of all resamples of a median that are held at a time."""


_ROUNDING = 1e-12
"""Part of the interval's width below which a value is 0."""


def shown_number(value: float | None) -> str:
    """Return a number with three digits, without an exponent where it has up to seven places.

    >>> [shown_number(value) for value in (0.12345, 7321.6, -13482.0, 1.5e9)]
    ['0.123', '7,320', '-13,500', '1.5e+09']
    """
    if value is None:
        return "not known"
    short = f"{value:.3g}"
    return f"{float(short):,.0f}" if 1e3 <= abs(float(short)) < 1e7 else short


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval over `n` sequences; `str` gives `0.5 [0.2, 0.8]`.

    One or two sequences give no interval, and `str` says so: `0.5 (no interval: n = 2)`.

    Attributes:
        value: The estimate; NaN where nothing could be measured.
        low: Lower end of the interval; NaN where there is none.
        high: Upper end of the interval; NaN where there is none.
        n: The number of sequences behind it.
        level: Coverage of the interval.

    Example:
        >>> found = Estimate(0.75, 0.5, 0.875, n=12)
        >>> found.text("nats"), found.excludes(0)
        ('0.75 nats (95 % interval 0.5 to 0.875)', True)
        >>> found.row("rate")
        {'n': 12, 'rate': 0.75, 'low': 0.5, 'high': 0.875}
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    level: float = 0.95

    @classmethod
    def of(cls, interval: xr.DataArray) -> Estimate:
        """Return one estimate from an array `[statistic]`, as `mean_ci` and `mean_interval` give it.

        >>> Estimate.of(mean_interval(xr.DataArray([1, 1, 0, 1], dims="sequence"))).text()
        '0.75 (95 % interval 0.301 to 0.954)'
        """
        value, low, high = (float(interval.sel(statistic=name)) for name in ("mean", "low", "high"))
        names = [str(name) for name in interval.coords if name == "n" or str(name).startswith("n_")]
        counts = [int(interval[name]) for name in names if interval[name].ndim == 0]
        level = float(interval.attrs.get("level", 0.95))
        return cls(value, low, high, counts[0] if counts else 0, level)

    @classmethod
    def unknown(cls, n: int = 0) -> Estimate:
        """Return an estimate without a value, for a quantity that could not be measured."""
        return cls(math.nan, n=n)

    @classmethod
    def from_row(
        cls, row: Mapping[Any, Any], name: str = "value", *, prefix: str = "", n: str | None = "n"
    ) -> Estimate:
        """Return the estimate that `row` wrote into a row of a table."""
        count = 0 if n is None else int(row[n])
        return cls(float(row[name]), float(row[f"{prefix}low"]), float(row[f"{prefix}high"]), count)

    @property
    def percent(self) -> str:
        """The value of a share in percent, rounded.

        >>> Estimate(0.254).percent, Estimate.unknown().percent
        ('25 %', 'an unknown share')
        """
        return f"{100 * self.value:.0f} %" if math.isfinite(self.value) else "an unknown share"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, value: float = 0.0) -> bool:
        """Return whether there is an interval and it excludes a value."""
        return self.known and not self.low <= value <= self.high

    def row(self, name: str = "value", *, prefix: str = "", n: str | None = "n") -> dict[str, Any]:
        """Return the columns of a table: the count, the value and the ends of the interval.

        Args:
            name: Column of the value.
            prefix: Prefix of the columns `low` and `high`.
            n: Column of the count; None leaves it out.
        """
        count = {} if n is None else {n: self.n}
        return {**count, name: self.value, f"{prefix}low": self.low, f"{prefix}high": self.high}

    def text(self, unit: str = "", *, units: str = "sequences") -> str:
        """Return the value with its interval as text, or with the reason why there is no interval.

        Args:
            unit: Unit of the value, such as "nats".
            units: What `n` counts.

        >>> Estimate(0.5, n=2).text()
        '0.5 (no interval: 2 sequences are too few)'
        """
        if not math.isfinite(self.value):
            return "not known"
        number = f"{shown_number(self.rounded)} {unit}".rstrip()
        if self.known:
            ends = f"{shown_number(self.low)} to {shown_number(self.high)}"
            return f"{number} ({100 * self.level:g} % interval {ends})"
        if self.n >= FEWEST:
            return f"{number} (no interval)"
        few = f"one {units.removesuffix('s')} is" if self.n == 1 else f"{self.n} {units} are"
        return f"{number} (no interval: {few} too few)"

    @property
    def rounded(self) -> float:
        """The value, or 0 where only rounding errors of the mean tell it from 0.

        >>> print(Estimate(1.4e-17, -0.25, 0.25, 4))
        0 [-0.25, 0.25]
        """
        wide = max(abs(self.low), abs(self.high))
        return 0.0 if abs(self.value) < _ROUNDING * wide else self.value

    def __str__(self) -> str:
        if self.known:
            return f"{shown_number(self.rounded)} [{shown_number(self.low)}, {shown_number(self.high)}]"
        few = math.isfinite(self.value) and 0 < self.n < FEWEST
        return shown_number(self.value) + (f" (no interval: n = {self.n})" if few else "")


def chosen_site(result: Result, metric: str, rows: Int[np.ndarray, "row"]) -> dict[str, int]:
    """Return the site with the smallest mean effect over some sequences, as coordinates.

    Args:
        result: A result with `sequence` and site dimensions.
        metric: The metric whose effect (intervened minus baseline) is smallest.
        rows: The sequences to choose on.
    """
    means = result.effect(metric).isel(sequence=rows).mean("sequence", skipna=True)
    filled = means.fillna(np.inf).values
    place = np.unravel_index(int(filled.argmin()), filled.shape)
    return {str(dim): int(means[dim].values[i]) for dim, i in zip(means.dims, place, strict=True)}


def mean_estimate(array: xr.DataArray, *, seed: int = 0) -> Estimate:
    """Return the mean over sequences of an array `[sequence]`, with a percentile bootstrap interval."""
    values = xr.DataArray(np.asarray(array, float), dims="sequence")
    return Estimate.of(mean_interval(values, method="bootstrap", seed=seed))


def share_estimate(hits: Any) -> Estimate:
    """Return the share of ones among `[sequence]`, with Wilson's interval; NaN of no sequences."""
    values = xr.DataArray(np.asarray(hits, float), dims="sequence")
    return Estimate.of(mean_interval(values, method="wilson")) if len(values) else Estimate.unknown()


def ratio_estimate(part: xr.DataArray, whole: xr.DataArray, *, seed: int = 0) -> Estimate:
    """Return sum(part) / sum(whole) over sequences with a percentile bootstrap interval over sequences.

    The value is NaN where the sum of `whole` cannot be told from 0; see `ratio_interval`.
    """
    return Estimate.of(ratio_interval(part, whole, seed=seed))


def median_estimate(values: Float[np.ndarray, "seq"], *, seed: int = 0) -> Estimate:
    """Return the median over sequences, with a percentile bootstrap interval."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return Estimate.unknown()
    value = float(np.median(values))
    if n < FEWEST:
        return Estimate(value, n=n)
    if np.ptp(values) == 0:
        return Estimate(value, value, value, n)
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"method": "percentile", "n_resamples": 2000, "vectorized": True, "rng": rng}
    options["batch"] = max(1, _DRAWN // n)
    found = stats.bootstrap((values,), np.median, **options).confidence_interval
    return Estimate(value, float(found.low), float(found.high), n)
