"""Numbers that an intervention's own hooks give, beside the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import InterventionError
from memlens.forward.batches import Batch
from memlens.sweeps.interventions import ByBatch
from tests.small import ragged


class Norms:
    """The mean norm of a layer's output over each sequence's own positions."""

    def __init__(self, layer: int, name: str = "norm") -> None:
        self.layer, self.name, self.seen = layer, name, torch.empty(0)

    def __getstate__(self) -> tuple[int, str]:
        return self.layer, self.name

    def intervention(self, scale: float = 1.0, **coords: Any) -> ml.Intervention:
        def make(batch: Batch) -> Any:
            def look(x: torch.Tensor, hook: Any) -> None:
                self.seen = (x.norm(dim=-1) * batch.mask).sum(1) / batch.mask.sum(1)

            return look

        edit = ("blocks.0.hook_resid_pre", lambda x, hook: x * scale)
        look = (f"blocks.{self.layer}.hook_resid_post", ByBatch(make))
        return ml.Intervention(f"scale {scale}", [edit, look], coords, observed=self.observed)

    def observed(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {self.name: self.seen}


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("per_token", [False, True])
def test_observed_numbers_stand_beside_the_metrics(tiny_model: Any, engine: str, per_token: bool) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    items = [Norms(1).intervention(scale, factor=scale) for scale in (1.0, 2.0)]
    result = ml.sweep(model, seqs, items, engine=engine, per_token=per_token, batch_size=4, progress=False)
    assert result["norm"].dims == ("sequence", "factor")
    assert result["target_logprob"].dims == ("sequence", "factor", "target")[: 3 if per_token else 2]
    for row, tokens in enumerate(seqs.rows()):
        for i, scale in enumerate((1.0, 2.0)):
            seen: list[torch.Tensor] = []
            hooks = [
                ("blocks.0.hook_resid_pre", lambda x, hook, scale=scale: x * scale),
                ("blocks.1.hook_resid_post", lambda x, hook, seen=seen: seen.append(x.norm(dim=-1).mean())),
            ]
            with torch.no_grad():
                model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
            assert float(result["norm"][row, i]) == pytest.approx(float(seen[0]), rel=1e-5)


def test_observed_numbers_persist(tiny_model: Any, tmp_path: Path) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged(6)
    options: dict[str, Any] = {"batch_size": 2, "progress": False, "out": tmp_path}
    first = ml.sweep(model, seqs, [Norms(1).intervention()], **options)
    again = ml.sweep(model, seqs, [Norms(1).intervention()], **options)
    assert np.array_equal(first["norm"], again["norm"])
    assert bool((first["norm"] > 0).all())


def test_two_edits_together_observe_both(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    both = Norms(0, "first").intervention() + Norms(2, "last").intervention()
    result = ml.sweep(model, seqs, [both], progress=False)
    assert {"first", "last"} <= set(result.metrics)
    assert not np.allclose(result["first"], result["last"])


def test_bad_observations(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(InterventionError, match="observe different things"):
        ml.sweep(model, seqs, [Norms(0, "a").intervention(), Norms(0, "b").intervention()], progress=False)
    wrong = ml.Intervention(
        "wrong", [("blocks.0.hook_resid_pre", lambda x, hook: x)], observed=lambda batch: {"n": torch.ones(3)}
    )
    with pytest.raises(InterventionError, match=r"'wrong' observed 'n' of shape \(3,\): it must be \(4,\)"):
        ml.sweep(model, seqs, [wrong], progress=False)
