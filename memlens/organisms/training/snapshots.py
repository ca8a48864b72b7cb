"""An organism's weights during training: checkpoints by training step."""

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
"""The folder of snapshots inside an organism's folder."""

_LINEAR = 10
_HALVINGS = 6


def snapshot_steps(n_steps: int) -> tuple[int, ...]:
    """Return the steps at which weights are kept: 0, then doubling, then every tenth of the run.

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
    """Where and at which steps a run's weights are kept: float16 checkpoints in `<folder>/step<N>`.

    Steps count updates: step 0 has the initial weights. Keeping weights does not change the run.

    Attributes:
        folder: The folder of the checkpoints; created if it does not exist.
        steps: Numbers of updates.
    """

    folder: Path
    steps: tuple[int, ...]

    def check(self, n_steps: int) -> None:
        """Raise `OptionError` if a run of `n_steps` steps does not reach one of the steps."""
        beyond = [step for step in self.steps if not 0 <= step <= n_steps]
        if beyond:
            raise OptionError(
                f"step {beyond[0]} cannot have a snapshot: the run has the steps 0 to {n_steps}."
            )

    def check_kept(self, step: int) -> None:
        """Raise `ResultError` if a run at `step` has passed a step whose weights were not kept."""
        lost = [s for s in self.steps if s < step and not (self._path(s) / "model.safetensors").is_file()]
        if lost:
            raise ResultError(
                f"the run is at step {step} and did not keep the weights of step {lost[0]}: start over with "
                "resume=False, or omit snapshots."
            )

    def keep(self, model: PreTrainedModel, step: int) -> None:
        """Write the weights if `step` is one of the steps; its folder is written atomically."""
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
    """Return the training steps whose weights are in an organism's folder, in order."""
    found = (Path(folder) / CHECKPOINTS).glob("step*/model.safetensors")
    return sorted(int(path.parent.name.removeprefix("step")) for path in found)


def as_snapshots(folder: Path, steps: Sequence[int]) -> Snapshots | None:
    """Return `Snapshots`, or None without steps."""
    return Snapshots(folder, tuple(sorted(set(steps)))) if steps else None
