from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from memlens.errors import (
    ColumnError,
    FileFormatError,
    OptionError,
    ResultError,
    SequenceError,
    SourceNotFoundError,
    UnfinishedError,
    VocabularyError,
)
from memlens.models.load import load_model
from memlens.recall.corpus import build as module
from memlens.recall.corpus.build import build_memorized_set
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.recall.corpus.scan import PredictableRule
from memlens.recall.score import score_recall
from memlens.recall.trivial import TrivialRules, trivial_continuations
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded, plain_greedy

ROLES = ("memorized", "unmemorized", "predictable")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def planted(model: Any) -> SequenceSet:
    """Planted rows from no copy to very many, and text that was not trained on."""
    zoo = load_sequences("zoo", model)
    zoo = zoo[(zoo.table["domain"].isin(["text", "code", "table"])).to_numpy()][::3]
    return zoo.concat(load_sequences("zoo:heldout", model)[:84])


@pytest.fixture(scope="module")
def corpus(planted: SequenceSet) -> np.ndarray:
    """The rows as uint16, some of them twice."""
    rows = planted.tokens.numpy().astype(np.uint16)
    return np.concatenate([rows, rows[60:80]])


@pytest.fixture(scope="module")
def found(model: Any, corpus: np.ndarray) -> MemorizedSet:
    return build(model, corpus)


def build(model: Any, source: Any, **options: Any) -> MemorizedSet:
    return build_memorized_set(model, source, **{"block_size": 64, "progress": False, **options})


def tokens(seqs: SequenceSet) -> list[tuple[int, ...]]:
    return [tuple(row) for row in seqs.rows()]


def assert_equal_sets(a: MemorizedSet, b: MemorizedSet) -> None:
    assert a.counts == b.counts
    pd.testing.assert_frame_equal(a.balance(), b.balance())
    for role in ROLES:
        one, two = getattr(a, role), getattr(b, role)
        assert torch.equal(one.tokens, two.tokens)
        pd.testing.assert_frame_equal(one.table, two.table)


def test_kept_is_what_scoring_calls_exact(model: Any, corpus: np.ndarray, found: MemorizedSet) -> None:
    whole = SequenceSet.from_tokens(corpus, 32)
    exact = score_recall(model, whole, metrics=(), progress=False).table["exact_match"].to_numpy() == 1
    trivial = trivial_continuations(whole, tokenizer=model.tokenizer)["trivial"].to_numpy(dtype=bool)
    expected = {tuple(row) for row in corpus[exact & ~trivial].tolist()}
    assert len(expected) > 20
    assert set(tokens(found.memorized)) == expected
    assert len(found.memorized) == len(expected)
    counts = found.counts
    assert counts["exact_match"] == exact.sum()
    assert counts["exact_trivial"] == (exact & trivial).sum()
    assert counts["exact_duplicate_window"] == (exact & ~trivial).sum() - len(expected) > 0
    rows = found.memorized.table["row"].to_numpy()
    assert corpus[rows].tolist() == found.memorized.tokens.tolist()


def test_counts_add_up(corpus: np.ndarray, found: MemorizedSet) -> None:
    c = found.counts
    assert c["windows"] == c["rows"] == len(corpus)
    assert c["windows"] == c["end_of_text"] + c["exact_match"] + c["not_exact"]
    of_exact = ("memorized", "beyond_n", "exact_trivial")
    of_exact += ("exact_duplicate_window", "exact_duplicate_continuation")
    assert c["exact_match"] == sum(c[name] for name in of_exact)
    of_others = ("unmemorized_found", "predictable_found", "between", "pool_full", "pool_trivial")
    of_others += ("pool_duplicate_window", "pool_duplicate_continuation")
    assert c["not_exact"] == sum(c[name] for name in of_others)
    assert [c[role] for role in ROLES] == [len(getattr(found, role)) for role in ROLES]


