"""Arrays are read as `numpy.load` reads them, and never into more memory than their file is worth."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlens.store.keyed_folder import read_arrays

ARRAYS: dict[str, Any] = {
    "floats": np.random.default_rng(0).random((3, 4)),
    "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "cut": np.arange(24).reshape(4, 6)[::2, 1:3],
    "half": np.float16([0.5, np.nan, np.inf]),
    "scalar": np.array(7),
    "empty": np.zeros((0, 5), np.int8),
    "texts": np.array(["a", "bc"]),
    "truth": np.array([True, False]),
    "big endian": np.arange(3, dtype=">i4"),
    "records": np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", "<f8")]),
    "no suffix.npy": np.arange(2),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as expected:
        assert list(found) == expected.files
    for (name, array), values in zip(ARRAYS.items(), found.values(), strict=True):
        np.testing.assert_array_equal(values, array, err_msg=name)
        assert (values.dtype, values.shape) == (array.dtype, array.shape)
        assert values.flags.writeable
        assert (
            values.flags.f_contiguous == np.ascontiguousarray(array).flags.f_contiguous or name == "by column"
        )


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_the_header_are_read(version: tuple[int, int], tmp_path: Path) -> None:
    raw = io.BytesIO()
    np.lib.format.write_array(raw, np.arange(5), version=version)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", raw.getvalue())
    assert read_arrays(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2, 3, 4]


def test_what_compresses_well_is_read_and_what_unpacks_to_gigabytes_is_not(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(2**20))  # a thousandth of its size
    assert read_arrays(tmp_path / "zeros.npz")["a"].shape == (2**20,)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(100))
    content = bytearray((tmp_path / "bomb.npz").read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the sizes that both headers claim
        start = content.index(signature) + place
        content[start : start + 4] = (2**28 + 1).to_bytes(4, "little")
    (tmp_path / "bomb.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npy would unpack to 0\.3 GiB"):
        read_arrays(tmp_path / "bomb.npz")


@pytest.mark.parametrize("array", [np.array([{}], object), np.array(["a", 1], object)])
def test_objects_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(ValueError, match=r"(?i)object"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("claimed", "packed", "refused"),
    [
        (2**28, 100, False),
        (2**28 + 1, 100, True),
        (200 * 2**21, 2**21, False),
        (200 * 2**21 + 1, 2**21, True),
        (2**28 + 1, 2**21, False),
    ],
)
def test_members_may_unpack_to_256_mib_or_200_times_their_size(
    claimed: int, packed: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    listed = zipfile.ZipFile.infolist

    def infolist(self: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        (member,) = listed(self)
        claims = copy.copy(member)
        claims.file_size, claims.compress_size = claimed, packed
        monkeypatch.setattr(self, "read", lambda _: plain)
        return [claims]

    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        plain = archive.read("a.npy")
    monkeypatch.setattr(zipfile.ZipFile, "infolist", infolist)
    if refused:
        with pytest.raises(ValueError, match=rf"^a\.npy would unpack to {claimed / 2**30:.1f} GiB$"):
            read_arrays(tmp_path / "a.npz")
    else:
        assert read_arrays(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2]
