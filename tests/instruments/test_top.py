"""`find_top`: its cells are those of the full sweep, so is its answer, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, InterventionError, OptionError, ResultError, SequenceError
from memlens.results.kinds import reading
from memlens.results.statistics.racing import RANK_BY
from tests.small import CASES, corrupted, ragged

Model = Any
OPTIONS: dict[str, Any] = {"first": 4, "growth": 1.3, "level": 0.5, "progress": False}
"""Rules that decide something on few sequences."""


def many(n: int = 30, seed: int = 0) -> ml.SequenceSet:
    """Random sequences of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9 + i % 5 for i in range(n)]
    rows = [torch.randint(0, 60, (k,), generator=generator).tolist() for k in lengths]
    return ml.SequenceSet.from_tokens(rows, [5] * n)


def check_against(top: ml.Result, full: ml.Result, k: int, rank_by: str = "magnitude") -> None:
    """Every cell that ran is the full sweep's, and so are the components that were decided exactly."""
    name = top.settings["metric"]
    dims = top["status"].dims
    wanted = full[name].transpose("sequence", *dims).values
    ran = np.isfinite(top[name].values)
    np.testing.assert_allclose(top[name].values[ran], wanted[ran], atol=1e-5)
    used = top["sequences_used"].values
    np.testing.assert_array_equal(ran.sum(0), used)
    assert top.settings["cells_run"] == used.sum() == ran.sum()
    assert top.settings["cells_full"] == wanted.size
    share = (top.settings["cells_run"] + top.settings["gradient_cells"]) / wanted.size
    assert top.settings["share"] == share
    means = full.effect(name).transpose("sequence", *dims).values.mean(0)
    exact = used == len(ran)
    np.testing.assert_allclose(top["estimate"].values[exact], means[exact], atol=1e-5)
    score = RANK_BY[rank_by](means)
    inside = top["status"].values == "in"
    assert inside.sum() == k
    if top.settings["level"] > 0.9:
        assert score[inside].min() >= score[~inside].max() - 1e-5


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_cells_and_answer_are_the_full_sweeps(tiny_model: Model, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    top = ml.find_top(model, seqs, 3, first=2, level=0.99, progress=False)
    check_against(top, ml.ablate_heads(model, seqs, mode="zero", progress=False), 3)
    assert top.kind == "top_components"
    assert top["target_logprob"].dims == ("sequence", "layer", "head")


@pytest.mark.parametrize(
    ("mode", "positions"), [("mean", "all"), ("resample", "targets"), ("mean_of_other_heads", "prompt")]
)
def test_rows_of_a_round_keep_what_belongs_to_them(tiny_model: Model, mode: Any, positions: Any) -> None:
    """A resampled head takes the same other sequence as in the full sweep, whatever the order."""
    model, seqs = tiny_model("gpt_neox", "bridge"), many(24)
    options: dict[str, Any] = {"mode": mode, "positions": positions, "seed": 3}
    top = ml.find_top(model, seqs, 2, rank_by="decrease", **options, **OPTIONS)
    assert top.settings["share"] < 1
    check_against(top, ml.ablate_heads(model, seqs, progress=False, **options), 2, "decrease")
    assert top.settings["mode"] == mode


def test_mlps_and_patching(tiny_model: Model) -> None:
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    mlps = ml.find_top(model, seqs, 1, instrument="mlp_ablation", **OPTIONS)
    check_against(mlps, ml.ablate_mlps(model, seqs, progress=False), 1)
    corrupt = corrupted(seqs)
    patched = ml.find_top(
        model, seqs, 2, instrument="patching", corrupt=corrupt, site="z", over="head", **OPTIONS
    )
    full = ml.patch_activations(model, seqs, corrupt, site="z", over="head", progress=False)
    check_against(patched, full, 2)
    np.testing.assert_allclose(patched["target_logprob_clean"], full["target_logprob_clean"], atol=1e-5)


def test_positions_that_all_sequences_have(tiny_model: Model) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged()
    top = ml.find_top(model, seqs, 2, instrument="patching", corrupt=corrupted(seqs), layers=[1], **OPTIONS)
    assert top["position"].values.tolist() == list(range(int(seqs.lengths.min()) - 1))


def test_interventions_of_ones_own_that_know_their_sequences(tiny_model: Model) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), many(24)
    scale = torch.rand(len(seqs), 5, generator=torch.Generator().manual_seed(1))

    class Scaled:
        def __init__(self, i: int) -> None:
            self.i = i

        def bind(self, batch: Any) -> Any:
            by = scale[batch.rows, self.i][:, None, None]
            return lambda x, hook: x * by

    edits = [ml.Intervention(f"scaled {i}", [("blocks.1.hook_mlp_out", Scaled(i))]) for i in range(5)]
    top = ml.find_top(model, seqs, 1, interventions=edits, **OPTIONS)
    check_against(top, ml.sweep(model, seqs, edits, progress=False), 1)
    assert top["intervention"].values.tolist() == [f"scaled {i}" for i in range(5)]
    assert isinstance(top.plot(), go.Figure)
    assert "scaled" in reading(top)


