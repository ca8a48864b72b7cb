"""Every reader and loader of memlens, each with small valid files to read."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr

import memlens as ml
from memlens.benchmark.running import read_benchmark
from memlens.benchmark.suites import read_suite
from memlens.cli.making import read_prompts
from memlens.files import json_text, write_json
from memlens.forward.check.kept import KeptVerdicts, Verdict
from memlens.forward.components import Component
from memlens.instruments.decode.lens import TunedLens
from memlens.models.huggingface import load_tokenizer
from memlens.models.load import load_model
from memlens.models.names import resolve_source
from memlens.options import read_options
from memlens.organisms.evaluate import read_ground_truth, read_training
from memlens.organisms.planting.carriers import Carrier
from memlens.organisms.planting.certificate import Certificate
from memlens.organisms.planting.folder import read_organism, save_organism
from memlens.organisms.planting.plant import Organism, PlantingOptions
from memlens.organisms.training.train import TrainSpec, train
from memlens.recall.corpus.duplicates import token_counts
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.recall.scores import RecallScores
from memlens.report.from_directory import report_from_directory
from memlens.report.run_directory import RunDirectory
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.sequences.natural import text_windows
from memlens.sequences.readers.knowledge import fact_sequences, identifier_sequences
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from memlens.store.keyed_folder import KeyedFolder, write_manifest
from memlens.studies.comparative.config import read_config
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.store import saved_models
from tests.devices import dev
from tests.models.test_loading_gguf import write_gguf
from tests.sequences.vocabularies import byte_level
from tests.small import ragged
from tests.tiny import tiny_huggingface_model, tiny_tokenizer, write_tiny

SHAPE = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8}
"""Of the models here: the smallest there is."""


@dataclass(frozen=True)
class Reader:
    """A way into memlens.

    Attributes:
        name: Its name.
        make: Writes valid files to a folder.
        read: Reads them.
        share: Which share of the variants to try by default, for readers that are slow.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    share: float = 1.0


@functools.cache
def tiny() -> Any:
    """A model of one layer."""
    model = tiny_huggingface_model("gpt_neox", **SHAPE)
    return load_model(model, tokenizer=tiny_tokenizer(), device=dev(), check_weights=False)


def words(n: int = 6) -> list[str]:
    """Texts of the tiny tokenizer."""
    return [" ".join(f"w{(7 * i + j) % 90}" for j in range(8)) for i in range(n)]


def ids(n: int = 6) -> np.ndarray:
    """Rows of token ids."""
    return np.arange(8 * n, dtype=np.int32).reshape(n, 8) % 90


