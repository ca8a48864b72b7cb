"""Neuron knock-outs: the acceptance tests of the idioms study, controls, and independent computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, ResultError, SiteError
from memlens.forward.read_weights import value_vectors
from memlens.instruments.ablate.neuron_choice import chosen_neurons, value_norms
from memlens.instruments.ablate.neurons import _Grid
from tests.small import CASES, ragged

POST = "blocks.{}.mlp.hook_post"
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


@contextmanager
def mlp_outputs(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """What the MLP module itself gives, before any post-norm."""
    seen: list[torch.Tensor] = []
    handle = model.blocks[layer].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    try:
        yield seen
    finally:
        handle.remove()


def output_bias(model: Any, layer: int) -> torch.Tensor:
    mlp = model.blocks[layer].mlp
    bias = mlp.out.original_component.bias if hasattr(mlp, "original_component") else mlp.b_out
    return torch.zeros(model.cfg.d_model) if bias is None else bias.detach()


def coefficients(model: Any, row: list[int], layer: int) -> torch.Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([row]), names_filter=[POST.format(layer)])
    return cache[POST.format(layer)][0]


def ranked(model: Any, row: list[int], prefix: int, layer: int) -> list[int]:
    """Neurons by dominance, from a plain run of one unpadded sequence."""
    acts = coefficients(model, row, layer)[prefix - 1]
    return (acts.abs() * value_vectors(model, layer).norm(dim=1)).argsort(descending=True).tolist()


def logits_with(model: Any, row: list[int], hooks: list[tuple[str, Callable[..., Any]]]) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([row]), fwd_hooks=hooks)[0]


def zeroing(neurons: list[int]) -> Callable[..., torch.Tensor]:
    def fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[..., neurons] = 0
        return x

    return fn


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_the_output_is_the_sum_of_sub_updates(tiny_model: Any, family: str, backend: str) -> None:
    """The hook stands at the input of the output matrix, in gated MLPs too."""
    model = tiny_model(family, backend)
    with torch.no_grad(), mlp_outputs(model, 1) as seen:
        _, cache = model.run_with_cache(TOKENS, names_filter=[POST.format(1)])
    total = cache[POST.format(1)] @ value_vectors(model, 1) + output_bias(model, 1)
    assert torch.allclose(total, seen[-1], atol=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_without_any_sub_update_the_output_is_its_bias(tiny_model: Any, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    width = len(value_vectors(model, 1))
    (edit,) = ml.edits.neuron_knock_outs(model, ragged(), {"all": {1: range(width)}})
    with torch.no_grad(), mlp_outputs(model, 1) as seen, ml.applied(model, edit):
        model(TOKENS)
    assert torch.allclose(seen[0], output_bias(model, 1).expand_as(seen[0]), atol=1e-7)
    if not output_bias(model, 1).any():
        seqs, options = ragged(), {"progress": False, "layers": [1]}
        all_gone = ml.knock_out_neurons(model, seqs, top_k=width, windows=1, **options)
        block = ml.ablate_mlps(model, seqs, **options)
        assert np.allclose(all_gone["target_logprob"][:, 0, 0, 0], block["target_logprob"][:, 0], atol=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_top_neurons_by_hand(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    result = ml.knock_out_neurons(model, seqs, top_k=[1, 7], windows=[1, 2], progress=False)
    assert result["target_logprob"].dims == ("sequence", "layer", "window", "k")
    for row, start, window, k in [(0, 0, 1, 7), (1, 1, 2, 1), (3, 0, 2, 7)]:
        tokens, prefix = seqs.rows()[row], int(seqs.prefix_len[row])
        hooks = [
            (POST.format(n), zeroing(ranked(model, tokens, prefix, n)[:k]))
            for n in range(start, start + window)
        ]
        logits, plain = logits_with(model, tokens, hooks), logits_with(model, tokens, [])
        ids = torch.tensor(tokens[prefix:])
        want = logits[prefix - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).mean()
        cell = result.data.isel(sequence=row).sel(layer=start, window=window, k=k)
        assert float(cell["target_logprob"]) == pytest.approx(float(want), abs=1e-5)
        now, before = int(logits[prefix - 1].argmax()), int(plain[prefix - 1].argmax())
        assert int(cell["first_prediction"]) == now
        assert float(cell["prediction_flipped"]) == (now != before)
        assert float(cell["target_missed"]) == (now != tokens[prefix])


def test_all_but_the_top_k(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo3", "bridge"), ragged()
    result = ml.knock_out_neurons(
        model, seqs, top_k=5, keep=True, windows=1, layers=[2], per_token=True, progress=False
    )
    tokens, prefix = seqs.rows()[1], int(seqs.prefix_len[1])
    gone = ranked(model, tokens, prefix, 2)[5:]
    logits = logits_with(model, tokens, [(POST.format(2), zeroing(gone))])
    ids = torch.tensor(tokens[prefix:])
    want = logits[prefix - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
    got = result["target_logprob"][1, 0, 0, 0, : len(ids)]
    assert np.allclose(got, want, atol=1e-5)
    assert "prediction_flipped" not in result.data


@pytest.mark.parametrize("keep", [False, True])
def test_an_empty_knock_out_is_a_no_op(tiny_model: Any, keep: bool) -> None:
    model = tiny_model("gpt_neo", "bridge")
    k = len(value_vectors(model, 0)) if keep else 0
    result = ml.knock_out_neurons(model, ragged(), top_k=k, keep=keep, windows=1, progress=False)
    assert float(abs(result.effect("target_logprob")).max()) < 1e-6
    assert float(result["prediction_flipped"].max()) == 0


@pytest.mark.parametrize("selection", ["dominant", "random", "norm_matched"])
def test_requested_k_is_applied_k(tiny_model: Any, selection: str) -> None:
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    found = ml.instruments.dominant_neurons(model, seqs, 9, progress=False)
    norms = value_norms(model, [0, 1, 2]).numpy()
    sets = chosen_neurons(found["neuron"].values, norms, [0, 1, 2], 9, selection)
    assert sets.shape == (4, 3, 9)
    assert all(len(set(one)) == 9 for row in sets for one in row)
    by_layer = {layer: sets[:, layer] for layer in range(3)}
    (edit,) = ml.edits.neuron_knock_outs(model, seqs, {"own": by_layer})
    counts: list[torch.Tensor] = []
    look = ml.Intervention(
        "look", [(POST.format(n), lambda x, hook: counts.append((x == 0).sum(-1))) for n in range(3)]
    )
    ml.sweep(model, seqs, [edit + look], progress=False, engine="reference")
    assert len(counts) == 3
    assert all(bool((c == 9).all()) for c in counts)


def test_grid_sizes_of_the_released_code() -> None:
    """647 knock-outs at 24 layers and 995 at 36: top k, and all but the top k."""

    def cells(n_layers: int) -> int:
        def count(ks: tuple[int, ...], keep: bool, windows: tuple[int, ...]) -> int:
            grid = _Grid(ks, keep, windows, ("dominant",), "last_prompt", 1)
            return len(list(grid.cells(range(n_layers), n_layers, width=4096)))

        return count((1, 10, 100, 1000), False, (1, 2, 3, 4, 5)) + count((10, 100, 1000), True, (1, 2, 3))

    assert (cells(24), cells(36)) == (647, 995)


def test_defaults_are_cut_to_the_model_and_recorded(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")  # 64 neurons, 3 layers
    result = ml.knock_out_neurons(model, ragged(), progress=False)
    assert result.data["k"].values.tolist() == [1, 10] == result.settings["top_k"]
    assert result.data["window"].values.tolist() == [1, 2, 3]
    assert result.settings["left_out"] == {"top_k": [100, 1000], "windows": [4, 5]}
    inside = result["target_logprob"].notnull().all(["sequence", "k"])
    assert inside.values.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert (result.data["first_prediction"].values[:, 2, 2] == -1).all()


def test_controls_are_seeded_and_do_not_depend_on_the_batch(tiny_model: Any) -> None:
    model, seqs = tiny_model("starcoder2", "bridge"), ragged(6)

    def run(**options: Any) -> np.ndarray:
        result = ml.knock_out_neurons(
            model, seqs, top_k=8, windows=1, selection=("random", "norm_matched"), n_draws=2,
            progress=False, **options,
        )  # fmt: skip
        assert result["target_logprob"].dims == ("sequence", "layer", "window", "k", "selection", "draw")
        return result["target_logprob"].values

    first = run(seed=3)
    assert np.allclose(first, run(seed=3, batch_size=1), atol=1e-5)
    assert np.array_equal(first, run(seed=3))
    assert not np.allclose(first[..., 0], run(seed=4)[..., 0], atol=1e-4)
    assert not np.allclose(first[..., 0, 0], first[..., 0, 1], atol=1e-4)  # draws differ


def test_dominant_stands_beside_its_controls(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    options: dict[str, Any] = {"top_k": 8, "windows": 1, "progress": False}
    both = ml.knock_out_neurons(model, seqs, selection=["dominant", "random"], n_draws=2, **options)
    alone = ml.knock_out_neurons(model, seqs, **options)
    dominant = both["target_logprob"].sel(selection="dominant")
    assert np.allclose(dominant.sel(draw=0), alone["target_logprob"], atol=1e-6)
    assert dominant.sel(draw=1).isnull().all()


def test_norm_matched_controls_are_the_nearest_others() -> None:
    rng = np.random.default_rng(0)
    norms = rng.uniform(1, 2, (1, 50)).astype(np.float32)
    top = rng.permutation(50)[:5][None, None]
    one = chosen_neurons(top, norms, [0], 1, "norm_matched")[0, 0, 0]
    first = top[0, 0, 0]
    others = np.delete(np.arange(50), first)
    assert one == others[np.abs(norms[0, others] - norms[0, first]).argmin()]
    five = chosen_neurons(top, norms, [0], 5, "norm_matched", seed=1)[0, 0]
    assert len(set(five)) == 5
    assert not set(five) & set(top[0, 0])
    gap = np.abs(norms[0, five] - norms[0, top[0, 0]])
    assert gap.max() < 0.2  # the nearest of 45 uniform norms, not any
    half = chosen_neurons(np.arange(25)[None, None], norms, [0], 25, "norm_matched")
    assert sorted(half[0, 0]) == list(range(25, 50))


def test_random_controls_cover_the_layer_evenly() -> None:
    top = np.zeros((400, 1, 10), dtype=int)
    norms = np.ones((1, 40), dtype=np.float32)
    drawn = chosen_neurons(top, norms, [0], 10, "random")
    counts = np.bincount(drawn.ravel(), minlength=40)
    assert counts.min() > 60  # 100 expected, standard deviation 8.7
    assert counts.max() < 140


def test_mean_replacement_by_hand(tiny_model: Any) -> None:
    model, seqs, reference = tiny_model("olmo", "bridge"), ragged(), ragged(6, seed=5)
    result = ml.knock_out_neurons(
        model, seqs, top_k=6, windows=1, layers=[1], mode="mean", reference=reference, progress=False
    )
    mean = torch.cat([coefficients(model, row, 1) for row in reference.rows()]).mean(0)
    tokens, prefix = seqs.rows()[2], int(seqs.prefix_len[2])
    top = ranked(model, tokens, prefix, 1)[:6]

    def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[..., top] = mean[top]
        return x

    logits, ids = logits_with(model, tokens, [(POST.format(1), edit)]), torch.tensor(tokens[prefix:])
    want = logits[prefix - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).mean()
    assert float(result["target_logprob"][2, 0, 0, 0]) == pytest.approx(float(want), abs=1e-5)


def test_last_prompt_in_the_last_layer_changes_the_first_target_only(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    last = len(model.blocks) - 1
    result = ml.knock_out_neurons(
        model, seqs, top_k=20, windows=1, layers=[last], positions="last_prompt", per_token=True,
        progress=False,
    )  # fmt: skip
    effect = abs(result.effect("target_logprob")).max("sequence").values[0, 0, 0]
    assert effect[0] > 1e-3
    assert effect[1:].max() < 1e-6


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_dominant_neurons_by_hand(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    result = ml.instruments.dominant_neurons(model, seqs, 4, progress=False)
    table = result.to_frame()
    for row, layer in [(0, 0), (3, 2)]:
        tokens, prefix = seqs.rows()[row], int(seqs.prefix_len[row])
        want = ranked(model, tokens, prefix, layer)[:4]
        rows = table[(table["sequence"] == str(row)) & (table["layer"] == layer)].sort_values("rank")
        assert rows["neuron"].tolist() == want
        acts, norms = coefficients(model, tokens, layer)[prefix - 1], value_vectors(model, layer).norm(dim=1)
        assert np.allclose(rows["coefficient"], acts[want], atol=1e-5)
        assert np.allclose(rows["dominance"], (acts.abs() * norms)[want], rtol=1e-4)


def test_measured_at_all_targets(tiny_model: Any) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    result = ml.instruments.dominant_neurons(model, seqs, 3, measured_at="targets", progress=False)
    tokens, prefix = seqs.rows()[1], int(seqs.prefix_len[1])
    acts = coefficients(model, tokens, 1)[prefix - 1 : -1]
    norms = value_vectors(model, 1).norm(dim=1)
    score = acts.abs().mean(0) * norms
    assert result.data["neuron"].values[1, 1].tolist() == score.argsort(descending=True)[:3].tolist()
    other = ml.instruments.dominant_neurons(
        model, seqs, 3, measured_at="targets", averaged="coefficient", progress=False
    )
    signed = acts.mean(0).abs() * norms
    assert other.data["neuron"].values[1, 1].tolist() == signed.argsort(descending=True)[:3].tolist()
    assert np.allclose(other["dominance"][1, 1], signed.sort(descending=True).values[:3], rtol=1e-4)
    assert not np.allclose(other["dominance"], result["dominance"], rtol=1e-2)


def test_results_draw_and_save(tiny_model: Any, tmp_path: Path) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    result = ml.knock_out_neurons(model, seqs, progress=False)
    figure = result.plot()
    assert [a.text for a in figure.layout.annotations] == ["k = 1", "k = 10"]
    flips = result["prediction_flipped"].mean("sequence").sel(k=10).values
    assert np.allclose(figure.data[1].z, flips, equal_nan=True)
    assert len(result.plot("target_logprob", k=1).data) == 1
    controls = ml.knock_out_neurons(
        model, seqs, top_k=[2, 4], selection=["dominant", "random"], progress=False
    )
    assert [a.text for a in controls.plot().layout.annotations] == ["dominant", "random"]
    with pytest.raises(SiteError, match="k=5 is not in this result"):
        result.plot(k=5)
    again = ml.load_result(result.save(tmp_path / "knock-out.nc"))
    assert again.data.identical(result.data)


def test_knock_outs_persist(tiny_model: Any, tmp_path: Path) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged(6)
    options: dict[str, Any] = {
        "top_k": [2, 5], "windows": [1, 2], "selection": ["dominant", "random"], "mode": "mean",
        "batch_size": 3, "out": tmp_path, "progress": False,
    }  # fmt: skip
    first = ml.knock_out_neurons(model, seqs, **options)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npz")}
    again = ml.knock_out_neurons(model, seqs, **options)
    assert len(stamps) == 2
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert np.array_equal(first["prediction_flipped"], again["prediction_flipped"], equal_nan=True)
    assert ml.load_result(tmp_path / "result.nc").data.identical(again.data)
    with pytest.raises(ResultError, match="different: the interventions"):
        ml.knock_out_neurons(model, seqs, seed=1, **options)


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="top_k=65: each layer has 64 neurons"):
        ml.knock_out_neurons(model, seqs, top_k=[1, 65])
    with pytest.raises(OptionError, match="top_k=65: each layer has 64 neurons"):
        ml.instruments.dominant_neurons(model, seqs, 65)
    with pytest.raises(OptionError, match="give at most 32"):
        ml.knock_out_neurons(model, seqs, top_k=33, selection="norm_matched")
    with pytest.raises(OptionError, match="windows=4: no window"):
        ml.knock_out_neurons(model, seqs, windows=4)
    with pytest.raises(OptionError, match=r"top_k=\[3, 3\]"):
        ml.knock_out_neurons(model, seqs, top_k=[3, 3])
    with pytest.raises(OptionError, match=r"selection='radnom'.*random"):
        ml.knock_out_neurons(model, seqs, top_k=1, selection="radnom")
    with pytest.raises(OptionError, match="mode='none'"):
        ml.knock_out_neurons(model, seqs, top_k=1, mode="none")
    with pytest.raises(OptionError, match="n_draws=0"):
        ml.knock_out_neurons(model, seqs, top_k=1, n_draws=0)
    with pytest.raises(SiteError, match="layer 3 does not exist"):
        ml.knock_out_neurons(model, seqs, layers=[3])
    with pytest.raises(SiteError, match="neuron 64 does not exist: layer 1 has neurons 0 to 63"):
        ml.edits.neuron_knock_outs(model, seqs, {"a": {1: [3, 64]}})
    with pytest.raises(OptionError, match="at least one layer"):
        ml.edits.neuron_knock_outs(model, seqs, {"a": {}})
