"""What `check_model` returns: one entry per comparison, shown as a table."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from memlens.errors import ModelLoadError

Status = Literal["ok", "failed", "refused", "ignored", "absent", "slow", "not compared"]
"""`ignored`: the site shows its activation, but what is written to it has no effect. `refused`: the site does
not do what its name claims, so hooks on it are errors; the rest of the model is right."""


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        name: What was compared, such as `"logits"` or `"site z"`.
        status: `"ok"`, or what was found instead (`Status`).
        difference: Root mean square of the difference relative to the reference's; NaN where none was taken.
        allowed: The largest `difference` that passes.
        layer: The first layer that differs, or None.
        note: One sentence.
    """

    name: str
    status: Status
    difference: float = float("nan")
    allowed: float = float("nan")
    layer: int | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """What `check_model` found; shows as a table.

    Attributes:
        model: The model's name.
        dtype: The precision in which it was checked.
        checks: One entry per comparison.
    """

    model: str
    dtype: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """The comparisons that failed."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_frame(self) -> pd.DataFrame:
        """Return one row per comparison."""
        return pd.DataFrame([vars(check) for check in self.checks])

    def raise_if_failed(self) -> None:
        """Raise `ModelLoadError` with the first failure, if there is one."""
        for check in self.failures:
            where = "" if check.layer is None else f", first in layer {check.layer}"
            size = f" by {check.difference:.2g} (allowed: {check.allowed:.2g})"
            size = size if check.difference == check.difference else ""
            raise ModelLoadError(
                f"{self.model!r} in {self.dtype} fails the check of its {check.name}{where}: "
                f"{check.note}{size}. Numbers from it would be wrong, so it is refused; try the other "
                "backend."
            )

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.failures)} failed"
        rows = [
            (
                check.name,
                check.status,
                "" if check.difference != check.difference else f"{check.difference:.1e}",
                "" if check.layer is None else str(check.layer),
                check.note,
            )
            for check in self.checks
        ]
        table = [("check", "status", "difference", "layer", "note"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in table]
        return "\n".join([f"{self.model} ({self.dtype}): {verdict}", *lines])

    def _repr_html_(self) -> str:
        head = f"<h4>{html.escape(self.model)} ({self.dtype}): {'ok' if self.ok else 'failed'}</h4>"
        return head + self.to_frame().to_html(index=False, float_format="{:.1e}".format, na_rep="")