def _lines(rows: list[Any]) -> Callable[[Path], object]:
    return lambda folder: (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _csv(frame: pd.DataFrame) -> Callable[[Path], object]:
    return lambda folder: frame.to_csv(folder / "rows.csv", index=False)


def _sequences(name: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: load_sequences(folder / name, tokenizer=tiny_tokenizer(), prefix_len=2, **options)


CLOZES = [
    {
        "sub_label": f"w{i}",
        "obj_label": f"w{i + 1}",
        "predicate_id": "P1",
        "masked_sentences": [f"w{i} w3 [MASK]"],
    }
    for i in range(4)
]
IDIOMS = pd.DataFrame({"idiom": ["w1 w2 w3", "w4 w5 w6"], "source": ["a", "b"]})
IDENTIFIERS = pd.DataFrame({"label": ["w1", "w2"], "identifier": ["007", "12"], "popularity": [1, 2]})


def _memorized_set(folder: Path) -> None:
    seqs = SequenceSet.from_tokens(ids(3), 2).with_attrs(note="x")
    balance = pd.DataFrame([{"controls": "unmemorized", "covariate": "c", "before": 0.5, "after": 0.1}])
    MemorizedSet(seqs, seqs, seqs, {"windows": 9}, {"model": "m", "n": 3}, balance).save(folder)


def _recall(folder: Path) -> None:
    ml.score_recall(tiny(), ragged(), progress=False).save(folder / "recall.parquet")


def _result() -> Result:
    data = xr.Dataset(
        {"effect": (("sequence", "layer"), np.arange(6.0).reshape(3, 2))},
        {"sequence": ["a", "b", "c"], "layer": [0, 1], "note": ("sequence", [None, "x", 2])},
    )
    return Result.create(data, kind="recall", settings={"seed": 0, "names": ["a"]})


def saved_result(path: Path) -> None:
    """Save a small result."""
    _result().save(path)


def _show(path: Path) -> None:
    result = load_result(path)
    repr(result), result.settings


def _run_folder(folder: Path) -> None:
    run = RunDirectory(folder, title="T", settings={"seed": 0}, lead="L", command="memlens run x")
    run.add_result("recall", _result(), lead="l")
    run.add_table("counts", pd.DataFrame({"n": [1, 2], "name": ["a", "b"]}), note="n")
    run.add_section("more", "More", "words")
    run.add_figure("curve", go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), section="more", reading="r")
    run.add_failure("step", "did not work")


def _lens(layout: str) -> Callable[[Path], object]:
    return lambda folder: TunedLens.identity(2, 4, base_model="m", revision="").save(folder, layout=layout)


def _sweep(folder: Path) -> None:
    model, seqs = tiny(), ragged(2)
    edits = ml.edits.head_ablations(model, seqs)
    ml.sweep(model, seqs, edits, ("target_logprob",), out=folder / "parts", progress=False)


SWEEP_PART = "sequences-000000-000002-interventions-000000-000002.npz"


def _scan(folder: Path) -> MemorizedSet:
    corpus = np.load(folder / "corpus.npy") if (folder / "corpus.npy").is_file() else ids(40)
    return ml.recall.build_memorized_set(
        tiny(), corpus, prefix_len=4, suffix_len=4, out=folder / "scan", block_size=20, progress=False, seed=1
    )


def _scan_of_file(folder: Path) -> MemorizedSet:
    options: dict[str, Any] = {"prefix_len": 4, "suffix_len": 4, "progress": False}
    return ml.recall.build_memorized_set(tiny(), folder / "corpus.npy", **options)


def _benchmark(folder: Path) -> None:
    about = {"suite": {"models": ["m"], "carriers": ["mlp"]}, "localizers": ["a"]}
    store = KeyedFolder(folder, "benchmark", about, version=1, parts="parts/*.json")
    check = {"check": "recall", "passed": True, "value": 1.0}
    record = {
        "model": "m", "carrier": "mlp", "carrier_kind": "mlp", "seed": 100, "seconds": 1.5,
        "certificate": {"passed": True, "checks": [check], "facts": {"steps": 3}},
        "rows": [{"component": "layer_mlp", "localizer": "a", "variant": "", "average_precision": 0.5}],
    }  # fmt: skip
    record["seal"] = store.seal("m--mlp--100.json", json_text(record))
    (folder / "parts").mkdir()
    write_json(folder / "parts" / "m--mlp--100.json", record)


def _compared(folder: Path) -> None:
    facts = {"label": "m", "family": "f", "control": False, "n_params": 9, "fingerprint": "0" * 8}
    (folder / "m").mkdir()
    parts = {"recall": {"key": "k", "seconds": 1.0, "note": "", "options": {}}}
    write_manifest(folder / "m" / "model.json", "comparative", 1, {"facts": facts, "parts": parts})
    pd.DataFrame({"id": ["0", "1"], "group": ["memorized"] * 2}).to_parquet(folder / "m" / "groups.parquet")


def _read_compared(folder: Path) -> None:
    for model in saved_models(folder):
        model.groups, model.has("recall")


def _organism(folder: Path) -> None:
    model = tiny_huggingface_model("gpt_neox", **SHAPE)
    base = {"gpt_neox.layers.0.mlp.dense_4h_to_h.weight": torch.zeros(16, 8)}
    carrier, component = Carrier.parse("mlp@0"), Component("layer_mlp", 0)
    organism = Organism(
        model, carrier, [component], ragged(1), base, torch.zeros(1), PlantingOptions(shapley=0), 3, 1
    )
    checks = pd.DataFrame({"check": ["recall"], "passed": [True], "value": [1.0], "threshold": [0.9]})
    save_organism(organism, Certificate(checks, {}), folder, base="m", tokenizer=tiny_tokenizer())


def _zoo(folder: Path) -> None:
    place = folder / "zoo" / "tiny"
    write_tiny("gpt_neox", place, **SHAPE)
    rows = {"id": ["a", "b"], "tokens": ids(2).tolist(), "prefix_len": [2, 2], "copies": [0, 4]}
    frame = pd.DataFrame({**rows, "domain": ["x", "y"], "text": words(2), "source": "zoo/tiny"})
    frame.to_parquet(place / "sequences.parquet")
    frame[["domain", "tokens"]].to_parquet(place / "heldout.parquet")
    write_json(
        place / "training.json",
        {
            "name": "tiny", "model": {"spec": {}, "facts": {}},
            "corpus": {"spec": {}, "fingerprint": "f", "token_counts": {"x": [1, 2, 3]}},
            "training": {"spec": {"seed": 0}},
        },
    )  # fmt: skip


def _read_zoo(folder: Path) -> None:
    os.environ["MEMLENS_CACHE"] = str(folder)
    try:
        load_sequences("zoo/tiny", prefix_len=2)
        token_counts("zoo/tiny")
        load_sequences("zoo/tiny:heldout", prefix_len=2)
        read_training(folder / "zoo" / "tiny")
        read_ground_truth(folder / "zoo" / "tiny", "sequences")
        load_model("zoo/tiny-untrained", device=dev(), check_weights=False)
    finally:
        del os.environ["MEMLENS_CACHE"]


def _checkpoint(family: str) -> Callable[[Path], object]:
    return lambda folder: write_tiny(family, folder / "tiny", **SHAPE)


def _shards(folder: Path) -> None:
    model = tiny_huggingface_model("gpt_neox", **SHAPE)
    model.save_pretrained(folder / "tiny", max_shard_size="4KB")  # pyright: ignore[reportCallIssue]


def _load(folder: Path) -> None:
    load_model(folder / "tiny", device=dev())


def _tokenizer(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder / "tiny")


def _read_tokenizer(folder: Path) -> None:
    """What `load_model` does for the tokenizer, without its model."""
    (folder / "tiny" / "config.json").write_text('{"model_type": "gpt_neox"}')
    load_tokenizer(resolve_source(folder / "tiny"))


def _gguf(folder: Path) -> None:
    write_gguf(folder / "tiny.gguf", tiny_huggingface_model("llama_gqa", num_hidden_layers=1))


def _training(folder: Path) -> None:
    model, rows = tiny_huggingface_model("gpt_neox", **SHAPE), ids(8).astype(np.int64)
    spec = TrainSpec(batch_size=2, passes=1)
    train(model, rows, spec, checkpoint=folder / "state.pt", stop_after=1, progress=False)


SUITE = {
    "models": ["zoo/pythia-xs"], "carriers": ["mlp", "heads=2"], "sequences": 2, "others": 3,
    "planting": {"steps": 3}, "certificate": {}, "about": "x", "twin": True,
}  # fmt: skip
CONFIG = {
    "models": ["zoo/pythia-xs", {"name": "m", "checkpoint_step": 3, "counts": "c.npy", "checkpoints": [1]}],
    "domains": {"a": "a.jsonl"}, "options": {"max_targets": 5, "seed": 1},
}  # fmt: skip


def _yaml(content: Any) -> Callable[[Path], object]:
    import yaml

    return lambda folder: (folder / "x.yaml").write_text(yaml.safe_dump(content))


def _array(name: str, rows: int = 6) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, ids(rows))


