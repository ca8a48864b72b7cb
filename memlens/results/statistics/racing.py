r"""Races: the k best of many components from samples of the sequences, drawn without replacement.

Sequences are added in rounds, in a random order. After each round a component is dropped if at least as
many others surely exceed it as there are places left, and accepted if fewer than that can still exceed it.
"Surely" is a one-sided test of the paired difference of two components: sequences are easy or hard for all of
them, so that differences vary less than the effects themselves. After the last sequence everything is exact.

How many tests can go wrong: a wrong decision needs a false claim that some component outside the true top k
exceeds one inside it. There are :math:`k (M - k)` such claims, so that many share the error probability
(Bonferroni), not all :math:`M (M - 1)` pairs. Racing is due to Maron and Moore (1994); this count, the paired
tests and the correction by gradients are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.results.statistics.intervals import check_level

RANK_BY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "magnitude": np.abs,
    "decrease": np.negative,
    "increase": np.positive,
}
"""The score by which components are ranked: the size of a metric's mean change, its decrease or increase."""
INTERVALS = ("t", "betting")
STATUS = ("in", "out", "undecided", "undefined")
Source = Callable[[Int[np.ndarray, " row"], Int[np.ndarray, " part"]], Float[np.ndarray, "row part"]]
"""Maps sequences and components, by number, to effects."""


@dataclass(frozen=True)
class RaceOptions:
    """The rules of a race.

    Attributes:
        k: Number of components to find.
        rank_by: One of `RANK_BY`.
        level: Probability that the answer is the top k of all sequences.
        interval: "t" or "betting"; see `memlens.find_top`.
        bounds: The least and the largest effect that is possible, for "betting".
        first: Sequences of the first round.
        growth: How much larger the sample is after each further round.
        max_sequences: Stop after this many; all by default.
        equal_width: Keep running accepted components until the race ends.

    Raises:
        OptionError: A value that is not possible.
    """

    k: int
    rank_by: str = "magnitude"
    level: float = 0.95
    interval: str = "t"
    bounds: tuple[float, float] | None = None
    first: int = 16
    growth: float = 1.5
    max_sequences: int | None = None
    equal_width: bool = False

    def __post_init__(self) -> None:
        check_option("rank_by", self.rank_by, list(RANK_BY))
        check_option("interval", self.interval, INTERVALS)
        check_level(self.level)
        for name, least in (("k", 1), ("first", 2), ("max_sequences", 1)):
            value = getattr(self, name)
            if value is None and name == "max_sequences":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(
                    f"{name}={value!r} is not possible: give a whole number of {least} or more."
                )
        if not isinstance(self.growth, int | float) or not 1 < self.growth < np.inf:
            raise OptionError(
                f"growth={self.growth!r} adds no sequences: give a factor above 1, such as 1.5."
            )
        if (self.bounds is not None) != (self.interval == "betting"):
            raise OptionError(
                f"interval={self.interval!r} with bounds={self.bounds!r}: interval='betting' needs the "
                "least and the largest possible effect, such as (-1, 1) for exact_match; 't' takes none."
            )
        two = isinstance(self.bounds, tuple | list) and len(self.bounds) == 2
        if self.bounds is not None and not (two and self.bounds[0] < self.bounds[1]):
            raise OptionError(f"bounds={self.bounds!r}: give the least effect first and then the largest.")

    def sizes(self, n_sequences: int) -> list[int]:
        """Return how many sequences have run after each round.

        >>> RaceOptions(1).sizes(143)
        [16, 24, 36, 54, 81, 121, 143]
        """
        most = min(n_sequences, self.max_sequences or n_sequences)
        found, size = [], float(self.first)
        while size < most:
            found.append(int(size))
            size = max(size * self.growth, found[-1] + 1)
        return [*found, most]


