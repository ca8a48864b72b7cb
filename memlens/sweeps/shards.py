"""The parts of a sweep in a folder: how it is cut, one file for each part, and how they are joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memlens.errors import ResultError
from memlens.files import exact_json, expanded, parsed_exact, replacing
from memlens.forward.metrics import Metric
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.store.keyed_folder import KeyedFolder, read_arrays, read_manifest
from memlens.store.sharing import check_finished
from memlens.sweeps.engine.schedule import joined
from memlens.sweeps.labels import Grid, Values

_PARTS_VERSION = 2
"""The version of the format; version 1 used fingerprints that could collide."""
_FEWEST = 16
"""The smallest number of interventions per part, since each part runs the unchanged model once."""


_SHARD_FLOPS = {"cpu": 1e12, "cuda": 1e15}
"""The largest cost of a saved part: about ten seconds."""


def part_limit(device: str) -> float:
    """Return how much a part may cost on a type of device, in FLOP."""
    return _SHARD_FLOPS.get(device, _SHARD_FLOPS["cuda"])


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
    """Divide a sweep into parts of about the same cost.

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

    Raises:
        OtherRunError: The folder belongs to another sweep, or another version of memlens wrote it.
        ResultError: Its manifest cannot be read.
    """

    folder: KeyedFolder
    shards: list[Shard]

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, str],
        shards: Sequence[Shard],
        described: Mapping[str, Any] | None = None,
    ) -> None:
        cut = [[s.rows.start, s.rows.stop, s.items.start, s.items.stop] for s in shards]
        self.folder = KeyedFolder(
            folder, "sweep", about, version=_PARTS_VERSION, parts="*.npz", content={"parts": cut},
            described=described,
        )  # fmt: skip
        self.shards = [Shard(range(a, b), range(c, d)) for a, b, c, d in self.folder.content["parts"]]

    def load(self, shard: Shard) -> tuple[Values, Values] | None:
        """Return a part's baseline and values; None if it is not finished.

        Raises:
            ResultError: The file is damaged, or is not the part that this sweep wrote.
        """
        path = self.folder.path / shard.name
        if not path.exists():
            return None
        with self.folder.parsing(shard.name):
            found = read_arrays(path)
            self.folder.check(shard.name, found, found.pop("seal", None))
        base = {n[5:]: a for n, a in found.items() if n.startswith("base ")}
        return base, {n[6:]: a for n, a in found.items() if n.startswith("value ")}

    def is_done(self, name: str) -> bool:
        """Whether a part's file is there, given its name."""
        return (self.folder.path / name).exists()

    def joined(self) -> tuple[Values, Values]:
        """Return the baseline and the values of all parts, which must be finished."""
        parts = [(shard, self.load(shard)) for shard in self.shards]
        return assembled([(shard, *done) for shard, done in parts if done is not None])

    def save(self, shard: Shard, base: Values, values: Values) -> None:
        """Write a finished part, whole or not at all."""
        named = {f"base {n}": a for n, a in base.items()} | {f"value {n}": a for n, a in values.items()}
        seal = np.array(self.folder.seal(shard.name, named))
        with replacing(self.folder.path / shard.name) as part, part.open("wb") as file:
            np.savez(file, seal=seal, **named)  # pyright: ignore[reportArgumentType]


def assembled(parts: Sequence[tuple[Shard, Values, Values]]) -> tuple[Values, Values]:
    """Join parts, which are ordered by their sequences and then by their interventions."""
    rows: dict[range, list[tuple[Values, Values]]] = {}
    for shard, base, values in parts:
        rows.setdefault(shard.rows, []).append((base, values))
    _, bases, found = parts[0]
    base = {n: joined([some[0][0][n] for some in rows.values()]) for n in bases}
    values = {
        n: joined([np.concatenate([v[n] for _, v in some], 1) for some in rows.values()]) for n in found
    }
    return base, values


_FRAME = "frame.nc"
"""The labels of a result whose parts several processes make, for `gather`."""


def save_frame(
    folder: str | Path, frame: Result, grid: Grid, per_token: bool, metrics: Sequence[Metric]
) -> None:
    """Save what a result holds besides its values, unless the folder has it.

    Args:
        folder: The sweep's folder.
        frame: The result with `Grid.cells` as its only variable.
        grid: Where the interventions are in it.
        per_token: Whether values have a `target` dimension.
        metrics: The metrics, whose attributes the values get.
    """
    path = expanded(folder) / _FRAME
    if not path.exists():
        attrs = {metric.name: metric.attrs for metric in metrics}
        about = {"per_token": per_token, "keys": grid.keys, "in_order": grid.index is None, "attrs": attrs}
        Result(frame.data.assign_attrs(frame=exact_json(about))).save(path)


def parts_of(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the names of a sweep's parts, and of those that are missing.

    Raises:
        ResultError: The folder does not hold a sweep.
    """
    store = _opened(folder)
    names = [shard.name for shard in store.shards]
    return names, [name for name in names if not store.is_done(name)]


def _opened(folder: str | Path) -> ShardStore:
    manifest = expanded(folder) / "manifest.json"
    return ShardStore(folder, read_manifest(manifest, "sweep", _PARTS_VERSION)["about"], ())


def gather(folder: str | Path) -> Result:
    """Join the parts of a sweep that several processes made, without the model.

    The result is that of `sweep`, bit for bit. What an analysis adds to it (such as the normalized effects of
    `patch_activations`, or `float32_agreement`) is in the folder's `result.nc`, which the same call without
    `part` writes, as does the worker that finishes last: where it is there, it is read.

    Args:
        folder: The folder that was given as `out`, with `part` or `executor`.

    Raises:
        UnfinishedError: Parts are missing; the message names them, and who works on them.
        ResultError: The folder does not hold a sweep that was shared, or is damaged.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs, out = ml.load_sequences("zoo", model)[:2], tempfile.mkdtemp()
        >>> whole = ml.bypass_attention(model, seqs, out=out, part=(0, 1), progress=False)
        >>> ml.gather(out).data.equals(whole.data)
        True
    """
    folder = expanded(folder)
    store = _opened(folder)
    check_finished([shard.name for shard in store.shards], folder, store.is_done)
    if (folder / "result.nc").exists():
        return load_result(folder / "result.nc")
    if not (folder / _FRAME).exists():
        raise ResultError(
            f"{folder} has no {_FRAME}: its sweep was not shared by part= or executor=, so that the call "
            "that began "
            "it has to finish it."
        )
    frame = load_result(folder / _FRAME).data
    about = parsed_exact(frame.attrs.pop("frame"))
    index = None if about["in_order"] else frame["cell"].values
    frame = frame.drop_vars("cell")
    grid = Grid(about["keys"], {key: frame[key].values.tolist() for key in about["keys"]}, index)
    variables = grid.variables(*store.joined(), per_token=about["per_token"])
    data = frame.assign(variables)
    for name in variables:
        data[name].attrs = about["attrs"].get(name.removesuffix("_baseline"), {})
    return Result(data)
