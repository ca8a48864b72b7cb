"""Public sets by name: every set is written in its authors' layout, in a few rows, and read again."""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import config
from transformers import LlamaConfig

from memlens.errors import (
    ColumnError,
    FileFormatError,
    OptionError,
    SequenceError,
    SourceNotFoundError,
    VocabularyError,
)
from memlens.models.families import FAMILIES
from memlens.report.bibliography import REFERENCES
from memlens.sequences import named
from memlens.sequences.named import NAMED_SETS, find_named, named_sets, register_named_sets
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from tests.sequences.vocabularies import byte_level, model_with

TOKENIZER = byte_level()
RNG = np.random.default_rng(0)
LONG = "turn a blind eye to the end of the tunnel and let bygones be bygones " * 4


class Hub(dict[tuple[str, str | None, str], list[dict[str, Any]]]):
    """What the hub has, by dataset, configuration and split; `asked` are the revisions asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str | None] = []


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that is empty, in the place of the real one."""
    content = Hub()

    def load_dataset(path: str, name: str | None = None, *, split: str, revision: str | None = None) -> Any:
        content.asked.append(revision)
        if (path, name, split) not in content:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub")
        return datasets.Dataset.from_list(content[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


def insertions(copies: list[int]) -> list[dict[str, Any]]:
    """Rows of a dataset of Hubble on the hub: `meta` is JSON, and the count has a column."""
    return [
        {
            "text": f"{LONG} number {i}",
            "meta": json.dumps({"title": f"T{i}", "duplicates": n}),
            "duplicates": n,
        }
        for i, n in enumerate(copies)
    ]


def evals(n: int) -> list[dict[str, Any]]:
    rows = RNG.integers(1, 50254, (n, 64)).tolist()
    return [{"index": 7 * i, "tokens": row, "__index_level_0__": 7 * i} for i, row in enumerate(rows)]


TRAPS = [
    {"perplexity_bucket": 3, "text": LONG + word, "label": label} for word, label in (("a", 1), ("b", 0))
]
FACTS = [
    {"subject": " Mara", "relation": "{} lives in", "prompt": "Mara lives in", "target_true": " Tarn"}
    | {"target_false": " Pell", "relation_id": "P1"},
    {"subject": " Otto", "relation": "{} lives in", "prompt": "Otto lives in", "target_true": " Pell"}
    | {"target_false": " Tarn", "relation_id": "P1"},
]
TOFU = [{"question": "Who wrote it?", "answer": "Mara did."}, {"question": "When?", "answer": "In spring."}]
LAMA = [
    {"uuid": "1", "sub_label": "Mara", "obj_label": "Tarn", "predicate_id": "P19", "template": "[X] is [Y] ."}
    | {"masked_sentence": "Mara was born in [MASK] ."}
]
IDIOMS = [
    {"idiom": "turn a blind eye", "id": "a", "source": "X", "prompt_comp_ind": False, "similarity_ind": False}
    | {"frequent_target_ind": True, "hard_to_guess": True}
]


def from_hub(name: str, hub: Hub) -> None:
    """Put a few rows of the set's part on the hub."""
    chosen = find_named(name)
    entry, part = chosen.entry, chosen.part
    rows = {
        "pile:pythia-memorized-evals": evals(3),
        "traps:copyright-traps": TRAPS,
        "facts:counterfact-tracing": FACTS,
        "facts:lama": LAMA,
        "unlearning:tofu": TOFU,
        "idioms:idiomem": IDIOMS,
    }.get(entry.name) or insertions([1, 4, 256] if part.name == "train" else [0, 0])
    config = entry.config.format(part=part.name) or None
    hub[entry.hub, config, entry.split.format(part=part.name)] = rows


def extraction(folder: Path, part: str) -> None:
    (folder / "datasets").mkdir(parents=True)
    for which, width in (("preprefix", 100), ("prefix", 50), ("suffix", 50)):
        ids = RNG.integers(1, 50257, (3, width)).astype(np.uint16)
        np.save(folder / "datasets" / f"{part}_{which}.npy", ids)


def tensor(folder: Path, part: str) -> None:
    path = folder / "data" / "pile" / "EleutherAI" / part / "pile_bs0-100-dedup.pt"
    path.parent.mkdir(parents=True)
    torch.save(torch.from_numpy(RNG.integers(1, 50254, (3, 80))), path)


def manual(folder: Path, part: str) -> None:
    row = {"prompt": "the cat sat", "prompt_len": 3, "all": "the cat sat on the mat"}
    write_lines(folder / "data" / "manual" / f"memorized_data-{part}.jsonl", [row])


def ecbd(folder: Path, _: str) -> None:
    row = {"definition": LONG, "prompt": "not what is read", "context": "nor this"}
    write_lines(folder / "data" / "ecbd" / "ecbd_2021_definition_dedup.jsonl", [row])


def ontology(folder: Path, _: str) -> None:
    (folder / "Dataset").mkdir(parents=True)
    name = "GO" if folder.name == "go" else "UBERON"
    for chosen in NAMED_SETS[f"ontologies:{folder.name}"].parts:
        answer = f";{name}:0006601" if chosen.name != "all" else ""
        lines = [f"{name}:000660{i};{label};{i}0;{i}9{answer}" for i, label in enumerate(("the cat", "NA"))]
        (folder / chosen.files[0]).write_text("\n".join(lines) + "\n")


LOCAL: dict[str, Callable[[Path, str], None]] = {
    "pile:lm-extraction-benchmark": extraction,
    "mempi:pile": tensor,
    "mempi:manual": manual,
    "mempi:ecbd": ecbd,
    "ontologies:go": ontology,
    "ontologies:uberon": ontology,
}
EVERY = [
    str(find_named(f"{entry.name}/{part.name}")) for entry in NAMED_SETS.values() for part in entry.parts
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore:.*is known to have")
def test_every_part_is_read(name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = find_named(name)
    entry, part = chosen.entry, chosen.part
    path = None
    if entry.hub:
        from_hub(name, hub)
    else:
        path = tmp_path / entry.name.partition(":")[2]
        LOCAL[entry.name](path, part.name)
        monkeypatch.setitem(NAMED_SETS._items, entry.name, replace(entry, md5_files=("no.npy",)))
    has_ids = entry.kind in ("tokens", "pairs", "tensor")
    seqs = load_sequences(name, tokenizer=None if has_ids else TOKENIZER, path=path)
    assert len(seqs) >= 1
    assert seqs.attrs["source"] == name
    assert seqs.attrs["license"] == (entry.license or "not known")
    assert REFERENCES[str(seqs.attrs["cite"])].year > 2000
    assert seqs.attrs["home"] == entry.home
    assert len(str(seqs.attrs["sha256"])) == 64
    if entry.prefix_len is not None:
        assert set(seqs.prefix_len.tolist()) == {entry.prefix_len}
    if entry.copies or part.copies is not None:
        assert seqs.table["copies"].dtype == np.int64


def test_the_registry_is_sound() -> None:
    for entry in NAMED_SETS.values():
        assert entry.cite in REFERENCES
        assert entry.home.startswith("https://")
        assert bool(entry.hub) or bool(entry.get)
        assert entry.hub or all(part.files or entry.files for part in entry.parts), entry.name
        assert set(entry.families) <= set(FAMILIES.names())
        assert (entry.kind in ("tokens", "pairs", "tensor")) == bool(entry.tokenizer and entry.vocab_size)
        assert len({part.name for part in entry.parts}) == len(entry.parts)
        for part in entry.parts:
            assert str(find_named(f"{entry.name}/{part.name}")).startswith(entry.name)
    table = named_sets()
    assert table["name"].is_unique
    assert sum(name.startswith("hubble:") for name in table["name"]) == 16
    sizes = dict(zip(table["name"], table["rows"], strict=True))
    assert sizes["hubble:passages_wikipedia"] == 2125 + 759
    assert sizes["mempi:pile"] is None


# What each layout becomes.


def test_memorized_evals(hub: Hub) -> None:
    rows = evals(4)
    hub["EleutherAI/pythia-memorized-evals", None, "deduped.70m"] = rows
    with pytest.warns(UserWarning, match="has 4 rows, and pile:.* is known to have 411,448"):
        seqs = load_sequences("pile:pythia-memorized-evals/deduped.70m")
    assert seqs.rows() == [row["tokens"] for row in rows]
    assert seqs.ids == ["0", "7", "14", "21"]
    assert seqs.attrs["made_with"] == "EleutherAI/pythia-70m-deduped"
    assert seqs.attrs["vocab_size"] == 50254
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a part of the rows is not compared with their number
        assert load_sequences("pile:pythia-memorized-evals/deduped.70m", limit=2).rows() == seqs.rows()[:2]


def test_the_extraction_benchmark_is_compared_with_its_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pile:lm-extraction-benchmark/val"
    extraction(tmp_path, "val")
    with pytest.raises(FileFormatError, match=r"have the MD5 .* was published with 318d6f3d68"):
        load_sequences(name, path=tmp_path)
    names = [tmp_path / "datasets" / f"val_{w}.npy" for w in ("preprefix", "prefix", "suffix")]
    ids = np.concatenate([np.load(path) for path in names], axis=1)
    entry = NAMED_SETS["pile:lm-extraction-benchmark"]
    parts = tuple(replace(p, rows=3, md5=hashlib.md5(ids.tobytes()).hexdigest()) for p in entry.parts)
    monkeypatch.setitem(NAMED_SETS._items, entry.name, replace(entry, parts=parts))
    for folder in (tmp_path, tmp_path / "datasets"):
        seqs = load_sequences(name, path=folder)
        assert seqs.attrs["published_checksum"] == "md5 agrees"
        assert seqs.rows() == ids[:, 100:].tolist()
        assert set(seqs.prefix_len.tolist()) == {50}
    names[0].unlink()  # without the 100 tokens before, it cannot be compared
    assert load_sequences(name, path=tmp_path).attrs["published_checksum"] == "not compared"
    with pytest.raises(
        SourceNotFoundError, match=r"is two files: give the folder of datasets/val_prefix\.npy"
    ):
        load_sequences(name, path=names[1])


def test_insertions_have_their_number_of_copies(hub: Hub, tmp_path: Path) -> None:
    rows = insertions([1, 4, 256])
    hub["allegrolab/biographies_yago", None, "train"] = rows
    seqs = load_sequences("hubble:biographies_yago/train", tokenizer=TOKENIZER, limit=3)
    assert seqs.table["copies"].tolist() == [1, 4, 256]
    assert [json.loads(meta)["title"] for meta in seqs.table["meta"]] == ["T0", "T1", "T2"]
    assert seqs.texts == [row["text"] for row in rows]
    # Files of the evaluation have the count in `meta` only, which may be an object.
    bare = [{"text": row["text"], "meta": json.loads(row["meta"])} for row in rows]
    write_lines(tmp_path / "bare.jsonl", bare)
    again = load_sequences(
        "hubble:biographies_yago/train", tokenizer=TOKENIZER, path=tmp_path / "bare.jsonl", limit=3
    )
    assert again.table["copies"].tolist() == [1, 4, 256]
    assert again.rows() == seqs.rows()
    for meta, message in (
        ({"title": "x"}, "row 0 has duplicates=None"),
        ({"duplicates": -1}, "duplicates=-1"),
        ({"duplicates": "4"}, "duplicates='4'"),
    ):
        write_lines(tmp_path / "bad.jsonl", [{"text": LONG, "meta": meta}])
        with pytest.raises(SequenceError, match=message):
            load_sequences("hubble:biographies_yago/train", tokenizer=TOKENIZER, path=tmp_path / "bad.jsonl")


def test_traps_have_copies_if_they_are_members(hub: Hub) -> None:
    hub["imperial-cpg/copyright-traps", None, "seq_len_50_n_rep_100"] = TRAPS
    seqs = load_sequences("traps:copyright-traps/seq_len_50_n_rep_100", tokenizer=TOKENIZER, limit=2)
    assert seqs.table["copies"].tolist() == [100, 0]
    assert seqs.table["perplexity_bucket"].tolist() == [3, 3]
    assert seqs.attrs["revision"] == "487062f5e7d5f6dd122957583433491e9fcc8d2d"
    assert hub.asked == ["487062f5e7d5f6dd122957583433491e9fcc8d2d"]


def test_a_revision_can_be_pinned(hub: Hub) -> None:
    hub["NeelNanda/counterfact-tracing", None, "train"] = FACTS
    seqs = load_sequences("facts:counterfact-tracing/all@c945b08", tokenizer=TOKENIZER, limit=2)
    assert seqs.attrs["revision"] == "c945b08"
    assert load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=2).attrs["revision"] == ""
    assert hub.asked == ["c945b08", None]


def test_prompts_and_continuations(hub: Hub, tmp_path: Path) -> None:
    hub["NeelNanda/counterfact-tracing", None, "train"] = FACTS
    hub["locuslab/TOFU", "forget10", "train"] = TOFU
    facts = load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=2)
    prefixes, targets = facts.halves()
    assert TOKENIZER.batch_decode(prefixes) == ["Mara lives in", "Otto lives in"]
    assert TOKENIZER.batch_decode(targets) == [" Tarn", " Pell"]
    assert facts.table["target_false"].tolist() == [" Pell", " Tarn"]
    tofu = load_sequences("unlearning:tofu/forget10", tokenizer=TOKENIZER, limit=2)
    assert TOKENIZER.batch_decode(tofu.halves()[0])[0] == "Question: Who wrote it?\nAnswer:"
    assert TOKENIZER.batch_decode(tofu.halves()[1]) == [" Mara did.", " In spring."]
    manual(tmp_path, "gpt2-xl")
    seqs = load_sequences("mempi:manual", tokenizer=TOKENIZER, path=tmp_path)
    assert TOKENIZER.batch_decode(seqs.halves()[1]) == [" on the mat"]
    wrong = tmp_path / "wrong.jsonl"
    write_lines(wrong, [{"prompt": "a dog", "all": "the cat sat on the mat"}])
    with pytest.raises(SequenceError, match="row 0 of column 'all' does not begin with its prompt"):
        load_sequences("mempi:manual", tokenizer=TOKENIZER, path=wrong)


@pytest.mark.filterwarnings("ignore:.*is known to have")
def test_ontologies_keep_zeros_and_have_the_study_s_prompt(tmp_path: Path) -> None:
    ontology(tmp_path / "go", "pythia-12b")
    seqs = load_sequences("ontologies:go/pythia-12b", tokenizer=TOKENIZER, path=tmp_path / "go")
    assert seqs.texts is not None
    assert seqs.texts[0] == "In the Gene Ontology, the GO ID of the label 'the cat' is GO:0006600"
    assert TOKENIZER.batch_decode(seqs.halves()[1]) == ["0006600", "0006601"]
    assert seqs.table["label"].tolist() == ["the cat", "NA"]
    assert seqs.table["occurrences"].tolist() == [9, 19]
    assert seqs.table["prediction"].tolist() == ["GO:0006601", "GO:0006601"]
    assert seqs.ids == ["GO:0006600", "GO:0006601"]
    (tmp_path / "uberon_dataset.csv").write_text("UBERON:0006600;the cat\n")
    two = load_sequences("ontologies:uberon/all", tokenizer=TOKENIZER, path=tmp_path)
    assert two.table["label"].tolist() == ["the cat"]
    (tmp_path / "uberon_dataset.csv").write_text("one column\n")
    with pytest.raises(FileFormatError, match="begins with 1 columns between semicolons: expected id, label"):
        load_sequences("ontologies:uberon/all", tokenizer=TOKENIZER, path=tmp_path)


@pytest.mark.filterwarnings("ignore:.*is known to have")
def test_the_probes_in_their_authors_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_lines(data / "relations.jsonl", [{"relation": "P19", "template": "[X] was born in [Y] ."}])
    evidence = [{"masked_sentence": "In [MASK] lived Mara."}]
    rows = [{"uuid": "1", "sub_label": "Mara", "obj_label": "Tarn", "evidences": evidence}]
    write_lines(data / "TREx" / "P19.jsonl", rows)
    seqs = load_sequences("facts:lama/trex", tokenizer=TOKENIZER, path=tmp_path)
    assert seqs.texts == ["Mara was born in Tarn"]
    for name, folder in (("squad", "Squad"), ("conceptnet", "ConceptNet")):
        row = {"id": "1", "obj_label": "fish", "masked_sentences": ["Cats eat [MASK] ."]}
        write_lines(data / folder / "test.jsonl", [row])
        assert load_sequences(f"facts:lama/{name}", tokenizer=TOKENIZER, path=tmp_path).texts == [
            "Cats eat fish"
        ]
    for relation in ("place_of_birth", "place_of_death"):
        row = {
            "pred": relation,
            "sub_label": "Otto",
            "obj_label": relation,
            "masked_sentences": [f"Otto, {relation}: [MASK]"],
        }
        write_lines(data / "Google_RE" / f"{relation}_test.jsonl", [row])
    both = load_sequences("facts:lama/google_re", tokenizer=TOKENIZER, path=data)
    assert both.table["relation"].tolist() == ["place_of_birth", "place_of_death"]
    (data / "relations.jsonl").unlink()
    with pytest.raises(SourceNotFoundError, match=r"no relations\.jsonl beside .*TREx: the templates"):
        load_sequences("facts:lama/trex", tokenizer=TOKENIZER, path=tmp_path)


def test_a_tensor_holds_ids_and_nothing_else(tmp_path: Path) -> None:
    tensor(tmp_path, "pythia-6.9b-deduped")
    name = "mempi:pile/pythia-6.9b-deduped"
    seqs = load_sequences(name, path=tmp_path)
    assert seqs.tokens.shape == (3, 80)
    file = tmp_path / "data" / "pile" / "EleutherAI" / "pythia-6.9b-deduped" / "pile_bs0-100-dedup.pt"
    assert load_sequences(name, path=file.parent.parent).rows() == seqs.rows()
    assert load_sequences(file, prefix_len=32).rows() == seqs.rows()
    for content, message in (
        (torch.rand(3, 80), "contains a Tensor of torch.float32"),
        (torch.arange(3), r"of torch.int64, \(3,\)"),
        ({"a": 1}, "contains a dict: sequences are a two-dimensional tensor"),
        (Path("x"), "other Python objects are not read from files"),
    ):
        torch.save(content, file)
        with pytest.raises(FileFormatError, match=message):
            load_sequences(name, path=tmp_path)


# Local copies of what is on the hub.


def test_a_folder_from_the_hub_and_its_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data" / "hubble" / "passages_wikipedia"
    folder.mkdir(parents=True)
    for part, copies in (("train", [1, 4, 256]), ("test", [0, 0])):
        pd.DataFrame(insertions(copies)).to_csv(folder / f"{part}.csv", index=False)
    with gzip.open(tmp_path / "nodup.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in insertions([1, 4, 256]))
    read: dict[str, SequenceSet] = {}
    for how, path in (
        ("folder", folder),
        ("file", folder / "train.csv"),
        ("compressed", tmp_path / "nodup.jsonl.gz"),
        ("variable", None),
    ):
        monkeypatch.setenv("MEMLENS_DATA", str(tmp_path / "data"))
        read[how] = load_sequences("hubble:passages_wikipedia/train", tokenizer=TOKENIZER, path=path, limit=3)
        assert read[how].table["copies"].tolist() == [1, 4, 256], how
    assert len({str(seqs.attrs["sha256"]) for seqs in read.values()}) == 1  # the same rows, in any form
    unseen = load_sequences("hubble:passages_wikipedia/test", tokenizer=TOKENIZER, limit=2)
    assert unseen.table["copies"].tolist() == [0, 0]
    assert unseen.attrs["sha256"] != read["folder"].attrs["sha256"]
    with pytest.raises(SourceNotFoundError, match=r"there is no .*nowhere: give the folder or file"):
        load_sequences("hubble:passages_wikipedia/test", tokenizer=TOKENIZER, path=tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match=r"give a folder, or a file of .*\.jsonl"):
        load_sequences("hubble:passages_wikipedia/test", path=Path(__file__))


def test_lines_in_a_file_called_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_lines(tmp_path / "forget01.json", TOFU)
    seqs = load_sequences("unlearning:tofu/forget01", tokenizer=TOKENIZER, path=tmp_path, limit=2)
    assert TOKENIZER.batch_decode(seqs.halves()[1]) == [" Mara did.", " In spring."]
    assert seqs.attrs["revision"] == ""


def test_a_checksum_can_be_pinned(hub: Hub) -> None:
    hub["NeelNanda/counterfact-tracing", None, "train"] = FACTS
    first = load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=2)
    pin = str(first.attrs["sha256"])
    assert load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=2, sha256=pin).rows()
    hub["NeelNanda/counterfact-tracing", None, "train"] = [FACTS[0], {**FACTS[1], "target_true": " Tarn"}]
    with pytest.raises(FileFormatError, match=rf"have the SHA-256 [0-9a-f]{{64}}, not {pin}"):
        load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=2, sha256=pin)
    with pytest.raises(FileFormatError, match="another number of them was read"):
        load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER, limit=1, sha256=pin)


