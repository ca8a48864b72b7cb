"""Files that are written whole or not at all, and read or refused by name."""

from __future__ import annotations

import ast
import errno
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

import memlens as ml
from memlens.errors import (
    FileFormatError,
    MemlensError,
    OptionError,
    OtherRunError,
    PathError,
    WriteError,
)
from memlens.files import (
    exact_json,
    expanded,
    finish_replacing,
    made_folder,
    parsed_exact,
    parsing,
    read_json,
    read_yaml,
    replacing,
    replacing_files,
    write_atomically,
)
from memlens.instruments.decode.lens import TunedLens
from memlens.options import read_options
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.report.run_directory import RunDirectory
from memlens.results.storage import load_result
from memlens.sequences.natural import text_ids
from memlens.store.keyed_folder import KeyedFolder
from memlens.studies.registry import Call
from memlens.studies.running import StudyDirectory
from tests.report import synthetic


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.html", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]
    assert path.read_bytes() == b"old"


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "new" / "a.txt", b"old")

    def stop_halfway() -> None:
        with replacing(path) as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]
    with replacing(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = write_atomically(tmp_path / "whole", b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def save_pair(folder: Path, content: bytes, stop: bool = False) -> None:
    with replacing_files(folder) as part:
        write_atomically(part / "a", content)
        if stop:
            raise KeyboardInterrupt
        write_atomically(part / "b", content)


def read_pair(folder: Path) -> dict[str, bytes]:
    files = [file for file in finish_replacing(folder).iterdir() if not file.name.startswith(".")]
    return {file.name: file.read_bytes() for file in files}


def test_files_of_a_folder_change_together(tmp_path: Path) -> None:
    save_pair(tmp_path / "pair", b"old")
    (tmp_path / "pair" / "mine.txt").write_bytes(b"mine")
    with pytest.raises(KeyboardInterrupt):
        save_pair(tmp_path / "pair", b"new", stop=True)
    assert read_pair(tmp_path / "pair") == {"a": b"old", "b": b"old", "mine.txt": b"mine"}
    save_pair(tmp_path / "pair", b"new")
    assert read_pair(tmp_path / "pair") == {"a": b"new", "b": b"new", "mine.txt": b"mine"}


@pytest.mark.parametrize("kill_at", range(1, 8))
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_files(tmp_path: Path, kill_at: int) -> None:
    """The process ends without any cleaning up, as by `kill -9`, before the nth rename of the second save."""
    script = """
import os, sys
from memlens.files import replacing_files, write_atomically
def save(content):
    with replacing_files(sys.argv[1]) as part:
        write_atomically(part / "a", content)
        write_atomically(part / "b", content)
save(b"old")
left, rename = int(sys.argv[2]), os.replace
def replace(*paths):
    global left
    left -= 1
    os._exit(9) if left == 0 else rename(*paths)
os.replace = replace
save(b"new")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "pair"), str(kill_at)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode == 9
    assert killed == (kill_at <= 5)  # two files, their folder, and two moves
    found = read_pair(tmp_path / "pair")
    assert set(found) == {"a", "b"}
    assert len(set(found.values())) == 1
    assert (found["a"] == b"old") == (kill_at <= 3)
    save_pair(tmp_path / "pair", b"newer")
    assert read_pair(tmp_path / "pair") == {"a": b"newer", "b": b"newer"}


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "folder/" + "y" * 300 + "/z.npy"])
def test_paths_that_cannot_be_are_memlens_errors(path: str, tmp_path: Path) -> None:
    for use in (load_result, ml.load_model, MemorizedSet.load, TunedLens.load, read_options):
        with pytest.raises(MemlensError):
            use(path)
    with pytest.raises(MemlensError):
        ml.load_sequences(f"{path}.npy")
    with pytest.raises(PathError, match=r"cannot be (read|written)"):
        write_atomically(path, b"")


def test_folders_and_files_without_permission_are_memlens_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_atomically(tmp_path / "file.jsonl", b"")
    for make in (made_folder, RunDirectory, lambda path: replacing_files(path).__enter__()):
        with pytest.raises(WriteError, match=r"folder .*file\.jsonl.* cannot be made"):
            make(file)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    lens = TunedLens.identity(2, 3).save(tmp_path / "lens")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PathError, match=r"lens\.json cannot be read"):
        TunedLens.load(lens)
    for read in (ml.load_sequences, read_options, lambda path: text_ids(object(), path)):
        with pytest.raises(PathError, match=r"file\.jsonl cannot be read \(Permission denied\)") as caught:
            read(file)
        assert caught.value.errno == errno.EACCES


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    result, seqs = synthetic.recall(), ml.load_sequences([[1, 2, 3]], prefix_len=1)
    lens = TunedLens.identity(2, 3)
    written = [
        result.save("~/a.nc"),
        result.to_parquet("~/a.parquet"),
        seqs.to_parquet("~/b.parquet"),
        lens.save("~/lens"),
        RunDirectory("~/run").path,
        StudyDirectory("~/study").place("sweep").parent.parent,
        KeyedFolder("~/parts", "sweep", {}, version=1, parts="*.npz").path,
        Call(None, None, Path("~/call")).folder,
    ]
    assert all(path.is_relative_to(home) for path in written)
    there = {file.name for file in home.iterdir()}
    assert there == {"a.nc", "a.parquet", "b.parquet", "lens", "run", "study", "parts"}
    assert load_result("~/a.nc").kind == result.kind
    assert TunedLens.load("~/lens").fingerprint == lens.fingerprint
    assert list(here.iterdir()) == []
    assert expanded("~no-such-user-x/a") == Path("~no-such-user-x/a")


def test_whatever_a_parser_raises_names_the_file() -> None:
    """Also a panic of a library in Rust, which is no `Exception`; but no lack of memory, and no Ctrl-C."""

    class PanicException(BaseException):
        pass

    for raised in (PanicException("index out of bounds"), KeyError("x"), RecursionError("too deep")):
        words = rf"a\.json is damaged.*{type(raised).__name__}"
        with pytest.raises(FileFormatError, match=words), parsing("folder/a.json"):
            raise raised
    for kept in (MemoryError, KeyboardInterrupt):
        with pytest.raises(kept), parsing("folder/a.json"):
            raise kept
    with pytest.raises(OptionError, match=r"^folder/a\.json: seed=-1"), parsing("folder/a.json"):
        raise OptionError("seed=-1")
    with pytest.raises(PathError, match=r"a\.json cannot be read \(No space"), parsing("folder/a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_json_and_yaml_that_nothing_could_follow(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text in ("[" * 100_000, '{"a": ' * 150 + "1" + "}" * 150, "[1]", "1" + "0" * 5000, '{"a": 1'):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=r"a\.json is damaged"):
            read_json(file)
    file = tmp_path / "a.yaml"
    bomb = "a: &a [1, 2]\n"
    bomb += "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in pairwise("abcdefghijklmnop"))
    for text in (bomb, "a: &a [*a]", "a: [" * 500, "- 1", "a: {", "a: 2026-99-99"):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=r"a\.yaml"):
            read_yaml(file)
    file.write_text("a: &a [1]\nb: *a\n")
    assert read_yaml(file) == {"a": [1], "b": [1]}


def test_all_json_is_written_by_two_functions_that_refuse_nan() -> None:
    """Any other writer of JSON would give NaN and infinity, which other programs cannot read."""
    calls: list[tuple[str, str, bool]] = []
    for file in sorted(Path(ml.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            other = any(word in ast.unparse(node).lower() for word in ("yaml", "pickle"))
            if name in ("dump", "dumps", "JSONEncoder") and not other:
                strict = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
                calls.append((file.name, name, strict))
    hashed = ("named.py", "dumps", False)  # the text whose digest identifies published rows; never written
    assert [call for call in calls if call != hashed] == [("files.py", "dumps", True)] * 2
    assert calls.count(hashed) <= 1


def test_nan_and_infinity_are_kept_in_valid_json(tmp_path: Path) -> None:
    ends = [float("nan"), float("inf"), -np.inf, np.float32("nan")]
    text = exact_json({"ends": ends, "of": {"a": np.array([1.0, np.nan])}, "at": tmp_path, "pair": (1, "é")})
    found = json.loads(text, parse_constant=lambda token: pytest.fail(token))
    assert found["pair"] == [1, "é"]
    assert text.isascii()
    back = parsed_exact(text)
    np.testing.assert_array_equal(back["ends"], ends)
    np.testing.assert_array_equal(back["of"]["a"], [1.0, np.nan])
    assert back["at"] == str(tmp_path)
    # what identifies a run tells them apart, and an equal run goes on
    for value in ends[:3]:
        folder = tmp_path / str(value)
        for _ in range(2):
            KeyedFolder(folder, "run", {"bound": value}, version=1, parts="*")
        json.loads((folder / "manifest.json").read_text(), parse_constant=lambda token: pytest.fail(token))
        with pytest.raises(OtherRunError, match="different: bound"):
            KeyedFolder(folder, "run", {"bound": None}, version=1, parts="*")


def test_a_result_s_file_holds_valid_json_and_its_settings_survive(tmp_path: Path) -> None:
    labels = np.array(["a", float("nan"), 2], dtype=object)
    data = xr.Dataset({"m": ("sequence", [1.0, 2.0, 3.0])}, {"label": ("sequence", labels)})
    data["m"].attrs["least"] = float("-inf")
    result = ml.Result.create(data, kind="recall", settings={"clip": float("inf"), "level": np.float64(0.9)})
    result.save(tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as raw:
        texts = [v for v in (*raw.attrs.values(), *raw["m"].attrs.values()) if str(v)[:1] in "{["]
        texts += raw["label"].values.tolist()
    assert len(texts) > 4
    for text in texts:
        json.loads(text, parse_constant=lambda token: pytest.fail(token))
    back = load_result(tmp_path / "a.nc")
    assert back.settings == {"clip": float("inf"), "level": 0.9}
    assert back["m"].attrs["least"] == float("-inf")
    assert back["label"].values[0] == "a"
    assert np.isnan(back["label"].values[1])
    assert back["label"].values[2] == 2


def test_no_key_occurs_twice_in_a_file_of_the_package() -> None:
    """Of two, the reader of YAML takes the last, without a word."""

    def check(node: Any, file: Path) -> None:
        parts = getattr(node, "value", None)
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in parts]
            assert len(set(map(str, keys))) == len(keys), f"{file}, line {node.start_mark.line + 1}"
            parts = [value for _, value in parts]
        for part in parts if isinstance(parts, list) else ():
            check(part, file)

    files = sorted(Path(ml.__file__).parent.rglob("*.yaml"))
    assert len(files) > 8
    for file in files:
        check(yaml.compose(file.read_text(encoding="utf-8")), file)
