"""`check_model`: it passes what is right, and refuses each way of being wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import nn

import memlens as ml
from memlens.errors import ModelLoadError, SiteError, UnsupportedModelError
from memlens.forward.check import sites
from memlens.forward.check.kinds import kinds_of_layers
from memlens.forward.check.model import check_model
from memlens.forward.check.reference import probe_tokens, record_reference
from memlens.forward.hooks import hook_name
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.sequences.vocabularies import byte_level
from tests.tiny import D_VOCAB, FAMILIES, HOOKED_FAMILIES, tiny_huggingface_model, tiny_tokenizer

CASES = [(f, "bridge") for f in FAMILIES] + [(f, "hooked") for f in HOOKED_FAMILIES]


def huggingface(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_right_model_passes_in_full(
    family: str, backend: str, tiny_model: Callable[..., Any], tiny_folder: Callable[[str], Path]
) -> None:
    reference = record_reference(huggingface(tiny_folder(family)), family)
    found = check_model(tiny_model(family, backend), reference=reference)
    status = {check.name: check.status for check in found.checks}
    assert found.ok, found
    assert status["logits"] == status["trunk"] == status["fast path"] == "ok"
    for site in ("resid_pre", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post"):
        assert status[f"site {site}"] == "ok", found
    # GPT-Neo's bridge shows its pattern and does not heed what is written to it
    ignores = (family, backend) == ("gpt_neo", "bridge")
    assert status["site pattern"] == ("ignored" if ignores else "ok")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "backend"), [("olmo2", "hooked"), ("gpt_neox", "bridge")])
def test_sixteen_bits_pass_and_a_small_change_of_one_layer_is_seen(
    family: str, backend: str, dtype: torch.dtype, tiny_folder: Callable[[str], Path]
) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    folder = tiny_folder(family)
    model = load_model(folder, backend=backend, dtype=dtype, device=dev())
    hf = huggingface(folder, dtype)
    assert check_model(model, reference=record_reference(hf, family), layers=[0]).ok
    layers = hf.gpt_neox.layers if family == "gpt_neox" else hf.model.layers
    # behind a post-norm a factor of the weights before it would change nothing
    changed = layers[1].mlp.dense_4h_to_h if family == "gpt_neox" else layers[1].post_feedforward_layernorm
    changed.weight.data.mul_(1.2)
    found = check_model(model, reference=record_reference(hf, family), layers=[0])
    assert [(check.name, check.layer) for check in found.failures] == [("logits", 1)]


def test_loading_refuses_weights_that_were_changed_on_the_way(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison at load is not optional by accident: a bridge that loses weights is refused."""
    import memlens.models.load as loading

    build = loading.build_bridge

    def lossy(hf_model: Any, *args: Any, **kwargs: Any) -> Any:
        bridge = build(hf_model, *args, **kwargs)
        bridge.blocks[2].attn.o.original_component.weight.data[:, :4] = 0
        return bridge

    monkeypatch.setattr(loading, "build_bridge", lossy)
    with pytest.raises(ModelLoadError, match="logits, first in layer 2"):
        load_model(tiny_folder("llama"), backend="bridge", device=dev())
    load_model(tiny_folder("llama"), backend="bridge", device=dev(), check_weights=False)


def test_a_trunk_that_leaves_out_a_step_after_the_last_layer_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ml.Trunk, "finish_logits", lambda self, logits: 0.5 * logits)
    with pytest.raises(ModelLoadError, match=r"trunk: .*what follows the last layer"):
        load_model(tiny_folder("llama"), backend="bridge", device=dev())


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_one_layer_of_each_kind_is_checked_at_load(
    backend: str, tiny_model: Callable[..., Any], tiny_folder: Callable[[str], Path]
) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    local = [kind == "sliding_attention" for kind in huggingface(tiny_folder("olmo3")).config.layer_types]
    found = kinds_of_layers(tiny_model("olmo3", backend))
    assert found == sorted({0, len(local) - 1, local.index(False), local.index(True)})
    assert kinds_of_layers(tiny_model("gpt_neox", backend)) == [0, 2]


