"""What a scan keeps, by a plain reading of its description, over made-up scores; and what it records."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.errors import OptionError, SequenceError, VocabularyError
from memlens.recall.corpus import build as build_module
from memlens.recall.corpus import scan as module
from memlens.recall.corpus.build import build_memorized_set
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.recall.corpus.scan import Kept, PredictableRule, ScanOptions, choose, score_block
from memlens.recall.corpus.windows import Block, open_windows
from memlens.recall.score import score_recall
from memlens.recall.trivial import TrivialRules, trivial_continuations
from memlens.sequences.set import SequenceSet

EOS, D_VOCAB = 5, 6
MODEL: Any = SimpleNamespace(cfg=SimpleNamespace(d_vocab=D_VOCAB), tokenizer=None)


def scored(row: tuple[int, ...]) -> tuple[int, float, float]:
    """Exact match, accuracy and log-probability of a window; they look random and depend on its ids alone."""
    number = crc32(repr(row).encode())
    exact = number % 3 == 0
    return int(exact), 1.0 if exact else (number // 3 % 4) / 4, -(number // 12 % 5) / 2


def made_up_scores(model: Any, seqs: SequenceSet, **options: Any) -> Any:
    assert options == {"generate": False, "metrics": (), "batch_size": 7, "progress": False}
    exact, accuracy, logprob = zip(*(scored(tuple(row)) for row in seqs.rows()), strict=True)
    columns = {"exact_match": exact, "target_accuracy": accuracy, "target_logprob": logprob}
    return SimpleNamespace(table=seqs.table.assign(**columns))


def options_of(**options: Any) -> ScanOptions:
    given: dict[str, Any] = {
        "prefix_len": 2, "suffix_len": 4, "n": None, "seed": 0, "max_rows": None, "keep_trivial": False,
        "stride": None, "below": 0.5, "predictable": PredictableRule(), "rules": TrivialRules(distinct=0.5),
        "on_eos": "drop", "pool_size": 3, "block_size": 9,
    }  # fmt: skip
    return ScanOptions(**{**given, **options})


def role_of(row: tuple[int, ...], options: ScanOptions) -> str:
    exact, accuracy, logprob = scored(row)
    rule = options.predictable
    measured = accuracy if rule.measure == "target_accuracy" else logprob
    assert rule.threshold is not None
    if exact:
        return "memorized"
    if measured >= rule.threshold and accuracy < rule.below:
        return "predictable"
    return "unmemorized" if accuracy < options.below else "between"


def plain_scan(blocks: list[list[tuple[int, ...]]], options: ScanOptions) -> tuple[list[Any], dict[str, int]]:
    """The kept (role, window) and the counts, window by window."""
    kept: list[tuple[str, tuple[int, ...]]] = []
    counts: dict[str, int] = {}

    def count(name: str, by: int = 1) -> None:
        counts[name] = counts.get(name, 0) + by

    p = options.prefix_len
    for block in blocks:
        rows = [row for row in block if EOS not in row[p:] or options.on_eos == "keep"]
        count("windows", len(block))
        count("end_of_text", len(block) - len(rows))
        full = {
            role for role in ("unmemorized", "predictable")
            if sum(role == other for other, _ in kept) >= options.pool_size
        }  # fmt: skip
        for row in rows:
            role = role_of(row, options)
            count("exact_match" if role == "memorized" else "not_exact")
            side = "exact" if role == "memorized" else "pool"
            alike = [other for name, other in kept if (name == "memorized") == (role == "memorized")]
            whole = SequenceSet.from_tokens([list(row)], p)
            if role == "between":
                count("between")
            if role == "between" or role in full:
                count("pool_full", role != "between")
            elif trivial_continuations(whole, rules=options.rules)["trivial"][0] and not options.keep_trivial:
                count(f"{side}_trivial")
            elif row in alike:
                count(f"{side}_duplicate_window")
            elif row[p:] in [other[p:] for other in alike]:
                count(f"{side}_duplicate_continuation")
            elif role != "memorized" and sum(role == n for n, _ in kept) >= options.pool_size:
                count("pool_full")
            else:
                count(f"{role}_found")
                kept.append((role, row))
    return kept, counts


windows = st.tuples(*[st.integers(0, D_VOCAB - 1)] * 2, *[st.sampled_from([0, 1, 2, EOS])] * 4)
variants = st.sampled_from([
    {}, {"keep_trivial": True}, {"on_eos": "keep"}, {"pool_size": 1}, {"below": 0.75}, {"below": 0.25},
    {"predictable": PredictableRule("target_logprob", -1.0, below=1.0)},
    {"predictable": PredictableRule(threshold=0.75, below=0.76)},
    {"rules": TrivialRules(repeated=0.0)},
])  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(windows, min_size=1, max_size=8), min_size=1, max_size=3), st.booleans(), variants)
def test_what_is_kept_and_counted_equals_a_plain_reading(
    blocks: list[list[tuple[int, ...]]], twice: bool, variant: dict[str, Any]
) -> None:
    if twice:  # so that windows and continuations repeat
        blocks = [*blocks, [(row[1], row[0], *row[2:]) for row in blocks[0]] + blocks[0]]
    options, kept = options_of(**variant), Kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score_recall", made_up_scores)
        model = SimpleNamespace(cfg=MODEL.cfg, tokenizer=None)
        if options.on_eos == "drop":
            patch.setattr(module, "eos_mask", lambda seqs, eos: _ends(seqs))
        for number, rows in enumerate(blocks):
            n = len(rows)
            place = np.arange(n)
            block = Block(np.array(rows), place + 10 * number, place, n + 2, 2)
            facts = pd.DataFrame({"id": [f"{number}-{i}" for i in place], "row": block.row, "start": place})
            seqs, counted = score_block(model, block, facts, options, 7)
            kept.add(*choose(model, seqs, kept, options, counted))
    expected, counts = plain_scan(blocks, options)
    counts |= {"rows": sum(len(b) + 2 for b in blocks), "rows_too_short": 2 * len(blocks)}
    assert {name: n for name, n in kept.counts.items() if n} == {name: n for name, n in counts.items() if n}
    for role in ("memorized", "unmemorized", "predictable"):
        mine = [row for name, row in expected if name == role]
        assert kept.size(role) == len(mine)
        found = kept.candidates(role)
        if not mine:
            assert found is None
            continue
        assert found is not None
        if role != "memorized":  # none with the window or the continuation of a memorized one
            recited = {row[2:] for name, row in expected if name == "memorized"}
            mine = [row for row in mine if row[2:] not in recited]
        assert [tuple(row) for row in found.rows()] == mine
        assert found.prefix_len.tolist() == [2] * len(mine)
        assert "role" not in found.table
        assert {"id", "row", "start", "exact_match", "target_accuracy", "step_share", "trivial"} <= set(
            found.table
        )
        for name, row in zip(found.table["id"], found.rows(), strict=True):
            number, place = map(int, name.split("-"))
            assert tuple(row) == blocks[number][place]


def _ends(seqs: SequenceSet) -> torch.Tensor:
    return torch.tensor([EOS in row[2:] for row in seqs.rows()], dtype=torch.bool)


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        (PredictableRule(), [False, True, True, False, False, False]),
        (PredictableRule(threshold=0.6), [False, False, True, False, False, False]),
        (PredictableRule(below=1.0), [False, True, True, True, True, False]),
        (PredictableRule("target_logprob"), [False, True, True, False, False, False]),
        (PredictableRule("target_logprob", -1.0, below=0.9), [False, False, True, True, False, False]),
    ],
)
def test_what_is_predictable(rule: PredictableRule, held: list[bool]) -> None:
    table = pd.DataFrame({
        "exact_match": [0, 0, 0, 0, 0, 1],
        "target_accuracy": [0.49, 0.5, 0.74, 0.75, 0.9, 1.0],
        "target_logprob": [-1.51, -1.5, -1.0, -0.5, -0.1, 0.0],
    })  # fmt: skip
    assert rule.holds(table).tolist() == held


def test_rules_say_their_thresholds_and_refuse_others() -> None:
    assert PredictableRule().settings() == {
        "predictable_measure": "target_accuracy", "predictable_threshold": 0.5, "predictable_below": 0.75
    }  # fmt: skip
    assert PredictableRule("target_logprob").threshold == -1.5
    for measure, good, bad in (
        ("target_accuracy", (0, 1), (-0.1, 1.1)),
        ("target_logprob", (-99.0, 0), (0.1,)),
    ):
        for threshold in good:
            assert PredictableRule(measure, threshold).threshold == threshold
        for threshold in bad:
            with pytest.raises(OptionError, match=f"threshold={threshold} is not a {measure}: give "):
                PredictableRule(measure, threshold)


def test_an_id_outside_the_vocabulary_names_its_row() -> None:
    block = Block(
        np.array([[1, 2], [1, D_VOCAB - 1], [D_VOCAB + 3, D_VOCAB], [9, 9]]),
        np.arange(4) + 7,
        np.arange(4),
        4,
        0,
    )
    with pytest.raises(VocabularyError, match=r"row 9 of the corpus holds the token id 9, .* has 6 entries"):
        score_block(MODEL, block, pd.DataFrame({"id": list("abcd")}), options_of(), 7)


def test_names_and_facts_of_windows() -> None:
    block = Block(np.zeros((3, 2), int), np.array([4, 0, 0]), np.array([0, 0, 6]), 3, 0)
    plain = build_module._facts(open_windows(np.zeros((5, 9), int), 2, 3, None), block)
    assert plain["id"].tolist() == ["row-4", "row-0", "row-0+6"]
    assert list(plain) == ["id", "row", "start"]
    table = pd.DataFrame({
        "id": list("abcde"), "domain": list("vwxyz"), "row": 1, "start": 2, "role": 3, "exact_match": 4,
        "text": 5,
        "matched_to": 6, "length_difference": 7, "frequency_difference": 8, "nll": 9,
    })  # fmt: skip
    seqs = SequenceSet.from_tokens([[1, 2, 3]] * 5, 1, table=table)
    facts = build_module._facts(open_windows(seqs, 2, None, None), block)
    assert facts["id"].tolist() == ["e", "a", "a+6"]
    assert (facts["row"].tolist(), facts["start"].tolist()) == ([4, 0, 0], [0, 0, 6])
    assert list(facts) == [
        "id",
        "row",
        "start",
        "domain",
    ]  # scores and places of an older scan are not its own
    assert facts["domain"].tolist() == ["z", "v", "v"]


def test_a_source_is_called_by_its_file_its_set_or_its_type() -> None:
    seqs = SequenceSet.from_tokens([[1, 2]], 1)
    for source, name in (
        ("a/b.npy", "b.npy"), (Path("c/d.npy"), "d.npy"), (seqs, "SequenceSet"), ([[1]], "list"),
        (seqs.with_attrs(source="mine"), "mine"), (np.zeros(2), "ndarray"),
    ):  # fmt: skip
        assert build_module._source_name(source) == name


DOCUMENTED = {
    "prefix_len": 32, "suffix_len": 32, "n": 1000, "seed": 0, "max_rows": None, "keep_trivial": False,
    "stride": None, "below": 0.5, "on_eos": "drop", "pool_size": 20_000, "block_size": 1024,
    "predictable_measure": "target_accuracy", "predictable_threshold": 0.5, "predictable_below": 0.75,
    "trivial_copied": 0.5, "trivial_distinct": 0.2, "trivial_repeated": 0.75, "trivial_step": 0.75,
    "trivial_min_tokens": 4, "trivial_max_period": 16,
    "source": "ndarray", "source_kind": "array", "token_counts": "counted in the scan",
}  # fmt: skip


@pytest.fixture
def tiny(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("gpt_neox", "bridge")


@pytest.mark.filterwarnings("ignore:none of")
def test_documented_defaults_are_recorded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = np.random.default_rng(0).integers(0, 90, (3, 70))
    found = build_memorized_set(tiny, corpus, progress=False)
    assert {name: found.settings.get(name, "missing") for name in DOCUMENTED} == DOCUMENTED
    assert "bos" not in found.settings
    assert found.counts["windows"] == 3
    changes: dict[str, Any] = {
        "prefix_len": 3, "suffix_len": 4, "n": 5, "seed": 6, "max_rows": 2, "keep_trivial": True, "stride": 7,
        "below": 0.25, "on_eos": "keep", "pool_size": 9, "block_size": 8,
    }  # fmt: skip
    other = build_memorized_set(
        tiny,
        corpus.tolist(),
        **changes,
        rules=TrivialRules(copied=0.6),
        predictable=PredictableRule(below=0.8),
        token_counts=np.ones(tiny.cfg.d_vocab),
        prepend_bos=True,
        progress=False,
    )
    changes |= {"trivial_copied": 0.6, "predictable_below": 0.8, "source": "list", "source_kind": "rows"}
    changes |= {"token_counts": "given"}
    assert {name: other.settings[name] for name in DOCUMENTED} == {**DOCUMENTED, **changes}
    assert other.settings["bos"] == tiny.tokenizer.bos_token_id
    assert other.settings["batch_size"] == 8  # no batch spans two blocks
    assert build_memorized_set(tiny, corpus, batch_size=2, progress=False).settings["batch_size"] == 2
    monkeypatch.setattr(build_module, "rows_per_batch", lambda cfg, length, device: 100 + length)
    assert build_memorized_set(tiny, corpus, progress=False).settings["batch_size"] == 164
    begun = build_memorized_set(tiny, corpus, prefix_len=31, prepend_bos=True, progress=False)
    assert begun.settings["batch_size"] == 164


@pytest.mark.filterwarnings("ignore:none of")
def test_windows_with_a_beginning_of_text_token_must_fit_the_context(tiny: Any) -> None:
    corpus = np.zeros((2, 64), int)
    with pytest.raises(SequenceError, match="window of 65 tokens is longer than the model's context of 64"):
        build_memorized_set(tiny, corpus, prepend_bos=True, progress=False)
    for shape in ((7,), (2, tiny.cfg.d_vocab)):
        with pytest.raises(SequenceError, match=rf"give one count for each of the {tiny.cfg.d_vocab} ids"):
            build_memorized_set(tiny, corpus, token_counts=np.ones(shape), progress=False)
    with pytest.raises(OptionError, match="prepend_bos='never'"):
        build_memorized_set(tiny, corpus, prepend_bos="never", progress=False)  # type: ignore[arg-type]
    build_memorized_set(tiny, corpus, prefix_len=31, prepend_bos=True, progress=False)


def test_a_scan_of_nothing_memorized_warns_its_caller_and_is_saved(tiny: Any, tmp_path: Path) -> None:
    corpus = np.random.default_rng(1).integers(0, 90, (5, 20))
    options: dict[str, Any] = {"prefix_len": 8, "suffix_len": 12, "progress": False}
    with pytest.warns(UserWarning, match="none of 5 windows is memorized: no set is made"):
        found = build_memorized_set(tiny, corpus, out=tmp_path / "scan", **options)
    assert list(found.balance()) == ["controls", "covariate", "before", "after"]
    assert [len(s) for s in (found.memorized, found.unmemorized, found.predictable)] == [0, 0, 0]
    assert found.memorized.tokens.shape[1] in (0, 20)
    assert found.counts["unmemorized_found"] + found.counts["predictable_found"] > 0
    again = MemorizedSet.load(tmp_path / "scan")
    assert again.counts == found.counts
    assert set(found.counts) == {
        "rows", "rows_too_short", "windows", "end_of_text", "exact_match", "not_exact", "memorized",
        "beyond_n", "exact_trivial", "exact_duplicate_window", "exact_duplicate_continuation",
        "unmemorized_found", "predictable_found", "between", "pool_full", "pool_trivial",
        "pool_duplicate_window", "pool_duplicate_continuation", "unmemorized", "predictable",
    }  # fmt: skip
    sizes, model = "0 memorized, 0 unmemorized, 0 predictable", found.settings["model"]
    assert repr(found) == f"MemorizedSet({sizes}; 5 windows scanned with {model})"
    bare = MemorizedSet(found.memorized, found.unmemorized, found.predictable, {}, {})
    assert repr(bare).endswith("0 windows scanned with a model)")
    assert bare.balance().empty
    for role, seqs in (("memorized", found.memorized), ("unmemorized", found.unmemorized)):
        assert seqs.attrs["role"] == role
        assert seqs.attrs["prepend_bos"] is False
        assert not [name for name, value in seqs.attrs.items() if value is None]


def test_rows_that_are_read_are_limited_and_facts_of_the_source_kept(tiny: Any) -> None:
    rows = np.random.default_rng(2).integers(0, 90, (9, 20)).tolist()
    options: dict[str, Any] = {"prefix_len": 8, "suffix_len": 12, "progress": False, "block_size": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for limit, n in ((1, 1), (4, 4), (5, 5), (99, 9), (None, 9)):
            found = build_memorized_set(tiny, rows, max_rows=limit, **options)
            assert (found.counts["rows"], found.counts["windows"]) == (n, n)
            assert found.settings["max_rows"] == limit


def test_each_distinct_window_is_scored_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows with one continuation, and a third that occurs three times."""
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [5, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8]]
    block = Block(np.array(rows), np.arange(5), np.zeros(5, int), 5, 0)
    facts = pd.DataFrame({"id": list("abcde")})
    sizes: list[int] = []
    plain = score_recall(
        tiny, SequenceSet.from_tokens(rows, 2), generate=False, metrics=(), batch_size=5, progress=False
    ).table

    def counting(model: Any, seqs: SequenceSet, **options: Any) -> Any:
        sizes.append(len(seqs))
        return score_recall(model, seqs, **options)

    monkeypatch.setattr(module, "score_recall", counting)
    seqs, counts = score_block(tiny, block, facts, options_of(prefix_len=2, suffix_len=2), 5)
    assert sizes == [3]
    assert counts["windows"] == len(seqs) == 5
    assert seqs.rows() == rows
    assert seqs.table["id"].tolist() == list("abcde")
    for name in ("target_logprob", "margin", "matching_prefix", "target_accuracy"):
        np.testing.assert_allclose(seqs.table[name], plain[name], rtol=0, atol=1e-5)