def test_controls_are_disjoint_matched_and_what_they_are_called(found: MemorizedSet) -> None:
    sets = [set(tokens(getattr(found, role))) for role in ROLES]
    assert sum(map(len, sets)) == len(set.union(*sets)) == sum(len(getattr(found, r)) for r in ROLES)
    assert len(found.unmemorized) == len(found.predictable) == len(found.memorized)
    for controls in (found.unmemorized, found.predictable):
        assert set(controls.table["matched_to"]) == set(found.memorized.ids)
        assert controls.prefix_len.eq(32).all()
        assert controls.lengths.eq(64).all()
        assert not controls.table["exact_match"].any()
    assert (found.unmemorized.table["target_accuracy"] < 0.5).all()
    assert found.predictable.table["target_accuracy"].between(0.5, 0.75, inclusive="left").all()


def test_balance_is_that_of_the_sets(found: MemorizedSet) -> None:
    balance = found.balance().set_index(["controls", "covariate"])
    assert abs(balance.loc[("predictable", "frequency"), "after"]) < 0.25
    for controls, covariate in (("predictable", "target_logprob"), ("unmemorized", "frequency")):
        row = balance.loc[(controls, covariate)]
        assert abs(row["after"]) <= abs(row["before"])
    gap = found.memorized.table["target_logprob"].mean() - found.predictable.table["target_logprob"].mean()
    assert np.sign(gap) == np.sign(balance.loc[("predictable", "target_logprob"), "after"]) == 1


def test_seeds(model: Any, corpus: np.ndarray) -> None:
    a, b, c = (build(model, corpus, n=8, seed=seed) for seed in (1, 1, 2))
    assert_equal_sets(a, b)
    assert tokens(a.memorized) != tokens(c.memorized)
    assert len(a.memorized) == len(c.memorized) == 8
    assert a.counts["windows"] < len(corpus)
    assert a.counts["windows"] % 64 == 0


def test_n_takes_the_first_of_a_longer_scan(model: Any, corpus: np.ndarray, found: MemorizedSet) -> None:
    few = build(model, corpus, n=5)
    assert tokens(few.memorized) == tokens(found.memorized)[:5]
    assert (
        few.counts["beyond_n"]
        == few.counts["exact_match"]
        - 5
        - few.counts["exact_trivial"]
        - (few.counts["exact_duplicate_window"])
    )


def test_every_form_of_source_gives_the_same_windows(
    model: Any, planted: SequenceSet, tmp_path: Path
) -> None:
    rows = planted.tokens[40:70].numpy().astype(np.uint16)
    np.save(tmp_path / "corpus.npy", rows)
    lists = rows.tolist()
    sources = {
        "memory map": np.load(tmp_path / "corpus.npy", mmap_mode="r"),
        "tensor": torch.from_numpy(rows.astype(np.int64)),
        "file": tmp_path / "corpus.npy",
        "name": str(tmp_path / "corpus.npy"),
        "long text": rows.reshape(-1),
        "lists": lists,
        "frame": pd.DataFrame({"input_ids": lists}),
        "dataset": datasets.Dataset.from_dict({"tokens": lists, "x": lists}),
        "set": SequenceSet.from_tokens(rows, 5),
        "generator": iter(lists),
        "streamed": datasets.Dataset.from_dict({"tokens": lists}).to_iterable_dataset(),
    }
    expected = build(model, rows)
    assert len(expected.memorized)
    for name, source in sources.items():
        seen = build(model, source)
        assert set(tokens(seen.memorized)) == set(tokens(expected.memorized)), name
        assert seen.counts == expected.counts, name
    for name in ("memory map", "tensor", "file", "long text", "lists", "frame", "dataset"):
        assert tokens(build(model, sources[name]).memorized) == tokens(expected.memorized), name
    named = build(model, planted[40:70]).memorized
    assert set(named.ids) <= set(planted.ids)
    assert named.table["copies"].tolist() == [
        planted.table.set_index("id").loc[name, "copies"] for name in named.ids
    ]


def test_strides_and_short_rows(model: Any, planted: SequenceSet) -> None:
    memorized = build(model, planted).memorized.rows()
    ragged = [[7] * 40 + memorized[0], memorized[1] + [9] * 2, [5, 6]]
    first = build(model, ragged)
    assert tokens(first.memorized) == [tuple(memorized[1])]
    assert (first.counts["rows"], first.counts["rows_too_short"], first.counts["windows"]) == (3, 1, 2)
    every = build(model, ragged, stride=20)
    assert every.counts["windows"] == 3 + 1
    assert {tuple(memorized[0]), tuple(memorized[1])} <= set(tokens(every.memorized))
    assert "row-0+40" in every.memorized.ids
    array = np.array([[7] * 40 + memorized[0], memorized[1] + [9] * 40])
    assert "row-0+40" in build(model, array, stride=40).memorized.ids
    assert build(model, array, stride=40).counts["windows"] == 4


