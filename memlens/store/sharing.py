"""Which parts of a run a process does: its share in a job array, or whatever nobody has claimed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from memlens.errors import OptionError, UnfinishedError
from memlens.store.claims import Claims

_LOG = logging.getLogger(__name__)

Part = tuple[int, int] | Literal["auto", "slurm"] | str
"""(i, n) or "i/n": each n-th part beginning with the i-th (from 0); "auto": any that is unclaimed; "slurm":
(i, n) of the Slurm job array that this process belongs to."""

_LOOK = 3.0
"""Seconds between looks at claims of others."""
_SHOWN = 12
"""How many missing parts an error names."""


def parse_part(part: Part, environment: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Return (i, n); None for "auto".

    Args:
        part: As above.
        environment: For "slurm"; that of this process by default.

    Raises:
        OptionError: It is something else, i is not from 0 to n - 1, or there is no job array.

    Example:
        >>> parse_part("3/16"), parse_part("auto")
        ((3, 16), None)
        >>> parse_part("slurm", {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1",
        ...                      "SLURM_ARRAY_TASK_COUNT": "16"})
        (3, 16)
    """
    if part == "auto":
        return None
    if part == "slurm":
        return _of_slurm(os.environ if environment is None else environment)
    words = part.split("/") if isinstance(part, str) else [str(number) for number in part]
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise OptionError(f"part={part!r} is not clear: give I/N with I from 0 to N - 1, as in 2/8, or auto.")
    i, n = map(int, words)
    if i >= n:
        raise OptionError(
            f"part={part!r} is out of range: of {n} parts there are 0/{n} to {max(n - 1, 0)}/{n}."
        )
    return i, n


def _of_slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    numbers = [environment.get(name, "") for name in names]
    first, step = (
        environment.get(f"SLURM_ARRAY_TASK_{name}") or default
        for name, default in (("MIN", "0"), ("STEP", "1"))
    )
    for name, value in zip((*names, "SLURM_ARRAY_TASK_MIN"), (*numbers, first), strict=True):
        if not value.isdecimal():
            raise OptionError(
                f"part='slurm' needs a job array, and {name} is {value!r}: start it by sbatch --array=0-15, "
                "or give part='I/N'."
            )
    place, rest = divmod(int(numbers[0]) - int(first), int(step) if step.isdecimal() and int(step) else 1)
    if rest or not 0 <= place < int(numbers[1]):
        raise OptionError(
            f"the job array has gaps ({names[0]}={numbers[0]} with {numbers[1]} tasks from {first}): give "
            "one without, such as --array=0-15, or part='auto'."
        )
    return place, int(numbers[1])


def do_share(
    part: Part,
    names: Sequence[str],
    folder: str | Path,
    done: Callable[[str], bool],
    work: Callable[[str], None],
) -> None:
    """Do this process's share of a run's parts, leaving out what others have done or work on.

    At the end it waits for parts that somebody has claimed only as long as it takes to see whether the claim
    is alive (left to its owner) or dead (the part is done here).

    Args:
        part: The share.
        names: All parts of the run.
        folder: The run's folder.
        done: Whether a part, given its name, is done.
        work: Does a part.

    Raises:
        OptionError: See `parse_part`.
        WriteError: The folder cannot be written to.
    """
    share = parse_part(part)
    own = list(names) if share is None else list(names)[share[0] :: share[1]]
    if share is not None and not own:
        _LOG.warning("there are only %d parts, so that part %d of %d is empty", len(names), *share)
    with Claims(folder) as claims:
        while own := [name for name in own if not done(name)]:
            standing, taken = claims.standing(own), False
            for name in own:
                if name in standing and not claims.is_dead(standing[name]):
                    continue
                with claims.taking(name) as mine:
                    if mine and not done(name):
                        work(name)
                        taken = True
            if taken:
                continue
            waited_for = [claim for claim in claims.standing(own).values() if not claims.is_alive(claim)]
            if not waited_for and len(claims.standing(own)) == len(own):
                break
            if waited_for:
                _LOG.info("waiting to see whether %s still works on %s", waited_for[0], waited_for[0].part)
                time.sleep(_LOOK)
        claims.clear(set(names), done)


def check_finished(names: Sequence[str], folder: str | Path, done: Callable[[str], bool]) -> None:
    """Raise `UnfinishedError` unless all parts are done; its message names those that are missing.

    Args:
        names: All parts.
        folder: The run's folder.
        done: Whether a part is done.
    """
    missing = [name for name in names if not done(name)]
    if not missing:
        return
    standing = Claims(folder).standing(missing)
    shown = [
        f"{name} (claimed by {standing[name]})" if name in standing else name for name in missing[:_SHOWN]
    ]
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise UnfinishedError(
        f"{len(names) - len(missing)} of {len(names)} parts in {folder} are done; missing: "
        f"{', '.join(shown)}{more}. Let the other workers finish, or run it again with part='auto'.",
        missing,
    )