def test_a_layer_that_is_another_one_when_run_alone_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a layer reads what an earlier one has left aside, such as its keys and values."""
    run = ml.Trunk.run

    def without_the_earlier_ones(self: Any, resid: Any, start: int = 0, stop: int | None = None) -> Any:
        return run(self, resid, start, stop) * (1.1 if start else 1)

    monkeypatch.setattr(ml.Trunk, "run", without_the_earlier_ones)
    with pytest.raises(ModelLoadError, match="trunk, first in layer 2"):
        load_model(tiny_folder("gpt_neox"), backend="bridge", device=dev())


def test_a_hook_that_is_not_what_its_name_says_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder("llama"), backend="bridge", device=dev())

    def exchanged(site: str, layer: int) -> str:
        return hook_name({"q": "v", "v": "q"}.get(site, site), layer)

    monkeypatch.setattr(sites, "hook_name", exchanged)
    found = check_model(model)
    assert [check.name for check in found.failures] == ["site v"]
    assert [check.name for check in found.checks if check.status == "refused"] == ["site q"]
    monkeypatch.undo()
    with pytest.raises(SiteError, match="does not do what its name claims on this model"):
        model_hooks(model, "q")
    model_hooks(model, "z")


def model_hooks(model: Any, site: str) -> None:
    edit = ml.Intervention("zero", [(hook_name(site, 1), lambda x, hook: x * 0)])
    ml.sweep(model, ml.load_sequences(probe_tokens(90, 64), prefix_len=4), [edit], progress=False)


def test_a_mixture_of_experts_loads_without_its_neurons() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OlmoeConfig(**shape, intermediate_size=96, num_experts=4, num_experts_per_tok=2)
    model = load_model(transformers.OlmoeForCausalLM(config), device=dev())
    status = {check.name: check.status for check in check_model(model).checks}
    assert (status["site mlp_post"], status["site mlp_out"], status["fast path"]) == ("refused", "ok", "ok")
    with pytest.raises(SiteError):
        model_hooks(model, "mlp_post")
    model_hooks(model, "mlp_out")


@pytest.mark.parametrize(
    ("make", "scale", "cap"),
    [
        (
            lambda c: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**c, head_dim=16)),
            1.0,
            30.0,
        ),
        (
            lambda c: transformers.GraniteForCausalLM(transformers.GraniteConfig(**c, logits_scaling=8.0)),
            1 / 8,
            None,
        ),
    ],
)
def test_what_follows_the_unembedding_is_part_of_the_logits(
    make: Callable[[dict[str, int]], Any], scale: float, cap: float | None
) -> None:
    shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    hf = make(shape | {"pad_token_id": 2})
    for parameter in hf.parameters():
        parameter.data.mul_(3)
    tokens = probe_tokens(96, 64)
    with torch.no_grad():
        wanted = hf.eval()(tokens).logits
    model = load_model(hf, device=dev())
    trunk = ml.Trunk(model)
    assert (trunk.logit_scale, trunk.logit_softcap) == (scale, cap)
    got = trunk.unembed(trunk.run(trunk.embed(tokens)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_there_or_are_codes_are_refused() -> None:
    with torch.device("meta"):
        meta = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
            )
        )
    with pytest.raises(UnsupportedModelError, match="meta device"):
        load_model(meta)
    codes = tiny_huggingface_model("llama")
    weight = codes.model.layers[0].mlp.up_proj.weight
    codes.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load_model(codes)


class _Lora(nn.Module):
    """What a LoRA layer of PEFT looks like from outside, without PEFT."""

    active_adapters = ("secret",)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.delta = nn.Parameter(torch.randn_like(base.weight) * 0.3)
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + (0 if self.merged else x @ self.delta.T)

    def get_base_layer(self) -> nn.Linear:
        return self.base_layer

    def merge(self, safe_merge: bool = False) -> None:
        self.base_layer.weight.data += self.delta.data
        self.merged = True


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt_bigcode"])
def test_adapters_are_merged_into_a_copy(family: str) -> None:
    hf = tiny_huggingface_model(family).eval()
    path = {
        "gpt_neox": "gpt_neox.layers.1.attention.query_key_value",
        "llama": "model.layers.1.self_attn.q_proj",
        "gpt_bigcode": "transformer.h.1.attn.c_attn",
    }[family]
    parent, _, child = path.rpartition(".")
    setattr(hf.get_submodule(parent), child, _Lora(hf.get_submodule(path)))
    tokens = probe_tokens(hf.config.vocab_size, None)
    with torch.no_grad():
        wanted = hf(tokens).logits
    model = load_model(hf, device=dev())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hf(tokens).logits, wanted)  # the given model keeps its adapter
    assert ml.measure(model, ml.load_sequences(tokens, prefix_len=4), ["target_logprob"])
    from memlens.models.provenance import describe

    assert describe(model)["adapters"] == "secret"


@pytest.mark.parametrize(
    ("site", "off", "status"),
    [
        ("z", 5e-4, "ok"),  # 0.5 of what it should be, but nothing beside the residual of size 100
        ("z", 5e-3, "failed"),
        ("mlp_post", 5e-3, "refused"),  # a model can do without it
        ("pattern", 5e-4, "ok"),
        ("q", 5e-8, "ok"),
        ("q", 5e-4, "refused"),  # what it changes, attention weights, is no part of the residual
        ("k", 5e-4, "refused"),
    ],
)
def test_differences_at_a_site_are_relative_to_the_residual_or_to_attention_weights(
    site: str, off: float, status: str
) -> None:
    out, here = hook_name("resid_post", 2), hook_name(site, 2)
    plain = {out: torch.full((2, 3), 100.0), here: torch.ones(2, 3)}
    wanted = torch.full((2, 3), 1e-3)
    found = sites._site(site, 2, plain, {out: plain[out] + 1}, lambda run: (wanted + off, wanted))
    assert (found.name, found.status) == (f"site {site}", status)
    assert found.layer == (None if status == "ok" else 2)
    unheeded = sites._site(site, 2, plain, plain, lambda run: (wanted, wanted))
    assert (unheeded.status, unheeded.layer) == ("ignored", 2)
    nothing = plain | {here: torch.zeros(2, 3)}  # a zero changes nothing where there was none but zeros
    assert sites._site(site, 2, nothing, nothing, lambda run: (wanted, wanted)).status == "ok"
    absent = sites._site(site, 2, plain, {out: plain[out] + 1}, lambda run: (run["other"], wanted))
    assert absent.status == "absent"


@torch.no_grad()
def test_a_sentence_shows_the_beginning_only_where_it_can(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Not without the token, nor for another vocabulary, nor for a sentence of one token."""
    model = load_model(tiny_folder("llama"), backend="bridge", device=dev())
    without_bos, one_word = tiny_tokenizer(), tiny_tokenizer()
    without_bos.bos_token = None
    one_word.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    shown = {}
    for name, tokenizer in {
        "tiny": tiny_tokenizer(),
        "none": None,
        "without BOS": without_bos,
        "one word": one_word,
        "larger": byte_level(),
    }.items():
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        model.tokenizer = tokenizer
        model.cfg.d_vocab = D_VOCAB  # TransformerLens takes the tokenizer's
        shown[name] = [check.note for check in check_model(model, layers=[0]).checks if check.name == "BOS"]
    assert [name for name, notes in shown.items() if notes] == ["tiny"]
    model.tokenizer, model.cfg.n_ctx = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny"), 5
    (note,) = [check.note for check in check_model(model, layers=[0]).checks if check.name == "BOS"]
    unknown = model.tokenizer.unk_token_id  # every word; four fit behind the first token
    logprob = model(torch.full((1, 5), unknown)).log_softmax(-1)[0, :, unknown]
    assert f"sentence {logprob[1:4].mean():.2f} with" in note
    assert f", {logprob[:3].mean():.2f} without" in note


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_reference_leaves_the_model_as_it_was(training: bool, attention: str) -> None:
    hf = tiny_huggingface_model("gpt_neox").train(training)
    hf.set_attn_implementation(attention)  # type: ignore[operator]
    tokens = record_reference(hf, "any").tokens
    assert (hf.training, hf.config._attn_implementation) == (training, attention)
    hf.forward = lambda **kwargs: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ModelLoadError, match="'any' does not run in transformers"):
        record_reference(hf, "any")
    assert (hf.training, hf.config._attn_implementation) == (training, attention)
    assert tokens.shape == (2, 12)
    assert len(set(tokens.flatten().tolist())) > 20
    assert probe_tokens(50_000, 5).shape == (2, 5)
    assert int(probe_tokens(7, None).max()) < 7


def test_the_table_reads_well(tiny_model: Callable[..., Any]) -> None:
    found = ml.check_model(tiny_model("gpt_neo", "bridge"))
    assert list(found.to_frame()["name"])[:2] == ["logits", "trunk"]
    assert (found.checks[0].status, found.checks[0].difference < 1e-5) == ("ok", True)
    assert "when it was loaded" in found.checks[0].note
    text = repr(found)
    assert "site pattern" in text
    assert "what is written here has no effect" in text
    assert "<table" in found._repr_html_()
    with pytest.raises(UnsupportedModelError, match="is not a TransformerLens model"):
        ml.check_model(nn.Linear(2, 2))
