from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import memlens as ml
from memlens.errors import FileFormatError, MemlensError, SourceNotFoundError, VocabularyError
from memlens.recall.corpus.windows import open_windows
from memlens.sequences.readers.memmaps import open_megatron
from memlens.sequences.readers.sources import zoo_file
from memlens.sequences.tokenizing import decode

CODES = {"u1": 1, "i4": 4, "i8": 5, "u2": 8}


def write_megatron(folder: Path, rows: list[list[int]], kind: str = "u2", **header: int) -> Path:
    """Write a corpus as the format's description says, independently of the reader."""
    flat = np.array([token for row in rows for token in row], dtype=f"<{kind}")
    (folder / "text_document.bin").write_bytes(flat.tobytes())
    sizes = np.array([len(row) for row in rows], "<i4")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * flat.itemsize
    bounds = np.arange(len(rows) + 1, dtype="<i8")
    version, code = header.get("version", 1), header.get("code", CODES[kind])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, header.get("n", len(rows)), len(bounds))
    (folder / "text_document.idx").write_bytes(head + sizes.tobytes() + starts.tobytes() + bounds.tobytes())
    return folder / "text_document.bin"


ROWS = [[5, 6, 7, 8], [9, 2, 6], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", list(CODES))
def test_megatron_corpora_are_read(kind: str, tmp_path: Path) -> None:
    path = write_megatron(tmp_path, ROWS, kind)
    assert ml.load_sequences(path, prefix_len=2).rows() == ROWS
    assert ml.load_sequences(path, prefix_len=2, limit=2).rows() == ROWS[:2]
    even = write_megatron(tmp_path, [[1, 2, 3], [4, 5, 6]], kind)
    assert ml.load_sequences(even, prefix_len=1, max_targets=1).rows() == [[1, 2], [4, 5]]


def test_large_ids_of_megatron_corpora(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [[60_000, 65_535, 3]], "u2")
    assert ml.load_sequences(path, prefix_len=1).rows() == [[60_000, 65_535, 3]]


def test_a_megatron_corpus_is_scanned_window_by_window(tmp_path: Path) -> None:
    windows = open_windows(write_megatron(tmp_path, ROWS), 3, None, None)
    assert windows.read(np.array([2, 0])).tokens.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_an_empty_megatron_corpus_has_no_rows(tmp_path: Path) -> None:
    assert len(open_megatron(write_megatron(tmp_path, []))) == 0


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"code": 7}, "token type 7"),
        ({"n": 10**12}, "cannot hold"),
        ({"n": 4}, "."),
    ],
)
def test_wrong_headers_are_refused(header: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=words):
        ml.load_sequences(write_megatron(tmp_path, ROWS, **header), prefix_len=1)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        FileFormatError, match=r"sequence 2 at byte 14 with 5 tokens, but text_document.bin has 11"
    ):
        open_megatron(path)
    path.with_suffix(".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(60))
    with pytest.raises(FileFormatError, match="MMIDIDX"):
        open_megatron(path)
    path.with_suffix(".idx").unlink()
    with pytest.raises(SourceNotFoundError, match=r"text_document\.idx"):
        open_megatron(path)


@pytest.mark.parametrize(
    ("place", "number", "kind"),
    [
        (34 + 4, -1, "<i4"),  # the second length
        (34 + 4 * 3 + 8, -2, "<i8"),  # the second pointer
        (34 + 4 * 3 + 8, 9, "<i8"),  # in the middle of a token
        (34 + 4 * 3 + 8, 20, "<i8"),  # two of the three tokens are there
    ],
)
def test_an_index_that_points_beside_the_tokens_is_refused(
    place: int, number: int, kind: str, tmp_path: Path
) -> None:
    path = write_megatron(tmp_path, ROWS)
    index = bytearray(path.with_suffix(".idx").read_bytes())
    raw = np.array(number, kind).tobytes()
    index[place : place + len(raw)] = raw
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(FileFormatError, match=r"puts sequence 1 at byte .*12 tokens of 2 bytes"):
        open_megatron(path)


def test_every_truncated_index_is_refused(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, ROWS)
    whole = path.with_suffix(".idx").read_bytes()
    for size in range(34 + 12 * len(ROWS)):
        path.with_suffix(".idx").write_bytes(whole[:size])
        with pytest.raises(MemlensError):
            open_megatron(path)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, ">i4"])
