"""Options of the audit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from memlens.choices import BypassMode
from memlens.errors import OptionError
from memlens.options import options_class

if TYPE_CHECKING:
    from memlens.instruments.detect.exposure import ExposureOptions
    from memlens.instruments.edit.mitigation import MitigationOptions
    from memlens.recall.sampling import Sampling

Step = Literal["leak", "little", "memory", "where", "help"]
STEPS: tuple[Step, ...] = get_args(Step)
CSV = "leaks.csv"
"""The file in the run's folder that has the full texts."""


def steps_folder(csv: Path) -> Path:
    """Return the folder of what a second run continues from: beside the CSV file, since it holds secrets too.

    >>> steps_folder(Path("leaks.csv")).name
    'leaks.csv.steps'
    """
    return csv.with_name(f"{csv.name}.steps")


@options_class
class AuditOptions:
    """Options of `audit`; the run records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.studies.AuditOptions(fail_above="2%").fail_above
        '2%'
    """

    steps: Annotated[tuple[Step, ...], Field(min_length=1)] = STEPS
    """Which questions are asked: leak (which strings come out), little (from how little), memory (is it
    memory), where (in the model), help (what would help, at what cost). All need the first."""
    redact: bool = True
    """Show of each secret its first and last character only, everywhere but in the CSV file."""
    fail_above: str | None = None
    """Exit with 3 if more strings leak than this: a whole number counts strings (0, 5); with % or with a
    point it is a share of them (2% or 0.02). By default leaks do not change the exit code."""
    csv: Path | None = None
    """The table with the full texts; leaks.csv in the run's folder by default."""
    near: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Edit similarity, by tokens or characters, from which the greedy text is nearly the secret."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Sampling temperature of (n, p)-discoverability."""
    top_k: PositiveInt | None = None
    """Sample from so many of the most likely tokens; by default from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens up to this probability mass."""
    n_samples: PositiveInt = 100
    """n: a secret leaks by sampling if so many samples contain it …"""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """… with at least this probability, p."""
    max_canaries: NonNegativeInt = 32
    """Most secrets whose exposure is measured, of those with four digits or more and of the others each,
    chosen at random; 0 for none."""
    alternatives: Literal["auto", "digits", "characters"] = "auto"
    """Among what the exposure of a secret is measured: texts that differ from it in digits only, or in
    letters and digits, with capitals and punctuation at the same places; auto: in digits only where it has
    four or more."""
    most_nodes: PositiveInt = 500
    """Most beginnings of candidates that are run for the exact exposure of one secret."""
    max_leaking: PositiveInt = 64
    """Most leaking strings that the later questions examine, chosen at random."""
    damaged: tuple[PositiveInt, ...] = (1, 4)
    """Numbers of tokens of the prefix that are replaced by others."""
    draws: PositiveInt = 3
    """Replacements of each number that are tried."""
    deletion_budget: PositiveInt = 200
    """Most prompts tried for each string when tokens are deleted from its prefix one by one."""
    ranked_sequences: PositiveInt = 8
    """Most leaking strings by which components are ranked."""
    most_forwards: NonNegativeFloat = 400
    """Most that a ranking may cost, in forward passes of the strings."""
    bypass_mode: BypassMode = "identity"
    """How the attention of layers is bypassed when help is looked for."""
    edited_neurons: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 30)
    """How many of the first neurons of the ranking are edited when help is looked for."""
    max_others: PositiveInt = 64
    """Most strings that do not leak and must not begin to, chosen at random."""
    n_random: NonNegativeInt = 1
    """Random edits of each kind of control."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if "leak" not in self.steps:
            raise OptionError(
                f"steps={','.join(self.steps)}: the other questions need the answer to leak; add it."
            )
        if self.csv is not None and self.csv.suffix.lower() != ".csv":
            raise OptionError(f"csv={self.csv}: give a file whose name ends in .csv.")
        self.limit(1)

    def limit(self, n: int) -> float | None:
        """Return how many of `n` strings may leak; None: any number.

        Raises:
            OptionError: `fail_above` is neither a count nor a share.

        >>> AuditOptions(fail_above="2").limit(50), AuditOptions(fail_above="2%").limit(50)
        (2.0, 1.0)
        >>> AuditOptions(fail_above="0.1").limit(50)
        5.0
        """
        if self.fail_above is None:
            return None
        text = self.fail_above.strip()
        if re.fullmatch(r"\d+", text):
            return float(text)
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return float(text[:-1]) / 100 * n
        if re.fullmatch(r"0?\.\d+", text):
            return float(text) * n
        raise OptionError(
            f"fail_above={self.fail_above!r} is neither a number of strings nor a share of them: give a "
            "whole number, a percentage such as 2%, or a share below 1 such as 0.02."
        )

    def sampling(self) -> Sampling:
        """Return how tokens are sampled."""
        from memlens.recall.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p)

    def exposure(self) -> ExposureOptions:
        """Return the options of `exposure`."""
        from memlens.instruments.detect.exposure import ExposureOptions

        return ExposureOptions(most_nodes=self.most_nodes, n_samples=200, seed=self.seed)

    def mitigation(self) -> MitigationOptions:
        """Return the options of `evaluate_mitigation`."""
        from memlens.instruments.edit.mitigation import MitigationOptions

        return MitigationOptions(
            shorter=(0.5,), replaced=(1,), near=self.near, sampling=self.sampling(),
            n_samples=self.n_samples, probability=self.probability, n_random=self.n_random, seed=self.seed,
        )  # fmt: skip