# Errors, and models that do not fit.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hubbel:passages_wikipedia/train", "Did you mean 'hubble:passages_wikipedia'"),
        ("hubble:passages_wiki", "Did you mean 'hubble:passages_wikipedia'"),
        ("data:pythia-memorized-evals", "called 'data:pythia-memorized-evals'.*Did you mean"),
        ("hubble:passages_wikipedia/trian", "has no part 'trian'.*from train, test. Did you mean 'train'"),
        ("hubble:passages_wikipedia", "has several parts: choose hubble:passages_wikipedia/PART from train"),
        ("pile:nope", "In 'pile' there are pile:pythia-memorized-evals, pile:lm-extraction-benchmark"),
        ("hubble:", "no set of sequences is called 'hubble:'"),
        (
            "mempi:ecbd",
            r"not on the Hugging Face hub: clone .*path=, or have it at mempi/ecbd in .*MEMLENS_DATA",
        ),
        ("idioms:idiomem", r"not in the cache, and .*; without the hub, give a copy of .* with path="),
    ],
)
def test_errors_say_what_there_is_and_what_to_do(name: str, message: str, hub: Hub) -> None:
    with pytest.raises(SourceNotFoundError, match=message):
        load_sequences(name, tokenizer=TOKENIZER)


def test_a_folder_of_data_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLENS_DATA", "/nowhere")
    with pytest.raises(SourceNotFoundError, match=r"\$MEMLENS_DATA is '/nowhere', which is not a folder"):
        load_sequences("facts:counterfact-tracing", tokenizer=TOKENIZER)


