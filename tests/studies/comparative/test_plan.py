"""The paper's models resolve, plans count what they say, and YAML and command line say which models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.errors import FileFormatError, OptionError, SourceNotFoundError
from memlens.models.families import find_model
from memlens.studies.comparative.command import with_checkpoints
from memlens.studies.comparative.config import (
    StudyModel,
    parse_model,
    parse_sources,
    read_config,
    read_domains,
)
from memlens.studies.comparative.plan import PlanSizes, plan_comparative, plan_parts
from memlens.sweeps.plan import plan, plan_shape, shape_of
from memlens.sweeps.roofline import Device
from tests.cli.test_commands import call
from tests.devices import dev

# ---- the paper's list ------------------------------------------------------------------------------------


def test_every_model_of_the_paper_resolves_to_name_revision_and_corpus() -> None:
    table = plan_comparative()
    assert table["family"].value_counts(sort=False).to_dict() == {
        "pythia": 6, "olmo1": 2, "olmo2": 4, "olmo3": 2, "openllama": 3, "starcoder": 3
    }  # fmt: skip
    assert (table[["model", "revision", "corpus", "note"]] != "").all().all()
    assert table["model"].is_unique
    for name in table["model"]:
        assert find_model(name) is not None
    heads = table.set_index("model")["heads"]
    assert heads["bigcode/starcoderbase-7b"] == 1344
    assert heads["allenai/OLMo-2-0425-1B"] == 256
    assert heads["allenai/Olmo-3-1125-32B"] == 2560


# ---- plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "gpt_bigcode", "llama_gqa"])
def test_a_shape_is_planned_as_the_model_it_is_of(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    seqs = ml.SequenceSet.from_tokens(np.ones((6, 12), dtype=int), 5)
    edits = ml.edits.head_ablations(model, seqs)
    there = plan(model, seqs, edits, calibrate=False, batch_size=6)
    away = plan_shape(shape_of(model), seqs, edits, batch_size=6)
    assert away.block_forwards == there.block_forwards
    assert away.block_flops == pytest.approx(there.block_flops)
    assert away.unembed_flops == there.unembed_flops
    assert away.unembedded_positions == there.unembedded_positions


def test_plans_count_forwards_and_hours() -> None:
    sizes = PlanSizes(per_domain=64, domains=2, heads_per_domain=32, heads_if_large=16, memorized=0.25)
    options = ml.studies.ComparativeOptions(alphas=(0.0, 0.5), noise_draws=1)
    found = find_model("pythia-160m")
    assert found is not None
    hub = found[1].shape
    assert hub is not None
    parts = plan_parts(hub, hub.n_params, sizes, options)
    assert parts["recall"]["forwards"] == 128
    # Noise after block 0: a baseline and two runs of the other eleven blocks.
    assert parts["noise"]["forwards"] == pytest.approx(128 * (12 + 2 * 11) / 12)
    # A head of block l is followed by the blocks after it.
    behind = sum(12 * (11 - layer) for layer in range(12))
    assert parts["heads"]["forwards"] == pytest.approx(64 * (12 + behind) / 12)
    assert parts["compression"]["forwards"] == 32 * 31
    row = plan_comparative([StudyModel("pythia-160m")], sizes=sizes, options=options, device_tflops=2).iloc[0]
    flop = sum(part["flop"] for part in parts.values())
    assert row["hours"] == pytest.approx(flop / 2e12 / 3600)
    assert row["pflop"] == pytest.approx(flop / 1e15)
    assert row["sequences"] == 128
    # One forward of 64 tokens costs about two operations a weight and token.
    weights = hub.n_params - 2 * hub.d_model * hub.d_vocab
    assert parts["recall"]["flop"] / 128 == pytest.approx(
        2 * 64 * weights + 2 * 32 * hub.d_model * hub.d_vocab, rel=0.05
    )


def test_on_a_device_parts_take_what_arithmetic_or_memory_needs() -> None:
    sizes = PlanSizes(per_domain=64, domains=2, heads_per_domain=8, memorized=0.25)
    found = find_model("pythia-70m")
    assert found is not None
    shape = found[1].shape
    assert shape is not None
    options = ml.studies.ComparativeOptions(noise_draws=1)
    without = plan_parts(shape, shape.n_params, sizes, options)
    # 2 * 10^12 operations per second, and memory that nothing waits for.
    fast = plan_parts(shape, shape.n_params, sizes, options, Device(peak=2e12, bandwidth=1e30))
    for name, part in fast.items():
        assert part["flop"] == without[name]["flop"]
        assert part["seconds"] == pytest.approx(part["flop"] / 2e12)
    slow = plan_parts(shape, shape.n_params, sizes, options, Device(peak=1e30, bandwidth=1e9))
    # Decoding reads all weights but the embedding once for each token of a batch, here 128 rows of 256.
    read = 32 * 2 * (shape.n_params - shape.d_model * shape.d_vocab) / 1e9
    assert read / 2 < slow["greedy"]["seconds"] < 30 * read
    assert (
        slow["greedy"]["seconds"] / slow["greedy"]["flop"]
        > slow["recall"]["seconds"] / slow["recall"]["flop"]
    )
    small = Device(peak=1e12, bandwidth=1e12, memory=1e8)
    assert plan_comparative([StudyModel("pythia-70m")], sizes=sizes, on=small)["fits"].tolist() == [False]
    with pytest.raises(OptionError, match="on='h999'"):
        plan_comparative([StudyModel("pythia-70m")], on="h999")


def test_large_models_are_planned_with_fewer_sequences_for_heads_and_faster_devices_take_less() -> None:
    table = plan_comparative(device_tflops=100).set_index("model")
    assert len(table) == 20
    assert table.loc["EleutherAI/pythia-12b", "head_sequences"] == 5 * 2_500
    assert table.loc["EleutherAI/pythia-6.9b", "head_sequences"] == 5 * 10_000
    assert (table["sequences"] == 1_500_000).all()
    faster = plan_comparative(device_tflops=200).set_index("model")
    assert (table["hours"] / faster["hours"]).to_numpy() == pytest.approx(2)
    with pytest.raises(OptionError, match="device_tflops=0"):
        plan_comparative(device_tflops=0)
    with pytest.raises(OptionError, match="memorized=2"):
        PlanSizes(memorized=2)


def test_plan_of_a_model_that_is_not_in_the_list(tiny_folder: Any) -> None:
    row = plan_comparative([StudyModel(str(tiny_folder("gpt_neox")), family="mine")]).iloc[0]
    assert row["family"] == "mine"
    assert row["heads"] == 12
    assert "not in the paper's list" in row["note"]


def test_the_command_prints_the_plan_of_the_paper_s_models() -> None:
    code, shown, error = call("run", "comparative", "--plan", "--device-tflops", "300")
    assert code == 0, error
    words = " ".join(shown.split())
    for name in ("starcoderbase-7b", "pythia-160m", "step143000", "head_hours", "300 TFLOP/s"):
        assert name in words
    assert "300,000 sequences in each of 5 domains" in words
    assert "not known" in words


def test_the_command_plans_for_a_device_and_writes_a_script(tmp_path: Path) -> None:
    at = ("run", "comparative", "--models", "pythia-70m", "zoo/pythia-xs", "--plan", "--per-domain", "100")
    code, shown, error = call(*at, "--on", "h100-sxm", "--json")
    assert code == 0, error
    document = json.loads(shown)
    assert document["on"] == "h100-sxm"
    assert [row["model"] for row in document["models"]] == ["EleutherAI/pythia-70m", "zoo/pythia-xs"]
    assert all(row["fits"] and 0 < row["head_hours"] < row["hours"] for row in document["models"])
    code, shown, error = call(*at, "--slurm", "--out", str(tmp_path))
    assert code == 0, error
    assert "#SBATCH --array=0-1\n" in shown
    assert "memlens run comparative --models pythia-70m zoo/pythia-xs" in shown


# ---- models and domains without code ---------------------------------------------------------------------


def test_models_and_sources_are_read_from_words() -> None:
    assert parse_model("zoo/pythia-s@step12").label == "zoo/pythia-s@step12"
    assert parse_model("EleutherAI/pythia-70m@step1000").revision == "step1000"
    assert parse_model({"name": "zoo/gpt-neo-s", "family": "neo", "checkpoints": [1, 2]}).checkpoints == (
        1,
        2,
    )
    assert parse_model("zoo/olmo2-s-untrained").is_control
    assert not parse_model({"name": "zoo/olmo2-s-untrained", "control": False}).is_control
    assert parse_model("allenai/OLMo-2-0425-1B").family_of({}) == "olmo2"
    assert parse_model("zoo/starcoder-xs").family_of({"family": "x"}) == "starcoder"
    assert "Dolmino" in parse_model("allenai/OLMo-2-0425-1B").corpus_of
    with pytest.raises(OptionError, match="no option 'famly'"):
        parse_model({"name": "a", "famly": "b"})
    with pytest.raises(OptionError, match="needs the option 'name'"):
        parse_model({"family": "b"})
    with pytest.raises(OptionError, match="is not clear"):
        parse_sources(["zoo", "code=a.npy"])
    with pytest.raises(OptionError, match="is not clear"):
        parse_sources(["code=b.npy", "code=a.npy"])


@pytest.fixture
def sources(tiny_folder: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two tiny checkpoints and two domains, of which they 'recall' half: their own continuations."""
    folder = tiny_folder("gpt_neox")
    model = ml.load_model(folder, device=dev())
    rng = np.random.default_rng(0)
    for domain, seed in (("code", 1), ("prose", 2)):
        rows = rng.integers(1, 100, (10, 9))
        seqs = ml.SequenceSet.from_tokens(rows, 6)
        said = np.stack(ml.score_recall(model, seqs, progress=False).table["generated"].tolist())
        rows[:6, 6:] = said[:6]
        kept = (rows != 100).all(1)
        table = pd.DataFrame({"id": [f"{seed}-{i}" for i in range(int(kept.sum()))]})
        ml.SequenceSet.from_tokens(rows[kept], 6, table=table).to_parquet(tmp_path / f"{domain}.parquet")
    np.save(tmp_path / "counts.npy", np.arange(101))
    config = tmp_path / "study.yaml"
    config.write_text(
        f"""
models:
  - name: {folder}
    family: tiny
    corpus: made up
    counts: counts.npy
  - {tiny_folder("olmo2")}
domains:
  code: code.parquet
  prose: prose.parquet
options:
  alphas: [0, 0.5]
  noise_draws: 1
  n_permutations: 19
  n_resamples: 50
  n_splits: 2
  min_per_domain: 2
  untrained: false
  structural: [code]
""",
        encoding="utf-8",
    )
    return config, folder


