"""The parts of a sweep in a folder: how it is cut, one file for each part, and how they are joined again."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memlens.errors import ResultError
from memlens.files import exact_json, expanded, parsed_exact, replacing
from memlens.forward.metrics import Metric
from memlens.results.result import Result
from memlens.results.storage import load_result, rows_at_once, stays_in_file
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

    def joined(self, stretch: float = 1.0) -> tuple[Values, Values]:
        """Return the baseline and the values of all parts, which must be finished; see `Parts`."""
        parts = Parts(self, stretch)
        for shard in self.shards:
            parts.add(shard, *self.finished(shard))
        return parts.joined()

    def finished(self, shard: Shard) -> tuple[Values, Values]:
        """Return a part's baseline and values.

        Raises:
            ResultError: It is missing or damaged, or is not the part that this sweep wrote.
        """
        done = self.load(shard)
        if done is None:
            raise ResultError(f"{self.folder.path / shard.name} is gone: run the sweep again.")
        return done

    def save(self, shard: Shard, base: Values, values: Values) -> None:
        """Write a finished part, whole or not at all."""
        named = {f"base {n}": a for n, a in base.items()} | {f"value {n}": a for n, a in values.items()}
        seal = np.array(self.folder.seal(shard.name, named))
        with replacing(self.folder.path / shard.name) as part, part.open("wb") as file:
            np.savez(file, seal=seal, **named)  # pyright: ignore[reportArgumentType]


class Parts:
    """The parts of a sweep as they come, joined: in memory, or read from their files when they are needed.

    The values are left in the files where a result of their size would be (`load_result`).

    Args:
        store: Keeps the parts, which must be in it when the values are read.
        stretch: How many cells the result has for each intervention.
    """

    def __init__(self, store: ShardStore, stretch: float = 1.0) -> None:
        self._store, self._stretch = store, stretch
        self._groups: list[tuple[range, Values, list[Shard]]] = []
        self._held: list[tuple[Shard, Values, Values]] | None = []
        self._kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._cells = 0

    def add(self, shard: Shard, base: Values, values: Values) -> None:
        """Take the next part; parts are ordered by their sequences and then by their interventions."""
        if not self._groups or self._groups[-1][0] != shard.rows:
            self._groups.append((shard.rows, base, []))
        self._groups[-1][2].append(shard)
        self._cells += len(shard.rows) * len(shard.items)
        for name, array in values.items():
            tail, dtype = self._kinds.get(name, (array.shape[2:], array.dtype))
            self._kinds[name] = max(tail, array.shape[2:]), np.result_type(dtype, array.dtype)
        if self._held is not None:
            self._held.append((shard, base, values))
            if stays_in_file(round(self._cells * self._cell_bytes())):
                self._held = None

    def joined(self) -> tuple[Values, Values]:
        """Return the baseline `[seq, …]` and the values `[seq, intervention, …]` of each metric.

        Values that are left in the files are Dask arrays, in blocks of some sequences.
        """
        base = {n: joined([own[n] for _, own, _ in self._groups]) for n in self._groups[0][1]}
        return base, self._left() if self._held is None else _assembled(self._held)

    def _cell_bytes(self) -> float:
        return self._stretch * sum(math.prod(tail) * dtype.itemsize for tail, dtype in self._kinds.values())

    def _left(self) -> dict[str, Any]:
        import dask.array as da
        from dask.delayed import delayed

        n_items = self._groups[0][2][-1].items.stop
        found: dict[str, list[Any]] = {name: [] for name in self._kinds}
        for rows in self._blocks(n_items):
            # One task reads all metrics of a block, so that each part is read once when a result is written.
            block: Any = delayed(partial(self._read, rows))()
            for name, (tail, dtype) in self._kinds.items():
                found[name].append(da.from_delayed(block[name], (len(rows), n_items, *tail), dtype))
        return {name: da.concatenate(blocks) for name, blocks in found.items()}

    def _blocks(self, n_items: int) -> Iterator[range]:
        """Yield the rows that are read at once: whole parts, unless they are many times too large."""
        most = rows_at_once(round(n_items * self._cell_bytes()))
        start = stop = 0
        for rows, _, _ in self._groups:
            if stop > start and rows.stop - start > most:
                yield range(start, stop)
                start = stop
            stop = rows.stop
            while stop - start > _LARGEST_BLOCK * most:
                yield range(start, start + _LARGEST_BLOCK * most)
                start += _LARGEST_BLOCK * most
        if stop > start:
            yield range(start, stop)

    def _read(self, rows: range) -> Values:
        first = bisect_right(self._groups, rows.start, key=lambda group: group[0].start) - 1
        last = bisect_left(self._groups, rows.stop, key=lambda group: group[0].start)
        parts = []
        for of, _, shards in self._groups[first:last]:
            own = slice(max(rows.start - of.start, 0), rows.stop - of.start)
            for shard in shards:
                _, values = self._store.finished(shard)
                parts.append((shard, {}, {n: values[n][own] for n in self._kinds}))
        return {
            name: _widened(array, self._kinds[name][0]).astype(self._kinds[name][1], copy=False)
            for name, array in _assembled(parts).items()
        }


_LARGEST_BLOCK = 8
"""How many times larger than what is read at once a block of whole parts may be."""


def _assembled(parts: Sequence[tuple[Shard, Values, Values]]) -> Values:
    """Join the values of parts, which are ordered by their sequences and then by their interventions."""
    rows: dict[range, list[Values]] = {}
    for shard, _, values in parts:
        rows.setdefault(shard.rows, []).append(values)
    return {
        n: joined([np.concatenate([values[n] for values in some], 1) for some in rows.values()])
        for n in parts[0][2]
    }


def _widened(array: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
    """Pad the axes after the interventions with NaN, as `joined` does."""
    pads = [(0, 0), (0, 0), *((0, size - own) for size, own in zip(tail, array.shape[2:], strict=True))]
    return np.pad(array, pads, constant_values=np.nan) if array.shape[2:] != tail else array


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

    The result is that of `sweep`, bit for bit; the values of a large one stay in the parts until they are
    needed, as those of `load_result` stay in its file. What an analysis adds to it (such as the normalized
    effects of `patch_activations`, or `float32_agreement`) is in the folder's `result.nc`, which the same
    call without `part` writes, as does the worker that finishes last: where it is there, it is read.

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
            "that began it has to finish it."
        )
    frame = load_result(folder / _FRAME).data
    about = parsed_exact(frame.attrs.pop("frame"))
    index = None if about["in_order"] else frame["cell"].values
    frame = frame.drop_vars("cell")
    grid = Grid(about["keys"], {key: frame[key].values.tolist() for key in about["keys"]}, index)
    variables = grid.variables(*store.joined(grid.stretch), per_token=about["per_token"])
    data = frame.assign(variables)
    for name in variables:
        data[name].attrs = about["attrs"].get(name.removesuffix("_baseline"), {})
    return Result(data)
