"""Hostile variants of a valid small file: bytes, structures, and what is written for one format only.

A variant is a name and new content; content that is a function makes the file itself (a folder, a pipe).
Everything is seeded, so that a name and a seed always give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

Content = bytes | Callable[[Path], None]
Variant = tuple[str, Content]

RAN = "memlens_ran_this_code"
"""What the pickles below set in the environment of the process that runs them."""

_DEEP = 100_000


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{RAN!r}] = 'yes'",)


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def of_bytes(content: bytes, rng: random.Random) -> Iterator[Variant]:
    """Variants of any file."""
    n = len(content)
    yield "empty", b""
    yield "one byte", content[:1]
    for share in (0.1, 0.5, 0.9):
        yield f"cut at {share}", content[: int(n * share)]
    yield "cut by one byte", content[:-1]
    yield "with a tail", content + rng.randbytes(100)
    yield "twice", content + content
    yield "without its beginning", content[min(n, 8) :]
    yield "zeros", bytes(n)
    yield "NUL in the middle", content[: n // 2] + b"\0" + content[n // 2 :]
    yield "random", rng.randbytes(max(n, 64))
    yield "compressed", gzip.compress(content)
    yield "compressed and cut", gzip.compress(content)[:-20]
    yield "BOM", b"\xef\xbb\xbf" + content
    yield "BOM of UTF-16", b"\xff\xfe" + content
    yield "UTF-16", content.decode("latin-1").encode("utf-16")
    yield "latin-1", b"\xe9\xff" + content
    for magic in (b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x89HDF\r\n\x1a\n", b"GGUF", b"\x93NUMPY"):
        yield f"magic {magic[:4]!r}", magic + content[len(magic) :]
    yield "pickle", pickle.dumps(_Code())
    for number in range(12):
        flipped = bytearray(content or b" ")
        for _ in range(1 + number // 4):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        yield f"flipped bits {number}", bytes(flipped)
    for number in range(4):
        wiped = bytearray(content)
        start = rng.randrange(max(n - 16, 1))
        wiped[start : start + 16] = b"\xff" * len(wiped[start : start + 16])
        yield f"wiped bytes {number}", bytes(wiped)
    yield "a folder", Path.mkdir
    yield "a link to itself", _link_to_itself
    yield "a pipe", os.mkfifo


_HUGE = 10**5000
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), 0.5),
    *("", "x", "../../x", "\0", "\ud800", "é" * 300, "9" * 5000),
    *([], [None], ["x"], [[[]]], [-1, 2**63], {}, {"x": None}, {"x": {"x": []}}),
)
"""Values for any place of a JSON document."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1}):
            if 0 <= index < len(value):
                yield from _places(value[index], (*path, index))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return value


def _without(value: Any, path: tuple[Any, ...]) -> Any:
    value = deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return value


