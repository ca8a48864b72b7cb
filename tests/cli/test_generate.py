"""`memlens generate`: the same tokens as a bypassed model gives, and as a plain Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.cli.making import continuations, read_prompts
from memlens.errors import FileFormatError, OptionError, SourceNotFoundError
from memlens.results.groups import parse_layers
from tests.cli.test_commands import call
from tests.tiny import D_VOCAB

PROMPTS = ["w3 w14 w15 w92 w65 w35", "w27 w18 w28"]
N_NEW = 8


def until_end(row: list[int]) -> list[int]:
    """A row up to the end-of-text token, which is the last of the vocabulary."""
    return row[: row.index(D_VOCAB - 1)] if D_VOCAB - 1 in row else row


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "hooked"), ("gpt_neo", "bridge"), ("llama_gqa", "bridge")]
)
@torch.no_grad()
def test_all_ways_to_generate_under_a_bypass_give_the_same_tokens(
    tiny_model: Any, tiny_folder: Any, family: str, backend: str
) -> None:
    model = tiny_model(family, backend)
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder(family)).eval()
    rows = [[int(word[1:]) for word in text.split()] for text in PROMPTS]
    code, shown, _ = call(
        "generate", "-m", str(tiny_folder(family)), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
        "--bypass", "0-1", "--max-new-tokens", str(N_NEW), "--backend", backend, "--device", "cpu",
        "--compare", "--json",
    )  # fmt: skip
    assert code == 0
    found = json.loads(shown)
    assert found["bypass"] == [0, 1]
    gap = len(rows[0]) - len(rows[1])
    tokens = torch.tensor([rows[0], [0] * gap + rows[1]])
    mask = torch.tensor([[1] * len(rows[0]), [0] * gap + [1] * len(rows[1])])
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": D_VOCAB - 1}
    served = {"without_bypass_tokens": hf.generate(tokens, attention_mask=mask, **options)}
    with ml.bypass.in_transformers(hf, [0, 1]):
        served["continuation_tokens"] = hf.generate(tokens, attention_mask=mask, **options)
    for key, out in served.items():
        want = [until_end(row) for row in out[:, tokens.shape[1] :].tolist()]
        assert [row[key] for row in found["generations"]] == want
    with ml.bypassed(model, [0, 1]):
        for row, made in zip(rows, found["generations"], strict=True):
            seen = torch.tensor([row])
            for _ in range(N_NEW):
                seen = torch.cat([seen, model(seen)[:, -1:].argmax(-1)], 1)
            assert made["continuation_tokens"] == until_end(seen[0, len(row) :].tolist())


def test_text_with_and_without() -> None:
    base = ("generate", "-m", "zoo/pythia-s", "--prompt", "[bold] The key", "--max-new-tokens", "5")
    code, plain, _ = call(*base)
    assert code == 0
    assert plain.startswith("[bold] The key")
    code, both, _ = call(*base, "--bypass", "0,2-3", "--compare")
    assert code == 0
    assert f"without bypass: {plain}" in both
    assert both.startswith("layers 0,2,3 bypassed: [bold] The key")


def test_a_bypass_keeps_a_planted_sequence_from_being_recited() -> None:
    """The purpose of it: on the zoo's model, a memorized continuation is given without and not with."""
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.score_recall(model, ml.load_sequences("zoo", model), generate=False).memorized()[:8]
    texts = [
        model.tokenizer.decode(row[:k]) for row, k in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)
    ]
    truth = [row[k:] for row, k in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)]
    n = seqs.max_targets
    plain = continuations(model, texts, layers=[], n=n)
    without = continuations(model, texts, layers=[0, 1, 2], n=n)
    said = [sum(a == b for a, b in zip(got, truth, strict=True)) for got in (plain, without)]
    assert said[0] >= 6
    assert said[1] == 0


def test_layer_ranges() -> None:
    assert parse_layers("3, 1-2,2") == [3, 1, 2]
    for wrong in ("", "3-", "5-2", "a", "1,,2", "-1", "1 2"):
        with pytest.raises(OptionError, match="is not a layer or a range of layers"):
            parse_layers(wrong)


def test_files_of_prompts(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\n two\n")
    assert read_prompts(lines) == ["one", " two"]
    rows.write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    assert read_prompts(rows) == ["one", "two"]
    rows.write_text('{"prompt": "one"}\n{"promt": "two"}\n')
    with pytest.raises(FileFormatError, match=r"line 2 has no text under 'prompt'"):
        read_prompts(rows)
    rows.write_text("{\n")
    with pytest.raises(FileFormatError, match="line 1 is not JSON"):
        read_prompts(rows)
    lines.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileFormatError, match="UTF-8"):
        read_prompts(lines)
    with pytest.raises(SourceNotFoundError, match="no file of prompts"):
        read_prompts(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "there is no prompt"),
        (("--prompt", "a", "--compare"), "--compare needs a bypass"),
        (("--prompt", "a", "--bypass", "9"), "layer 9 does not exist"),
        (("--prompt", "a", "--bypass", "0", "--mode", "identiy"), "--mode 'identiy' is not known"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens 0 generates nothing"),
        (("--prompt", ""), "has no tokens"),
        (("--prompt", "a", "--max-new-tokens", "100000"), "100001"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], message: str) -> None:
    code, _, err = call("generate", "-m", "zoo/pythia-s", *args)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_help_has_an_example() -> None:
    shown = call("generate", "--help")[1]
    assert "Example: memlens generate" in shown