def test_other_sources_take_no_path_and_no_checksum(tmp_path: Path) -> None:
    message = r"are for named sets, and 'rows\.jsonl' is none"
    with pytest.raises(OptionError, match=message):
        load_sequences("rows.jsonl", path=tmp_path)
    with pytest.raises(OptionError, match=message):
        load_sequences("rows.jsonl", sha256="0" * 64)


def test_a_file_may_have_a_name_like_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("mine:rows.jsonl"), [{"tokens": [1, 2, 3]}])
    assert load_sequences("mine:rows.jsonl", prefix_len=1).rows() == [[1, 2, 3]]


def test_a_folder_without_the_set_and_columns_that_are_missing(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        SourceNotFoundError, match="holds no copy of mempi:ecbd: expected data/ecbd/ecbd_2021"
    ):
        load_sequences("mempi:ecbd", path=tmp_path)
    hub["locuslab/TOFU", "full", "train"] = [{"question": "a", "reply": "b"}]
    with pytest.raises(
        ColumnError, match="should have a column 'answer', but the columns are question, reply"
    ):
        load_sequences("unlearning:tofu/full", tokenizer=TOKENIZER)
    hub["imperial-cpg/copyright-traps", None, "seq_len_25_n_rep_10"] = [{"text": LONG}]
    with pytest.raises(ColumnError, match="should have a column 'label'"):
        load_sequences("traps:copyright-traps/seq_len_25_n_rep_10", tokenizer=TOKENIZER)