def test_same_continuation_after_another_prefix(model: Any, found: MemorizedSet) -> None:
    rows = found.memorized.tokens
    altered = rows.clone()
    altered[:, 0] = 1  # the first of 32 tokens given matters little
    exact = score_recall(model, SequenceSet.from_tokens(altered, 32), metrics=(), progress=False)
    still = np.flatnonzero((exact.table["exact_match"] == 1) & (rows[:, 0] != 1).numpy())
    assert len(still)
    twice = build(model, torch.cat([rows[still], altered[still]]))
    assert len(twice.memorized) == len(still)
    assert twice.counts["exact_match"] == 2 * len(still)
    assert twice.counts["exact_duplicate_continuation"] == len(still)


class Broken(Exception):
    pass


def breaking(rows: Any, at: int) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if number == at:
            raise Broken
        yield row


def test_blocks_scored_by_others_give_the_same_scan(model: Any, corpus: np.ndarray, tmp_path: Path) -> None:
    """By workers, and in shares; also where the scan ends before the last block."""
    np.save(tmp_path / "corpus.npy", corpus)
    source = tmp_path / "corpus.npy"
    for n in (None, 10):
        whole = build(model, source, n=n, out=tmp_path / f"one-{n}")
        with ThreadPoolExecutor(2) as executor:
            found = build(model, source, n=n, out=tmp_path / f"many-{n}", executor=executor)
        assert_equal_sets(found, whole)
        blocks = sorted((tmp_path / f"one-{n}").glob("block-*"))
        assert blocks
        for part in blocks:
            assert part.read_bytes() == (tmp_path / f"many-{n}" / part.name).read_bytes()
    names = {f.name for f in (tmp_path / "many-None").iterdir()}
    assert names == {f.name for f in (tmp_path / "one-None").iterdir()}
    with pytest.raises(UnfinishedError, match=r"missing: scored-000001.parquet"):
        build(model, source, n=None, out=tmp_path / "shares", part=(0, 2))
    shared = build(model, source, n=None, out=tmp_path / "shares", part=(1, 2))
    assert_equal_sets(shared, MemorizedSet.load(tmp_path / "one-None"))
    with pytest.raises(OptionError, match="a source with a length"):
        build(model, iter(corpus), out=tmp_path / "stream", part="auto")


