"""Weights kept on the way: an organism's checkpoints by training step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from memlens.errors import OptionError, ResultError
from memlens.models.quiet import quiet

CHECKPOINTS = "checkpoints"
"""The folder in an organism's own that holds its snapshots."""

_LINEAR = 10
_HALVINGS = 6


def snapshot_steps(n_steps: int) -> tuple[int, ...]:
    """Return the steps at which a run's weights are kept: 0, then doubling, then every tenth of the run.

    >>> snapshot_steps(2562)
    (0, 4, 8, 16, 32, 64, 128, 256, 512, 769, 1025, 1281, 1537, 1793, 2050, 2306, 2562)
    >>> snapshot_steps(4)
    (0, 1, 2, 3, 4)
    """
    tenths = [round(n_steps * k / _LINEAR) for k in range(1, _LINEAR + 1)]
    early = [n_steps // (_LINEAR * 2**k) for k in range(1, _HALVINGS + 1)]
    return tuple(sorted({0, *early, *tenths}))


@dataclass(frozen=True)
class Snapshots:
    """Where and at which steps a run's weights are kept: `<folder>/step<N>`, a float16 checkpoint each.

    A step counts the updates made: step 0 has the weights that training began from. Keeping weights changes
    nothing about the run.

    Attributes:
        folder: that holds them; it is made.
        steps: numbers of updates.
    """

    folder: Path
    steps: tuple[int, ...]

    def check(self, n_steps: int) -> None:
        """Raise `OptionError` where the run of `n_steps` steps never comes to one of the steps."""
        beyond = [step for step in self.steps if not 0 <= step <= n_steps]
        if beyond:
            raise OptionError(
                f"snapshots at step {beyond[0]} cannot be kept: the run has the steps 0 to {n_steps}."
            )

    def check_kept(self, step: int) -> None:
        """Raise `ResultError` where a run that stands at `step` has passed one that was not kept."""
        lost = [s for s in self.steps if s < step and not (self._path(s) / "model.safetensors").is_file()]
        if lost:
            raise ResultError(
                f"the run stands at step {step} and did not keep the weights of step {lost[0]}: start over "
                "with resume=False, or leave snapshots out."
            )

    def keep(self, model: PreTrainedModel, step: int) -> None:
        """Write the weights if `step` is one of the steps; the folder of a step is written whole or not."""
        if step not in self.steps:
            return
        path = self._path(step)
        part = path.with_name(path.name + ".partial")
        part.mkdir(parents=True, exist_ok=True)
        with quiet():
            deepcopy(model).cpu().half().save_pretrained(part)  # pyright: ignore[reportCallIssue]
        (part / "generation_config.json").unlink(missing_ok=True)
        (part / "model.safetensors").chmod(0o644)
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step}"


def kept_steps(folder: str | Path) -> list[int]:
    """Return the training steps whose weights an organism's folder holds, in order."""
    found = (Path(folder) / CHECKPOINTS).glob("step*/model.safetensors")
    return sorted(int(path.parent.name.removeprefix("step")) for path in found)


def as_snapshots(folder: Path, steps: Sequence[int]) -> Snapshots | None:
    """Return `Snapshots`, or None where there are no steps."""
    return Snapshots(folder, tuple(sorted(set(steps)))) if steps else None
