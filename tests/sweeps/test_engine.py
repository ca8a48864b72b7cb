"""The fast engine equals the reference engine, whatever the edit, family and backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import (
    EmptySetError,
    InterventionError,
    NonFiniteError,
    OptionError,
    SequenceError,
    SiteError,
    UnsupportedModelError,
)
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.hooks import SITES, has_site, hook_name
from memlens.sweeps.interventions import ByBatch
from tests.devices import dev
from tests.small import CASES, corrupted, counts_agree, largest_difference, near_ties, ragged, spread
from tests.tiny import write_tiny

METRICS = ("target_logprob", "margin", "completion_entropy", "target_rank", "matching_prefix", "exact_match")
RELAXED = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def scaled(factor: float) -> Any:
    return lambda x, hook: x * factor


def shifted(by: float) -> Any:
    def fn(x: torch.Tensor, hook: Any) -> None:
        x += by  # in place, nothing returned: TransformerLens allows that

    return fn


def rolled(x: torch.Tensor, hook: Any) -> torch.Tensor:
    """An edit that looks along the batch's own positions."""
    return x.roll(1, dims=1)


@st.composite
def edits(draw: Any, model: Any) -> list[ml.Intervention]:
    sites = [s for s in SITES if s != "pattern" and has_site(model, s)]
    found = []
    for i in range(draw(st.integers(1, 5))):
        hooks = [
            (
                hook_name(draw(st.sampled_from(sites)), draw(st.integers(0, len(model.blocks) - 1))),
                draw(st.sampled_from([scaled(0.0), scaled(1.5), shifted(0.3), rolled])),
            )
            for _ in range(draw(st.integers(1, 3)))
        ]
        found.append(ml.Intervention(f"edit {i}", hooks))
    return found


@pytest.mark.parametrize(("family", "backend"), CASES)
@RELAXED
@given(data=st.data())
def test_fast_equals_reference(tiny_model: Any, family: str, backend: str, data: Any) -> None:
    model = tiny_model(family, backend)
    interventions = data.draw(edits(model))
    seqs = ragged(data.draw(st.integers(1, 6)))
    options: dict[str, Any] = {
        "progress": False,
        "batch_size": data.draw(st.sampled_from([None, 1, 3])),
        "per_token": data.draw(st.booleans()),
    }
    fast = ml.sweep(model, seqs, interventions, METRICS, **options)
    plain = ml.sweep(model, seqs, interventions, METRICS, engine="reference", **options)
    assert largest_difference(fast, plain) < 1e-5
    ties = ml.sweep(model, seqs, interventions, [near_ties], engine="reference", progress=False)
    assert counts_agree(fast, plain, ties)
    assert list(fast.data.dims) == list(plain.data.dims)


TOLERANCES = {"float64": 1e-6, "bfloat16": 0.1, "float16": 0.02}
"""Of log-probabilities; architectures that take a softmax in float32 whatever the weights bound float64's."""


