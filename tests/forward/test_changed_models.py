"""What was found out about a model does not outlive a change of it, and no change is overlooked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import memlens as ml
from memlens.errors import ModelLoadError, ResultError, SequenceError
from memlens.forward.baseline import teacher_forced_stats
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.small import corrupted, largest_difference, ragged
from tests.tiny import D_VOCAB, random_tokens, tiny_huggingface_model

_SMALL = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_attention_heads": 4}


def fused(name: str) -> Any:
    """A tiny model with fused projections, in evaluation mode."""
    torch.manual_seed(0)
    config: Any = {
        "bloom": partial(transformers.BloomConfig, vocab_size=D_VOCAB, hidden_size=32, n_layer=2, n_head=4),
        "falcon": partial(transformers.FalconConfig, **_SMALL, num_hidden_layers=2),
        "phi3": partial(
            transformers.Phi3Config, **_SMALL, num_hidden_layers=2, intermediate_size=64, pad_token_id=0
        ),
        "gpt2": partial(transformers.GPT2Config, vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4),
    }
    if name in config:
        return transformers.AutoModelForCausalLM.from_config(config[name]()).eval()
    return tiny_huggingface_model(name)


def loaded(model: Any, backend: str, **options: Any) -> Any:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    return ml.load_model(model, backend=backend, device=dev(), **options)


def through_data(weight: Any, new: torch.Tensor) -> None:
    weight.data.copy_(new)


def in_place(weight: Any, new: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(new)


def as_other_data(weight: Any, new: torch.Tensor) -> None:
    weight.data = new.clone()


@pytest.mark.parametrize("edit", [through_data, in_place, as_other_data])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt_bigcode", "bloom", "falcon", "gpt2", "phi3"])
def test_a_bridge_computes_with_the_edited_weights_of_its_model(
    family: str, edit: Callable[..., None]
) -> None:
    hf, truth, tokens = fused(family), fused(family), random_tokens()
    weights = dict(hf.named_parameters())
    model = loaded(hf, "bridge")
    with torch.no_grad():
        for name, weight in truth.named_parameters():
            if "layers." in name or ".h." in name:
                new = weight + 0.1 * torch.randn_like(weight)
                edit(weight, new)
                edit(weights[name], new)
        wanted = truth(tokens).logits
        assert torch.allclose(model(tokens), wanted, atol=1e-3)
        trunk = ml.Trunk(model)
        assert torch.allclose(trunk.unembed(trunk.run(trunk.embed(tokens))), wanted, atol=1e-3)
        assert torch.allclose(model.original_model(tokens).logits, wanted, atol=1e-3)


def test_an_edit_reaches_computations_that_do_not_run_the_whole_model() -> None:
    """The trunk runs the layers, not the Hugging Face model whose forward is watched."""
    hf, seqs = tiny_huggingface_model("gpt_neox"), ragged()
    weight = hf.gpt_neox.layers[1].attention.query_key_value.weight
    model = loaded(hf, "bridge")
    before = ml.measure(model, seqs)["target_logprob"]
    weight.data.zero_()
    after = ml.measure(model, seqs)["target_logprob"]
    truth = tiny_huggingface_model("gpt_neox")
    truth.gpt_neox.layers[1].attention.query_key_value.weight.data.zero_()
    wanted = ml.measure(loaded(truth, "bridge"), seqs)["target_logprob"]
    assert abs(after - wanted).max() < 1e-5 < 1e-2 < abs(after - before).max()


@torch.no_grad()
def test_edits_of_the_parts_count_and_edits_of_both_are_refused() -> None:
    hf, tokens = tiny_huggingface_model("gpt_neox"), random_tokens()
    whole = hf.gpt_neox.layers[0].attention.query_key_value.weight
    model = loaded(hf, "bridge")
    before, part = model(tokens), model.blocks[0].attn.q.original_component.weight
    part.data.zero_()
    edited = model(tokens)
    assert float((edited - before).abs().max()) > 1e-2
    assert torch.equal(model(tokens), edited)
    whole.data.mul_(2)
    with pytest.raises(ModelLoadError, match="its parts were edited too"):
        model(tokens)
    with pytest.raises(ModelLoadError, match="its parts were edited too"):
        ml.score_recall(model, ragged(), generate=False, progress=False)


@torch.no_grad()
def test_a_state_dict_counts_and_a_copy_is_watched_too() -> None:
    tokens = random_tokens()
    one, other = (loaded(tiny_huggingface_model("gpt_neox", seed=seed), "bridge") for seed in (0, 1))
    wanted = other(tokens)
    one.load_state_dict(other.state_dict())
    assert torch.allclose(one(tokens), wanted, atol=1e-5)
    twin, truth = copy.deepcopy(other), tiny_huggingface_model("gpt_neox", seed=1)
    for block, layer in zip(twin.blocks, truth.gpt_neox.layers, strict=True):
        block.attn.original_component.query_key_value.original_component.weight.data.zero_()
        layer.attention.query_key_value.weight.data.zero_()
    assert torch.allclose(twin(tokens), truth(tokens).logits, atol=1e-3)
    assert torch.allclose(other(tokens), wanted, atol=1e-5)


@pytest.mark.parametrize(("backend", "options"), [("hooked", {}), ("bridge", {"process_weights": True})])
def test_a_model_that_is_a_copy_is_refused_after_an_edit_of_the_original(backend: str, options: Any) -> None:
    hf, tokens = tiny_huggingface_model("gpt_neox"), random_tokens()
    weight = hf.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    model = loaded(hf, backend, **options)
    model(tokens)
    weight.data.mul_(2)
    with pytest.raises(ModelLoadError, match="load the edited model again"):
        model(tokens)
    with pytest.raises(ModelLoadError, match="load the edited model again"):
        ml.measure(model, ragged())
    weight.data.div_(2)
    model(tokens)


def test_merged_adapters_are_watched() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_huggingface_model("gpt_neox"), lora)
    model = ml.load_model(adapted, device=dev())
    next(p for n, p in adapted.named_parameters() if "lora_B" in n).data.mul_(2)
    with pytest.raises(ModelLoadError, match="load the edited model again"):
        ml.measure(model, ragged())


def doubled(module: Any) -> Callable[..., Any]:
    """The module's forward, with twice its output."""
    forward = module.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    return twice


