"""Sweeps in parts: each part is a pure function of what the sweep was asked, and one file.

The folder (`memlens.store.keyed_folder`) is identified by the contents of the model, the sequences, the
interventions and the metrics (`memlens.store.fingerprint`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memlens.files import replacing
from memlens.store.keyed_folder import KeyedFolder

Values = dict[str, np.ndarray]
_VERSION = 2
"""Of the format; version 1 was identified by fingerprints that could collide."""
_FEWEST = 16
"""Interventions per part, at least: each part runs the un-intervened model once."""


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
        folder: The folder; created if it is missing.
        about: What identifies the sweep: fingerprints and settings.
        shards: How it is cut into parts; a sweep that was begun keeps its own cut.

    Raises:
        OtherRunError: The folder belongs to another sweep, or another version of memlens wrote it.
        ResultError: Its manifest cannot be read.
    """

    shards: list[Shard]

    def __init__(self, folder: str | Path, about: Mapping[str, str], shards: Sequence[Shard]) -> None:
        cut = [[s.rows.start, s.rows.stop, s.items.start, s.items.stop] for s in shards]
        self.folder = KeyedFolder(
            folder, "sweep", about, version=_VERSION, parts="*.npz", content={"parts": cut}
        )
        self.shards = [Shard(range(a, b), range(c, d)) for a, b, c, d in self.folder.content["parts"]]

    def load(self, shard: Shard) -> tuple[Values, Values] | None:
        """Return a part's baseline and values; None if it is not finished.

        Raises:
            ResultError: The file is damaged, or is not the part that this sweep wrote.
        """
        path = self.folder.path / shard.name
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise self.folder.damaged(shard.name, error) from error
        self.folder.check(shard.name, found, found.pop("seal", None))
        base = {n[5:]: a for n, a in found.items() if n.startswith("base ")}
        return base, {n[6:]: a for n, a in found.items() if n.startswith("value ")}

    def save(self, shard: Shard, base: Values, values: Values) -> None:
        """Write a finished part, whole or not at all."""
        named = {f"base {n}": a for n, a in base.items()} | {f"value {n}": a for n, a in values.items()}
        seal = np.array(self.folder.seal(shard.name, named))
        with replacing(self.folder.path / shard.name) as part, part.open("wb") as file:
            np.savez(file, seal=seal, **named)  # pyright: ignore[reportArgumentType]
