"""Curvature edits: everything at mass 1, the right entries below it, and as many at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.choices import CurvatureMatrix
from memlens.errors import EmptySetError, OptionError
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.curvature import (
    Eigenbasis,
    curvature_runs,
    high_curvature,
    kfac_factors,
)
from memlens.instruments.edit.weight_edit import EditMaker
from tests.devices import dev
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
    other = ml.load_model(tiny_folder("gpt_neox"), backend="bridge", device=dev())
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


OF_PARAMETER: dict[str, dict[CurvatureMatrix, str]] = {
    "gpt_neox_sequential": {"in": "mlp.dense_h_to_4h"},
    "gpt_neox": {"in": "mlp.dense_h_to_4h"},
    "llama_gqa": {
        "in": "mlp.up_proj", "gate": "mlp.gate_proj", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
    },
    "olmo2": {"gate": "mlp.gate_proj", "q": "self_attn.q_proj", "k": "self_attn.k_proj"},
}  # fmt: skip


@pytest.mark.parametrize("family", list(OF_PARAMETER))
def test_inputs_and_gradients_make_up_the_gradient_of_the_parameter(
    tiny_model: Callable[..., Any], tiny_folder: Any, family: str
) -> None:
    """The gradient of a weight matrix is the sum over positions of gradient times input."""
    seqs = ragged()
    other = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32)
    for row, prefix in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True):
        logprob = other(torch.tensor([row])).logits[0].log_softmax(-1)
        logprob[range(prefix - 1, len(row) - 1), row[prefix:]].mean().backward()
    trunk = Trunk(tiny_model(family, "bridge"))
    parameters = dict(other.named_parameters())
    for matrix, name in OF_PARAMETER[family].items():
        found: Any = [0] * trunk.n_layers
        for a, g, _ in curvature_runs(trunk, seqs, matrix):
            found = [
                old + torch.einsum("bpo,bpi->oi", gradient, x)
                for old, gradient, x in zip(found, g, a, strict=True)
            ]
        for layer, total in enumerate(found):
            (parameter,) = (p for key, p in parameters.items() if f".{layer}.{name}.weight" in key)
            wanted: Any = parameter.grad
            np.testing.assert_allclose(total, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "hooked"), ("olmo2", "bridge")])
def test_edits_of_input_matrices_change_these_alone(
    tiny_model: Callable[..., Any], family: str, backend: str
) -> None:
    model, text, tokens = tiny_model(family, backend), ragged(6, seed=3), ragged().tokens
    matrices: Any = ["in", "k", "v"]
    whole, less, drawn = (
        edit
        for share, n in ((1.0, 0), (0.8, 1))
        for edit in ml.detect.curvature_edits(
            model, text, [share], matrices=[*matrices, "k"], layers=[1], n_random=n
        )
    )
    plain = model(tokens)
    with ml.applied(model, whole):
        np.testing.assert_allclose(model(tokens).detach(), plain.detach(), atol=1e-5)
    assert whole.about["share_of_entries"] == 1.0
    parts = EditMaker(model).parts(1)
    for edit in (less, drawn):
        assert [(change.layer, change.part) for change in edit.changes] == [(1, m) for m in matrices]
        assert edit.about["matrices"] == matrices
    for change, matrix in zip(less.changes, matrices, strict=True):
        a, g = kfac_factors(Trunk(model), text, matrix)
        weight = parts.maps[matrix].weight
        wanted = high_curvature(weight.double(), a[1], g[1], 0.8)
        np.testing.assert_allclose(change.weight, wanted, atol=1e-5)
    with ml.applied(model, less):
        assert not torch.allclose(model(tokens), plain, atol=1e-3)


def test_matrices_that_the_model_does_not_have_are_refused(tiny_model: Callable[..., Any]) -> None:
    model, text = tiny_model("gpt_neox", "hooked"), ragged()
    with pytest.raises(OptionError, match="has no 'gate'"):
        ml.detect.curvature_edits(model, text, matrices=["gate"])
    with pytest.raises(OptionError, match="no matrices"):
        ml.detect.curvature_edits(model, text, matrices=[])
    with pytest.raises(OptionError, match="matrix='o'"):
        ml.detect.curvature_edits(model, text, matrices=["o"])  # pyright: ignore[reportArgumentType]


def test_no_text_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    with pytest.raises(EmptySetError):
        ml.detect.curvature_edits(model, ragged()[:0])