def replace_block(model: Any) -> None:
    model.blocks[1].__dict__["forward"] = doubled(model.blocks[1])


def replace_attention(model: Any) -> None:
    model.blocks[1].attn.__dict__["forward"] = doubled(model.blocks[1].attn)


def replace_mlp(model: Any) -> None:
    model.blocks[2].mlp.__dict__["forward"] = doubled(model.blocks[2].mlp)


def replace_inner_mlp(model: Any) -> None:
    inner = model.blocks[1].mlp.original_component
    inner.__dict__["forward"] = doubled(inner)


def replace_final_norm(model: Any) -> None:
    model.ln_final.__dict__["forward"] = doubled(model.ln_final)


def replace_whole(model: Any) -> None:
    inner = getattr(model, "original_model", model)
    forward = inner.forward

    def cooler(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out / 2
        out.logits = out.logits / 2
        return out

    inner.__dict__["forward"] = cooler


def look_ahead(model: Any) -> None:
    model.cfg.attention_dir = "bidirectional"


def cap_scores(model: Any) -> None:
    model.cfg.attn_scores_soft_cap = 0.5


def cap_logits(model: Any) -> None:
    model.cfg.output_logits_soft_cap = 2.0


def another_epsilon(model: Any) -> None:
    for module in model.blocks[1].modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 3.0
        if isinstance(vars(module).get("eps"), float):
            module.eps = 3.0


def weights_in_place(model: Any) -> None:
    for weight in model.blocks[2].parameters():
        weight.data.mul_(1.5)


CHANGES = [
    *[(change, backend) for backend in ("hooked", "bridge") for change in (
        replace_block, replace_attention, replace_mlp, replace_final_norm, replace_whole, another_epsilon,
        weights_in_place,
    )],
    *[(change, "hooked") for change in (look_ahead, cap_scores, cap_logits)],
    (replace_inner_mlp, "bridge"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "backend"), CHANGES)
def test_after_a_change_the_fast_engine_still_equals_the_reference(
    change: Callable[[Any], None], backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, seqs = loaded(tiny_huggingface_model("gpt_neox_sequential"), backend), ragged()
    edits = [
        *ml.edits.head_ablations(model, seqs, layers=[0, 1], mode="resample"),
        *ml.edits.activation_patches(model, corrupted(seqs), layers=[1, 2], positions=[3, 5]),
    ]
    run = partial(ml.sweep, model, seqs, edits, metrics=["target_logprob"], progress=False)
    before = run()
    change(model)
    fast = run()
    exact = run(engine="reference")
    assert largest_difference(fast, exact) < 1e-4
    assert largest_difference(fast, before) > 1e-3
    if change is not replace_whole:  # there the second reference is the whole point
        assert largest_difference(run(), exact) < 1e-4
    measured = ml.measure(model, seqs)["target_logprob"]
    assert abs(measured - exact["target_logprob_baseline"].values).max() < 1e-4
    stats = teacher_forced_stats(model, seqs, progress=False)
    mean = (stats.logprob * seqs.target_mask).sum(1) / seqs.target_mask.sum(1)
    assert abs(mean.numpy() - measured).max() < 1e-4


@pytest.mark.parametrize("change", [replace_block, replace_attention, replace_inner_mlp, replace_final_norm])
def test_a_replaced_forward_survives_a_sweep(change: Callable[[Any], None]) -> None:
    model, seqs, tokens = loaded(tiny_huggingface_model("gpt_neox"), "bridge"), ragged(), random_tokens()
    change(model)
    with torch.no_grad():
        wanted = model(tokens)
        ml.ablate_heads(model, seqs, layers=[2], progress=False)
        assert torch.equal(model(tokens), wanted)


def test_attributes_set_on_a_bridge_s_block_survive() -> None:
    """Plain assignment reaches the wrapped module."""
    model, tokens = loaded(tiny_huggingface_model("gpt_neox"), "bridge"), random_tokens()
    model.blocks[1].forward = doubled(model.blocks[1].original_component)
    with torch.no_grad():
        wanted = model(tokens)
        ml.ablate_heads(model, ragged(), layers=[2], progress=False)
        assert torch.equal(model(tokens), wanted)


def test_what_was_checked_and_shown_is_of_the_unchanged_model() -> None:
    model, seqs = loaded(tiny_huggingface_model("gpt_neox"), "bridge"), ragged(2)
    explorer = ml.explore(model, seqs)
    explorer.view  # noqa: B018
    logits = ml.check_model(model).checks[0]
    assert (logits.name, logits.status) == ("logits", "ok")
    model.blocks[0].mlp.out.original_component.weight.data.mul_(2)
    assert ml.check_model(model).checks[0].status == "not compared"
    with pytest.raises(ResultError, match="the model has changed"):
        explorer.view  # noqa: B018


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_autocast_does_not_reach_what_memlens_computes(backend: str) -> None:
    model, seqs = loaded(tiny_huggingface_model("gpt_neox"), backend), ragged()
    calls: list[Callable[[], Any]] = [
        partial(ml.ablate_heads, model, seqs, progress=False),
        partial(ml.ablate_heads, model, seqs, progress=False, engine="reference"),
        partial(ml.decode_residual, model, seqs, progress=False),
        partial(ml.attribute_gradients, model, seqs, corrupted(seqs), progress=False),
        partial(ml.perturb_residual, model, seqs, progress=False),
    ]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = call()
        for name, array in plain.data.data_vars.items():
            np.testing.assert_array_equal(array.values, cast.data[name].values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_tokens())
        assert torch.is_autocast_enabled("cpu")


def halved(_module: Any, _args: Any, out: Any) -> Any:
    return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("place", ["block", "final norm", "attention"])
def test_a_user_s_torch_hook_acts_where_its_module_runs_and_nowhere_else(backend: str, place: str) -> None:
    """A layer that is skipped passes its input on, and a hook on it must not change that."""
    model, seqs = loaded(tiny_huggingface_model("gpt_neox"), backend), ragged()
    plain = ml.measure(model, seqs)["target_logprob"]
    where = {"block": model.blocks[1], "final norm": model.ln_final, "attention": model.blocks[1].attn}[place]
    handle = where.register_forward_hook(halved)
    run = partial(ml.ablate_heads, model, seqs, mode="zero", progress=False)
    fast, exact = run(), run(engine="reference")
    assert largest_difference(fast, exact) < 1e-5
    assert abs(ml.measure(model, seqs)["target_logprob"] - plain).max() > 1e-3
    with torch.no_grad():
        tokens = random_tokens()
        trunk = ml.Trunk(model)
        out = trunk.unembed(trunk.run(trunk.run(trunk.embed(tokens), 0, 1), 1))
        assert torch.allclose(out, model(tokens), atol=1e-4)
    handle.remove()
    assert abs(ml.measure(model, seqs)["target_logprob"] - plain).max() == 0


def test_a_default_device_does_not_reach_what_memlens_computes() -> None:
    model, seqs = loaded(tiny_huggingface_model("gpt_neox"), "bridge"), ragged()
    run = partial(ml.ablate_heads, model, seqs, mode="zero", progress=False)
    plain = run()
    with torch.device("meta"):
        assert largest_difference(run(), plain) == 0
        scored = ml.score_recall(model, seqs, generate=False, progress=False).table["target_logprob"]
    assert np.isfinite(scored).all()


def test_a_model_with_two_rotations_takes_texts_of_one_only() -> None:
    """In LongRoPE the length of the longest text of a batch decides on the rotation of all."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 16
    config = transformers.Phi3Config(
        **_SMALL, num_hidden_layers=2, intermediate_size=64, pad_token_id=0, max_position_embeddings=64,
        original_max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = loaded(transformers.AutoModelForCausalLM.from_config(config).eval(), "bridge")
    rows = random_tokens(2, 20).tolist()
    with pytest.raises(SequenceError, match="context holds 16"):
        ml.measure(model, ml.load_sequences([rows[0], rows[1][:12]], prefix_len=4))
    assert np.isfinite(
        ml.measure(model, ml.load_sequences([r[:16] for r in rows], prefix_len=4))["target_logprob"]
    ).all()


@pytest.mark.parametrize("kind", ["recurrent", "without a cache"])
def test_a_model_without_a_cache_is_decoded_from_the_whole_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if kind == "recurrent":
        config = transformers.MambaConfig(vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2)
        hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        hf = tiny_huggingface_model("gpt_neox")
    model, seqs = loaded(hf, "bridge"), ragged(2)
    if kind == "without a cache":
        forward = hf.forward
        monkeypatch.setattr(hf, "forward", lambda *a, **k: forward(*a, **{**k, "use_cache": False}))
    found = ml.score_recall(model, seqs, progress=False).table["memorization_score"]
    for i, row in enumerate(seqs.rows()):
        text = torch.tensor([row[: int(seqs.prefix_len[i])]])
        with torch.no_grad():
            while text.shape[1] < len(row):
                text = torch.cat([text, hf(input_ids=text).logits[:, -1:].argmax(-1)], 1)
        same = (text[0, int(seqs.prefix_len[i]) :] == torch.tensor(row[int(seqs.prefix_len[i]) :])).float()
        assert found[i] == pytest.approx(float(same.mean()))