def test_a_study_from_a_yaml_file(sources: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = sources
    out = tmp_path / "out"
    code, shown, error = call("run", "comparative", "--config", str(config), "--out", str(out), "-q")
    assert code == 0, shown + error
    models = pd.read_parquet(out / "models.parquet").set_index("family")
    assert models.loc["tiny", "corpus"] == "made up"
    assert models.loc["tiny", "memorized"] >= 10
    domains = pd.read_parquet(out / "domains.parquet")
    assert set(domains["domain"]) == {"code", "prose"}
    assert domains.loc[domains["domain"] == "code", "structural"].all()
    boundary = pd.read_parquet(out / "boundary.parquet")
    assert set(boundary.loc[boundary["family"] == "tiny", "counted_in"]) == {"counts.npy"}
    # Another domain and option on the command line, over the file's models.
    code, shown, error = call(
        "run", "comparative", "--config", str(config), "--out", str(tmp_path / "two"), "-q",
        "--sequences", f"prose={config.parent / 'prose.parquet'}", "--option", "measures=recall",
    )  # fmt: skip
    assert code == 0, shown + error
    assert set(pd.read_parquet(tmp_path / "two" / "domains.parquet")["domain"]) == {"prose"}
    assert not list((tmp_path / "two" / "models").glob("*/heads.nc"))


def test_models_named_one_after_the_other(
    sources: tuple[Path, Path], tiny_folder: Any, tmp_path: Path
) -> None:
    config, folder = sources
    domain = f"code={config.parent / 'code.parquet'}"
    code, shown, error = call(
        "run", "comparative", "--models", str(folder), str(tiny_folder("llama")), "--sequences", domain,
        "--out", str(tmp_path / "out"), "--option", "measures=recall", "-q",
    )  # fmt: skip
    assert code == 0, shown + error
    assert len(pd.read_parquet(tmp_path / "out" / "models.parquet")) == 2
    code, shown, error = call(
        "run", "comparative", "--models", str(tiny_folder("olmo")), "--sequences", domain, "--add",
        "--out", str(tmp_path / "out"), "--option", "measures=recall", "-q",
    )  # fmt: skip
    assert code == 0, shown + error
    assert len(pd.read_parquet(tmp_path / "out" / "models.parquet")) == 3


def test_bad_command_lines_and_files_are_one_line(tmp_path: Path) -> None:
    for words, message in (
        (("--models", "zoo/pythia-s"), "--out is missing"),
        (("--models", "zoo/pythia-s", "--out", "x", "--option", "alfas=1"), "'alfas=1' is not clear"),
        (("--models", "zoo/pythia-s", "--out", "x", "--checkpoints", "zoo/pythia-s"), "is not clear"),
        (("--models", "zoo/pythia-s", "--out", "x", "--checkpoints", "other=1"), "not among the models"),
        (("--config", str(tmp_path / "none.yaml"), "--out", "x"), "there is no options file"),
    ):
        code, _, error = call("run", "comparative", *words)
        assert code == 2
        assert message in " ".join(error.split())
    bad = tmp_path / "bad.yaml"
    for text, kind in (
        ("models: [", FileFormatError), ("- a", FileFormatError), ("modles: []", OptionError),
        ("options: {alpha: 1}", OptionError),
    ):  # fmt: skip
        bad.write_text(text)
        with pytest.raises(kind):
            read_config(bad)
    with pytest.raises(SourceNotFoundError):
        read_config(tmp_path / "missing.yaml")


def test_domains_are_sampled_alike_for_all_and_named(sources: tuple[Path, Path]) -> None:
    config, folder = sources
    model = ml.load_model(folder, device=dev())
    both = {name: str(config.parent / f"{name}.parquet") for name in ("code", "prose")}
    options = ml.studies.ComparativeOptions(max_per_domain=3)
    seqs = read_domains(both, model, options)
    assert seqs.table["domain"].value_counts().to_dict() == {"code": 3, "prose": 3}
    assert all(i.startswith(("code/", "prose/")) for i in seqs.ids)
    assert read_domains(both, model, options).ids == seqs.ids
    one = read_domains(both["code"], model, ml.studies.ComparativeOptions())
    assert set(one.table["domain"]) == {"all"}


def test_all_checkpoints_of_a_folder_are_those_that_it_keeps(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for step in (20, 3):
        (folder / "checkpoints" / f"step{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"step{step}" / "config.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    entries = [StudyModel(str(folder)), StudyModel("zoo/pythia-xs")]
    followed = with_checkpoints(entries, [f"{folder}=all", "zoo/pythia-xs=4,8"])
    assert [entry.checkpoints for entry in followed] == [(3, 20), (4, 8)]


def test_an_existing_file_whose_name_has_an_equals_sign_is_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a=1").mkdir()
    (tmp_path / "a=1" / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_sources(["a=1/x.parquet"]) == {"": "a=1/x.parquet"}
    assert parse_sources(["code=a=1/x.parquet"]) == {"code": "a=1/x.parquet"}
    assert parse_sources(["a=2/x.parquet"]) == {"a": "2/x.parquet"}
    entries = with_checkpoints([StudyModel("a=1/model")], ["a=1/model=100,200"])
    assert entries[0].checkpoints == (100, 200)
