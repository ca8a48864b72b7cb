"""Keyed folders: a part is only ever taken for itself, and a run's folder only for that run's."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memlens.errors import OtherRunError, ResultError
from memlens.files import replacing
from memlens.store.keyed_folder import KeyedFolder, read_manifest
from memlens.sweeps.run import Shard, ShardStore

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
    with pytest.raises(OtherRunError, match=r"written by memlens 9\.9"):
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
