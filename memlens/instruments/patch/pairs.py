"""Pairs of runs, clean and corrupt: the checks before them and the comparison after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from memlens.errors import FingerprintError, SequenceError, SiteError, check_option
from memlens.forward.metrics import MetricLike
from memlens.instruments.donors import donor_settings
from memlens.results.result import Result
from memlens.sequences.checks import check_is_set
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import model_fingerprint
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import token_labels
from memlens.sweeps.run import SweepOptions, kept, measure, sweep

DIRECTIONS = ("denoising", "noising")


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupt sequences, row by row, and the direction in which activations are moved.

    Attributes:
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix; the clean ones where only the donor differs.
        direction: "denoising" (clean activations are written into the corrupt run) or "noising".
        donor: The model whose activations are moved; None for the one that is patched.

    Raises:
        SequenceError: The rows differ in length, prefix length or targets.
    """

    clean: SequenceSet
    corrupt: SequenceSet
    direction: str
    donor: Any = None

    def __post_init__(self) -> None:
        clean, corrupt = self.clean, self.corrupt
        check_is_set(clean)
        check_is_set(corrupt)
        if len(clean) != len(corrupt):
            raise SequenceError(
                f"{len(clean)} clean and {len(corrupt)} corrupt sequences: they must be pairs, row by row."
            )
        same = (clean.lengths == corrupt.lengths) & (clean.prefix_len == corrupt.prefix_len)
        if not bool(same.all()):
            row = int(torch.nonzero(~same)[0])
            raise SequenceError(
                f"pair {row} differs in length or prefix length: clean and corrupt must have one shape."
            )
        if not torch.equal(clean.target_ids, corrupt.target_ids):
            row = int(torch.nonzero((clean.target_ids != corrupt.target_ids).any(-1))[0])
            raise SequenceError(
                f"pair {row} has different continuations: corrupt the prefix only (memlens.corrupt)."
            )

    @classmethod
    def of(
        cls, clean: SequenceSet, corrupt: SequenceSet | None, direction: str | None, donor: Any = None
    ) -> Pairs:
        """Return the pairs of corrupt sequences, of a donor on the clean ones, or of both.

        Raises:
            SequenceError: There is neither.
        """
        if corrupt is None and donor is None:
            raise SequenceError(
                "activations are taken from another run: give corrupt (memlens.corrupt) or donor=."
            )
        return cls(clean, clean if corrupt is None else corrupt, direction_of(direction, corrupt), donor)

    @property
    def source(self) -> SequenceSet:
        """The sequences whose activations are moved."""
        return self.clean if self.direction == "denoising" else self.corrupt

    @property
    def base(self) -> SequenceSet:
        """The sequences whose run is changed."""
        return self.corrupt if self.direction == "denoising" else self.clean

    @property
    def settings(self) -> dict[str, Any]:
        """What a result records about the pairs."""
        own = {"direction": self.direction, "corruption": dict(self.corrupt.attrs)}
        if self.donor is None:
            return own
        corruption = {} if self.corrupt is not self.clean else {"corruption": "none"}
        return own | corruption | donor_settings(self.donor)

    def sweep(
        self,
        model: Any,
        patches: Sequence[Intervention],
        metrics: Sequence[MetricLike],
        options: SweepOptions,
        *,
        kind: str,
        settings: Mapping[str, Any],
    ) -> Result:
        """Run patches on the base, and return the result of `sweep` with the comparison of `compared`."""
        settings = {**settings, **self.settings}
        result = sweep(model, self.base, patches, metrics, kind=kind, settings=settings, **options)
        per_token = options.get("per_token", False)
        return kept(self.compared(model, result, metrics, per_token=per_token), options.get("out"))

    def compared(
        self, model: Any, result: Result, metrics: Sequence[MetricLike], *, per_token: bool = False
    ) -> Result:
        """Measure the source run and add it to a result on the base; see `compare_runs`.

        Where both runs are of the same tokens by the same weights, the source run is the base run: their
        arithmetic may differ, and a difference that is rounding would be normalized by.
        """
        of_source = model if self.donor is None else self.donor
        source = measure(of_source, self.source, metrics, per_token=per_token)
        if self._is_donor(model):
            pairs = zip(self.source.rows(), self.base.rows(), strict=True)
            same = np.array([one == other for one, other in pairs])
            for name, values in source.items():
                values[same] = result.baseline(name).values[same]
        return compare_runs(result, model, source, self.direction, self.clean)

    def _is_donor(self, model: Any) -> bool:
        """Whether activations come from the model itself, or an equal one."""
        if self.donor is None:
            return True
        with suppress(FingerprintError):
            return model_fingerprint(self.donor) == model_fingerprint(model)
        return False


def direction_of(direction: str | None, corrupt: object) -> str:
    """Return a direction; by default denoising, and noising where a donor takes the part of the corrupt run.

    Raises:
        OptionError: It is unknown.
    """
    direction = direction or ("noising" if corrupt is None else "denoising")
    check_option("direction", direction, DIRECTIONS)
    return direction


def checked_positions(seqs: SequenceSet, positions: Sequence[int] | None) -> list[int]:
    """Return the given positions; by default all that can reach a target.

    Raises:
        SiteError: The sequences do not have such a position.
    """
    last = int(seqs.lengths.max()) - 1  # the last token predicts nothing
    for p in positions or ():
        if not 0 <= p <= last:
            raise SiteError(f"position {p} does not exist: the sequences have positions 0 to {last}.")
    return list(range(last) if positions is None else positions)


def compare_runs(
    result: Result, model: Any, source: Mapping[str, np.ndarray], direction: str, clean: SequenceSet
) -> Result:
    """Add both runs' metrics by name, the normalized effect of the first metric, and the tokens as text.

    The baseline of the result is the base run; `source` holds the metrics of the source run.
    """
    data = result.data
    of_source, of_base = ("clean", "corrupt") if direction == "denoising" else ("corrupt", "clean")
    found: dict[str, xr.Variable] = {}  # the coordinates are one and the same, which variables do not compare
    for name, values in source.items():
        found[f"{name}_{of_source}"] = xr.Variable(("sequence", "target")[: values.ndim], values)
        found[f"{name}_{of_base}"] = data[f"{name}_baseline"].variable
    first = next(iter(source))
    low, high = found[f"{first}_corrupt"], found[f"{first}_clean"]
    span = high - low
    effect = (data[first].variable - low) / span.where(span != 0)
    found["normalized_effect"] = effect = xr.Variable(effect.dims, effect.data)
    if "position" in data.dims:
        position = data["position"].variable.to_base_variable()
        in_sequence = position < xr.Variable("sequence", clean.lengths.numpy() - 1)
        found["normalized_effect"] = effect.where(in_sequence)
        found |= {name: data[name].variable.where(in_sequence) for name in source}
        labels = token_labels(model, clean.tokens, clean.mask)
        if labels is not None:
            found["token"] = xr.Variable(("sequence", "position"), labels[:, position.values])
    return Result(data.assign(found))