def test_arrays_of_every_type_and_layout_give_the_same_set(kind: object, tmp_path: Path) -> None:
    rows = np.arange(12).reshape(3, 4)
    for number, array in enumerate((rows.astype(kind), np.asfortranarray(rows.astype(kind)))):
        np.save(tmp_path / f"{number}.npy", array)
        assert ml.load_sequences(tmp_path / f"{number}.npy", prefix_len=2).rows() == rows.tolist()
    backwards = rows.astype(kind)[::-1, ::-1]
    assert ml.SequenceSet.from_tokens(backwards, 2).rows() == backwards.tolist()


def test_reading_some_rows_of_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((300_000, 64), np.int64))  # 150 MB
    ml.load_sequences(tmp_path / "x.npy", limit=1)  # imports what reading needs
    tracemalloc.start()
    seqs = ml.load_sequences(tmp_path / "x.npy", limit=100)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(seqs) == 100


def test_a_set_does_not_change_with_the_file_or_array_it_was_read_from(tmp_path: Path) -> None:
    array = np.ones((3, 4), np.int64)
    np.save(tmp_path / "x.npy", array)
    read, made = ml.load_sequences(tmp_path / "x.npy", prefix_len=2), ml.SequenceSet.from_tokens(array, 2)
    tensor = torch.ones(3, 4, dtype=torch.int64)
    direct = ml.SequenceSet.from_tokens(tensor, 2)
    array[:], tensor[:] = 7, 7
    with (tmp_path / "x.npy").open("r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))
    for seqs in (read, made, direct):
        assert seqs.rows() == [[1] * 4] * 3


def test_sets_with_other_facts_share_their_tokens() -> None:
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7], [5, 9]], 1)
    other = seqs.with_attrs(name="b")
    assert other.tokens.data_ptr() == seqs.tokens.data_ptr()
    assert (other.attrs["name"], dict(seqs.attrs)) == ("b", {})
    other.table["note"] = "x"
    assert "note" not in seqs.table
    assert seqs.with_table(seqs.table.assign(a=1)).table["a"].tolist() == [1, 1]
    with pytest.raises(MemlensError):
        seqs.with_table(seqs.table.iloc[:1])


@pytest.mark.parametrize("portion", [2, 65_536])
def test_checks_in_portions_find_what_checks_of_all_rows_find(
    portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memlens.sequences import checks

    monkeypatch.setattr(checks, "_PORTION", portion)
    rows = [[5, 6, 7, 0], [5, 6, 7], [1, 2, 3], [5, 6, 7], [0, 2, 3], [1, 2, 3, 4]]
    seqs = ml.SequenceSet.from_tokens(rows, [2, 2, 1, 1, 2, 2])
    assert checks.eos_mask(seqs, [0, 4]).tolist() == [True, False, False, False, False, True]
    again = seqs.concat(seqs[[1, 3]], id_suffix="-b")
    assert checks.check_sequences(again, d_vocab=10).duplicates == ("1-b", "3-b")
    with pytest.raises(VocabularyError, match="row 0, position 2"):
        checks.check_sequences(seqs, d_vocab=7)


def test_rows_with_one_hash_are_compared_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def integers(self, *_: object) -> np.ndarray:
            return np.zeros(6, np.int64)

    from memlens.sequences import checks

    monkeypatch.setattr(checks.np.random, "default_rng", lambda _: Zeros())
    seqs = ml.SequenceSet.from_tokens([[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 3, 4]], 2)  # all sums are equal
    assert checks._duplicates(seqs) == ("2",)


def test_texts_are_those_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo_file("zoo/pythia-s").parent)
    rows = np.random.default_rng(0).integers(0, len(tokenizer), (70, 9))
    assert decode(tokenizer, rows) == tokenizer.batch_decode(rows.tolist())
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, rows: ["own"] * len(rows))
    assert decode(tokenizer, rows.tolist()) == ["own"] * 70
