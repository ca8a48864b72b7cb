"""Sweeps in parts: each part is a pure function of what the sweep was asked, and one file.

A folder holds `manifest.json`, which names the model, the sequences, the interventions and the metrics by
their contents (`memlens.store.fingerprint`), and one file for each finished part. A part is written whole
or not at all, so a sweep that was stopped at any moment goes on with the parts that are missing.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memlens.errors import OtherSweepError, ResultError
from memlens.files import replacing, write_atomically

Values = dict[str, np.ndarray]
_FORMAT = "memlens sweep 1"
_FEWEST = 16
"""Interventions of a part: each part runs the un-intervened model once."""


@dataclass(frozen=True)
class Shard:
    """A part of a sweep: some sequences under some interventions.

    Attributes:
        rows: Row numbers of the sequences.
        items: Numbers of the interventions.
    """

    rows: range
    items: range

    @property
    def name(self) -> str:
        """The name of its file."""
        return (
            f"sequences-{self.rows.start:06d}-{self.rows.stop:06d}"
            f"-interventions-{self.items.start:06d}-{self.items.stop:06d}.npz"
        )


def cut(n_sequences: int, costs: Sequence[float], batch_size: int, most: float) -> list[Shard]:
    """Cut a sweep into parts that cost about the same.

    Args:
        n_sequences: How many sequences.
        costs: What each intervention costs on one sequence.
        batch_size: Sequences of a part.
        most: What a part should cost at most.

    >>> [(s.rows, s.items) for s in cut(3, [1.0] * 40, 2, 40.0)]
    [(range(0, 2), range(0, 20)), (range(0, 2), range(20, 40)), (range(2, 3), range(0, 40))]
    """
    shards = []
    for first in range(0, n_sequences, batch_size):
        rows = range(first, min(first + batch_size, n_sequences))
        start, cost = 0, 0.0
        for i, each in enumerate(costs):
            if i - start >= _FEWEST and cost + each * len(rows) > most:
                shards.append(Shard(rows, range(start, i)))
                start, cost = i, 0.0
            cost += each * len(rows)
        shards.append(Shard(rows, range(start, len(costs))))
    return shards


class ShardStore:
    """The finished parts of one sweep in a folder.

    Args:
        folder: Where they are; made where it is missing.
        about: What the sweep is of, part by part: fingerprints, settings.
        shards: How it is cut; a sweep that was begun goes on with its own cut.

    Raises:
        OtherSweepError: The folder holds another sweep.
        ResultError: Its manifest cannot be read.
    """

    folder: Path
    manifest: Path
    key: str
    shards: list[Shard]

    def __init__(self, folder: str | Path, about: Mapping[str, str], shards: Sequence[Shard]) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        if self.manifest.exists():
            self.key, self.shards = self._begun(about)
        else:
            self.key, self.shards = _key(about), list(shards)
            self._begin(about)

    def _begin(self, about: Mapping[str, str]) -> None:
        if self.folder.is_dir() and any(self.folder.glob("*.npz")):
            raise ResultError(
                f"{self.folder} holds parts of a sweep and no manifest.json: give an empty or a new folder."
            )
        parts = [[s.rows.start, s.rows.stop, s.items.start, s.items.stop] for s in self.shards]
        content = {"format": _FORMAT, "about": dict(about), "parts": parts}
        write_atomically(self.manifest, json.dumps(content, indent=1).encode())

    def _begun(self, about: Mapping[str, str]) -> tuple[str, list[Shard]]:
        try:
            content = json.loads(self.manifest.read_text())
            then = content["about"]
            shards = [Shard(range(a, b), range(c, d)) for a, b, c, d in content["parts"]]
            known = content["format"] == _FORMAT
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ResultError(
                f"{self.manifest} is damaged or no manifest of a sweep ({error}): give another folder."
            ) from error
        other = [name for name in about if then.get(name) != about[name]]
        if other or not known:
            what = " and ".join(other) if other else "the format"
            raise OtherSweepError(
                f"{self.manifest} is of another sweep ({what} differ): give another folder, "
                "or delete this one."
            )
        return _key(about), shards

    def load(self, shard: Shard) -> tuple[Values, Values] | None:
        """Return a part's baseline and values; None where it is not finished.

        Raises:
            ResultError: The file is damaged, or of another sweep than its manifest's.
        """
        path = self.folder / shard.name
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise ResultError(
                f"{path} is damaged ({error}): delete it and run again; the other parts are kept."
            ) from error
        base = {n[5:]: a for n, a in found.items() if n.startswith("base ")}
        values = {n[6:]: a for n, a in found.items() if n.startswith("value ")}
        shape = len(shard.rows), len(shard.items)
        fits = values and all(a.shape[:2] == shape for a in values.values())
        if str(found.get("key")) != self.key or not fits:
            raise ResultError(
                f"{path} does not fit {self.manifest}: it is of another sweep; delete it and run again."
            )
        return base, values

    def save(self, shard: Shard, base: Values, values: Values) -> None:
        """Write a finished part, whole or not at all."""
        with replacing(self.folder / shard.name) as part, part.open("wb") as file:
            named = {f"base {n}": a for n, a in base.items()} | {f"value {n}": a for n, a in values.items()}
            np.savez(file, key=np.array(self.key), **named)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())


def _key(about: Mapping[str, str]) -> str:
    return json.dumps(dict(about), sort_keys=True)
