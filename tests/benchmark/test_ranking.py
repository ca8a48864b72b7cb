"""Rankings by the recommended method, what is known of methods, and publishing a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import memlens as ml
from memlens import benchmark
from memlens.benchmark import LOCALIZERS, Leaderboard, recommend
from memlens.benchmark.publishing import compact, markdown
from memlens.benchmark.scores import chance_level
from memlens.errors import FileFormatError, OptionError, SequenceError
from memlens.sequences.set import SequenceSet
from tests.benchmark.test_statistics import rows


def some(n: int, seed: int) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, 90, (n, 12), generator=generator), 6)


def test_a_ranking_is_the_mean_of_the_localizers_scores(tiny_model: Any) -> None:
    model, seqs, others = tiny_model("gpt_neox"), some(3, 0), some(5, 1)
    found = benchmark.rank(model, seqs, "head", others=others, localizer="zero ablation", variant="z-scored")
    method = LOCALIZERS["zero ablation"]
    own, there = (method(model, s, component="head", others=others) for s in (seqs, others))
    z = ((own - there.mean(0)) / there.std(0, ddof=1)).mean(0)
    first = found.table.iloc[0]
    assert z[int(first["layer"]), int(first["index"])] == pytest.approx(z.max(), rel=1e-4)
    assert found.table["score"].is_monotonic_decreasing
    assert len(found.table) == z.size
    assert found.method == "zero ablation, z-scored"
    assert "finds" in found.evidence


def test_by_default_it_is_the_recommended_method(tiny_model: Any) -> None:
    model, seqs, others = tiny_model("gpt_neox"), some(1, 0), some(4, 1)
    found = benchmark.rank(model, seqs, "head", others=others)
    best = benchmark.recommended("head")
    assert found.method == recommend.method_name(best.localizer, best.variant)
    with pytest.raises(SequenceError, match="needs at least 4 other sequences, there are 0"):
        benchmark.rank(model, seqs, "head", localizer="averaged ranks", variant="z-scored")
    with pytest.raises(OptionError, match="variant='best'"):
        benchmark.rank(model, seqs, "head", localizer="random", variant="best")


def test_what_is_known_of_a_method() -> None:
    every = benchmark.known("zero ablation", "z-scored", "head")
    own = benchmark.known("zero ablation", "z-scored", "head", family="pythia")
    assert every is not None
    assert own is not None
    assert (every.family, own.family) == ("", "pythia")
    assert own.recall_at_k.n < every.recall_at_k.n
    assert str(benchmark.known("zero ablation", "z-scored", "head", family="gpt9")) == str(every)
    assert benchmark.known("tea leaves") is None
    assert recommend.what_is_known("tea leaves").endswith("has not measured tea leaves on heads.")
    words = recommend.what_is_known("zero ablation", "z-scored", "head", "pythia")
    assert words.startswith("In the localization benchmark zero ablation, z-scored finds ")
    assert f"on {own.recall_at_k.n} organisms of pythia (chance" in words


def table(**columns: Any) -> pd.DataFrame:
    two = pd.concat([rows(6), rows(6).assign(model="n")], ignore_index=True)
    return two.assign(forwards=2.0, forwards_others=32.0, cpu_seconds=0.1, uniqueness=0.5, **columns)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Leaderboard:
    organisms = pd.DataFrame(
        {"model": ["m", "n"], "passed": [True, True], "seconds": [3600.0] * 2, "cpu_seconds": [1800.0] * 2,
         "peak_mib": [512.0, 1024.0]}
    )  # fmt: skip
    board = Leaderboard(organisms, table())
    monkeypatch.setattr("memlens.benchmark.publishing.read_benchmark", lambda folder: board)
    monkeypatch.setattr("memlens.benchmark.publishing.model_family", {"m": "pythia", "n": ""}.get)
    return board


def test_a_published_run_is_what_is_known(
    run: Leaderboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(FileFormatError, match="has no lines"):
        benchmark.publish("a run", tmp_path, docs=page)
    assert not (tmp_path / "leaderboard.csv").exists()
    marks = [f"<!-- benchmark {m}: written by memlens benchmark publish -->" for m in ("begin", "end")]
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    written = benchmark.publish("a run", tmp_path, docs=page)
    assert [p.name for p in written] == ["recommended.yaml", "leaderboard.csv", "page.md"]
    stored = yaml.safe_load((tmp_path / "recommended.yaml").read_text())
    assert stored["head"]["localizer"] == "good"
    monkeypatch.setattr("memlens.benchmark.recommend.files", lambda package: tmp_path)
    recommend._leaderboard.cache_clear()
    try:
        found = benchmark.known("good", "z-scored", "head", family="pythia")
        assert found is not None
        assert (found.family, found.forwards, found.recall_at_k.n) == ("pythia", 2.0, 6)
        cheap = recommend.affordable("head", 2.0)
        assert cheap is not None
        assert cheap.method == "good, z-scored"
        assert recommend.affordable("head", 1.9) is None
        assert str(recommend.affordable("head", 2.0, family="pythia")).count("6 organisms of pythia") == 1
        assert "12 organisms of all families" in str(cheap)
        monkeypatch.setattr(recommend, "FEWEST_PAIRS", 7)
        assert str(recommend.affordable("head", 2.0, family="pythia")) == str(cheap)
    finally:
        recommend._leaderboard.cache_clear()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| good | z-scored | 0.9" in text
    assert "| 2 (+ 32) | 0.1 |" in text


def test_the_compact_table_has_every_family(run: Leaderboard) -> None:
    found = compact(run)
    assert found["family"].value_counts().to_dict() == {"": 3, "pythia": 3}
    assert found.loc[found["family"] == "", "n"].eq(12).all()
    assert "1.0 CPU hours, 2.0 hours, 1.0 GiB at most" in markdown(run)
    assert np.isfinite(found["deletion_specific"]).all()
    assert "By carrier" not in markdown(run)
    assert "Nothing to find" not in markdown(run)


def test_the_tables_tell_carriers_apart_and_show_where_there_is_nothing(run: Leaderboard) -> None:
    one = run.rows.assign(carrier="path=2", carrier_kind="path")
    none = run.rows.assign(carrier="none", carrier_kind="none", average_precision=0.5)
    text = markdown(Leaderboard(run.organisms, pd.concat([run.rows, one, none], ignore_index=True)))
    assert re.search(r"\| head \| path=2 \| 12 \| 0\.\d\d \| good, z-scored 0\.9", text)
    level = chance_level("average_precision", 0.25, 2)
    assert f"| none | head | 12 | 3 | {0.5 - level:+.3f} [" in text


def test_the_rankings_of_the_studies_are_those_of_the_localizers_that_they_name(tiny_model: Any) -> None:
    model, seqs = tiny_model("llama"), SequenceSet.from_tokens(some(3, 0).tokens, 11)
    dominant = ml.instruments.dominant_neurons(model, seqs, 4, progress=False)["neuron"].values
    scores = LOCALIZERS[recommend.DOMINANT](model, seqs, component="neuron", others=some(4, 1))
    assert np.array_equal(dominant, np.argsort(-scores, axis=-1, kind="stable")[..., :4])
    for mode, name in recommend.ABLATIONS.items():
        found = ml.instruments.ablate_heads(model, seqs, mode=mode, reference=some(4, 1), progress=False)
        scores = LOCALIZERS[name](model, seqs, component="head", others=some(4, 1))
        assert np.allclose(-found.effect("target_logprob").values.reshape(scores.shape), scores, atol=1e-4), (
            mode
        )
    bypass = ml.instruments.bypass_attention(model, seqs, progress=False).effect("target_logprob")
    scores = LOCALIZERS["attention bypass"](model, seqs, component="layer_attention", others=some(4, 1))
    assert np.allclose(-bypass.values.reshape(scores.shape), scores, atol=1e-4)
    note = recommend.ranked_by("attention bypass", "layer_attention", "pythia")
    assert note.startswith("Ranked by attention bypass. In the localization benchmark attention bypass finds")
