"""Unlearning depth: its ends, its formula by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import DonorError, InterventionError, OptionError
from memlens.forward.hooks import hook_name
from memlens.results.kinds import reading
from tests.devices import dev
from tests.small import CASES, ragged
from tests.tiny import write_tiny

QUIET: dict[str, Any] = {"progress": False}
depth_of = ml.instruments.unlearning_depth


@pytest.fixture
def edits(tiny_model: Any) -> list[ml.Intervention]:
    """An edit of one layer in two steps."""
    return [
        ml.Intervention("half the MLP", [("blocks.1.hook_mlp_out", lambda x, hook: x / 2)]),
        ml.Intervention("no attention", [("blocks.1.hook_attn_out", lambda x, hook: 0 * x)]),
    ]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_nothing_is_depth_0_and_the_retain_model_depth_1(
    tiny_model: Any, tmp_path: Any, family: str, backend: str
) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    retain = ml.load_model(write_tiny(family, tmp_path, seed=3), backend=backend, device=dev())
    quiet = ml.Intervention("nothing", [(hook_name("mlp_out", 0), lambda x, hook: x)])
    for nothing in (model, quiet):
        none = depth_of(model, seqs, retain=retain, edited=nothing, **QUIET)
        assert (none["fall_edited"] == 0).all()
        known = none["depth"].notnull()
        assert (none["depth"].values[known.values] == 0).all()
    whole = depth_of(model, seqs, retain=retain, edited=retain, **QUIET)
    assert bool(known.any())
    assert whole["depth"].values[known.values] == pytest.approx(1, abs=1e-4)
    assert whole["erased"].notnull().equals(none["erased"].notnull())


@pytest.mark.parametrize("positions", ["targets", "all"])
def test_the_formula_by_hand(
    tiny_model: Any, tmp_path: Any, edits: list[ml.Intervention], positions: str
) -> None:
    """Each sequence and layer alone, by plain hooks and caches."""
    model, seqs, threshold = tiny_model("llama", "bridge"), ragged(), 0.02
    retain = ml.load_model(write_tiny("llama", tmp_path, seed=3), backend="bridge", device=dev())
    how: dict[str, Any] = {"threshold": threshold, "positions": positions, **QUIET}
    found = depth_of(model, seqs, retain=retain, edited=edits, **how)
    assert found.settings["edited"] == ["half the MLP", "no attention"]

    def logprob(tokens: torch.Tensor, start: int, hooks: list[Any]) -> float:
        with torch.no_grad():
            logp = model.run_with_hooks(tokens, fwd_hooks=hooks)[0].log_softmax(-1)
        return float(np.mean([logp[p - 1, tokens[0, p]].item() for p in range(start, tokens.shape[1])]))

    def cached(source: Any, tokens: torch.Tensor, name: str, under: list[Any]) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            source.run_with_hooks(tokens, fwd_hooks=[*under, (name, lambda x, hook: kept.append(x.clone()))])
        return kept[0]

    for row, tokens in enumerate(seqs.rows()):
        ids, start = torch.tensor([tokens]), int(seqs.prefix_len[row])
        full = logprob(ids, start, [])
        falls: dict[str, list[float]] = {"retain": [], "edited": []}
        place = slice(start - 1, len(tokens) - 1) if positions == "targets" else slice(None)
        for layer in range(3):
            name = hook_name("resid_post", layer)
            under = [hook for edit in edits for hook in edit.hooks]
            states = {"retain": cached(retain, ids, name, []), "edited": cached(model, ids, name, under)}
            for who, state in states.items():
                falls[who].append(full - logprob(ids, start, [(name, written(state, place))]))
        s1, s2 = (np.array(falls[who]) for who in ("retain", "edited"))
        assert found["fall_retain"].values[row] == pytest.approx(s1, abs=1e-5)
        assert found["fall_edited"].values[row] == pytest.approx(s2, abs=1e-5)
        counts = s1 > threshold
        assert np.array_equal(found["erased"].notnull().values[row], counts)
        want = (s1 * np.clip(s2 / s1, 0, 1))[counts].sum() / s1[counts].sum() if counts.any() else np.nan
        assert float(found["depth"][row]) == pytest.approx(want, abs=1e-4, nan_ok=True)


def written(state: torch.Tensor, place: slice) -> Any:
    """A plain hook that writes a state at some positions."""

    def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, place] = state[:, place]
        return x

    return patch


def test_an_edit_at_the_output_is_shallow(tiny_model: Any, tmp_path: Any) -> None:
    """An edit of the last layer leaves the states before it as they were; one of the first does not."""
    model, seqs = tiny_model("llama", "bridge"), ragged()
    retain = ml.load_model(write_tiny("llama", tmp_path, seed=3), backend="bridge", device=dev())
    late, early = (
        ml.Intervention(str(n), [(f"blocks.{n}.hook_resid_pre", lambda x, hook: x.flip(-1))]) for n in (2, 0)
    )
    found = depth_of(model, seqs, retain=retain, edited=late, **QUIET)
    assert (found["fall_edited"].sel(layer=[0, 1]) == 0).all()
    deep = depth_of(model, seqs, retain=retain, edited=early, **QUIET)
    assert (deep["fall_edited"].sel(layer=[0, 1]) != 0).all()


def test_no_layer_counts(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    found = depth_of(model, seqs, retain=model, edited=model, **QUIET)
    assert found["depth"].isnull().all()
    assert "the depth is not known" in reading(found)


def test_kept_drawn_and_read(tiny_model: Any, tmp_path: Any, edits: list[ml.Intervention]) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    retain = ml.load_model(write_tiny("llama", tmp_path / "model", seed=3), backend="bridge", device=dev())
    how: dict[str, Any] = {"retain": retain, "edited": edits[0], "out": tmp_path / "run", **QUIET}
    found = depth_of(model, seqs, **how)
    again = depth_of(model, seqs, **how)
    assert again["depth"].equals(found["depth"])
    saved = ml.load_result(tmp_path / "run" / "result.nc")
    assert saved.data.identical(again.data)
    assert saved.settings["retain"]["fingerprint"] != saved.data.attrs.get("fingerprint")
    depth = float(found["depth"].mean())
    assert f"depth is {depth:.3g}" in reading(found)
    figure: Any = found.plot()
    assert f"{depth:.3g}" in figure.layout.title.text
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert {"of the retain model", "of the edited model"} <= set(names)
    assert found.plot("erased").data


def test_bad_input(tiny_model: Any, edits: list[ml.Intervention]) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    with pytest.raises(DonorError, match="Olmo3ForCausalLM"):
        depth_of(model, seqs, retain=tiny_model("olmo3", "bridge"), edited=model)
    with pytest.raises(InterventionError, match="there is no edit"):
        depth_of(model, seqs, retain=model, edited=[])
    with pytest.raises(OptionError, match="threshold=-1"):
        depth_of(model, seqs, retain=model, edited=edits, threshold=-1)
    with pytest.raises(OptionError, match="per_token"):
        depth_of(model, seqs, retain=model, edited=edits, per_token=True)
