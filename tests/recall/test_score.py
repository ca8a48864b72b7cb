from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from memlens.errors import (
    EmptySetError,
    NonFiniteError,
    OptionError,
    SequenceError,
    UnsupportedModelError,
    VocabularyError,
)
from memlens.forward import baseline as forward_module
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.generate import greedy_continuations
from memlens.forward.metrics import BUILT_IN, target_stats
from memlens.models.load import load_model
from memlens.recall import score as score_module
from memlens.recall.columns import SCORE_COLUMNS
from memlens.recall.score import score_recall
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded, plain_greedy
from tests.tiny import D_VOCAB, FAMILIES, HOOKED_FAMILIES, N_CTX, random_tokens

BOTH = [(f, "bridge") for f in FAMILIES] + [(f, "hooked") for f in HOOKED_FAMILIES]
Models = Callable[..., Any]


@pytest.mark.parametrize(("family", "backend"), BOTH)
def test_scores_equal_plain_decoding_and_plain_logits(tiny_model: Models, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    seqs = graded(model)
    recall = score_recall(model, seqs, progress=False, batch_size=4)
    truth = [row[n:] for row, n in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)]
    decoded = plain_greedy(model, seqs)
    assert recall.table["generated"].tolist() == decoded
    equal = [[a == b for a, b in zip(d, t, strict=True)] for d, t in zip(decoded, truth, strict=True)]
    assert recall.table["exact_match"].tolist() == [int(all(e)) for e in equal]
    np.testing.assert_allclose(recall.table["memorization_score"], [np.mean(e) for e in equal])
    assert recall.table["matching_prefix"].tolist() == [[*e, False].index(False) for e in equal]
    assert set(recall.table["exact_match"]) == {0, 1}
    for row in range(len(seqs)):
        with torch.no_grad():
            logits = model(seqs[row].tokens)[0, seqs.prefix_len[row] - 1 : -1]
        targets = torch.tensor(truth[row])
        logp = logits.log_softmax(-1)
        of_target = logits.gather(1, targets[:, None])
        found = recall.table.iloc[row]
        expected = {
            "target_logprob": logp.gather(1, targets[:, None]).mean(),
            "completion_entropy": -(logp.exp() * logp).sum(),
            "target_rank": (logits > of_target).sum(-1).float().mean(),
            "target_accuracy": (logits.argmax(-1) == targets).float().mean(),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(float(value), abs=1e-4), name
        others = logits.scatter(1, targets[:, None], -torch.inf).max(-1).values
        assert found["margin"] == pytest.approx(float((of_target[:, 0] - others).min()), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "olmo3", "llama_gqa", "gpt_bigcode"])
def test_generated_equals_huggingface_s_generate(
    tiny_folder: Callable[[str], Path], tiny_model: Models, family: str
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    prompts = random_tokens(5, 9, seed=3)
    with torch.no_grad():
        every = torch.ones_like(prompts)
        whole = hf.generate(prompts, attention_mask=every, max_new_tokens=12, do_sample=False, pad_token_id=0)
    wrong = whole.clone()
    wrong[:, -4] = (wrong[:, -4] + 1) % D_VOCAB
    seqs = SequenceSet.from_tokens(torch.cat([whole, wrong]), 9)
    recall = score_recall(tiny_model(family, "bridge"), seqs, progress=False)
    assert recall.table["exact_match"].tolist() == [1] * 5 + [0] * 5
    assert recall.table["matching_prefix"].tolist() == [12] * 5 + [8] * 5
    assert recall.table["generated"].tolist() == whole[:, 9:].tolist() * 2


@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_batch_and_chunk_sizes_do_not_matter(
    tiny_model: Models, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox", backend)
    seqs = graded(model, seed=2)
    whole = score_recall(model, seqs, progress=False).table
    monkeypatch.setattr(forward_module, "unembedding_rows", lambda *sizes: (3, 2))
    for batch_size in (1, 2, 5):
        parts = score_recall(model, seqs, progress=False, batch_size=batch_size).table
        pd.testing.assert_frame_equal(parts, whole, atol=1e-5, rtol=1e-5)


def test_no_logits_of_the_prefix_are_ever_computed(
    tiny_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    seen = 0
    unembed = forward_module.Trunk.unembed

    def counting(self: Any, resid: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += resid.shape[:-1].numel()
        return unembed(self, resid)

    monkeypatch.setattr(forward_module.Trunk, "unembed", counting)
    score_recall(model, seqs, progress=False, generate=False)
    assert seen == int(seqs.n_targets.sum())


@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_decoding_starts_at_the_first_error(tiny_model: Models, backend: str) -> None:
    model = tiny_model("gpt_neox", backend)
    prompts = random_tokens(3, 6)
    row = torch.tensor(
        plain_greedy(model, SequenceSet.from_tokens(torch.cat([prompts, prompts[:, :1].expand(3, 10)], 1), 6))
    )
    right = torch.cat([prompts, row], 1)
    wrong = right.clone()
    wrong[0, 15] = (wrong[0, 15] + 1) % 100
    wrong[1, 13] = (wrong[1, 13] + 1) % 100
    seqs = SequenceSet.from_tokens(wrong, 6)
    widths: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda act, hook: widths.append(act.shape[1]))]):
        recall = score_recall(model, seqs, progress=False)
    # One teacher-forced pass; then the tokens up to the earlier error and its own; then one step.
    assert widths[-3:] == [16, 14, 1]
    assert sum(widths[:-3]) <= 1
    assert recall.table["memorization_score"].tolist() == [0.9, 0.9, 1.0]


def test_an_all_right_set_is_not_decoded(tiny_model: Models) -> None:
    model = tiny_model("llama", "bridge")
    seqs = graded(model)[::3]
    widths: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda act, hook: widths.append(act.shape[1]))]):
        recall = score_recall(model, seqs, progress=False)
    assert recall.table["memorization_score"].tolist() == [1.0] * len(seqs)
    assert [w for w in widths if w > 1] == [seqs.tokens.shape[1]]


