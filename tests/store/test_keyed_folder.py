"""Keyed folders: a part is only ever taken for itself, and a run's folder only for that run's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlens.errors import MemlensError, OtherRunError, ResultError, VocabularyError
from memlens.files import replacing
from memlens.store.keyed_folder import KeyedFolder, read_manifest, write_manifest
from memlens.sweeps.shards import Shard, ShardStore

SHARDS = [Shard(range(2), range(3)), Shard(range(2, 4), range(3))]


def store(folder: Path, model: str = "a") -> ShardStore:
    return ShardStore(folder, {"the model": model, "the options": "b"}, SHARDS)


def fill(folder: Path, model: str = "a") -> ShardStore:
    made = store(folder, model)
    for number, shard in enumerate(SHARDS):
        made.save(shard, {"m": np.full(2, number)}, {"m": np.full((2, 3), 10.0 * number)})
    return made


def test_a_part_comes_back_as_it_was(tmp_path: Path) -> None:
    base, values = fill(tmp_path).load(SHARDS[1]) or ({}, {})
    assert base["m"].tolist() == [1, 1]
    assert values["m"].tolist() == [[10.0] * 3] * 2
    assert store(tmp_path / "new").load(SHARDS[0]) is None


def test_swapped_edited_and_foreign_parts_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "other", "another")
    first, second = (tmp_path / "a" / shard.name for shard in SHARDS)
    content = first.read_bytes()
    os.replace(second, first)  # the same shapes, of other rows
    with pytest.raises(ResultError, match=rf"{first.name} does not belong to .*manifest.json"):
        store(tmp_path / "a").load(SHARDS[0])
    first.write_bytes((tmp_path / "other" / first.name).read_bytes())
    with pytest.raises(ResultError, match="does not belong"):
        store(tmp_path / "a").load(SHARDS[0])
    first.write_bytes(content)
    with np.load(first) as file:
        arrays = dict(file)
    arrays["value m"][0, 0] = 1e-6
    np.savez(first, **arrays)
    with pytest.raises(ResultError, match="does not belong"):
        store(tmp_path / "a").load(SHARDS[0])


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    manifest = fill(tmp_path).folder.manifest
    content = json.loads(manifest.read_text())
    content["parts"][1] = [2, 3, 0, 3]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=r"manifest.json was edited"):
        store(tmp_path)


def test_another_run_and_another_version_are_named(tmp_path: Path) -> None:
    manifest = fill(tmp_path).folder.manifest
    with pytest.raises(OtherRunError, match=r"belongs to another sweep \(different: the model\)"):
        store(tmp_path, "another")
    with pytest.raises(ResultError, match=r"not the manifest of a scan \(its format is 'memlens sweep 2'\)"):
        read_manifest(manifest, "scan", 2)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"format": "memlens sweep 1", "about": {}, "parts": content["parts"]}))
    with pytest.raises(OtherRunError, match=r"memlens 0\.1\.0 or earlier in the format 'memlens sweep 1'"):
        store(tmp_path)
    manifest.write_text(json.dumps({**content, "format": "memlens sweep 3", "memlens": "9.9"}))
    with pytest.raises(OtherRunError, match=r"was written by memlens 9\.9"):
        store(tmp_path)


def test_an_empty_manifest_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = fill(tmp_path).folder.manifest
    manifest.write_text("")
    with caplog.at_level(logging.WARNING, logger="memlens"):
        assert store(tmp_path).load(SHARDS[0]) is not None
    assert "is empty" in caplog.text


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from memlens.files import replacing\n"
        "with replacing(sys.argv[1]) as part: part.write_bytes(b'half'); os._exit(1)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.npz")], check=False, env=env)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    with replacing(tmp_path / "b.npz") as ours:
        KeyedFolder(tmp_path, "sweep", {}, version=2, parts="*.npz")
        assert ours.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.npz", "manifest.json"]


def folder(path: Path, about: Any = None, **options: Any) -> KeyedFolder:
    given: dict[str, Any] = {"version": 7, "parts": "part-*", **options}
    return KeyedFolder(path, "journey", {"a": 1, "b": [1, 2]} if about is None else about, **given)


def test_a_new_folder_has_a_manifest_that_people_can_read(tmp_path: Path) -> None:
    made = folder(tmp_path / "deep" / "new", content={"more": {"x": 1}})
    assert made.path == tmp_path / "deep" / "new"
    assert made.manifest == made.path / "manifest.json"
    assert made.content == {"more": {"x": 1}}
    text = made.manifest.read_text()
    content = json.loads(text)
    assert list(content) == ["format", "memlens", "about", "more", "digest"]
    assert content["format"] == "memlens journey 7"
    assert content["memlens"] == version("memlens")
    assert content["about"] == {"a": 1, "b": [1, 2]}
    assert '\n "about": {\n  "a": 1,\n' in text  # one entry per line
    # the digest and the key are of what is written, whatever its order
    bare = {name: value for name, value in content.items() if name != "digest"}
    for value, digest in ((bare, content["digest"]), (content["about"], made.key)):
        sorted_text = json.dumps(value, sort_keys=True)
        assert hashlib.blake2b(sorted_text.encode(), digest_size=16).hexdigest() == digest
    assert folder(tmp_path / "empty").content == {}


def test_a_run_goes_on_with_the_content_that_it_began_with(tmp_path: Path) -> None:
    first = folder(tmp_path, content={"more": 1})
    before = first.manifest.read_bytes()
    again = folder(tmp_path, about={"b": (1, 2), "a": 1}, content={"more": 2, "other": 3})
    assert again.content == {"more": 1}
    assert again.key == first.key
    assert first.manifest.read_bytes() == before
    assert read_manifest(first.manifest, "journey", 7) == {"about": {"a": 1, "b": [1, 2]}, "more": 1}


@pytest.mark.parametrize(
    ("about", "names"),
    [
        ({"a": 2, "b": [1, 2]}, "a"),
        ({"a": 1}, "b"),
        ({"a": 1, "b": [1, 2], "c": 0}, "c"),
        ({"a": 2, "c": 0}, "a, c, b"),
    ],
)
def test_what_is_different_is_named_whichever_side_has_it(about: Any, names: str, tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(
        OtherRunError, match=rf"belongs to another journey \(different: {names}\): give another"
    ):
        folder(tmp_path, about=about)


def test_only_parts_make_a_folder_without_a_manifest_someone_else_s(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-1").write_text("x")
    with pytest.raises(
        ResultError, match=r"is not empty and holds no manifest\.json of a journey: give a new"
    ):
        folder(tmp_path / "other")
    assert folder(tmp_path / "other", parts="piece-*").manifest.exists()
    with pytest.raises(TypeError, match="what identifies a run may not hold a set"):
        folder(tmp_path / "new", about={"a": {1}})
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_seals_depend_on_run_name_and_content(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "1"), folder(tmp_path / "2", about={"a": 2})
    seal = one.seal("part-1", [1, 2])
    assert seal == folder(tmp_path / "1").seal("part-1", [1, 2])
    assert (
        len({seal, one.seal("part-2", [1, 2]), one.seal("part-1", [1, 3]), other.seal("part-1", [1, 2])}) == 4
    )
    one.check("part-1", [1, 2], seal)
    for given in (None, "", seal[:-1], other.seal("part-1", [1, 2])):
        with pytest.raises(
            ResultError, match=r"part-1 does not belong to .*manifest.json: .*another journey, or"
        ):
            one.check("part-1", [1, 2], given)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("shape"), r"part-1 .*shape.*: delete it and run again; the other parts are kept"),
        (
            VocabularyError("ids beyond"),
            r"part-1 .*ids beyond.*: delete it and run again; the other parts are kept",
        ),
        (ResultError("part-1 is foreign"), "^part-1 is foreign$"),
    ],
)
def test_whatever_reading_a_part_leads_to_names_it(error: Exception, words: str, tmp_path: Path) -> None:
    made = folder(tmp_path)
    with pytest.raises(ResultError, match=words), made.parsing("part-1"):
        raise error
    with pytest.raises(KeyboardInterrupt), made.parsing("part-1"):
        raise KeyboardInterrupt
    with made.parsing("part-1"):
        pass


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (
            "memlens scan 7",
            r"is not the manifest of a journey \(its format is 'memlens scan 7'\): give another",
        ),
        ("memlens journey x", "is not the manifest of a journey"),
        ("memlens journey ", "is not the manifest of a journey"),
        ("memlens journey -7", "is not the manifest of a journey"),
        ("journey 7", "is not the manifest of a journey"),
        (
            "memlens journey 8",
            r"was written by memlens 9\.9 in the format 'memlens journey 8', .* \(format 7\)",
        ),
        ("memlens journey 7", "was edited: give another folder, or delete this one"),
    ],
)
def test_manifests_of_other_formats_are_named(tag: str, words: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    write_manifest(manifest, "journey", 7, {"about": {}})
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": tag, "memlens": "9.9"}))
    with pytest.raises(ResultError, match=f"manifest.json {words}"):
        read_manifest(manifest, "journey", 7)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"about": {}}'])
def test_damaged_manifests_are_named(text: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(text)
    with pytest.raises(ResultError, match=r"manifest\.json is damaged"):
        read_manifest(manifest, "journey", 7)
    with pytest.raises(MemlensError, match="nowhere"):
        read_manifest(tmp_path / "nowhere.json", "journey", 7)


def test_a_manifest_without_its_author_is_still_read(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    write_manifest(manifest, "journey", 7, {"memlens": None, "about": {"z": 1, "a": 2}})
    assert read_manifest(manifest, "journey", 7) == {"about": {"z": 1, "a": 2}}