def test_gradients_as_a_control_variate(tiny_model: Model) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), many(24)
    options: dict[str, Any] = {"instrument": "neuron_ablation", "layers": [1], **OPTIONS}
    top = ml.find_top(model, seqs, 3, **options)
    assert top.settings["control_variate"]
    assert 0 < top.settings["gradient_cells"] <= 0.1 * top.settings["cells_full"]
    assert top["controlled"].values.any()
    estimate = ml.instruments.attribute_ablation(
        model, seqs, site="mlp_post", layers=[1], method="attribution_patching", progress=False
    ).effect("target_logprob")
    x, g = top.effect("target_logprob").values, estimate.values
    part = np.argwhere(top["controlled"].values & (top["sequences_used"].values < len(seqs)))[0]
    x, g = x[:, *part], g[:, *part]
    ran = np.isfinite(x)
    slope = np.polyfit(g[ran], x[ran], 1)[0]
    by_hand = x[ran].mean() - slope * (g[ran].mean() - g.mean())
    assert top["estimate"].values[*part] == pytest.approx(by_hand, rel=1e-6)
    few = {**options, "layers": [2], "method": "integrated_gradients"}
    plain = ml.find_top(model, seqs[:4], 3, **few)
    assert not plain.settings["control_variate"]  # they cost more than a tenth of 64 neurons
    assert not plain["controlled"].values.any()
    assert plain.settings["gradient_cells"] == 0


def test_a_stopped_run_goes_on_and_another_is_refused(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), many(24)
    from memlens.instruments.screen import top as module

    options: dict[str, Any] = {"control_variate": True, "steps": 1, "metrics": ["target_logprob"], **OPTIONS}
    whole = ml.find_top(model, seqs, 2, **options)
    original, calls = module.sweep, []

    def stopping(*args: Any, **kwargs: Any) -> ml.Result:
        calls.append(kwargs["out"].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "sweep", stopping)
    with pytest.raises(KeyboardInterrupt):
        ml.find_top(model, seqs, 2, out=tmp_path, **options)
    monkeypatch.setattr(module, "sweep", original)
    kept = [*tmp_path.glob("round-*/*.npz"), tmp_path / "gradients.npz"]
    assert len(kept) >= 3
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = ml.find_top(model, seqs, 2, out=tmp_path, **options)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert again.data.equals(whole.data)
    assert ml.load_result(tmp_path / "result.nc").data.equals(again.data)
    with pytest.raises(ResultError, match="k was 2 and is 3"):
        ml.find_top(model, seqs, 3, out=tmp_path, **options)
    (tmp_path / "gradients.npz").write_bytes(b"damaged")
    with pytest.raises(ResultError, match=r"gradients\.npz"):
        ml.find_top(model, seqs, 2, out=tmp_path, **options)


def test_undecided_figures_and_readings(tiny_model: Model) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), many(24)
    top = ml.find_top(model, seqs, 2, first=3, max_sequences=3, level=0.999, progress=False)
    assert (top["status"].values == "undecided").all()
    said = reading(top)
    assert "12 are undecided" in said
    figure: Any = top.plot()
    assert {trace.name for trace in figure.data} == {"undecided"}
    exact = ml.find_top(model, seqs[:2], 2, progress=False)
    figure = exact.plot()
    assert {trace.name for trace in figure.data} == {"in the top 2", "out"}
    assert "L0H" in "".join(figure.data[0].y)
    assert "probability" not in reading(exact)
    assert exact.settings["rounds"] == [{"sequences": 2, "components": 12}]
    table = exact.to_frame(["status", "decided_by", "estimate"])
    assert set(table["decided_by"]) == {"all sequences"}


def test_a_bounded_metric_by_bets(tiny_model: Model) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), many(12)
    top = ml.find_top(model, seqs, 1, metrics=["exact_match"], interval="betting", bounds=(-1, 1), **OPTIONS)
    assert top.settings["metric"] == "exact_match"
    assert not top.settings["control_variate"]
    with pytest.raises(OptionError, match="do not hold"):
        ml.find_top(model, seqs, 1, interval="betting", bounds=(-1e-9, 1e-9), **OPTIONS)


def test_bad_arguments_are_refused_before_anything_runs(tiny_model: Model) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edit = ml.Intervention("none", [])
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"k": 0}, OptionError, "k=0"),
        ({"per_token": True}, OptionError, "per_token"),
        ({"part": (0, 2)}, OptionError, "part"),
        ({"instrument": "neuron_knockout"}, OptionError, "no gradient estimate"),
        ({"instrument": "patching"}, SequenceError, "corrupt"),
        ({"corrupt": seqs}, SequenceError, "does not use corrupt"),
        ({"interventions": [edit], "corrupt": seqs}, OptionError, "corrupt"),
        ({"interventions": []}, InterventionError, "no edit"),
        ({"interventions": [3]}, InterventionError, "int"),
        ({"interventions": [edit], "control_variate": True}, OptionError, "an instrument"),
        ({"interval": "betting", "bounds": (-1, 1), "control_variate": True}, OptionError, "interval='t'"),
        ({"interventions": [edit], "layers": [0]}, OptionError, "leave out layers"),
        ({"interventions": [edit], "mode": "mean"}, OptionError, "leave out mode"),
        ({"method": "guess"}, OptionError, "method"),
        ({"path": "guess"}, OptionError, "path"),
        ({"steps": 0}, OptionError, "steps=0"),
        ({"metrics": ["exact_match"], "control_variate": True}, OptionError, "no gradient"),
        ({"layers": []}, EmptySetError, "component"),
    ]
    for options, error, match in refused:
        own: dict[str, Any] = {"progress": False, **options}
        with pytest.raises(error, match=match):
            ml.find_top(model, seqs, **own)
    with pytest.raises(EmptySetError):
        ml.find_top(model, seqs[:0], progress=False)
