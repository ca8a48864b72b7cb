"""The registry of instruments that rank components of a model; each is registered where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlens.errors import OptionError, SequenceError, check_option
from memlens.forward.metrics import MetricLike
from memlens.registry import Registry
from memlens.results.kinds import KINDS
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention

Cell = Mapping[str, int]
Interventions = Callable[[Sequence[Cell]], list[Intervention]]


@dataclass(frozen=True)
class Screen:
    """A gradient estimate of all components, and the exact interventions on some of them or on all.

    Attributes:
        base: The sequences under intervention.
        estimate: Returns the result of the gradients; takes the options of the method.
        interventions: Returns the exact interventions on some cells.
        settings: Settings of the exact result.
        finish: Completes the exact result.
        cells: Returns all components, for a screen in another precision; None: there is no such screen.
    """

    base: SequenceSet
    estimate: Callable[..., Result]
    interventions: Interventions
    settings: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Result, Sequence[MetricLike]], Result] = lambda result, metrics: result
    cells: Callable[[], Sequence[Cell]] | None = None


_RANKED = ("layer", "head", "neuron", "site")

MakeScreen = Callable[..., Screen]
"""Maps a model, clean and corrupt sequences and options to a screen."""


@dataclass(frozen=True)
class Instrument:
    """An instrument that ranks components.

    Attributes:
        name: Its name.
        ranks: What it ranks: "layer", "head", "neuron" or "site"; except for "site", a dimension of its
            result.
        kind: The kind of its result, which has the figure, the reading and the citation.
        run: Measures every component; takes (model, sequences), or (model, clean, corrupt) with `pairs`. None
            if there are too many components to measure all of them.
        pairs: Whether it compares clean with corrupt sequences.
        screen: For `memlens.screen_then_verify`; None if there is no gradient estimate.
        options: The options of `memlens.screen_then_verify` that the screen uses.
    """

    name: str
    ranks: str
    kind: str
    run: Callable[..., Result] | None = None
    pairs: bool = False
    screen: MakeScreen | None = None
    options: frozenset[str] = frozenset()

    @property
    def cites(self) -> tuple[tuple[str, str], ...]:
        """The citations of its kind."""
        return KINDS[self.kind].cites


INSTRUMENTS: Registry[Instrument] = Registry("instrument", of=Instrument, modules=["memlens.instruments"])


def register_instrument(
    name: str,
    *,
    ranks: str,
    kind: str,
    run: Callable[..., Result] | None = None,
    pairs: bool = False,
    screen: MakeScreen | None = None,
    options: Sequence[str] = (),
) -> Instrument:
    """Register an instrument that ranks components, in the module that defines it; see `Instrument`.

    Raises:
        OptionError: The name is taken, neither `run` nor `screen` is given, it ranks something else, or its
            kind of result is not registered.

    Example:
        >>> import memlens as ml
        >>> ml.instruments.register_instrument(
        ...     "MLPs", ranks="layer", kind="mlp_ablation", run=ml.ablate_mlps
        ... ).ranks  # doctest: +SKIP
        'layer'
    """
    if run is None and screen is None:
        raise OptionError(f"the instrument {name!r} measures nothing: give run= or screen=.")
    check_option("ranks", ranks, _RANKED)
    KINDS[kind]
    return INSTRUMENTS.add(name, Instrument(name, ranks, kind, run, pairs, screen, frozenset(options)))


def screen_of(
    name: str, model: Any, clean: SequenceSet, corrupt: SequenceSet | None, **options: Any
) -> Screen:
    """Return the screen of an instrument; see `memlens.screen_then_verify` for its options.

    Raises:
        OptionError: An unknown name, an instrument without a gradient estimate, or an option that the
            instrument does not have.
        SequenceError: `corrupt` is missing, or given for an instrument that does not use it.
    """
    tool = INSTRUMENTS[name]
    if tool.screen is None:
        known = ", ".join(i.name for i in INSTRUMENTS.values() if i.screen)
        raise OptionError(f"instrument={name!r} has no gradient estimate: choose from {known}.")
    if tool.pairs and corrupt is None and options["donor"] is None:
        raise SequenceError(
            f"instrument={name!r} needs corrupt sequences (make them with memlens.corrupt) or donor=."
        )
    if not tool.pairs and corrupt is not None:
        raise SequenceError(f"instrument={name!r} does not use corrupt sequences: leave them out.")
    for option, value in options.items():
        if option not in {*tool.options, "layers", "seed"} and value != _UNSET[option]:
            raise OptionError(f"instrument={name!r} does not use {option}={value!r}: leave it out.")
    return tool.screen(model, clean, corrupt, options)


_UNSET = {
    "site": None, "over": None, "direction": None, "mode": "zero", "positions": None,
    "reference": None, "path": "site", "donor": None,
}  # fmt: skip
