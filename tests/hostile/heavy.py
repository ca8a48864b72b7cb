"""Files that are large, or become large when they are read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.mutations import Content
from tests.hostile.readers import READERS, SHAPE, SWEEP_PART, saved_result
from tests.hostile.running import Case
from tests.tiny import tiny_config

_BY_NAME = {reader.name: reader for reader in READERS}
_MB = 2**20


def _one_line(begin: str, piece: str, end: str) -> Callable[[Path], None]:
    """100 MB without a line break."""

    def write(path: Path) -> None:
        path.write_text(begin + piece * (100 * _MB // len(piece)) + end)

    return write


def _many_keys(path: Path) -> None:
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"tokens": [1, 2, 3], f"key {number}": number}) + "\n")


def _dictionary_bomb(path: Path) -> None:
    """9 GB of text from one value of 1 MB."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(9000, np.int32)), pa.array(["x" * _MB]))
    tokens = pa.array([[1, 2, 3, 4]] * 9000)
    pq.write_table(
        pa.table({"tokens": tokens, "prefix_len": [2] * 9000, "text": text}), path, store_schema=False
    )


def _constant_ids(path: Path) -> None:
    """200 million equal ids, which take a few bytes each thousand."""
    values, offsets = (
        pa.array(np.ones(10**8, np.int64)),
        pa.array(np.arange(0, 10**8 + 1, 10**5, dtype=np.int32)),
    )
    part = pa.table({"tokens": pa.ListArray.from_arrays(offsets, values), "prefix_len": [2] * 1000})
    with pq.ParquetWriter(path, part.schema) as writer:
        for _ in range(2):
            writer.write_table(part)


def _wide(path: Path) -> None:
    table = pa.table({"tokens": [[1, 2, 3, 4]] * 6, "prefix_len": [2] * 6})
    settings = json.dumps({"attrs": {}, "width": 10**9})
    pq.write_table(table.replace_schema_metadata({b"memlens": settings.encode()}), path)


def _npz_bomb(path: Path) -> None:
    """6 GB of zeros in a file of 6 MB."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("seal.npy", "w", force_zip64=True) as member,
    ):
        about = {"descr": "<f8", "fortran_order": False, "shape": (6 * 2**27,)}
        np.lib.format.write_array_header_1_0(member, about)
        for _ in range(6 * 1024):
            member.write(bytes(_MB))


def _npz_claim(path: Path) -> None:
    """A header that asks for 8 TB."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("seal.npy", out.getvalue())


def _config(family: str, **changes: Any) -> Callable[[Path], None]:
    """The config of another model than the weights beside it."""

    def write(path: Path) -> None:
        config = tiny_config(family, **SHAPE)
        names = {"gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}
        path.write_text(json.dumps({**config.to_dict(), "architectures": [names[family]], **changes}))

    return write


def _long_row(path: Path) -> None:
    """One row of a million ids among 10,000 short ones, which all would be padded to its length."""
    with path.open("w") as file:
        file.write(json.dumps({"tokens": [1] * 10**6, "prefix_len": 2}) + "\n")
        file.writelines(json.dumps({"tokens": [1, 2, 3], "prefix_len": 2}) + "\n" for _ in range(10_000))


def _netcdf_bomb(path: Path) -> None:
    """A variable of 8 GB of which nothing is stored."""
    saved_result(path)
    with h5py.File(path, "r+") as file:
        bomb = file.create_dataset("bomb", shape=(10**9,), chunks=(2**20,), dtype="f8", compression="gzip")
        bomb.dims[0].label = "bomb"


def _case(reader: str, file: str, name: str, content: Content) -> Case:
    return Case(_BY_NAME[reader], file, name, content)


HEAVY = [
    _case("lines of ids", "rows.jsonl", "a line of 100 MB", _one_line('{"tokens": [1', ", 1", "]}")),
    _case("lines of texts", "rows.jsonl", "a text of 100 MB", _one_line('{"text": "', "w1 ", '"}')),
    _case("table of texts", "rows.csv", "a cell of 100 MB", _one_line("text\n", "w1 ", "\n")),
    _case("table of ids", "rows.csv", "a cell of 100 MB", _one_line('tokens\n"[1', ", 1", ']"\n')),
    _case("table of texts", "rows.csv", "a header of 100 MB", _one_line("text", ",a", "\n1")),
    _case("prompts", "x.txt", "a line of 100 MB", _one_line("", "w1 ", "")),
    _case("run folder", "run.json", "a title of 100 MB", _one_line('{"title": "', "x", '"}')),
    _case("options", "x.yaml", "a value of 100 MB", _one_line("seed: ", "1", "")),
    _case("lines of ids", "rows.jsonl", "20,000 different keys", _many_keys),
    _case("lines of ids", "rows.jsonl", "a row of a million ids", _long_row),
    _case("saved set", "x.parquet", "a bomb of 9 GB", _dictionary_bomb),
    _case("memorized set", "memorized.parquet", "a bomb of 9 GB", _dictionary_bomb),
    _case("saved set", "x.parquet", "200 million equal ids", _constant_ids),
    _case("saved set", "x.parquet", "width of a billion", _wide),
    _case("result", "x.nc", "8 GB that are not stored", _netcdf_bomb),
    *(
        _case("sweep", f"parts/{SWEEP_PART}", name, content)
        for name, content in (("a bomb of 6 GB", _npz_bomb), ("a claim of 8 TB", _npz_claim))
    ),
    *(
        _case(reader, "tiny/config.json", f"{key} of {value:,}", _config(family, **{key: value}))
        for reader, family in (("checkpoint", "gpt_neox"), ("other checkpoint", "llama"))
        for key, value in (
            ("num_hidden_layers", 10**6), ("hidden_size", 10**9), ("intermediate_size", 10**9),
            ("vocab_size", 2**31), ("max_position_embeddings", 10**9), ("num_attention_heads", 10**9),
        )
    ),
]  # fmt: skip