def of_json(value: Any, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Variants of a JSON document, as text: another type at every place, and what no writer writes."""
    mark = '"\ue000"'
    for path in _places(value):
        place = "/".join(map(str, path)) or "the whole"
        for new in rng.sample(_ODD, 6):
            yield f"{place} := {str(new)[:20]!r}", json.dumps(_replaced(value, path, new))
        if path:
            yield f"{place} missing", json.dumps(_without(value, path))
        if path and isinstance(path[-1], str):
            text = json.dumps(_replaced(value, path, "\ue000"), ensure_ascii=False)
            key = json.dumps(path[-1], ensure_ascii=False)
            old = f"{key}: {mark}"
            yield f"{place} twice", text.replace(old, f"{key}: 0, {key}: [0]", 1)
            for name, raw in (
                ("deep", "[" * _DEEP + "]" * _DEEP),
                ("deep objects", '{"a":' * _DEEP + "0" + "}" * _DEEP),
                ("of 5,000 digits", "1" + "0" * 5000),
                ("1e999", "1e999"),
            ):
                yield f"{place} {name}", text.replace(old, f"{key}: {raw}", 1)


def _whole_json() -> Iterator[tuple[str, str]]:
    yield "deep lists", "[" * _DEEP + "]" * _DEEP
    yield "deep and open", "[" * _DEEP
    yield "deep objects", '{"a":' * _DEEP + "0" + "}" * _DEEP
    yield "5,000 digits", "1" + "0" * 5000
    yield "-Infinity", "-Infinity"
    yield "a lone surrogate", '"\\ud800"'


def _whole_yaml() -> Iterator[tuple[str, str]]:
    names = "abcdefghijklmnopqrstuvwxyz"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 10)}]\n" for x, y in pairwise(names))
    yield "bomb of aliases", bomb
    yield "a list in itself", "&a [*a]"
    yield "a mapping in itself", "&a {models: *a, options: *a}"
    yield "a tag of Python", "!!python/object/apply:os.system ['true']"
    yield "an unknown tag", "models: !thing x"
    yield "a list as key", "? [a, b]\n: 1"
    yield "a mapping as key", "{{a: b}: c}"
    yield "a tab", "models:\n\t- x"
    yield "two documents", "a: 1\n---\nb: 2"
    yield "a wrong date", "seed: 2026-99-99"
    yield "a date", "seed: 2026-01-01"
    yield "numbers as keys", "1: 2\n3: 4"
    yield "merge of a number", "<<: 3"
    yield "sexagesimal", "seed: 190:20:30"
    yield "deep flow", "[" * _DEEP
    yield "deep blocks", "".join(" " * n + "a:\n" for n in range(2000))
    yield "a control character", "models: \x01"


def _parquet(content: bytes, rng: random.Random) -> Iterator[Variant]:
    table = pq.read_table(io.BytesIO(content))
    metadata = dict(table.schema.metadata or {})

    def written(table: Any) -> bytes:
        out = io.BytesIO()
        pq.write_table(table, out)
        return out.getvalue()

    for key in (b"memlens", b"pandas"):
        if key in metadata:
            for name, text in (*of_json(json.loads(metadata[key]), rng), *_whole_json()):
                changed = {**metadata, key: text.encode("utf-8", "surrogatepass")}
                yield f"{key.decode()}: {name}", written(table.replace_schema_metadata(changed))
            changed = {**metadata, key: b"\xff\xfe not text"}
            yield f"{key.decode()}: bytes", written(table.replace_schema_metadata(changed))
    yield "no metadata", written(table.replace_schema_metadata({}))
    yield "no rows", written(table.slice(0, 0))
    yield "no columns", written(table.select([]))
    for index, name in enumerate(table.column_names):
        yield f"without {name}", written(table.drop_columns([name]))
        n = len(table)
        odd = {
            "None": [None] * n, "floats": [0.5] * n, "texts": ["x"] * n, "lists": [[-1, 2]] * n,
            "deep": [[[["x"]]]] * n, "structs": [{"a": 1}] * n, "bytes": [b"\xff"] * n,
            "NaN": [float("nan")] * n, "negative": [-5] * n, "large": [2**62] * n, "empty": [[]] * n,
        }  # fmt: skip
        for kind, values in odd.items():
            import pyarrow as pa

            yield f"{name} of {kind}", written(table.set_column(index, name, pa.array(values)))
    yield "a column twice", written(table.append_column(table.column_names[0], table.column(0)))


def _netcdf(content: bytes, rng: random.Random) -> Iterator[Variant]:
    import h5py

    def changed(change: Callable[[Any], None]) -> bytes:
        out = io.BytesIO(content)
        with h5py.File(out, "r+") as file:
            change(file)
        return out.getvalue()

    def set_attr(name: str, attr: str, value: Any) -> Callable[[Any], None]:
        def change(file: Any) -> None:
            holder = file[name] if name else file
            holder.attrs[attr] = value

        return change

    with h5py.File(io.BytesIO(content), "r") as file:
        holders = {"": dict(file.attrs), **{name: dict(file[name].attrs) for name in file}}
        names = list(file)
    for holder, attrs in holders.items():
        for attr, value in attrs.items():
            if attr in ("_NCProperties",):
                continue
            with_json = isinstance(value, str) and value[:1] in "[{"
            for name, text in of_json(json.loads(value), rng) if with_json else ():
                if len(text) < 60_000 and "\0" not in text:
                    yield (
                        f"{holder}@{attr}: {name}",
                        changed(
                            set_attr(
                                holder, attr, text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
                            )
                        ),
                    )
            for odd in ("not JSON", "", 5, -1.5, np.arange(3), np.bytes_(b"\xff\xfe")):
                if not attr.startswith(("DIMENSION", "REFERENCE", "CLASS", "_Netcdf")):
                    yield f"{holder}@{attr} = {odd!r}", changed(set_attr(holder, attr, odd))
            if not attr.startswith(("DIMENSION", "REFERENCE")):
                yield (
                    f"{holder}@{attr} missing",
                    changed(
                        lambda file, holder=holder, attr=attr: (file[holder] if holder else file).attrs.pop(
                            attr
                        )
                    ),
                )
    for name in names:
        yield f"without {name}", changed(lambda file, name=name: file.pop(name))

        def retyped(file: Any, name: str = name) -> None:
            shape = file[name].shape
            del file[name]
            file[name] = np.full(shape, b"x", dtype="S1")

        yield f"{name} of bytes", changed(retyped)


def _safetensors(content: bytes, rng: random.Random) -> Iterator[Variant]:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for name, text in (*of_json(header, rng), *_whole_json()):
        raw = text.encode("utf-8", "surrogatepass")
        yield f"header: {name}", struct.pack("<Q", len(raw)) + raw + data
    for wrong in (0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1):
        yield f"header of {wrong} bytes", struct.pack("<Q", wrong) + content[8:]
    yield "without data", content[: 8 + size]


def _npy(content: bytes, _: random.Random) -> Iterator[Variant]:
    array = np.load(io.BytesIO(content))
    array = array if array.dtype.kind in "iu" else np.arange(array.size).reshape(array.shape)
    start = content.index(b"{")
    data = content[content.index(b"\n", start) + 1 :]

    def made(header: str, version: bytes = b"\x01\x00") -> bytes:
        raw = header.encode("latin-1") + b"\n"
        return b"\x93NUMPY" + version + struct.pack("<H", len(raw)) + raw + data

    shape = tuple(array.shape)
    for descr in ("|O", "<f8", "<f2", "|V8", "<i16", "<M8[ns]", "|S0", "<U8", ">i8", "<c16", "|b1", "x", ""):
        yield f"type {descr}", made(str({"descr": descr, "fortran_order": False, "shape": shape}))
    for odd in (
        (10**12, 10**12), (10**9, 64), (-1, 4), (2**62, 0), (0, 2**62), (0, 0), (), (array.size,), ("x",),
        (1.5, 2), [4, 5], None, (1,) * 70, (True, 5),
    ):  # fmt: skip
        yield f"shape {odd}"[:40], made(str({"descr": array.dtype.str, "fortran_order": False, "shape": odd}))
    plain = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
    yield "header with a call", made("__import__('os').system('true')")
    yield "header of brackets", made("(" * 9000)
    yield "header without shape", made(str({k: v for k, v in plain.items() if k != "shape"}))
    yield "version 9", made(str(plain), b"\x09\x00")
    yield "order", made(str({**plain, "fortran_order": True}))
    for name, values in (
        ("negative", -1 - np.abs(array)), ("too large", np.full(shape, 2**62)), ("floats", array * 0.5),
        ("unsigned", np.full(shape, 2**64 - 1, np.uint64)), ("text", array.astype("U")),
        ("a row", array.ravel()[:1]), ("a number", array.sum()),
        ("no rows", np.atleast_1d(array)[:0]), ("no columns", np.atleast_1d(array)[..., :0]),
        ("a record", np.zeros(3, [("a", "i4"), ("b", "f4")])), ("dates", array.astype("M8[s]")),
        ("objects", None),
    ):  # fmt: skip
        out = io.BytesIO()
        np.save(out, np.array([_Code()], dtype=object) if values is None else values, allow_pickle=True)
        yield f"array of {name}", out.getvalue()
    out = io.BytesIO()
    np.savez(out, a=array)
    yield "archive", out.getvalue()


def _npz(content: bytes, rng: random.Random) -> Iterator[Variant]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}

    def made(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", how) as file:
            for name, raw in members.items():
                file.writestr(name, raw)
        return out.getvalue()

    for name, raw in members.items():
        yield f"without {name}", made({k: v for k, v in members.items() if k != name})
        yield f"{name} outside", made({f"../{name}" if k == name else k: v for k, v in members.items()})
        variants = [*of_bytes(raw, rng), *_npy(raw, rng)]
        for what, new in rng.sample([v for v in variants if isinstance(v[1], bytes)], 12):
            yield f"{name}: {what}", made({**members, name: new})  # pyright: ignore[reportArgumentType]
    names = list(members)
    moved = dict(zip(names, [*list(members.values())[1:], members[names[0]]], strict=True))
    yield "members exchanged", made(moved)
    yield "no members", made({})
    yield "compressed", made(members, zipfile.ZIP_DEFLATED)
    damaged = bytearray(made(members, zipfile.ZIP_DEFLATED))
    damaged[60:90] = b"\xff" * 30
    yield "damaged compression", bytes(damaged)
    method = bytearray(content)
    for at in range(len(method) - 4):
        if method[at : at + 4] == b"PK\x01\x02":
            method[at + 10] = 99
    yield "unknown compression", bytes(method)


def _gguf(content: bytes, rng: random.Random) -> Iterator[Variant]:
    for at, what in ((4, "version"), (8, "tensors"), (16, "values"), (24, "first key's length")):
        for value in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
            width = 4 if at == 4 else 8
            raw = (value % 2 ** (8 * width)).to_bytes(width, "little")
            yield f"{what} {value}", content[:at] + raw + content[at + width :]
    for number in range(30):  # counts, types and lengths stand among the first bytes
        at = rng.randrange(24, min(len(content), 2500))
        raw = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x0c\0\0\0", struct.pack("<Q", 2**40)])
        yield f"overwritten at {at} ({number})", content[:at] + raw + content[at + len(raw) :]
    for key in (
        b"llama.block_count",
        b"llama.embedding_length",
        b"llama.attention.head_count",
        b"tokenizer.ggml",
    ):
        at = content.find(key)
        yield f"no {key.decode()}", content[:at] + b"x" + content[at + 1 :]
        end = at + len(key) + 4
        for value in (0, 2**31, 2**32 - 1):
            yield f"{key.decode()} {value}", content[:end] + struct.pack("<I", value) + content[end + 4 :]


def _lines(content: bytes, rng: random.Random) -> Iterator[Variant]:
    lines = content.decode().splitlines()
    first = json.loads(lines[0])
    for name, text in (*of_json(first, rng), *_whole_json()):
        changed = "\n".join([text, *lines[1:]])
        yield f"line 1: {name}", changed.encode("utf-8", "surrogatepass")
    for odd in ("3", "null", '"x"', "[1]", "{}", "{", "NaN", "[" * 500 + "]" * 500):
        yield f"line 2: {odd[:9]}", "\n".join([lines[0], odd, *lines[2:]]).encode()
        yield f"all lines: {odd[:9]}", "\n".join([odd] * len(lines)).encode()
    yield "in one line", " ".join(lines).encode()
    yield "lines end in CR", content.replace(b"\n", b"\r")
    yield "other keys in every line", "\n".join(json.dumps({f"k{i}": i}) for i in range(200)).encode()


def _cells(content: bytes, _: random.Random) -> Iterator[Variant]:
    lines = content.decode().splitlines()
    head, first = lines[0].split(","), lines[1].split(",")
    for number, name in enumerate(head):
        for odd in (
            *(
                "",
                "x",
                "-1",
                "1.5",
                "nan",
                "NA",
                '"[1, 2"',
                "[[1]]",
                "9" * 400,
                "1e400",
                '"',
                '""""',
                "\r",
                "\0",
            ),
            *('"' + "[" * 9999 + '"', "inf", "True", "'", "{}", "\ufeff1"),
        ):
            cells = [*first]
            cells[number] = odd
            yield f"{name} := {odd[:12]!r}", "\n".join([lines[0], ",".join(cells), *lines[2:]]).encode()
        yield f"without {name}", "\n".join([",".join(h for h in head if h != name), *lines[1:]]).encode()
        yield (
            f"{name} twice",
            "\n".join([f"{lines[0]},{name}", *(f"{line},1" for line in lines[1:])]).encode(),
        )
    yield "a cell more", "\n".join([*lines, lines[-1] + ",1,2,3"]).encode()
    yield "a cell less", "\n".join([*lines, first[0]]).encode()
    yield "only a header", lines[0].encode()
    yield "an open quote", content + b'"open'
    yield "semicolons", content.replace(b",", b";")
    yield "200,000 columns", (",".join("abcdefgh"[i % 8] for i in range(200_000)) + "\n1").encode()


def _json(content: bytes, rng: random.Random) -> Iterator[Variant]:
    for name, text in (*of_json(json.loads(content), rng), *_whole_json()):
        yield name, text.encode("utf-8", "surrogatepass")


def _yaml(content: bytes, rng: random.Random) -> Iterator[Variant]:
    for name, text in (*of_json(yaml.safe_load(content), rng), *_whole_json(), *_whole_yaml()):
        yield name, text.encode("utf-8", "surrogatepass")


_OF_FORMAT = {
    ".json": _json, ".jsonl": _lines, ".yaml": _yaml, ".csv": _cells, ".parquet": _parquet, ".nc": _netcdf,
    ".safetensors": _safetensors, ".npy": _npy, ".npz": _npz, ".gguf": _gguf,
}  # fmt: skip


def variants(name: str, content: bytes, seed: str) -> list[Variant]:
    """Return all variants of a file: those of bytes, and those of the format that its name says."""
    rng = random.Random(seed)
    found = [*of_bytes(content, rng)]
    if make := _OF_FORMAT.get(Path(name).suffix):
        found += make(content, rng)
    return [variant for variant in found if variant[1] != content]