@dataclass(frozen=True)
class Race:
    """The outcome of a race.

    Attributes:
        effects: Effects, NaN where nothing ran.
        estimate: Estimated mean effect of each component over all sequences; exact where all ran.
        low: Lower end of its interval, at the race's level for all components and rounds together; NaN where
            the sample says nothing (see `Sample.of`).
        high: Upper end likewise.
        status: Of `STATUS`.
        by: How it was decided: "interval", "all sequences", "tie" (in the order of the components, since the
            means are equal) or "".
        used: Sequences that ran.
        sizes: Sequences that had run after each round.
        running: Components that ran in each round.
        controlled: Whether the estimate uses the gradients'.
    """

    effects: Float[np.ndarray, "sequence part"]
    estimate: Float[np.ndarray, " part"]
    low: Float[np.ndarray, " part"]
    high: Float[np.ndarray, " part"]
    status: np.ndarray
    by: np.ndarray
    used: Int[np.ndarray, " part"]
    sizes: list[int]
    running: list[int]
    controlled: Bool[np.ndarray, " part"]

    @property
    def cells(self) -> int:
        """Number of effects that were measured."""
        return int(self.used.sum())


@dataclass(frozen=True)
class Sample:
    """Effects of some components on the sequences drawn so far, as the tests see them.

    Attributes:
        mean: Estimates of the means over all sequences.
        residuals: What is left of each effect; their squares give the variance of differences.
        df: Degrees of freedom.
        share: Share of the sequences that was not drawn, by which the variance is smaller.
        controlled: Whether a component's estimate uses the gradients'.
    """

    mean: Float[np.ndarray, " part"]
    residuals: Float[np.ndarray, "row part"]
    df: int
    share: float
    controlled: Bool[np.ndarray, " part"]

    @classmethod
    def of(
        cls,
        effects: Float[np.ndarray, "row part"],
        known: Float[np.ndarray, "row part"] | None,
        whole: Float[np.ndarray, "sequence part"] | None,
        n_sequences: int,
    ) -> Sample:
        r"""Return the sample, corrected by `known` where that predicts left-out sequences better.

        The regression estimator of a mean is :math:`\bar x - \beta (\bar g_\text{run} - \bar g_\text{all})`.
        Residuals are those of a line that was fitted without the sequence itself, each with the weight that
        its sequence has in this estimate, so that a slope never looks better than it is. Where the drawn
        sequences have less than half of the variance that `known` has over all, they are no guide to the
        rest: residuals are infinite, and nothing is claimed about the component yet.

        Args:
            effects: On the drawn sequences.
            known: Estimates from gradients there.
            whole: The same on all sequences.
            n_sequences: All of them.
        """
        n = len(effects)
        mean = effects.mean(0)
        plain = (effects - mean) * (n / max(n - 1, 1))  # each less the mean of the others
        off = np.zeros(effects.shape[1], bool)
        share = 1 - n / n_sequences
        if known is None or whole is None or n < 4:
            return cls(mean, plain, n - 1, share, off)
        offset, away = known.mean(0) - whole.mean(0), known - known.mean(0)
        spread = np.square(away).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (away * effects).sum(0) / spread
            leverage = 1 / n + np.square(away) / spread
            fitted = (effects - mean - slope * away) / (1 - leverage) * (1 - n * offset * away / spread)
            better = np.square(fitted).sum(0) < np.square(plain).sum(0)
        better &= np.isfinite(fitted).all(0)
        mean = np.where(better, mean - slope * offset, mean)
        residuals = np.where(better, fitted, plain)
        residuals[:, spread / n < whole.var(0) / 2] = np.inf
        return cls(mean, residuals, n - 1 - bool(better.any()), share, better)

    def exceeds(
        self, mine: Float[np.ndarray, " part"], theirs: float, alpha: float
    ) -> Bool[np.ndarray, "part part"]:
        """Test by Student's t whether mine · the mean of i is above theirs · that of j: `[i, j]`."""
        n = len(self.residuals)
        if n < 2:
            return np.zeros((len(self.mean), len(self.mean)), bool)
        gap = (mine * self.mean)[:, None] - theirs * self.mean
        unknown = ~np.isfinite(self.residuals).all(0)
        residuals = np.where(unknown, 0.0, self.residuals)
        products = residuals.T @ residuals
        own = np.add.outer(np.diag(products), np.diag(products))
        squares = np.maximum(
            own - 2 * theirs * mine[:, None] * products, 1e-14 * own
        )  # rounding may give less
        error = np.sqrt(squares / (n - 1) / n * self.share)
        return (gap > stats.t.isf(alpha, self.df) * error) & ~np.logical_or.outer(unknown, unknown)

    def interval(self, alpha: float) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"]]:
        """Return Student's interval of each mean, with an error probability of `alpha` at each end."""
        n = len(self.residuals)
        if n < 2:
            return np.full_like(self.mean, np.nan), np.full_like(self.mean, np.nan)
        error = np.sqrt(np.square(self.residuals).sum(0) / (n - 1) / n * self.share)
        half = stats.t.isf(alpha, self.df) * error
        return self.mean - half, self.mean + half