@pytest.mark.parametrize(("family", "backend", "dtype"), spread(list(TOLERANCES)))
def test_dtypes(tiny_folder: Any, tiny_model: Any, family: str, backend: str, dtype: str) -> None:
    """In 16 bits both engines round on their own ways; neither may stand far from the other."""
    tiny_model(family, backend)  # skips what the installed release does not have
    model = ml.load_model(tiny_folder(family), backend=backend, dtype=dtype, device=dev())
    seqs = ragged()
    edits = [
        *ml.edits.head_ablations(model, seqs, layers=[0, 2], heads=[1]),
        *ml.edits.activation_patches(model, corrupted(seqs), layers=[1], positions=[0, 9]),
        *ml.edits.attention_bypasses(model, layers=[1]),
        ml.Intervention("k", [(hook_name("k", 1), rolled)]),
    ]
    options: dict[str, Any] = {"metrics": ("target_logprob",), "progress": False, "check_dtype": False}
    fast = ml.sweep(model, seqs, edits, **options)
    plain = ml.sweep(model, seqs, edits, engine="reference", **options)
    assert largest_difference(fast, plain) < TOLERANCES[dtype]
    assert float(abs(plain.effect("target_logprob")).max()) > 1e-3


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_baseline_equals_the_model(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    got = ml.measure(model, seqs, ("target_logprob",))["target_logprob"]
    with torch.no_grad():
        logp = model(seqs.tokens).log_softmax(-1)
    for row in range(len(seqs)):
        span = range(int(seqs.prefix_len[row]), int(seqs.lengths[row]))
        want = np.mean([logp[row, p - 1, seqs.tokens[row, p]].item() for p in span])
        assert got[row] == pytest.approx(want, abs=1e-5)


def test_tiny_budget_changes_nothing(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    large = ml.ablate_heads(model, seqs, progress=False)
    small = ml.ablate_heads(model, seqs, progress=False, memory_budget=200_000)
    assert largest_difference(large, small) < 1e-5


@pytest.mark.parametrize(("runs", "site"), [(ml.Trunk, "q"), (FunctionalBlocks, "z")])
def test_out_of_memory_is_halved(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, runs: type, site: str
) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edits = [ml.Intervention(f"edit {i}", [(hook_name(site, 0), scaled(i / 4))]) for i in range(7)]
    want = ml.sweep(model, seqs, edits, progress=False)
    seen: list[int] = []
    plain = runs.run

    def short_of_memory(self: Any, *args: Any, **traced: Any) -> torch.Tensor:
        rows = next(len(a) for a in args if isinstance(a, torch.Tensor))
        seen.append(rows)
        if rows > 2 * len(seqs):
            raise torch.OutOfMemoryError("no room")
        return plain(self, *args, **traced)

    monkeypatch.setattr(runs, "run", short_of_memory)
    got = ml.sweep(model, seqs, edits, progress=False)
    assert max(seen) > 2 * len(seqs)
    assert largest_difference(got, want) < 1e-5


def test_user_function_sees_only_its_own_sequences(tiny_model: Any) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    shapes: list[tuple[int, ...]] = []

    def look(z: torch.Tensor, hook: Any) -> torch.Tensor:
        shapes.append(tuple(z.shape))
        return z - z.mean(0, keepdim=True)  # would mix with other interventions if it saw the whole stack

    many = [ml.Intervention(f"edit {i}", [("blocks.1.attn.hook_z", look)]) for i in range(3)]
    got = ml.sweep(model, seqs, many, progress=False)
    assert {s[0] for s in shapes} == {len(seqs)}
    alone = ml.sweep(model, seqs, many[:1], progress=False, engine="reference")
    assert np.allclose(got["target_logprob"][:, 2], alone["target_logprob"][:, 0], atol=1e-5)


def test_batch_hook_is_bound_to_its_rows(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    wanted = torch.linspace(0, 1, 6)

    def make(batch: Any) -> Any:
        factor = wanted[batch.rows][:, None, None]
        return lambda x, hook: x * factor

    edit = ml.Intervention("by row", [("blocks.1.hook_mlp_out", ByBatch(make))])
    got = ml.sweep(model, seqs, [edit], progress=False, batch_size=2)["target_logprob"][:, 0]
    for row in range(6):
        alone = ml.Intervention("one", [("blocks.1.hook_mlp_out", scaled(float(wanted[row])))])
        want = ml.sweep(model, seqs[row], [alone], progress=False)["target_logprob"]
        assert float(got[row]) == pytest.approx(float(want[0, 0]), abs=1e-5)


def test_hooks_outside_the_blocks(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edits = [
        ml.Intervention("embedding", [("embed.hook_out", scaled(0.5))]),
        ml.Intervention("final norm", [("ln_final.hook_out", rolled)]),
        ml.Intervention("both", [("embed.hook_out", scaled(0.5)), ("blocks.1.hook_mlp_out", scaled(0.0))]),
    ]
    fast = ml.sweep(model, seqs, edits, progress=False)
    plain = ml.sweep(model, seqs, edits, progress=False, engine="reference")
    assert largest_difference(fast, plain) < 1e-5
    assert float(abs(fast.effect("target_logprob")).min()) > 1e-4


def test_users_own_hooks_stay_and_count_once(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edit = ml.Intervention("edit", [("blocks.1.hook_mlp_out", scaled(0.5))])
    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(scaled(1.3))
    try:
        fast = ml.sweep(model, seqs, [edit], progress=False)
        plain = ml.sweep(model, seqs, [edit], progress=False, engine="reference")
        assert len(point.fwd_hooks) == 1
    finally:
        point.remove_hooks()
    assert largest_difference(fast, plain) < 1e-5
    untouched = ml.sweep(model, seqs, [edit], progress=False)
    assert largest_difference(fast, untouched) > 1e-4


def test_custom_metric_and_composition(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo2", "bridge"), ragged()

    def last_logit(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(ids))
        return logits[rows, mask.sum(-1) - 1, ids[rows, mask.sum(-1) - 1]]

    a = ml.Intervention("a", [("blocks.0.hook_mlp_out", scaled(0.0))], {"x": 1})
    b = ml.Intervention("b", [("blocks.2.hook_attn_out", scaled(2.0))], {"y": 2})
    both = ml.Intervention("both", [*a.hooks, *b.hooks])
    got = ml.sweep(model, seqs, [a + b], (last_logit,), progress=False)
    want = ml.sweep(model, seqs, [both], (last_logit,), progress=False, engine="reference")
    assert np.allclose(
        got["last_logit"], want["last_logit"].values.reshape(got["last_logit"].shape), atol=1e-5
    )
    assert (a + b).coords == {"x": 1, "y": 2}


def test_coordinates_become_dimensions(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edits = [
        ml.Intervention(
            f"{layer}{gain}", [(f"blocks.{layer}.hook_mlp_out", scaled(gain))], {"layer": layer, "gain": gain}
        )
        for layer in (2, 0)
        for gain in (0.0, 0.5)
    ][:3]
    result = ml.sweep(model, seqs, edits, progress=False)
    assert result["target_logprob"].dims == ("sequence", "layer", "gain")
    assert result.data.layer.values.tolist() == [2, 0]
    assert bool(result["target_logprob"].sel(layer=0, gain=0.5).isnull().all())
    alone = ml.sweep(model, seqs, edits[2:], progress=False)
    assert np.allclose(
        result["target_logprob"].sel(layer=0, gain=0.0), alone["target_logprob"][:, 0, 0], atol=1e-6
    )


def test_hooks_are_gone_after_an_error(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    before = ml.measure(model, seqs)["target_logprob"]

    def broken(x: torch.Tensor, hook: Any) -> torch.Tensor:
        raise ValueError("my mistake")

    for engine in ("fast", "reference"):
        with pytest.raises(
            InterventionError, match=r"blocks\.1\.hook_mlp_out.*'mine'.*ValueError: my mistake"
        ):
            ml.sweep(
                model,
                seqs,
                [ml.Intervention("mine", [("blocks.1.hook_mlp_out", broken)])],
                engine=engine,
                progress=False,
            )
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert np.array_equal(ml.measure(model, seqs)["target_logprob"], before)


def test_bad_input_is_refused_before_any_forward(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edit = ml.Intervention("edit", [("blocks.0.hook_mlp_out", scaled(0.0))])
    ran: list[int] = []
    monkeypatch.setattr(ml.Trunk, "embed", lambda *a: ran.append(1))
    with pytest.raises(EmptySetError, match="no interventions"):
        ml.sweep(model, seqs, [])
    with pytest.raises(EmptySetError, match="no sequences"):
        ml.sweep(model, seqs[[]], [edit])
    with pytest.raises(OptionError, match=r"unknown metric 'exact_mach'.*exact_match"):
        ml.sweep(model, seqs, [edit], ("exact_mach",))
    with pytest.raises(OptionError, match="batch_size=0"):
        ml.sweep(model, seqs, [edit], batch_size=0)
    with pytest.raises(OptionError, match="engine='fsat'"):
        ml.sweep(model, seqs, [edit], engine="fsat")
    with pytest.raises(SiteError, match=r"'blocks\.0\.hook_mlp_uot'.*Did you mean"):
        ml.sweep(model, seqs, [ml.Intervention("typo", [("blocks.0.hook_mlp_uot", scaled(0.0))])])
    with pytest.raises(SequenceError, match="token id 5000"):
        ml.sweep(model, ml.SequenceSet.from_tokens([[1, 5000, 2]], 1), [edit])
    with pytest.raises(SequenceError, match="65 tokens"):
        ml.sweep(model, ml.SequenceSet.from_tokens([list(range(65))], 1), [edit])
    with pytest.raises(InterventionError, match="is not an Intervention"):
        ml.sweep(model, seqs, [("blocks.0.hook_mlp_out", scaled(0.0))])
    for hooks in (
        "blocks.0.hook_mlp_out",
        ("blocks.0.hook_mlp_out", scaled(0.0)),
        [scaled(0.0)],
        scaled(0.0),
    ):
        with pytest.raises(InterventionError, match=r"'one' holds .*a list of pairs"):
            ml.Intervention("one", hooks)
    assert not ran


@pytest.mark.parametrize("model", ["zoo/pythia-s", None])
def test_a_name_is_no_model(model: Any) -> None:
    seqs = ragged()
    for work in (
        ml.score_recall,
        ml.decode_residual,
        ml.ablate_heads,
        ml.bypass_attention,
        ml.attribute_logits,
    ):
        with pytest.raises(UnsupportedModelError, match=r"memlens\.load_model"):
            work(model, seqs)


@pytest.mark.parametrize("family", ["gpt_neox", "llama_gqa"])
def test_scoring_and_the_baseline_of_a_sweep_are_one_pass(tiny_model: Any, family: str) -> None:
    model, seqs = tiny_model(family, "bridge"), ragged()
    edit = ml.Intervention("edit", [("blocks.1.hook_mlp_out", scaled(0.0))])
    names = ("target_logprob", "matching_prefix", "margin", "completion_entropy")
    swept = ml.sweep(model, seqs, [edit], names, progress=False, per_token=True)
    scored = teacher_forced_stats(model, seqs, progress=False, batch_size=2)
    for name in names:
        want = ml.METRICS[name].of(scored, per_token=True)
        np.testing.assert_allclose(swept.baseline(name), want, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_a_metric_of_your_own_has_no_target_axis(tiny_model: Any, tmp_path: Path, kept: bool) -> None:
    """Beside memlens' own, which keep theirs, and with as many sequences as targets."""

    def largest(logits: Any, ids: Any, mask: Any) -> Any:
        return torch.where(mask[..., None], logits, -torch.inf).amax((1, 2))

    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edits = [ml.Intervention(f"MLP {i}", [(f"blocks.{i}.hook_mlp_out", scaled(0.5))]) for i in (0, 1)]
    options: Any = {"progress": False, "out": tmp_path / "run" if kept else None}
    swept = ml.sweep(model, seqs, edits, ["target_logprob", largest], per_token=True, **options)
    plain = ml.sweep(model, seqs, edits, [largest], progress=False)
    assert swept["target_logprob"].dims == ("sequence", "intervention", "target")
    for name in ("largest", "largest_baseline"):
        assert swept[name].dims == plain[name].dims
        np.testing.assert_allclose(swept[name], plain[name], atol=1e-5)


def test_not_finite_logits_name_the_layer(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"))
    seqs = ragged()
    edit = ml.Intervention("edit", [("blocks.0.hook_mlp_out", scaled(0.0))])
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="first after layer 1;"):
        ml.sweep(model, seqs, [edit], progress=False)


def test_plan_counts_blocks(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edits = ml.edits.attention_bypasses(model)
    cost = ml.plan(model, seqs, edits)
    assert cost._repr_html_() == f"<p>{cost}</p>"  # a sentence in a notebook, not a list of fields
    assert cost.block_forwards == len(seqs) * (3 + 2 + 1 + 0)  # a bypassed block does not run itself
    assert cost.reference_block_forwards == len(seqs) * 3 * 4
    assert cost.unembedded_positions == 4 * int(seqs.n_targets.sum())
    assert cost.expected_seconds is not None
    assert cost.expected_seconds > 0


def test_fast_engine_skips_blocks(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo3", "bridge"), ragged()
    last = len(model.blocks) - 1
    edits = ml.edits.attention_bypasses(model, layers=[last])
    ml.sweep(model, seqs, edits, progress=False)  # the model's own facts are asked for once
    ran: list[int] = []
    handles = [
        block.original_component.register_forward_pre_hook(lambda m, a, layer=i: ran.append(layer))
        for i, block in enumerate(model.blocks)
    ]
    try:
        ml.sweep(model, seqs, edits, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [*range(last + 1), last]  # the baseline, then the touched block alone


@pytest.mark.parametrize("rate", ["hidden_dropout", "attention_dropout"])
def test_active_dropout_is_refused(tmp_path: Any, rate: str) -> None:
    """On the bridge, and where only the Hugging Face model inside it was set to training."""
    folder = write_tiny("gpt_neox", tmp_path, **{rate: 0.1})
    model, seqs = ml.load_model(folder, backend="bridge", device=dev()), ragged()
    want = ml.sweep(model, seqs, ml.edits.attention_bypasses(model), progress=False)
    for part in (model, model.original_model):
        part.train()
        for use in (ml.ablate_mlps, ml.measure, ml.score_recall):
            with pytest.raises(UnsupportedModelError, match=r"call model\.eval\(\) first"):
                use(model, seqs)
        part.eval()
    again = ml.sweep(model, seqs, ml.edits.attention_bypasses(model), progress=False)
    assert np.array_equal(again["target_logprob"], want["target_logprob"])
