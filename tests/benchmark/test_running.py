"""The mini suite from end to end, localizers from outside, and what a leaderboard says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from memlens import benchmark
from memlens.benchmark import LOCALIZERS, Leaderboard, localizer
from memlens.benchmark.running import missing_organisms
from memlens.benchmark.suites import material
from memlens.cli.app import app
from memlens.errors import OptionError, OtherRunError, ResultError
from memlens.sequences.set import SequenceSet
from memlens.zoo import CertificateOptions, PlantingOptions, plant, read_organism

SMALL = benchmark.Suite(
    models=("zoo/pythia-xs",),
    carriers=("heads=2", "mlp", "none", "spread"),
    sequences=1,
    others=4,
    localizers=("zero ablation", "gate gradient", "weight norm", "random"),
    planting=PlantingOptions(n_heldout=4, kl_weight=0.3),
    certificate=CertificateOptions(max_kl=0.5),
)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Leaderboard]:
    out = tmp_path_factory.mktemp("benchmark") / "mini"
    return out, benchmark.run(SMALL, out, progress=False)


def test_what_is_planted_is_found_and_nothing_is_not(mini: tuple[Path, Leaderboard]) -> None:
    found = mini[1]
    assert found.organisms["passed"].all()
    best = found.best("head")
    assert best["average_precision"] > 0.8 > 2 * best["chance"]
    table = found.table(by=("carrier_kind",))
    controls = table[(table["carrier_kind"] == "heads") & table["control"]]
    assert {"random", "weight norm"} < set(controls["localizer"])
    nothing = table[(table["carrier_kind"] == "none") & (table["component"] == "neuron")]
    assert (nothing["average_precision"] < 0.1).all()


def test_the_twin_is_kept_and_stays_the_base_model() -> None:
    texts = material("zoo/pythia-xs", SMALL)
    tokens, options = texts.planted.tokens, PlantingOptions(steps=3, n_heldout=4)
    with torch.no_grad():
        before = texts.twin(tokens)
    made = plant(texts.base(), texts.planted, "mlp", heldout=texts.training, options=options)
    assert texts.twin is texts.twin
    with torch.no_grad():
        assert torch.equal(texts.twin(tokens), before)
        assert torch.allclose(before, texts.base()(tokens).logits, atol=1e-4)
        assert not torch.allclose(before, made.model(tokens).logits, atol=1e-2)


def test_a_run_says_what_it_took_and_a_spread_memory_has_no_place(mini: tuple[Path, Leaderboard]) -> None:
    found = mini[1]
    effort = found.effort()
    assert effort["organisms"] == len(found.organisms)
    assert effort["cpu_seconds"] > 0
    assert 100 < effort["peak_mib"] < 1e5
    table = found.table("recall_at_k", by=("carrier_kind",)).set_index(["carrier_kind", "component"])
    assert (table.loc[("spread", "neuron"), "recall_at_k"] < 0.1).all()
    assert set(found.planted["carrier_kind"]) == {"heads", "mlp"}
    assert set(found.deletion_agreement()["component"]) == {"head", "layer_mlp"}


def test_a_finished_run_is_read_and_not_repeated(
    mini: tuple[Path, Leaderboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = mini
    monkeypatch.setattr("memlens.benchmark.running._run_one", lambda *a: pytest.fail("repeated"))
    again = benchmark.run(SMALL, out, progress=False)
    pd.testing.assert_frame_equal(again.rows, found.rows)
    with pytest.raises(OtherRunError, match="another benchmark"):
        benchmark.run(SMALL, out, carriers=["mlp"], progress=False)


def test_workers_and_shares_make_the_same_organisms(mini: tuple[Path, Leaderboard], tmp_path: Path) -> None:
    few = replace(SMALL, carriers=("none", "mlp"))
    first = benchmark.run(few, tmp_path, part="0/2", progress=False)
    assert len(first.organisms) == 1
    assert [len(names) for names in missing_organisms(tmp_path)] == [2, 1]
    with ThreadPoolExecutor(1) as executor:
        both = benchmark.run(few, tmp_path, executor=executor, progress=False)
    assert len(both.organisms) == 2
    assert missing_organisms(tmp_path)[1] == []
    whole = mini[1].rows[mini[1].rows["carrier_kind"].isin(["none", "mlp"])]
    found, wanted = (rows["average_precision"].reset_index(drop=True) for rows in (both.rows, whole))
    assert found.equals(wanted)
    with pytest.raises(OptionError, match="out of range"):
        benchmark.run(few, tmp_path, part=(2, 2), progress=False)


def test_an_edited_part_is_refused(mini: tuple[Path, Leaderboard], tmp_path: Path) -> None:
    part = next((mini[0] / "parts").glob("*heads*.json"))
    copy = tmp_path / "run" / "parts" / part.name
    copy.parent.mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_bytes((mini[0] / "manifest.json").read_bytes())
    record = json.loads(part.read_text())
    record["rows"][0]["average_precision"] = 0.123
    copy.write_text(json.dumps(record))
    with pytest.raises(ResultError, match="was moved or edited"):
        benchmark.read_benchmark(tmp_path / "run")


@pytest.fixture
def own() -> Iterator[str]:
    @localizer("test only", components=("head",))
    def score(model: Any, sequences: Any, *, component: str, others: Any, seed: int) -> np.ndarray:
        return np.full((len(sequences), model.cfg.n_layers, model.cfg.n_heads), np.nan)

    yield "test only"
    del LOCALIZERS._items["test only"]


def test_a_localizer_that_gives_no_numbers_is_refused(own: str, tiny_model: Any) -> None:
    model = tiny_model("gpt_neox")
    some = SequenceSet.from_tokens([[5, 6, 7, 8]], 2)
    with pytest.raises(ResultError, match="'test only' gave NaN or infinity"):
        LOCALIZERS[own](model, some, component="head", others=some)
    with pytest.raises(OptionError, match="does not rank neuron"):
        LOCALIZERS[own](model, some, component="neuron", others=some)
    with pytest.raises(OptionError, match="registered already"):
        localizer(own, components=("head",))(lambda *a, **k: None)  # pyright: ignore[reportArgumentType]


def test_unknown_names_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown localizer 'guess'"):
        benchmark.run(SMALL, tmp_path / "a", localizers=["guess"])
    with pytest.raises(OptionError, match="no suite 'huge'"):
        benchmark.run("huge", tmp_path / "b")
    with pytest.raises(OptionError, match="no model of the family 'olmo2': choose from pythia"):
        benchmark.run("mini", tmp_path / "d", families=["olmo2"])
    with pytest.raises(OptionError, match="names no model"):
        benchmark.run("transfer", tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_the_commands(mini: tuple[Path, Leaderboard], capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["benchmark", "fingerprint", "zoo/pythia-xs", "--carrier", "heads=2", "--sequences", "1"]
    app([*ways, "--out", str(mini[0]), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert {(row["keep"], row["statistic"]) for row in told} >= {("nothing", "norm"), ("entries", "norm")}
    app(["benchmark", "report", str(mini[0]), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["organisms"]) == len(mini[1].organisms)
    page = (mini[0] / "report.html").read_text(encoding="utf-8")
    for section in ("Carrier heads: head", "Cost against precision", "Calibration by z", "Fingerprint"):
        assert section in page
    assert "Fingerprint by the way of planting" in page
    assert "Nothing to find" in page
    assert "Use zero ablation" in page
    assert "4 of 4 organisms passed" in page
    app(["benchmark", "localizers", "--json"])
    assert {row["localizer"] for row in json.loads(capsys.readouterr().out)} == set(LOCALIZERS)


def test_organisms_are_planted_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "organism"
    app(
        [
            "organisms",
            "plant",
            "zoo/pythia-xs",
            "--carrier",
            "mlp",
            "--seed",
            "3",
            "--out",
            str(out),
            "--json",
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["nll"] < 0.1 < told["facts"]["nll_without"]
    back = read_organism(out)
    assert [c.kind for c in back.components] == ["layer_mlp"]
