from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memlens.errors import OptionError, PathError, ResultError, WriteError
from memlens.results.result import Result
from memlens.results.storage import load_result
from tests.report import synthetic

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
)
ATTRS = st.dictionaries(
    st.text("abcxyz", min_size=1, max_size=5),
    st.one_of(st.text(max_size=8), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
    max_size=4,
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _round_trip(result: Result, folder: Path) -> Result:
    return load_result(result.save(folder / "result.nc"))


def _assert_same(left: xr.Dataset, right: xr.Dataset) -> None:
    xr.testing.assert_identical(left, right)
    assert {k: v.dtype for k, v in left.variables.items()} == {k: v.dtype for k, v in right.variables.items()}
    assert left.attrs == right.attrs
    assert {k: type(v) for k, v in left.attrs.items()} == {k: type(v) for k, v in right.attrs.items()}


@FEW
@given(hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)), ATTRS)
def test_numbers_and_attributes_come_back(
    tmp_path: Path, values: np.ndarray, attrs: dict[str, object]
) -> None:
    dims = ("sequence", "layer", "head")[: values.ndim]
    data = xr.Dataset({"value": (dims, values, attrs)}, attrs={**attrs, "kind": "recall"})
    result = Result(data)
    _assert_same(_round_trip(result, tmp_path).data, result.data)


@FEW
@given(st.lists(st.text(max_size=6), min_size=1, max_size=5, unique=True), st.booleans())
def test_strings_come_back(tmp_path: Path, texts: list[str], as_object: bool) -> None:
    labels = np.array(texts, dtype=object if as_object else None)
    data = xr.Dataset({"token": ("sequence", labels)}, {"sequence": labels}, {"kind": "recall"})
    _assert_same(_round_trip(Result(data), tmp_path).data, data)


def test_mixed_objects_and_surrogates_come_back(tmp_path: Path) -> None:
    labels = np.array(["a\0b", None, "\ud800", 3, True, 2.5], dtype=object)
    data = xr.Dataset(
        {"value": ("sequence", np.arange(6.0))}, {"domain": ("sequence", labels)}, {"kind": "recall"}
    )
    back = _round_trip(Result(data), tmp_path).data
    assert back["domain"].values.tolist() == labels.tolist()
    assert [type(value) for value in back["domain"].values] == [type(value) for value in labels]


@pytest.mark.parametrize("name", list(synthetic.ALL))
def test_every_kind_comes_back(tmp_path: Path, name: str) -> None:
    result = synthetic.ALL[name]()
    back = _round_trip(result, tmp_path)
    _assert_same(back.data, result.data)
    assert back.settings == result.settings


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    path = synthetic.head_ablation().save(tmp_path / "deep" / "folder" / "result.nc")
    with xr.open_dataset(path, engine="h5netcdf") as raw:
        assert raw.attrs["model"] == "zoo/pythia-s"
        assert raw["target_logprob"].shape == (48, 8, 6)
        assert raw["sequence"].values[3] == "seq-003"


@pytest.mark.parametrize(("name", "instead"), [("r.csv", "to_frame()"), ("r.Parquet", "to_parquet(path)")])
def test_a_table_is_not_written_as_netcdf(tmp_path: Path, name: str, instead: str) -> None:
    with pytest.raises(OptionError, match=rf"save writes netCDF.*{re.escape(instead)}"):
        synthetic.head_ablation().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # h5netcdf's, on a half-open file
def test_every_damage_is_noticed(tmp_path: Path) -> None:
    result = synthetic.head_ablation()
    path = result.save(tmp_path / "result.nc")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(whole) - 1, 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ResultError, match=r"result\.nc"):
            load_result(path)
    values = result["target_logprob"].values
    for place in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            back = load_result(path)
        except ResultError:
            continue
        np.testing.assert_array_equal(back.data["target_logprob"].values, values)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89HDF\r\n\x1a\n"])
def test_what_is_not_netcdf_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.nc"
    path.write_bytes(content)
    with pytest.raises(ResultError, match=r"bad\.nc"):
        load_result(path)


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "foreign.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match=r"foreign\.nc is netCDF but not a memlens result"):
        load_result(tmp_path / "foreign.nc")
    with pytest.raises(ResultError, match=r"none\.nc does not exist"):
        load_result(tmp_path / "none.nc")
    with pytest.raises(ResultError, match="does not exist"):
        load_result(tmp_path)


def test_a_full_disk_keeps_the_old_file_and_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = synthetic.recall()
    path = result.save(tmp_path / "result.nc")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        WriteError, match=r"result\.nc cannot be written \(No space left on device\)"
    ) as caught:
        result.save(path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["result.nc"]
    _assert_same(load_result(path).data, result.data)
    _assert_same(_round_trip(result, tmp_path).data, result.data)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_nothing_but_bytes_goes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), "/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(WriteError, match="No space left on device"):
        synthetic.recall().save(tmp_path / "result.nc")


def test_paths_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "result.nc", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(PathError, match=r"cannot be (written|read)"):  # a name too long is found first
            synthetic.recall().save(path)


@FEW
@given(names=st.lists(st.text(min_size=1, max_size=6), min_size=3, max_size=3, unique=True))
@example(["a/b", "a b", "a_b"])
@example(["..", ".", "/"])
@example(["_nc4_non_coord_x", "phony_dim_0", "named_a_b"])
@example(["\ud800", "x\0", "x "])
def test_any_name_comes_back(tmp_path: Path, names: list[str]) -> None:
    dim, value, label = names
    variables = {value: (("sequence", dim), [[1.0, 2.0]])}
    data = xr.Dataset(variables, {dim: [3, 4], label: (dim, ["s", "t"])}, {"kind": "recall"})
    back = _round_trip(Result(data.assign_attrs({label: 1})), tmp_path).data
    xr.testing.assert_identical(back, data.assign_attrs(back.attrs))
    assert back.attrs[label] == 1


def test_attributes_that_have_no_text_form_are_refused(tmp_path: Path) -> None:
    result = Result(synthetic.recall().data.assign_attrs(thing=object()))
    with pytest.raises(ResultError, match="type object"):
        result.save(tmp_path / "result.nc")
    assert list(tmp_path.iterdir()) == []
