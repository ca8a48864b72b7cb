"""Results as netCDF files: written atomically, read back exactly.

The file is plain netCDF-4 (HDF5), so that xarray, R, Julia or `ncdump` can read it without memlens. Values
and names that netCDF cannot store directly are encoded and marked: attributes also as one JSON string
(`memlens_attrs`), strings with a NUL and object arrays of mixed types as JSON values, half precision as
single, names with a slash, a space or the like under another name (`memlens_names` has both). Numeric arrays
carry a checksum (Fletcher-32), so that a damaged file is detected. The values of large results are read when
they are needed, some sequences at a time (Dask).
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from memlens.errors import OptionError, ResultError
from memlens.files import (
    exact_json,
    expanded,
    json_text,
    parsed_exact,
    parsed_json,
    parsing,
    replacing,
    write_atomically,
)
from memlens.results.result import Result
from memlens.results.statistics.resampling import slices

FORMAT = "memlens result 1"
_ATTRS, _DTYPE, _JSON_VALUES = "memlens_attrs", "memlens_dtype", "memlens_json_values"
_NAMES = "memlens_names"
_PLAIN_NAME = re.compile(r"(?!.*_nc4_non_coord_|phony_dim_)\w[^\s/\0-\x1f\x7f\ud800-\udfff]*")
"""What netCDF, HDF5 and the list of coordinates (names between spaces) take as it is."""
_COMPRESSED, _CHUNK = 4096, 2**20
"""Bytes from which on a variable is compressed, and of a chunk in the file."""
_LAZY, _READ = 2**29, 2**25
"""Bytes from which on a result stays in its file, and bytes that are read at once of one that does."""
_ROW_GROUP = 2**20
"""Rows of a table that are written at once."""
_IN_MEMORY = 2**28
"""Bytes up to which a file is made in memory."""


_HAS_DASK = find_spec("dask") is not None


def load_result(path: str | Path, *, lazy: bool | None = None) -> Result:
    """Read a result that `Result.save` wrote.

    Args:
        path: A netCDF file.
        lazy: Whether the values stay in the file until they are needed, as Dask arrays in portions of
            sequences. Means, comparisons, figures and `to_parquet` go through them a portion at a time, so
            that a result may be larger than memory. By default they do from 512 MiB on, where Dask is
            installed (`pip install 'memlens[dask]'`).

    Returns:
        The result, equal to what was saved in values, dtypes, coordinates and attributes. Damage in the
        values of a lazy one is found when they are read.

    Raises:
        ResultError: When there is no such file, it is damaged, or memlens did not write it.
        OptionError: With `lazy=True`, if Dask is missing.

    Example:
        >>> import tempfile
        >>> data = xr.Dataset({"exact_match": ("sequence", [True, False])}, {"sequence": ["a", "b"]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Result.create(data, kind="recall").save(Path(folder) / "recall.nc")
        ...     load_result(path)["exact_match"].values.tolist()
        [True, False]
    """
    path = expanded(path)
    if not path.is_file():
        raise ResultError(f"{path} does not exist: give the path of a file that Result.save wrote.")
    if lazy and not _HAS_DASK:
        raise OptionError("lazy=True needs Dask: pip install 'memlens[dask]'.")
    with parsing(path, ResultError, "compute or copy it again"):
        file = xr.open_dataset(path, engine="h5netcdf")
        try:
            size = file.nbytes
            if size > max(2**30, 1000 * path.stat().st_size):
                raise ValueError(f"its {path.stat().st_size} bytes would unpack to {size / 2**30:.1f} GiB")
            lazy = stays_in_file(size) if lazy is None else lazy
            raw = file.chunk({"sequence": _rows_at_once(file)}) if lazy else file.load()
        finally:
            if not lazy:
                file.close()
        if raw.attrs.get("memlens_format", "") != FORMAT:
            raise ResultError(f"{path} is netCDF but not a memlens result: open it with xarray.open_dataset.")
        data = decode(raw)
        for variable in data.variables.values():
            if variable.nbytes <= _READ:
                variable.load()
        result = Result(data)
        if not (isinstance(result.kind, str) and isinstance(result.settings, dict)):
            raise ValueError("its kind is not a name, or its settings are not an object")
        return result


def stays_in_file(size: int) -> bool:
    """Whether the values of a result of so many bytes are left in its file until they are needed."""
    return size > _LAZY and _HAS_DASK


def rows_at_once(row_bytes: int) -> int:
    """Return how many sequences of so many bytes are read at once."""
    return max(1, _READ // max(1, row_bytes))


def _rows_at_once(file: xr.Dataset) -> int:
    """Return how many sequences to read at once: whole chunks of the file."""
    widest = max(file.variables.values(), key=lambda v: v.nbytes / max(1, v.sizes.get("sequence", 1)))
    rows = max(1, widest.sizes.get("sequence", 1))
    stored = (widest.encoding.get("chunksizes") or (1,))[0]
    return max(1, _READ * rows // max(1, widest.nbytes) // stored) * stored


@contextmanager
def _own_locks() -> Iterator[None]:
    """Keep xarray from asking an active Dask cluster for a lock on a file that only this process sees."""
    dask = sys.modules.get("dask")
    with nullcontext() if dask is None else dask.config.set(scheduler="threads"):
        yield


@contextmanager
def _own_threads() -> Iterator[None]:
    """Let Dask work in threads that have ended at the end: one that still writes makes a file anew."""
    dask = sys.modules.get("dask")
    if dask is None:
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, dask.config.set(pool=pool):
        yield


@_own_locks()
def save_dataset(data: xr.Dataset, path: str | Path) -> Path:
    """Write `data` to `path` atomically.

    A small file is made in memory, since the HDF5 library crashes on a full disk. A large one is written a
    portion at a time, where the disk has space for all of its values.

    Raises:
        WriteError: The file cannot be written.
    """
    encoded = encode(data)
    for name, variable in encoded.variables.items():
        if any(len(sizes) > 1 for sizes in variable.chunksizes.values()):
            rows = rows_at_once(variable.nbytes // max(1, len(variable)))
            encoded[name] = variable.chunk({**dict.fromkeys(variable.dims, -1), variable.dims[0]: rows})
    how: dict[str, Any] = {"engine": "h5netcdf", "encoding": _compression(encoded)}
    if encoded.nbytes <= _IN_MEMORY:
        return write_atomically(path, encoded.to_netcdf(**how))
    with replacing(path) as part:
        if (free := shutil.disk_usage(part.parent).free) < encoded.nbytes:
            needed = f"{encoded.nbytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
            raise OSError(errno.ENOSPC, needed)
        with _own_threads():
            encoded.to_netcdf(part, **how)
    return expanded(path)


def save_table(result: Result, path: str | Path) -> Path:
    """Write `result.to_frame("all")` to a parquet file atomically, in row groups of some sequences each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = result.data
    sites = math.prod(n for dim, n in data.sizes.items() if dim != "sequence")
    # Of texts, the type is that of the whole: a portion may hold nothing but None.
    types = {
        str(name): pa.array(variable.values.ravel(), from_pandas=True).type
        for name, variable in data.variables.items()
        if variable.dtype.kind == "O"
    }
    attrs = json_text({str(key): value for key, value in data.attrs.items()})
    with replacing(path) as part, ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        for rows in [*slices(data.sizes["sequence"], max(1, _ROW_GROUP // max(1, sites)))] or [slice(None)]:
            frame = result.isel(sequence=rows).to_frame("all")
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                fields = [field.with_type(types.get(field.name, field.type)) for field in table.schema]
                schema = pa.schema(fields, {**(table.schema.metadata or {}), b"PANDAS_ATTRS": attrs})
                writer = files.enter_context(pq.ParquetWriter(part, schema))
            writer.write_table(table.cast(writer.schema))
    return expanded(path)


def encode(data: xr.Dataset) -> xr.Dataset:
    """Return `data` in types and under names that netCDF can store; `decode` is the inverse."""
    encoded = data.copy()
    for name in encoded.variables:
        encoded[name] = _encode_variable(encoded[name].variable)
    stored = _stored_names([*dict.fromkeys([*data.variables, *data.dims])])
    encoded = encoded.rename(stored)
    names = {_NAMES: exact_json([*stored.items()])} if stored else {}
    encoded.attrs = {**_encode_attrs(data.attrs), **names, "memlens_format": FORMAT}
    return encoded


def _stored_names(names: list[Any]) -> dict[Any, str]:
    """Return new names for those that netCDF cannot hold, different from all others."""
    taken, stored = set(names), {}
    for name in names:
        if not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name)):
            plain = "named_" + re.sub(r"\W|_nc4_non_coord_", "_", str(name))
            while plain in taken:
                plain += "_"
            taken.add(plain)
            stored[name] = plain
    return stored


def decode(raw: xr.Dataset) -> xr.Dataset:
    """Return the dataset that `encode` was given."""
    data = raw.copy()
    for name in raw.variables:
        data[name] = _decode_variable(raw[name].variable)
        data[name].encoding = {}
    data = data.rename({stored: name for name, stored in parsed_json(raw.attrs.get(_NAMES, "[]"))})
    data.attrs = parsed_exact(raw.attrs[_ATTRS], dict)
    data.encoding = {}
    return data


def _encode_variable(variable: xr.Variable) -> xr.Variable:
    values: Any = variable.data if variable.dtype.kind in "biuf" else np.asarray(variable.values)
    marks: dict[str, Any] = {}
    if values.dtype.kind in "OUT":
        marks[_DTYPE] = values.dtype.str if values.dtype.kind == "U" else "O"
        flat = [value.item() if isinstance(value, np.generic) else value for value in values.ravel()]
        if not all(isinstance(value, str) and _is_plain(value) for value in flat):
            flat, marks[_JSON_VALUES] = [exact_json(value, default=_refused) for value in flat], 1
        values = np.array([*flat, None], dtype=object)[:-1].reshape(values.shape)
    elif values.dtype == np.float16:
        marks[_DTYPE], values = values.dtype.str, values.astype(np.float32)
    return xr.Variable(variable.dims, values, {**_encode_attrs(variable.attrs), **marks})


def _decode_variable(variable: xr.Variable) -> xr.Variable:
    attrs = dict(variable.attrs)
    values: Any = variable.data if variable.dtype.kind in "biuf" else variable.values
    if _JSON_VALUES in attrs:
        flat = [parsed_exact(value) for value in values.ravel()]
        values = np.array([*flat, None], dtype=object)[:-1].reshape(values.shape)
    if _DTYPE in attrs:
        values = values.astype(attrs[_DTYPE])
    return xr.Variable(variable.dims, values, parsed_exact(attrs[_ATTRS], dict))


def _encode_attrs(attrs: Mapping[Any, Any]) -> dict[str, str | int | float]:
    plain = {
        str(key): value
        for key, value in attrs.items()
        if key and _is_plain(str(key))
        if type(value) in (int, float) or (isinstance(value, str) and value and _is_plain(value))
    }
    small = {key: value for key, value in plain.items() if type(value) is not int or abs(value) < 2**63}
    return {**small, _ATTRS: exact_json(dict(attrs), default=_refused)}


def _is_plain(text: str) -> bool:
    """Return whether HDF5 stores `text` unchanged: no NUL (which ends a string) and no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _refused(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise ResultError(
        f"an attribute of type {type(value).__name__} cannot be saved: use text, numbers, lists or dicts."
    )


def _compression(data: xr.Dataset) -> dict[str, dict[str, Any]]:
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in data.variables.items():
        if variable.dtype.kind in "iufb" and variable.ndim and variable.size:
            encoding[str(name)] = {"fletcher32": True}
            if variable.nbytes > _COMPRESSED:
                encoding[str(name)] |= {"zlib": True, "complevel": 4, "shuffle": True}
            if variable.nbytes > _IN_MEMORY:
                rows = min(len(variable), max(1, _CHUNK * len(variable) // variable.nbytes))
                encoding[str(name)]["chunksizes"] = (rows, *variable.shape[1:])
    return encoding
