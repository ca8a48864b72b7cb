"""Curvature edits: everything at mass 1, the right entries below it, and as many at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, OptionError
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.curvature import Eigenbasis, high_curvature, kfac_factors
from tests.small import ragged


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "hooked"), ("gpt_neox", "bridge"), ("olmo2", "bridge")]
)
def test_with_all_of_the_curvature_the_logits_are_equal(
    tiny_model: Callable[..., Any], family: str, backend: str
) -> None:
    model, tokens = tiny_model(family, backend), ragged().tokens
    (edit,) = ml.detect.curvature_edits(model, ragged(6, seed=3), [1.0], n_random=0)
    plain = model(tokens)
    with ml.applied(model, edit):
        assert torch.equal(model(tokens), plain)
    assert edit.about["share_of_entries"] == 1.0
    assert edit.size == 0.0


def test_an_edit_equals_the_model_with_the_edited_matrices(
    tiny_model: Callable[..., Any], tiny_folder: Any
) -> None:
    model, text, tokens = tiny_model("gpt_neox", "bridge"), ragged(6, seed=3), ragged().tokens
    edit, _ = ml.detect.curvature_edits(model, text, [0.7], layers=[0, 2])
    a, g = kfac_factors(Trunk(model), text)
    other = ml.load_model(tiny_folder("gpt_neox"), backend="bridge", device="cpu")
    with torch.no_grad():
        for layer in (0, 2):
            matrix = value_vectors(other, layer).T
            matrix.copy_(high_curvature(matrix.double(), a[layer], g[layer], 0.7).to(matrix))
    with ml.applied(model, edit):
        np.testing.assert_allclose(model(tokens).detach(), other(tokens).detach(), atol=1e-4)
    assert not torch.allclose(model(tokens), other(tokens), atol=1e-2)


def test_kept_entries_hold_the_share_and_are_the_largest() -> None:
    rng = np.random.default_rng(0)
    a, g = (torch.from_numpy(x @ x.T) for x in (rng.normal(size=(5, 9)), rng.normal(size=(4, 9))))
    basis = Eigenbasis.of(a, g)
    kron = torch.linalg.eigvalsh(torch.kron(g, a))
    np.testing.assert_allclose(np.sort(basis.curvature.flatten()), kron, atol=1e-8)
    for share in (0.3, 0.9):
        stays = basis.largest(share)
        kept, gone = basis.curvature[stays], basis.curvature[~stays]
        assert kept.min() >= gone.max()
        assert kept.sum() >= share * basis.curvature.sum() > kept.sum() - kept.min()
    matrix = torch.from_numpy(rng.normal(size=(4, 5)))
    parts = [basis.part(matrix, where) for where in (stays, ~stays)]
    np.testing.assert_allclose(parts[0] + parts[1], matrix, atol=1e-12)


def test_controls_keep_as_many_other_entries(tiny_model: Callable[..., Any]) -> None:
    model, text = tiny_model("gpt_neox", "bridge"), ragged(6, seed=3)
    edits = ml.detect.curvature_edits(model, text, [0.9, 0.5], n_random=2)
    assert [tuple(e.coords.values()) for e in edits] == [
        (share, entries) for share in (0.9, 0.5) for entries in ("curvature", "random 0", "random 1")
    ]
    assert edits[0].about["share_of_entries"] == edits[1].about["share_of_entries"]
    assert edits[0].about["share_of_entries"] > edits[3].about["share_of_entries"]
    assert len({round(edit.size, 6) for edit in edits}) == 6
    again = ml.detect.curvature_edits(model, text, [0.9, 0.5], n_random=2)
    assert [edit.size for edit in again] == [edit.size for edit in edits]
    swept = ml.sweep(model, ragged(), edits, progress=False)
    assert swept["target_logprob"].dims == ("sequence", "kept", "entries")
    with pytest.raises(OptionError, match=r"kept=1\.5"):
        ml.detect.curvature_edits(model, text, [1.5])


def test_no_text_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    with pytest.raises(EmptySetError):
        ml.detect.curvature_edits(model, ragged()[:0])
