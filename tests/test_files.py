"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlens.files import replacing, write_atomically


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
