"""Parquet files of sequences: columns `tokens` and `prefix_len` in addition to the table's own.

memlens' settings are in the file's metadata under the key `memlens` (JSON); other programs read the file as
an ordinary table.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from memlens.errors import ColumnError, FileFormatError
from memlens.files import exact_json, expanded, parsed_exact, parsing, replacing
from memlens.sequences.set import RESERVED_COLUMNS, SequenceSet, unique_ids

_KEY = b"memlens"


def write_parquet(seqs: SequenceSet, path: str | Path, **extra: Mapping[str, Any]) -> Path:
    """Write `seqs` to `path` (whole or not at all); `extra` is kept in the metadata with its attributes."""
    return _write(as_arrow(seqs), path, {"attrs": dict(seqs.attrs), "width": seqs.tokens.shape[1], **extra})


def as_arrow(seqs: SequenceSet) -> pa.Table:
    """Return the columns of the set's table, and `tokens` (lists of int64) and `prefix_len`."""
    table = pa.Table.from_pandas(seqs.table, preserve_index=False)
    table = table.append_column("tokens", pa.array(seqs.rows(), pa.list_(pa.int64())))
    return table.append_column("prefix_len", pa.array(seqs.prefix_len.numpy()))


def write_table(frame: pd.DataFrame, path: str | Path, **settings: Any) -> Path:
    """Write a table without sequences to `path` (whole or not at all), with settings for `read_table`."""
    return _write(pa.Table.from_pandas(frame, preserve_index=False), path, settings)


def join_parquet(parts: Sequence[Path], path: str | Path, **extra: Any) -> Path:
    """Write the rows of several files of `write_parquet`, in order, to one (whole or not at all).

    It is written a part at a time. Columns have the types that hold the values of all parts; ids that occur
    in several parts get a suffix, with a warning. The settings are those of the first part, with `extra`.
    """
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
    settings = [read_settings(part) for part in parts]
    about = {**settings[0], "width": max(each["width"] for each in settings), **extra}
    schema = schema.with_metadata({**(schema.metadata or {}), _KEY: exact_json(about)})
    ids = [str(name) for part in parts for name in pq.read_table(part, columns=["id"])["id"].to_pylist()]
    unique = unique_ids(ids)
    if unique != ids:
        warnings.warn(f"{len(ids) - len(set(ids))} ids occur again and get a suffix", stacklevel=3)
    with replacing(path) as new, pq.ParquetWriter(new, schema) as writer:
        first = 0
        for part in parts:
            table = pq.read_table(part)
            named = pa.array(unique[first : first + len(table)], pa.string())
            table = table.set_column(table.schema.get_field_index("id"), "id", named)
            missing = [field for field in schema if field.name not in table.schema.names]
            for field in missing:
                table = table.append_column(field, pa.nulls(len(table), field.type))
            writer.write_table(table.select(schema.names).cast(schema))
            first += len(table)
    return expanded(path)


def _write(table: pa.Table, path: str | Path, settings: Mapping[str, Any]) -> Path:
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: exact_json(settings)})
    with replacing(path) as part:
        pq.write_table(table, part)
    return expanded(path)


def read_table(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a parquet file's table, with lists as Python lists, and memlens' settings if it has any.

    Raises:
        FileFormatError: It is not a parquet file, its metadata are damaged, or it is a small file that
            decodes to gigabytes.
    """
    with parsing(path):
        table = _decoded(expanded(path))
        return _as_frame(table), _settings(table.schema)


def read_frames(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    """Yield a parquet file's table, so many rows at a time, as `read_table` gives it."""
    with parsing(path), pq.ParquetFile(expanded(path)) as file:
        for batch in file.iter_batches(batch_size=rows):
            yield _as_frame(pa.Table.from_batches([batch]))


def read_columns(path: str | Path, names: Sequence[str]) -> pd.DataFrame:
    """Return those of the named columns that a parquet file has."""
    with parsing(path), pq.ParquetFile(expanded(path)) as file:
        return _as_frame(file.read([name for name in names if name in file.schema_arrow.names]))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return memlens' settings in a parquet file, without its table; none of another program's file."""
    with parsing(path):
        return _settings(pq.read_schema(expanded(path)))


def _as_frame(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    for name in table.schema.names:
        if pa.types.is_nested(table.schema.field(name).type):
            frame[name] = pd.Series([_plain(v) for v in frame[name]], index=frame.index, dtype=object)
    return frame


def _settings(schema: pa.Schema) -> dict[str, Any]:
    metadata = schema.metadata or {}
    return parsed_exact(metadata[_KEY], dict[str, Any]) if _KEY in metadata else {}


_LARGE, _PACKED = 2**30, 200
"""Bytes that a table may have in memory whatever its file's size, and bytes per byte of the file beyond."""


def _decoded(path: Path) -> pa.Table:
    """Read the file in portions, so that one which repeats large values is refused before it fills memory."""
    most, size, batches = max(_LARGE, _PACKED * path.stat().st_size), 0, []
    with pq.ParquetFile(path) as file:
        of_numbers = all(pa.types.is_primitive(each.type) for each in file.schema_arrow)
        for batch in file.iter_batches(batch_size=65_536 if of_numbers else 128):
            size += batch.nbytes
            if size > most:
                raise ValueError(
                    f"its {path.stat().st_size} bytes decode to more than {most / 2**30:.1f} GiB"
                )
            batches.append(batch)
        return pa.Table.from_batches(batches, file.schema_arrow)


def read_parquet(path: str | Path) -> tuple[SequenceSet, dict[str, Any]]:
    """Return the set in a parquet file with `tokens` and `prefix_len`, and memlens' settings.

    Raises:
        FileFormatError: It is not a parquet file.
        ColumnError: It lacks one of the two columns.
    """
    frame, settings = read_table(path)
    with parsing(path):
        for name in RESERVED_COLUMNS:
            if name not in frame:
                raise ColumnError(
                    f"{path} has no column {name!r}: it has {', '.join(map(str, frame.columns))}"
                )
        seqs = SequenceSet.from_tokens(
            frame["tokens"].tolist(),
            frame["prefix_len"].to_numpy(),
            table=frame.drop(columns=list(RESERVED_COLUMNS)),
            attrs=settings.get("attrs", {}),
        )
        return _widened(seqs, settings.get("width", 0)), settings


def _widened(seqs: SequenceSet, width: int) -> SequenceSet:
    """Restore columns that are all padding, which rows of tokens do not show."""
    missing = width - seqs.tokens.shape[1]
    if missing <= 0:
        return seqs
    if len(seqs) * missing > max(2**24, 100 * seqs.tokens.numel()):
        raise FileFormatError(
            f"its width of {width} tokens is far above the longest of {len(seqs)} sequences"
        )
    tokens = np.pad(seqs.tokens.numpy(), ((0, 0), (0, missing)))
    mask = np.pad(seqs.mask.numpy(), ((0, 0), (0, missing)))
    return SequenceSet.from_tokens(tokens, seqs.prefix_len, table=seqs.table, mask=mask, attrs=seqs.attrs)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value.tolist()] if isinstance(value, np.ndarray) else value