def test_models_that_cannot_be_entered_at_a_block_are_scored_by_whole_passes(
    tiny_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "bridge")
    seqs = graded(model)
    expected = score_recall(model, seqs, progress=False).table

    def refuse(model: Any) -> None:
        raise UnsupportedModelError("no inner decoder")

    monkeypatch.setattr(forward_module, "Trunk", refuse)
    pd.testing.assert_frame_equal(score_recall(model, seqs, progress=False).table, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_s_length_is_known_for_every_family(tiny_model: Models, family: str) -> None:
    model = tiny_model(family, "bridge")
    full = SequenceSet.from_tokens(random_tokens(1, N_CTX), 60)
    assert len(score_recall(model, full, progress=False)) == 1
    with pytest.raises(SequenceError, match=r"65 tokens, .* holds 64"):
        score_recall(model, SequenceSet.from_tokens(random_tokens(1, N_CTX + 1), 60), progress=False)


def test_greedy_continuations_of_chosen_rows_from_nothing_known(tiny_model: Models) -> None:
    model = tiny_model("olmo2", "bridge")
    seqs = graded(model)
    rows = torch.tensor([7, 0, 4])
    generated = greedy_continuations(model, seqs, rows, batch_size=2)
    expected = plain_greedy(model, seqs[rows])
    assert generated.shape == (3, seqs.max_targets)
    for found, right in zip(generated.tolist(), expected, strict=True):
        assert found == right + [-1] * (seqs.max_targets - len(right))


def test_without_generation_there_is_no_memorization_score(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    fast, full = (score_recall(model, seqs, generate=g, progress=False) for g in (False, True))
    assert "memorization_score" not in fast.table
    assert fast.table["exact_match"].tolist() == full.table["exact_match"].tolist()
    assert fast.memorized().ids == full.memorized().ids
    assert (fast.criterion, full.criterion) == ("target_accuracy", "memorization_score")


DEFAULTS = {
    "generate": True,
    "ban_eos": False,
    "near_tie_margin": 1e-4,
    "metrics": "likelihood,sampling,near_verbatim,trivial,taxonomy",
    "min_k_share": 0.2,
    **{"n_samples": 100, "probability": 0.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    **{"trivial_copied": 0.5, "trivial_distinct": 0.2, "trivial_repeated": 0.75, "trivial_step": 0.75},
    **{"trivial_min_tokens": 4, "trivial_max_period": 16},
    **{"guess_rouge_l": 0.5, "guess_rouge_3": 0.5, "guess_repeated": 0.75, "guess_step": 0.75},
    "batch_size": 0,
}
"""The settings as documented; no batch size was given."""
OF_GROUP = {
    "likelihood": ("min_k_share",),
    "sampling": ("n_samples", "probability", "temperature", "top_k", "top_p"),
    "near_verbatim": (),
    "trivial": tuple(name for name in DEFAULTS if name.startswith("trivial_")),
    "taxonomy": tuple(name for name in DEFAULTS if name.startswith("guess_")),
}


def test_the_settings_that_took_part_are_recorded(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model, n=3)
    facts = set(score_recall(model, seqs, metrics=(), generate=False, progress=False).attrs)
    facts -= set(DEFAULTS)
    assert {"model", "backend", "dtype"} <= facts

    def recorded(**options: Any) -> dict[str, Any]:
        attrs = score_recall(model, seqs, progress=False, **options).attrs
        assert facts <= set(attrs)
        return {name: value for name, value in attrs.items() if name not in facts}

    assert recorded() == DEFAULTS
    grouped = {name for names in OF_GROUP.values() for name in names}
    for group, names in OF_GROUP.items():
        found = recorded(metrics=[group], generate=False, batch_size=2)
        changed = {"generate": False, "batch_size": 2, "metrics": group}
        assert found == {
            name: changed.get(name, value)
            for name, value in DEFAULTS.items()
            if name in names or name not in grouped
        }
    assert recorded(metrics=("trivial", "likelihood"))["metrics"] == "likelihood,trivial"


def test_scores_have_the_types_of_what_they_count(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    table = score_recall(model, graded(model), progress=False).table
    kinds = {name: table[name].dtype.kind for name in table}
    flags = ("exact_match", "np_discoverable", "guessed", "recollected")
    counts = ("matching_prefix", "edit_distance", "edit_distance_characters")
    counts += ("longest_run", "longest_run_at", "longest_run_generated_at")
    assert {kinds[name] for name in (*flags, *counts)} == {"i"}
    assert {kinds[name] for name in ("near_tie", "trivial")} == {"b"}
    assert kinds["generated"] == "O"
    whole = {*flags, *counts, "near_tie", "trivial", "generated", "generated_text", "id"}
    for name in set(SCORE_COLUMNS) & set(table) - whole:
        assert kinds[name] == "f", name
    n = table["generated"].map(len)
    for name in ("target_accuracy", "memorization_score"):  # shares as thresholds meet them: k / n exactly
        assert (table[name] == (table[name] * n).round() / n).all()


def test_a_margin_under_a_ten_thousandth_is_a_near_tie() -> None:
    ids = torch.tensor([[1], [1], [1], [1]])
    stats = target_stats(torch.randn(4, 1, 3), ids, torch.ones_like(ids, dtype=torch.bool))
    stats = replace(stats, margin=torch.tensor([[-1.1e-4], [-0.9e-4], [0.9e-4], [1.1e-4]]))
    assert score_module._teacher_forced_columns(stats)["near_tie"].tolist() == [False, True, True, False]


def test_without_a_tokenizer_there_are_no_columns_of_texts(tiny_folder: Callable[[str], Path]) -> None:
    model = load_model(tiny_folder("gpt_neox"), backend="bridge")
    seqs = graded(model, n=3)
    full = score_recall(model, seqs, progress=False).table
    model.tokenizer = None
    bare = score_recall(model, seqs, progress=False).table
    texts = {"zlib_ratio", "nll_per_zlib_byte", "generated_text", "rouge_l"}
    texts |= {"edit_distance_characters", "edit_similarity_characters"}
    assert set(full) - set(bare) == texts
    same = [name for name in bare if name != "step_share"]  # steps are then sought in ids only
    pd.testing.assert_frame_equal(bare[same], full[same])
    with pytest.raises(SequenceError, match="the model's tokenizer has no end-of-text token"):
        score_recall(model, seqs, ban_eos=True, progress=False)


def test_what_follows_the_first_error_is_decoded_quietly(
    tiny_model: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    stats = teacher_forced_stats(model, seqs, progress=False)
    capsys.readouterr()
    generated = score_module.generated_after(model, seqs, stats)
    assert capsys.readouterr() == ("", "")
    for row, n, expected in zip(generated, seqs.n_targets, plain_greedy(model, seqs), strict=True):
        assert row[:n].tolist() == expected


WHOLE = ("tokens", "characters", "position", "samples")


def test_numbers_are_in_the_units_of_their_columns(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    scores = score_recall(model, graded(model), progress=False)
    for name, array in scores.to_result().data.data_vars.items():
        unit, values = array.attrs["units"], array.values[np.isfinite(array.values)]
        assert array.attrs["label"] if name in BUILT_IN else array.attrs["long_name"]
        if unit == "0 or 1":
            assert np.isin(values, (0, 1)).all(), name
        elif unit in ("share", "share of tokens"):
            assert ((values >= 0) & (values <= 1)).all(), name
        elif unit in WHOLE:
            assert (values == values.round()).all(), name
            assert values.min() >= (-1 if unit == "position" else 0), name
        else:
            assert unit in ("nats", "nats per byte", "logits", "0 = top", "1"), name


def test_near_ties_are_flagged(tiny_folder: Callable[[str], Path]) -> None:
    model = load_model(tiny_folder("llama"), backend="bridge")
    seqs = SequenceSet.from_tokens(random_tokens(1, 8), 7)
    with torch.no_grad():
        top = model(seqs.tokens[:, :7])[0, -1].argsort(descending=True)
        head = model.original_model.get_output_embeddings().weight
        head[int(top[1])] = head[int(top[0])]
    for token, tied in ((top[0], True), (top[1], True), (top[2], False)):
        tokens = seqs.tokens.clone()
        tokens[0, 7] = token
        recall = score_recall(model, SequenceSet.from_tokens(tokens, 7), progress=False)
        assert recall.table["near_tie"].tolist() == [tied]
        assert (abs(recall.table["margin"][0]) < 1e-5) == tied


def test_banning_the_end_of_text_token(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    eos = D_VOCAB - 1
    prompts = random_tokens(400, 6, seed=8)
    with torch.no_grad():
        ends = model(prompts)[:, -1].argmax(-1) == eos
    assert ends.any(), "the test needs a prompt after which the model ends the text"
    with torch.no_grad():
        logits = model(prompts[ends][:1])[0, -1]
    second = int(logits.argsort(descending=True)[1])
    seqs = SequenceSet.from_tokens(torch.cat([prompts[ends][:1], torch.tensor([[second]])], 1), 6)
    free, banned = (score_recall(model, seqs, ban_eos=b, progress=False) for b in (False, True))
    assert free.table["generated"][0] == [eos]
    assert banned.table["generated"][0] == [second]
    assert (free.table["exact_match"][0], banned.table["exact_match"][0]) == (0, 1)
    share = 1 - logits.softmax(-1)[eos]
    assert banned.table["target_logprob"][0] == pytest.approx(
        float(free.table["target_logprob"][0] - share.log()), abs=1e-4
    )
    assert (free.attrs["ban_eos"], banned.attrs["ban_eos"]) == (False, True)
    with pytest.raises(SequenceError, match="end-of-text"):
        score_recall(model, SequenceSet.from_tokens([[1, 2, eos]], 1), ban_eos=True)


def test_an_end_of_text_token_is_recalled_like_any_other(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = SequenceSet.from_tokens([[1, 2, D_VOCAB - 1, 5]], 1)
    recall = score_recall(model, seqs, progress=False)
    with torch.no_grad():
        logp = model(seqs.tokens)[0].log_softmax(-1)
    expected = (logp[0, 2] + logp[1, D_VOCAB - 1] + logp[2, 5]) / 3
    assert recall.table["target_logprob"][0] == pytest.approx(float(expected), abs=1e-4)


def test_the_set_s_columns_are_kept_and_old_scores_replaced(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    table = pd.DataFrame({"domain": list("abc"), "exact_match": [7, 7, 7]})
    seqs = SequenceSet.from_tokens(random_tokens(3, 10), 5, table=table, attrs={"name": "mine"})
    recall = score_recall(model, seqs, progress=False)
    assert recall.table["domain"].tolist() == list("abc")
    assert 7 not in recall.table["exact_match"].tolist()
    assert "exact_match" not in recall.sequences.table
    assert recall.sequences.attrs["name"] == "mine"
    assert recall.attrs["backend"] == "TransformerBridge"
    assert recall.table["generated_text"][0] == model.tokenizer.decode(recall.table["generated"][0])


def test_hooks_that_are_set_act_on_the_score(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    plain = score_recall(model, seqs, progress=False).table
    zero = [("blocks.1.hook_mlp_out", lambda act, hook: act * 0)]
    with model.hooks(fwd_hooks=zero):
        hooked = score_recall(model, seqs, progress=False).table
        expected = plain_greedy(model, seqs)
    assert hooked["generated"].tolist() == expected
    assert hooked["generated"].tolist() != plain["generated"].tolist()


@pytest.mark.parametrize(
    ("seqs", "options", "error", "words"),
    [
        (SequenceSet.from_tokens([[1, 2]], 1)[[]], {}, EmptySetError, "no sequences"),
        (SequenceSet.from_tokens([[1, 101]], 1), {}, VocabularyError, "row 0, position 1 .* 101"),
        (SequenceSet.from_tokens([[1] * 65], 1), {}, SequenceError, "65 tokens, .* holds 64"),
        (SequenceSet.from_tokens([[1, 2]], 1), {"batch_size": 0}, OptionError, "batch_size=0"),
    ],
)
def test_bad_input_is_refused_before_any_forward_pass(
    tiny_model: Models, seqs: SequenceSet, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    ran: list[bool] = []
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda act, hook: ran.append(True))]),
        pytest.raises(error, match=words),
    ):
        score_recall(model, seqs, progress=False, **options)
    assert not ran


def test_logits_that_are_not_finite_name_the_layer(tiny_folder: Callable[[str], Path]) -> None:
    model = load_model(tiny_folder("gpt_neox"), backend="bridge")
    seqs = SequenceSet.from_tokens(random_tokens(4, 10), 5)

    def spoil(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return act * float("nan")

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", spoil)]),
        pytest.raises(NonFiniteError, match="first after layer 1;"),
    ):
        score_recall(model, seqs, progress=False)