def test_ids_of_another_tokenizer_are_refused(hub: Hub) -> None:
    hub["EleutherAI/pythia-memorized-evals", None, "duped.70m"] = evals(2)
    name = "pile:pythia-memorized-evals/duped.70m"
    size = TOKENIZER.vocab_size
    with pytest.raises(
        VocabularyError, match=rf"ids of EleutherAI/gpt-neox-20b \(50254 .* has {size} entries"
    ):
        load_sequences(name, tokenizer=TOKENIZER, limit=2)
    assert load_sequences(name, limit=2).n_targets.tolist() == [32, 32]


def test_models_that_were_not_trained_on_a_set_are_warned_of(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["allegrolab/passages_wikipedia", None, "train"] = insertions([1, 4])
    model = model_with(TOKENIZER, n_ctx=512)
    model.config = LlamaConfig()
    for name, seen in (
        ("allegrolab/hubble-1b-100b_toks-perturbed-hf", True),
        ("openlm-research/open_llama_3b", False),
    ):
        model.cfg.model_name = name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_sequences("hubble:passages_wikipedia/train", model, limit=2, prepend_bos=False)
        said = [str(w.message) for w in caught if "was in the training data of hubble" in str(w.message)]
        assert bool(said) != seen
        assert seen or "this model is of openllama" in said[0]
    model.cfg.model_name = ""
    monkeypatch.setattr(TOKENIZER, "name_or_path", "allegrolab/hubble-1b-100b_toks-perturbed-hf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_sequences("hubble:passages_wikipedia/train", model, limit=2, prepend_bos=False)
    assert not any("was in the training data" in str(w.message) for w in caught)


def test_the_reader_looks_for_the_layout_from_any_level(tmp_path: Path) -> None:
    chosen = find_named("facts:lama/trex")
    write_lines(tmp_path / "other.jsonl", [{}])
    assert named.local_files(tmp_path, chosen) == []  # not every file that ends in .jsonl
    write_lines(tmp_path / "TREx" / "P1.jsonl", [{}])
    assert named.local_files(tmp_path, chosen) == [tmp_path / "TREx" / "P1.jsonl"]


FIELDS = "{title: a, made_for: b, kind: texts, parts: {train: {}}, cite: c, home: d}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not described in YAML"),
        ("", "fields of each by its name"),
        ("- mine:set", "fields of each by its name"),
        ("mine:set:", "the set 'mine:set' cannot be registered"),
        ("mine:set: {title: a}", "the field 'parts' is missing"),
        (f"mine:set: {FIELDS[:-1]}, colour: red}}", "unexpected keyword argument 'colour'"),
        (f"mine:set: {FIELDS.replace('texts', 'tezts')}", "kind='tezts' is not known.*'texts'"),
        (f"mine:set: {FIELDS.replace('{train: {}}', '{}')}", "it has no parts"),
        (f"mine: {FIELDS}", "its name is not NAMESPACE:NAME"),
        (f"m:set: {FIELDS}", "its name is not NAMESPACE:NAME"),
    ],
)
def test_a_set_that_is_described_wrongly_is_refused(text: str, message: str) -> None:
    """A name or a kind that no reader knows would be listed, and never be found."""
    before = NAMED_SETS.names()
    with pytest.raises(OptionError, match=message):
        register_named_sets(text)
    assert NAMED_SETS.names() == before


def test_a_part_needs_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NAMED_SETS, "_items", dict(NAMED_SETS._items))
    register_named_sets(f"mine:set: {FIELDS.replace('{train: {}}', '{train: }')}")
    assert find_named("mine:set").part.name == "train"