def wealth(
    steps: Iterable[np.ndarray],
    null: float | np.ndarray,
    low: float | np.ndarray,
    width: float,
    n_sequences: int,
) -> np.ndarray:
    r"""Return how much a bet has won against the claim that a mean over all sequences is at most `null`.

    Values :math:`x_t` are drawn without replacement. With :math:`m_t` the mean that the claim leaves to those
    not drawn yet, the wealth is multiplied by :math:`1 + \lambda_t (x_t - m_t)`, where
    :math:`\lambda_t` depends on earlier values only. Under the claim it is expected not to grow, so that it
    ever exceeds :math:`1/\alpha` with a probability of at most :math:`\alpha` (Ville's inequality;
    Waudby-Smith and Ramdas, arXiv 2010.09686).

    Args:
        steps: One array of values per draw.
        null: The claimed mean.
        low: The least value that is possible.
        width: By how much the largest exceeds it; only for the size of the first bets.
        n_sequences: How many values there are in all.

    Returns:
        The largest wealth so far; infinite where the claim has become impossible.

    >>> draws = [np.array([1.0])] * 30
    >>> bool(wealth(draws, 0.0, -1.0, 2.0, 100) > 1000), bool(wealth(draws, 1.0, -1.0, 2.0, 100) > 1)
    (True, False)
    """
    total = np.zeros(())
    now = most = np.ones(())
    squares = np.asarray(width**2 / 4)
    drawn = 0
    for x in steps:
        left = (n_sequences * np.asarray(null) - total) / (n_sequences - drawn)
        room, mean = left - low, (total + null) / (drawn + 1)
        ahead = mean - left
        with np.errstate(invalid="ignore", divide="ignore"):
            stake = np.clip(ahead / (squares / (drawn + 1) + ahead**2), 0, 0.75 / room)
            now = np.where(room > 0, now * (1 + stake * (x - left)), np.inf)
        most = np.maximum(most, now)
        total, squares, drawn = total + x, squares + np.square(x - mean), drawn + 1
    left = (n_sequences * np.asarray(null) - total) / max(n_sequences - drawn, 1)
    return np.where(left < low, np.inf, most)


def race(
    source: Source,
    n_sequences: int,
    n_components: int,
    options: RaceOptions,
    *,
    estimates: Float[np.ndarray, "sequence part"] | None = None,
    seed: int = 0,
) -> Race:
    """Find the top k of a table of effects from a part of its cells.

    Args:
        source: Returns effects; asked once for each cell that is needed, round by round.
        n_sequences: Rows of the table.
        n_components: Its columns.
        options: The rules.
        estimates: Estimates of all cells that cost little, as a control variate.
        seed: Of the order of the sequences.

    Raises:
        EmptySetError: There are no sequences, or no components.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> table = rng.normal([0, 0, 0, 9], 1, (200, 4))
        >>> found = race(lambda rows, parts: table[np.ix_(rows, parts)], 200, 4, RaceOptions(1), seed=1)
        >>> found.status.tolist(), found.cells
        (['out', 'out', 'out', 'in'], 64)
    """
    if n_sequences < 1 or n_components < 1:
        raise EmptySetError(
            f"{n_sequences} sequences and {n_components} components: give at least one of each."
        )
    return _Running(source, n_sequences, n_components, options, estimates, seed).finished()


