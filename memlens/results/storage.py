"""Results as netCDF files: written atomically, read back exactly.

The file is plain netCDF-4 (HDF5), so that xarray, R, Julia or `ncdump` can read it without memlens. Values
and names that netCDF cannot store directly are encoded and marked: attributes also as one JSON string
(`memlens_attrs`), strings with a NUL and object arrays of mixed types as JSON values, half precision as
single, names with a slash, a space or the like under another name (`memlens_names` has both). Numeric arrays
carry a checksum (Fletcher-32), so that a damaged file is detected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from memlens.errors import ResultError
from memlens.files import exact_json, expanded, parsed_exact, parsed_json, parsing, write_atomically
from memlens.results.result import Result

FORMAT = "memlens result 1"
_ATTRS, _DTYPE, _JSON_VALUES = "memlens_attrs", "memlens_dtype", "memlens_json_values"
_NAMES = "memlens_names"
_PLAIN_NAME = re.compile(r"(?!.*_nc4_non_coord_|phony_dim_)\w[^\s/\0-\x1f\x7f\ud800-\udfff]*")
"""What netCDF, HDF5 and the list of coordinates (names between spaces) take as it is."""
_LARGE = 4096


def load_result(path: str | Path) -> Result:
    """Read a result that `Result.save` wrote.

    Args:
        path: A netCDF file.

    Returns:
        The result, equal to what was saved in values, dtypes, coordinates and attributes.

    Raises:
        ResultError: When there is no such file, it is damaged, or memlens did not write it.

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
    with parsing(path, ResultError, "compute or copy it again"):
        with xr.open_dataset(path, engine="h5netcdf") as file:
            if (size := file.nbytes) > max(2**30, 1000 * path.stat().st_size):
                raise ValueError(f"its {path.stat().st_size} bytes would unpack to {size / 2**30:.1f} GiB")
            raw = file.load()
        if raw.attrs.get("memlens_format", "") != FORMAT:
            raise ResultError(f"{path} is netCDF but not a memlens result: open it with xarray.open_dataset.")
        result = Result(decode(raw))
        if not (isinstance(result.kind, str) and isinstance(result.settings, dict)):
            raise ValueError("its kind is not a name, or its settings are not an object")
        return result


def save_dataset(data: xr.Dataset, path: str | Path) -> Path:
    """Write `data` to `path` atomically.

    The file is made in memory: the HDF5 library crashes on a full disk.

    Raises:
        WriteError: The file cannot be written.
    """
    encoded = encode(data)
    content = encoded.to_netcdf(engine="h5netcdf", encoding=_compression(encoded))
    return write_atomically(path, content)


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
    values, marks = np.asarray(variable.values), {}
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
    attrs, values = dict(variable.attrs), variable.values
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
            if variable.nbytes > _LARGE:
                encoding[str(name)] |= {"zlib": True, "complevel": 4, "shuffle": True}
    return encoding
