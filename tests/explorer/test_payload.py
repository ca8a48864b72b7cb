"""The page's data: what it holds is what was measured, and it stays within its bytes."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memlens.errors import EmptySetError, OptionError
from memlens.explorer.attention import unpack_causal
from memlens.explorer.data import Edits, Exploration, strongest_heads
from memlens.explorer.page import explorer_payload, write_explorer
from memlens.report.render import safe_json
from tests.explorer.synthetic import exploration, view


def sixteen(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def size(payload: Any) -> int:
    """Bytes in a page."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return len(safe_json(text).encode())


def test_everything_comes_back_from_the_payload() -> None:
    one = view("a", ["the", " cat", " sat", " on", " <b>", " cat"], 2)
    payload = json.loads(json.dumps(explorer_payload(exploration([one])), allow_nan=False))
    (found,) = payload["sequences"]
    words = [text for text, _ in payload["words"]]
    assert [words[i] for i in found["tokens"]] == list(one.tokens)
    assert len(words) == len(set(words))
    assert np.abs(sixteen(found["lens_probability"]) / 65535 - one.lens_probability.ravel()).max() < 1e-5
    assert sixteen(found["lens_rank"]).tolist() == np.minimum(one.lens_rank, 65535).ravel().tolist()
    assert np.allclose(found["heads"], one.head_effects, rtol=1e-3)
    assert np.allclose(found["mlp"], one.mlp_effects, rtol=1e-3)
    assert np.allclose(found["bypass"], one.bypass_effects, rtol=1e-3)
    for stored, given in zip(
        [found["as_it_is"], *found["edited"]], [one.continuation, *one.edited], strict=True
    ):
        assert stored["name"] == given.edits.name
        assert [words[i] for i in stored["tokens"]] == list(given.tokens)
        assert stored["same"] == "".join(str(int(same)) for same in given.same)
        assert np.abs(sixteen(stored["probability"]) / 65535 - given.probability).max() < 1e-5
    for kept in found["attention"]:
        expected = one.attention[kept["layer"], kept["head"]]
        assert (unpack_causal(base64.b64decode(kept["map"]), 6) == expected).all()
    assert len(found["attention"]) == 12
    assert found["left_out"] == {"edited": 0, "attention": 0}


def test_labels_of_figures_are_escaped_and_running_text_is_not() -> None:
    payload = explorer_payload(exploration([view("a", ["<b>", "$x$", "\u202e", " a\n"], 1)]))
    words = dict(payload["words"])
    assert words["<b>"] == "&lt;b&gt;"
    assert words["$x$"] == "&#36;x&#36;"
    assert words["\\u202e"] == "\\u202e"
    assert words[" a↵\n"] == "·a↵"


def test_a_wide_layer_and_long_sequences_stay_within_the_budget() -> None:
    """128 heads a layer, 512 tokens: what is kept is the strongest, in rounds over the sequences."""
    edits = [Edits((layer,)) for layer in range(8)]
    views = []
    for seed in range(6):
        effects = np.random.default_rng(seed).normal(size=(8, 128))
        kept = strongest_heads(effects)[:10]
        tokens = [f" token{i}" for i in range(512)]
        made = view(f"s{seed}", tokens, 32, n_layers=8, n_heads=128, kept=kept, edits=edits, seed=seed)
        views.append(replace(made, head_effects=effects))
    payload = explorer_payload(exploration(views))
    assert 1_200_000 < size(payload) <= 1_500_000
    counts = [len(found["attention"]) for found in payload["sequences"]]
    assert all(len(found["edited"]) == 8 for found in payload["sequences"])
    assert 1 <= max(counts) < 10
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    for found, one in zip(payload["sequences"], views, strict=True):
        shown = [(kept["layer"], kept["head"]) for kept in found["attention"]]
        assert shown == strongest_heads(one.head_effects)[: len(shown)]
        assert found["left_out"]["attention"] == 8 * 128 - len(shown)


def test_under_a_small_budget_the_weakest_edits_go() -> None:
    one = replace(view("a", ["a"] * 200, 1), bypass_effects=np.array([0.1, -3.0, 0.0]))
    one = replace(one, head_effects=np.zeros((3, 4)))
    whole = explorer_payload(exploration([one]))
    bare = size({**whole, "sequences": [{**whole["sequences"][0], "edited": [], "attention": []}]})
    cut = explorer_payload(exploration([one]), budget=bare + size(whole["sequences"][0]["edited"][1]) + 20)
    (found,) = cut["sequences"]
    assert [edit["name"] for edit in found["edited"]] == ["bypass L1"]
    assert found["left_out"] == {"edited": 2, "attention": 12}
    (none,) = explorer_payload(exploration([one]), budget=0)["sequences"]
    assert none["edited"] == []
    assert none["as_it_is"]["tokens"]


def test_numbers_that_are_none_are_null() -> None:
    one = replace(view("a", ["a", "b"], 1), head_effects=np.full((3, 4), np.nan))
    assert explorer_payload(exploration([one]))["sequences"][0]["heads"] == [[None] * 4] * 3


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(EmptySetError, match="no sequences to explore"):
        explorer_payload(Exploration([], {"metric": "target_logprob"}))
    with pytest.raises(OptionError, match="budget=-1"):
        explorer_payload(exploration([view("a", ["a", "b"], 1)]), budget=-1)


def test_the_page_says_how_it_was_measured(tmp_path: Any) -> None:
    page = write_explorer(tmp_path / "page.html", exploration([view("a", ["a", "b"], 1)]))
    text = page.read_text(encoding="utf-8")
    assert "by ablating each head (zero)" in text
    assert "1 sequences in a &lt;b&gt;model&lt;/b&gt;" in text
    assert page.stat().st_size < 6_000_000