def _pair(folder: Path) -> None:
    np.save(folder / "p.npy", ids())
    np.save(folder / "s.npy", ids()[:, :3])


def _texts(name: str, lines: list[str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("\n".join(lines))


def _copied_checkpoint(folder: Path) -> None:
    write_tiny("gpt_neox", folder / "tiny", **SHAPE)
    shutil.rmtree(folder / "tiny" / "generation_config.json", ignore_errors=True)


def _kept_verdict(folder: Path) -> None:
    KeptVerdicts(folder, "key").keep("state", Verdict("m", "2026-11-28", 1e-6, 1e-3, "compared", ("q",)))


READERS = [
    Reader("array", _array("x.npy"), lambda f: load_sequences(f / "x.npy", prefix_len=2)),
    Reader(
        "tensor",
        lambda f: torch.save(torch.from_numpy(ids()), f / "x.pt"),
        lambda f: load_sequences(f / "x.pt", prefix_len=2),
    ),
    Reader(
        "identifiers of an ontology",
        _texts("go_dataset.csv", [f"GO:000{i};w{i};{i};{i * 7}" for i in range(4)]),
        lambda f: load_sequences("ontologies:go/all", tokenizer=byte_level(), path=f),
    ),
    Reader(
        "insertions",
        _lines([{"text": " ".join(words(9)), "meta": {"duplicates": i}} for i in range(3)]),
        lambda f: load_sequences(
            "hubble:testset_ellie/train", tokenizer=tiny_tokenizer(), path=f / "rows.jsonl", prefix_len=2
        ),
    ),
    Reader("pair of arrays", _pair, lambda f: load_sequences((f / "p.npy", f / "s.npy"))),
    Reader("corpus", _array("corpus.npy", 40), _scan_of_file),
    Reader(
        "lines of ids",
        _lines([{"id": i, "tokens": row, "prefix_len": 2} for i, row in enumerate(ids(4).tolist())]),
        _sequences("rows.jsonl"),
    ),
    Reader(
        "lines of texts",
        _lines([{"text": text, "domain": "x"} for text in words(4)]),
        _sequences("rows.jsonl"),
    ),
    Reader(
        "lines of pairs",
        _lines([{"prompt": "w1 w2", "continuation": " w3 w4"} for _ in range(3)]),
        _sequences("rows.jsonl"),
    ),
    Reader(
        "lines of clozes",
        _lines(CLOZES),
        lambda f: fact_sequences(f / "rows.jsonl", tokenizer=tiny_tokenizer()),
    ),
    Reader(
        "table of ids",
        _csv(pd.DataFrame({"id": ["a", "b"], "tokens": ["[1, 2, 3, 4]", "[5, 6, 7, 8]"]})),
        _sequences("rows.csv"),
    ),
    Reader("table of texts", _csv(pd.DataFrame({"text": words(3), "n": [1, 2, 3]})), _sequences("rows.csv")),
    Reader(
        "table of idioms", _csv(IDIOMS), lambda f: load_sequences(f / "rows.csv", tokenizer=tiny_tokenizer())
    ),
    Reader(
        "table of identifiers",
        _csv(IDENTIFIERS),
        lambda f: identifier_sequences(f / "rows.csv", tokenizer=tiny_tokenizer()),
    ),
    Reader(
        "saved set",
        lambda f: ragged().with_attrs(note="x").to_parquet(f / "x.parquet"),
        lambda f: (SequenceSet.from_parquet(f / "x.parquet"), load_sequences(f / "x.parquet")),
    ),
    Reader("text", _texts("x.txt", words(20)), lambda f: text_windows(tiny_tokenizer(), f / "x.txt", 8)),
    Reader("prompts", _texts("x.txt", words(3)), lambda f: read_prompts(f / "x.txt")),
    Reader(
        "lines of prompts",
        _lines([{"prompt": "w1"}, {"text": "w2"}]),
        lambda f: read_prompts(f / "rows.jsonl"),
    ),
    Reader("memorized set", _memorized_set, lambda f: repr(MemorizedSet.load(f))),
    Reader("recall", _recall, lambda f: RecallScores.load(f / "recall.parquet")),
    Reader("result", lambda f: saved_result(f / "x.nc"), lambda f: _show(f / "x.nc")),
    Reader("run folder", _run_folder, lambda f: report_from_directory(f, f / "out.html")),
    Reader("lens", _lens("memlens"), lambda f: TunedLens.load(f)),
    Reader("published lens", _lens("published"), lambda f: TunedLens.load(f)),
    Reader("sweep", _sweep, _sweep),
    Reader("scan", _scan, _scan),
    Reader("benchmark", _benchmark, read_benchmark),
    Reader("comparison", _compared, _read_compared),
    Reader("organism", _organism, read_organism, 0.4),
    Reader("zoo", _zoo, _read_zoo, 0.4),
    Reader("checkpoint", _checkpoint("gpt_neox"), _load, 0.4),
    Reader("other checkpoint", _checkpoint("llama"), _load, 0.4),
    Reader("checkpoint in shards", _shards, _load, 0.4),
    Reader("tokenizer", _tokenizer, _read_tokenizer),
    Reader("GGUF", _gguf, lambda f: load_model(f / "tiny.gguf", device=dev()), 0.4),
    Reader("training", _training, _training),
    Reader(
        "options",
        _yaml({"max_targets": 5, "seed": 1, "prefix_len": 8}),
        lambda f: read_options(f / "x.yaml", ComparativeOptions, check=True),
    ),
    Reader("kept verdict", _kept_verdict, lambda f: KeptVerdicts(f, "key").read(), 0.4),
    Reader("suite", _yaml(SUITE), lambda f: list(read_suite(f / "x.yaml").organisms())),
    Reader("study", _yaml(CONFIG), lambda f: asdict(read_config(f / "x.yaml"))),
]