class _Running:
    """A race on its way."""

    def __init__(
        self,
        source: Source,
        n_sequences: int,
        n_components: int,
        options: RaceOptions,
        estimates: Float[np.ndarray, "sequence part"] | None,
        seed: int,
    ) -> None:
        self.source, self.options, self.n = source, options, n_sequences
        self.order = np.random.default_rng(seed).permutation(n_sequences)
        self.known = None if options.interval == "betting" else estimates
        self.effects = np.full((n_sequences, n_components), np.nan)
        self.status = np.full(n_components, "undecided", dtype="<U9")
        self.by = np.full(n_components, "", dtype="<U13")
        self.used = np.zeros(n_components, dtype=int)
        self.sizes = options.sizes(n_sequences)
        claims = max(options.k * (n_components - options.k), 1)
        looks = 1 if options.interval == "betting" else max(len(self.sizes) - (self.sizes[-1] == self.n), 1)
        sides = 2 if options.rank_by == "magnitude" else 1
        self.alpha = (1 - options.level) / (claims * looks * sides)
        self.own_alpha = (1 - options.level) / (2 * n_components * looks)

    def finished(self) -> Race:
        running: list[int] = []
        done = 0
        for size in self.sizes:
            parts = np.flatnonzero(self._runs())
            fresh = self.order[done:size]
            self.effects[np.ix_(fresh, parts)] = self._measured(fresh, parts)
            self.used[parts], done = size, size
            running.append(len(parts))
            broken = ~np.isfinite(self.effects[np.ix_(self.order[:size], parts)]).all(0)
            self.status[parts[broken]], self.by[parts[broken]] = "undefined", ""
            self._look(size)
            if not (self.status == "undecided").any():
                break
        estimate, low, high = np.full((3, len(self.used)), np.nan)
        controlled = np.zeros(len(self.used), bool)
        for size in np.unique(self.used):
            parts = np.flatnonzero((self.used == size) & (self.status != "undefined"))
            effects, sample = self._sample(parts, int(size))
            estimate[parts], controlled[parts] = sample.mean, sample.controlled
            low[parts], high[parts] = self._interval(effects, sample)
        unknown = ~(np.isfinite(low) & np.isfinite(high))
        low[unknown] = high[unknown] = np.nan
        return Race(
            self.effects, estimate, low, high, self.status, self.by, self.used, self.sizes[: len(running)],
            running, controlled,
        )  # fmt: skip

    def _measured(self, rows: np.ndarray, parts: np.ndarray) -> np.ndarray:
        effects = self.source(rows, parts)
        if self.options.bounds is not None:
            low, high = self.options.bounds
            outside = effects[(effects < low) | (effects > high)]
            if len(outside):
                raise OptionError(
                    f"bounds={self.options.bounds!r} do not hold: an effect is {outside[0]:.4g}."
                )
        return effects

    def _runs(self) -> Bool[np.ndarray, " part"]:
        kept = ("undecided", "in") if self.options.equal_width else ("undecided",)
        return np.isin(self.status, kept)

    def _sample(self, parts: np.ndarray, size: int) -> tuple[Float[np.ndarray, "row part"], Sample]:
        rows = self.order[:size]
        effects = self.effects[np.ix_(rows, parts)]
        if self.known is None:
            return effects, Sample.of(effects, None, None, self.n)
        whole = self.known[:, parts]
        return effects, Sample.of(effects, whole[rows], whole, self.n)

    def _look(self, size: int) -> None:
        """Decide what can be decided."""
        parts = np.flatnonzero(self.status == "undecided")
        effects, sample = self._sample(parts, size)
        places = self.options.k - int((self.status == "in").sum())
        if size == self.n:
            self._rank(parts, sample.mean, places)
        else:
            self._decide(parts, self._claims(effects, sample), places)

    def _decide(self, parts: np.ndarray, above: Bool[np.ndarray, "part part"], places: int) -> None:
        """Accept and drop until nothing follows any more; `above[i, j]`: i surely exceeds j."""
        decided = True
        while decided and len(parts):
            dropped = above.sum(0) >= places
            accepted = (above.sum(1) >= len(parts) - places) & ~dropped
            for chosen, status in ((dropped, "out"), (accepted, "in")):
                self.status[parts[chosen]], self.by[parts[chosen]] = status, "interval"
            left = ~(dropped | accepted)
            decided = not left.all()
            parts, above, places = parts[left], above[np.ix_(left, left)], places - int(accepted.sum())

    def _rank(self, parts: np.ndarray, mean: np.ndarray, places: int) -> None:
        """Rank what is left by exact means; equal ones in their own order."""
        score = RANK_BY[self.options.rank_by](mean)
        order = np.argsort(-score, kind="stable")
        self.status[parts[order[:places]]], self.status[parts[order[places:]]] = "in", "out"
        self.by[parts] = "all sequences"
        if 0 < places < len(parts) and score[order[places - 1]] == score[order[places]]:
            self.by[parts[score == score[order[places]]]] = "tie"

    def _claims(
        self, effects: Float[np.ndarray, "row part"], sample: Sample
    ) -> Bool[np.ndarray, "part part"]:
        """Return which component surely exceeds which: `[higher, lower]`."""
        ones = np.ones(effects.shape[1])
        if self.options.rank_by == "magnitude":  # |a| > |b| if sign · a exceeds b as well as -b
            sign = np.where(sample.mean >= 0, ones, -ones)
            found = self._exceeds(effects, sample, sign, 1.0) & self._exceeds(effects, sample, sign, -1.0)
        else:
            side = 1.0 if self.options.rank_by == "increase" else -1.0
            found = self._exceeds(effects, sample, side * ones, side)
        score = RANK_BY[self.options.rank_by](sample.mean)
        return found & (score[:, None] > score)  # never both ways

    def _exceeds(
        self,
        effects: Float[np.ndarray, "row part"],
        sample: Sample,
        mine: Float[np.ndarray, " part"],
        theirs: float,
    ) -> Bool[np.ndarray, "part part"]:
        if self.options.bounds is None:
            return sample.exceeds(mine, theirs, self.alpha)
        ends = np.array(self.options.bounds)
        low = np.min(mine[:, None] * ends, axis=1)[:, None] - np.max(theirs * ends)
        steps = (mine[:, None] * x[:, None] - theirs * x for x in effects)
        return wealth(steps, 0.0, low, 2 * float(np.ptp(ends)), self.n) >= 1 / self.alpha

    def _interval(
        self, effects: Float[np.ndarray, "row part"], sample: Sample
    ) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"]]:
        if len(effects) == self.n:
            return sample.mean, sample.mean
        if self.options.bounds is None:
            return sample.interval(self.own_alpha)
        return betting_interval(effects, self.options.bounds, self.n, self.own_alpha)


def betting_interval(
    values: Float[np.ndarray, "row part"], bounds: tuple[float, float], n_sequences: int, alpha: float
) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """Return the means against which no bet (see `wealth`) won 1 / `alpha`, found by bisection."""
    ends = []
    for sign in (1.0, -1.0):
        low = min(sign * bounds[0], sign * bounds[1])
        below, above = np.full(values.shape[1], low), (sign * values).mean(0)
        for _ in range(20):
            middle = (below + above) / 2
            refuted = wealth(sign * values, middle, low, bounds[1] - bounds[0], n_sequences) >= 1 / alpha
            below, above = np.where(refuted, middle, below), np.where(refuted, above, middle)
        ends.append(sign * below)
    return ends[0], ends[1]
