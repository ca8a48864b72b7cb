"""Head ablation against an independent computation, and its invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError
from tests.small import CASES, ragged

HEADS = 4


def by_hand(model: Any, seqs: ml.SequenceSet, row: int, layer: int, replace: Any) -> float:
    """Mean log-probability of one unpadded sequence with one plain TransformerLens hook."""
    tokens = torch.tensor([seqs.rows()[row]])
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", replace)])
    start = int(seqs.prefix_len[row])
    logp = logits[0].log_softmax(-1)
    return float(np.mean([logp[p - 1, tokens[0, p]].item() for p in range(start, tokens.shape[1])]))


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_mean_of_other_heads_by_hand(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    result = ml.ablate_heads(model, seqs, progress=False)
    for row, layer, head in [(0, 0, 1), (2, 2, 3), (3, 1, 0)]:

        def replace(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
            others = [h for h in range(HEADS) if h != head]
            z = z.clone()
            z[:, :, head] = z[:, :, others].mean(2)
            return z

        got = float(result["target_logprob"].sel(layer=layer, head=head)[row])
        assert got == pytest.approx(by_hand(model, seqs, row, layer, replace), abs=1e-5)


def test_mean_is_over_real_positions_only(tiny_model: Any) -> None:
    model, seqs, reference = tiny_model("olmo2", "bridge"), ragged(), ragged(6, seed=5)
    result = ml.ablate_heads(model, seqs, mode="mean", reference=reference, progress=False)
    parts = []
    for row in reference.rows():
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]), names_filter=["blocks.1.attn.hook_z"])
        parts.append(cache["blocks.1.attn.hook_z"][0, :, 2])
    mean = torch.cat(parts).mean(0)

    def replace(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = mean
        return z

    got = float(result["target_logprob"].sel(layer=1, head=2)[1])
    assert got == pytest.approx(by_hand(model, seqs, 1, 1, replace), abs=1e-5)


def test_resample_takes_another_sequence(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(2)
    result = ml.ablate_heads(model, seqs, mode="resample", progress=False)
    donor = torch.tensor([seqs.rows()[1]])  # with two sequences the donor of the first is the second
    with torch.no_grad():
        _, cache = model.run_with_cache(donor, names_filter=["blocks.1.attn.hook_z"])
    other = cache["blocks.1.attn.hook_z"][0, :, 3]

    def replace(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 3] = other[torch.arange(z.shape[1]) % len(other)]
        return z

    got = float(result["target_logprob"].sel(layer=1, head=3)[0])
    assert got == pytest.approx(by_hand(model, seqs, 0, 1, replace), abs=1e-5)


def test_resample_is_seeded(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    first, again, other = (
        ml.ablate_heads(model, seqs, mode="resample", seed=s, progress=False)["target_logprob"].values
        for s in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_heads_that_are_equal_already_change_nothing(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"), backend="bridge")
    equal = ml.Intervention(
        "equal", [("blocks.1.attn.hook_z", lambda z, hook: z.mean(2, keepdim=True).expand_as(z))]
    )
    ablated = [
        ml.Intervention(e.name, [*equal.hooks, *e.hooks])
        for e in ml.edits.head_ablations(model, ragged(), layers=[1], heads=range(HEADS))
    ]
    result = ml.sweep(model, ragged(), [equal, *ablated], progress=False)["target_logprob"]
    assert float(abs(result - result[:, :1]).max()) < 1e-5


def test_positions_targets_differs_from_all(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    everywhere = ml.ablate_heads(model, seqs, mode="zero", progress=False)["target_logprob"]
    targets = ml.ablate_heads(model, seqs, mode="zero", positions="targets", progress=False)["target_logprob"]
    last = len(model.blocks) - 1
    assert (
        float(abs(everywhere - targets).sel(layer=last).max()) < 1e-5
    )  # the last block's prefix reaches no target
    assert float(abs(everywhere - targets).sel(layer=0).max()) > 1e-4


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match=r"mode='maen'.*mean"):
        ml.ablate_heads(model, seqs, mode="maen")
    with pytest.raises(OptionError, match="positions='last'"):
        ml.ablate_heads(model, seqs, positions="last")
    with pytest.raises(SiteError, match="layer 3 does not exist: the model has layers 0 to 2"):
        ml.ablate_heads(model, seqs, layers=[3])
    with pytest.raises(SiteError, match="head 4 does not exist"):
        ml.ablate_heads(model, seqs, heads=[4])
    with pytest.raises(SequenceError, match="at least two reference sequences"):
        ml.ablate_heads(model, seqs[:1], mode="resample")