@pytest.mark.parametrize("form", ["stream", "array"])
def test_an_interrupted_scan_goes_on(
    model: Any, corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / "scan"
    whole = build(model, iter(corpus) if form == "stream" else corpus)
    scored: list[int] = []
    score_block = module.score_block

    def counting(model: Any, block: Any, *rest: Any) -> Any:
        scored.append(len(block))
        if form == "array" and len(scored) == 3:
            raise Broken
        return score_block(model, block, *rest)

    monkeypatch.setattr(module, "score_block", counting)
    with pytest.raises(Broken):
        build(model, breaking(corpus, 150) if form == "stream" else corpus, out=out)
    assert sorted(p.name for p in out.iterdir()) == [
        "block-000000.parquet",
        "block-000001.parquet",
        "manifest.json",
    ]
    with pytest.raises(SourceNotFoundError, match="not finished"):
        MemorizedSet.load(out)
    scored.extend([0] * 3)
    before = sum(scored)
    resumed = build(model, iter(corpus) if form == "stream" else corpus, out=out)
    assert sum(scored) - before == len(corpus) - 128
    assert_equal_sets(resumed, whole)
    assert_equal_sets(MemorizedSet.load(out), whole)
    before = sum(scored)
    assert_equal_sets(build(model, iter(corpus) if form == "stream" else corpus, out=out), whole)
    assert sum(scored) == before


def test_a_finished_scan_is_made_longer(model: Any, corpus: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    short = build(model, corpus, out=out, n=3)
    assert len(short.memorized) == 3
    assert_equal_sets(build(model, corpus, out=out, max_rows=100), build(model, corpus, max_rows=100))
    assert_equal_sets(build(model, corpus, out=out), build(model, corpus))
    assert_equal_sets(build(model, corpus, out=out, n=3), short)


def test_a_scan_goes_on_with_its_own_batches(
    model: Any, corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scan"
    monkeypatch.setattr(module, "rows_per_batch", lambda *_: 24)
    build(model, corpus, out=out, n=1)
    monkeypatch.setattr(module, "rows_per_batch", lambda *_: 48)
    assert build(model, corpus, out=out).settings["batch_size"] == 24
    assert build(model, corpus[:64]).settings["batch_size"] == 48


def test_another_scan_is_refused(model: Any, corpus: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    build(model, corpus, out=out, n=3)
    for options, what in (
        ({"seed": 1}, "seed"),
        ({"prefix_len": 30}, "prefix_len"),
        ({"batch_size": 7}, "batch_size"),
        ({"rules": TrivialRules(copied=0.6)}, "trivial_copied"),
        ({"predictable": PredictableRule(below=0.8)}, "predictable_below"),
    ):
        with pytest.raises(ResultError, match=f"another scan.*different: .*{what}"):
            build(model, corpus, out=out, **options)
    other = corpus.copy()
    other[:, 0] += 1
    with pytest.raises(ResultError, match="the source has changed"):
        build(model, other, out=out)
    with pytest.raises(ResultError, match="n_rows"):
        build(model, corpus[:-1], out=out)


def test_another_model_and_standing_hooks_are_refused(corpus: np.ndarray, tmp_path: Path) -> None:
    model, out = load_model("zoo/pythia-s"), tmp_path / "scan"
    build(model, corpus, out=out, n=1)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        with pytest.raises(ResultError, match="different: weights"):
            build(model, corpus, out=out, n=1)
        with pytest.warns(UserWarning, match="none of 64"):
            assert build(model, corpus[:64]).counts["exact_match"] == 0
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    with pytest.raises(ResultError, match="different: weights"):
        build(model, corpus, out=out, n=1)


def test_damaged_files(model: Any, corpus: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    build(model, corpus, out=out, n=1)
    block = out / "block-000000.parquet"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(ResultError, match=r"block-000000.parquet is damaged"):
        build(model, corpus, out=out, n=1)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ResultError, match=r"manifest.json is damaged"):
        build(model, corpus, out=out, n=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"not empty and holds no manifest.json of a scan"):
        build(model, corpus, out=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_saving(found: MemorizedSet, tmp_path: Path) -> None:
    loaded = MemorizedSet.load(found.save(tmp_path / "set"))
    assert_equal_sets(loaded, found)
    assert loaded.settings == found.settings
    assert repr(loaded) == repr(found)
    assert loaded.memorized.attrs == found.memorized.attrs
    content = json.loads((tmp_path / "set" / "memorized_set.json").read_text())
    (tmp_path / "set" / "memorized_set.json").write_text(json.dumps({**content, "format": "x"}))
    with pytest.raises(FileFormatError, match="format 'x'"):
        MemorizedSet.load(tmp_path / "set")


def test_what_is_recorded(model: Any, corpus: np.ndarray, found: MemorizedSet) -> None:
    for facts in (found.settings, found.memorized.attrs, found.predictable.attrs):
        assert facts["dtype"] == "float32"
        assert facts["device"] == "cpu"
        assert facts["torch"] == torch.__version__
        inner = getattr(model, "original_model", None)
        own = "TransformerLens (eager)" if inner is None else inner.config._attn_implementation
        assert facts["attention"] == own
        assert facts["batch_size"] == 32  # 2,048 positions at a time on a CPU
        assert (facts["prefix_len"], facts["suffix_len"], facts["seed"]) == (32, 32, 0)
        assert facts["predictable_measure"] == "target_accuracy"
        assert facts["predictable_threshold"] == 0.5
    assert build(model, corpus[:64], batch_size=16).settings["batch_size"] == 16
    assert f"{len(found.memorized)} memorized" in repr(found)
    html = found._repr_html_()
    assert "exact_duplicate_window" in html
    assert "target_logprob" in html


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bridge_s_kernel_is_recorded(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "describe", lambda model: {})
    bridge: Any = nn.Linear(2, 2)
    bridge.original_model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    assert module._numerics(bridge, 8)["attention"] == attention


def test_on_a_gpu_its_name_is_recorded(found: MemorizedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gpu" not in found.settings
    monkeypatch.setattr(module, "describe", lambda model: {"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the best {device.type}")
    weight = SimpleNamespace(device=torch.device("cuda"))
    facts = module._numerics(SimpleNamespace(parameters=lambda: iter([weight])), 8)
    assert facts["gpu"] == "the best cuda"
    assert (facts["batch_size"], facts["attention"]) == (8, "TransformerLens (eager)")
    assert facts["matmul_precision"] == torch.get_float32_matmul_precision()


def test_the_recorded_sets_go_on_as_any_other(model: Any, found: MemorizedSet) -> None:
    again = score_recall(model, found.memorized, metrics=(), progress=False)
    assert again.table["exact_match"].all()
    assert found.memorized.texts == model.tokenizer.batch_decode(found.memorized.rows())


def test_trivial_is_kept_on_demand(model: Any, planted: SequenceSet) -> None:
    rules = TrivialRules(distinct=0.7)
    without = build(model, planted, rules=rules)
    within = build(model, planted, rules=rules, keep_trivial=True)
    assert without.counts["exact_trivial"] > 0
    assert within.counts["exact_trivial"] == 0
    assert within.memorized.table["trivial"].sum() == without.counts["exact_trivial"]
    assert not without.memorized.table["trivial"].any()


def test_end_of_text(model: Any, planted: SequenceSet) -> None:
    rows = planted.tokens[:20].clone()
    rows[:5, 40] = model.tokenizer.eos_token_id
    rows[5:7, 3] = model.tokenizer.eos_token_id
    assert build(model, rows).counts["end_of_text"] == 5
    kept = build(model, rows, on_eos="keep").counts
    assert (kept["end_of_text"], kept["not_exact"] + kept["exact_match"]) == (0, 20)


def test_predictable_by_log_probability(model: Any, corpus: np.ndarray) -> None:
    rule = PredictableRule("target_logprob", -1.2, below=0.8)
    found = build(model, corpus, predictable=rule)
    table = found.predictable.table
    assert (table["target_logprob"] >= -1.2).all()
    assert (table["target_accuracy"] < 0.8).all()
    assert (found.unmemorized.table["target_logprob"] < -1.2).all()
    assert PredictableRule("target_logprob").threshold == -1.5


def test_a_small_pool_and_given_counts(model: Any, corpus: np.ndarray, found: MemorizedSet) -> None:
    few = build(model, corpus, pool_size=10)
    assert len(few.unmemorized) == len(few.predictable) == 10
    assert few.counts["pool_full"] > 0
    assert tokens(few.memorized) == tokens(found.memorized)
    counts = np.ones(model.cfg.d_vocab, np.int64)
    flat = build(model, corpus, token_counts=counts)
    assert (flat.predictable.table["frequency_difference"].abs() < 1e-12).all()
    assert flat.settings["token_counts"] == "given"


def test_no_control_continues_as_a_memorized_one(model: Any, planted: SequenceSet) -> None:
    row = build(model, planted).memorized.rows()[0]
    other = load_sequences("zoo:heldout", model).rows()[200]
    mixed = [*other[:32], *row[32:]]  # the memorized continuation where it does not belong
    score = score_recall(model, SequenceSet.from_tokens([mixed], 32), metrics=(), progress=False)
    assert score.table["exact_match"].tolist() == [0]
    found = build(model, [mixed, row], below=1.0)
    assert found.counts["unmemorized_found"] + found.counts["predictable_found"] == 1
    assert len(found.memorized) == 1
    assert len(found.unmemorized) == len(found.predictable) == 0


def test_nothing_is_memorized(model: Any, tmp_path: Path) -> None:
    rows = load_sequences("zoo:heldout", model).tokens[:20]
    with pytest.warns(UserWarning, match="none of 20 windows is memorized"):
        found = build(model, rows, out=tmp_path / "scan")
    assert [len(getattr(found, role)) for role in ROLES] == [0, 0, 0]
    assert found.counts["not_exact"] == 20
    assert MemorizedSet.load(tmp_path / "scan").counts == found.counts


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neo", "bridge"), ("llama_gqa", "bridge"), ("gpt_neox", "hooked")]
)
def test_models_without_a_tokenizer_s_text(tiny_model: Callable[..., Any], family: str, backend: str) -> None:
    """Greedy continuations of random models are memorized by definition, altered ones are not."""
    model = tiny_model(family, backend)
    prompts = SequenceSet.from_tokens(graded(model, n=9).tokens[:, :12], 4)
    recited = [row[:4] + more for row, more in zip(prompts.rows(), plain_greedy(model, prompts), strict=True)]
    altered = [[*row[:8], (row[8] + 1) % 40, *row[9:]] for row in recited]
    found = build(model, recited + altered, prefix_len=4, suffix_len=8, keep_trivial=True)
    distinct = {tuple(row[4:]) for row in recited}
    assert {tuple(row[4:]) for row in found.memorized.rows()} == distinct
    assert found.counts["exact_match"] == 9


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.ones((3, 64)), SequenceError, r"float64 of shape \(3, 64\)"),
        (
            np.ones((3, 63), int),
            SequenceError,
            "the longest row of the corpus has 63 tokens, and 64",
        ),
        (np.ones((2, 3, 64), int), SequenceError, r"shape \(2, 3, 64\)"),
        (np.full((3, 64), 5000), VocabularyError, "row 0 of the corpus|row . of the corpus holds .* 5000"),
        (np.full((3, 64), -1), VocabularyError, "negative token id"),
        (["some text"], SequenceError, "row 0 of the corpus is <U"),
        ([[1.5] * 64], SequenceError, "row 0 of the corpus is float64"),
        (5, SequenceError, "a int is not a corpus"),
        ({"train": [[1]]}, SequenceError, "a dict is not a corpus"),
        (pd.DataFrame({"x": [[1]]}), ColumnError, "no column of token ids: the columns are x"),
        ("no/such.npy", SourceNotFoundError, "there is no file no/such.npy"),
        ("corpus.jsonl", FileFormatError, r"is not a .npy or .bin file"),
    ],
)
def test_sources_that_are_none(model: Any, source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(model, source)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, OptionError, "n=0 is not allowed: give"),
        ({"stride": 0}, OptionError, "stride=0 is not allowed: give"),
        ({"suffix_len": 4000}, SequenceError, "window of 4032 tokens is longer than the model's context"),
        ({"below": 0.0}, OptionError, "below=0.0"),
        ({"on_eos": "raise"}, OptionError, "on_eos"),
        ({"token_counts": np.ones(7)}, SequenceError, r"token_counts has shape \(7,\)"),
        ({"batch_size": 0}, OptionError, "batch_size=0"),
    ],
)
def test_bad_options(
    model: Any, corpus: np.ndarray, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(model, corpus, **options)


def test_bad_rules() -> None:
    with pytest.raises(OptionError, match="measure='nll'"):
        PredictableRule("nll")
    with pytest.raises(OptionError, match=r"threshold=1.5 is not a target_accuracy"):
        PredictableRule(threshold=1.5)
    with pytest.raises(OptionError, match=r"below=0"):
        PredictableRule(below=0)


def test_a_set_of_another_tokenizer(model: Any, planted: SequenceSet) -> None:
    with pytest.raises(VocabularyError, match="tokenizer"):
        build(model, planted.with_attrs(vocabulary="another"))


def test_a_failed_save_keeps_the_old_set(
    found: MemorizedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = found.save(tmp_path / "set")
    other = replace(found, memorized=found.memorized[:1], counts={**found.counts, "memorized": 1})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memlens.recall.corpus.memorized_set.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        other.save(folder)
    assert_equal_sets(MemorizedSet.load(folder), found)
    monkeypatch.undo()
    assert_equal_sets(MemorizedSet.load(other.save(folder)), other)
