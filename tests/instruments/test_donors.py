"""Two models at once: identity, equality with plain hooks, and donors that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import memlens as ml
from memlens.errors import DonorError, OptionError, OtherRunError, SequenceError, VocabularyError
from memlens.forward.hooks import has_site, hook_name
from memlens.instruments.donors import check_donor, donor_settings
from memlens.instruments.patch.patching import PATCH_SITES
from memlens.results.kinds import reading
from memlens.store.fingerprint import model_fingerprint
from tests.devices import dev
from tests.small import CASES, HOOKED_FAMILIES, corrupted, ragged
from tests.tiny import D_VOCAB, write_tiny

QUIET: dict[str, Any] = {"progress": False}
DEAF = {("gpt_neo", "bridge", "pattern")}
"""Sites whose hook this backend ignores; see `tests.instruments.test_patching`."""


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Any:
    """`other_model("olmo2", "bridge")`: another seed of that tiny model."""
    folders: dict[str, Path] = {}
    loaded: dict[tuple[str, str], Any] = {}

    def model_of(family: str, backend: str) -> Any:
        tiny_model(family, backend)  # skips where there is no such backend
        if family not in folders:
            folders[family] = write_tiny(family, tmp_path_factory.mktemp(f"{family}-other"), seed=1)
        if (family, backend) not in loaded:
            loaded[family, backend] = ml.load_model(folders[family], backend=backend, device=dev())
        return loaded[family, backend]

    return model_of


def sites_of(model: Any, family: str, backend: str) -> list[str]:
    return [s for s in PATCH_SITES if has_site(model, s) and (family, backend, s) not in DEAF]


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_model_as_its_own_donor_changes_nothing(
    tiny_model: Any, family: str, backend: str, engine: str
) -> None:
    """Not one bit, at every site, with padded rows of several lengths."""
    model, seqs = tiny_model(family, backend), ragged()
    layer = [1]
    for site in sites_of(model, family, backend):
        edits = ml.edits.activation_patches(model, seqs, donor=model, site=site, over="layer", layers=layer)
        edits += ml.edits.activation_patches(
            model, seqs, donor=model, site=site, layers=layer, positions=[3, 11]
        )
        found = ml.sweep(model, seqs, edits, engine=engine, **QUIET)
        for name in ("target_logprob", "exact_match"):
            assert (found.baseline(name) == found[name].T).all(), (site, name)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_patches_are_plain_hooks_with_the_donors_cache(
    tiny_model: Any, other_model: Any, family: str, backend: str
) -> None:
    """Each row alone, unpadded, by `run_with_hooks` and the cache of the other model."""
    model, donor, seqs = tiny_model(family, backend), other_model(family, backend), ragged(3)
    layer, position, row = 1, 4, 1
    tokens = torch.tensor([seqs.rows()[row]])
    start, every = int(seqs.prefix_len[row]), slice(None)
    for site in sites_of(model, family, backend):
        whole = ml.patch_activations(
            model, seqs, donor=donor, site=site, over="layer", layers=[layer], **QUIET
        )
        part = ml.patch_activations(
            model, seqs, donor=donor, site=site, layers=[layer], positions=[position], **QUIET
        )
        names = [hook_name(site, layer)]
        with torch.no_grad():
            _, cache = donor.run_with_cache(tokens, names_filter=names)
        for result, index in (
            (whole, (every,)),
            (part, (every, every, position) if site == "pattern" else (every, position)),
        ):
            want = plain_patch(model, tokens, site, layer, cache[names[0]], index)
            logp = want[0].log_softmax(-1)
            mean = np.mean([logp[p - 1, tokens[0, p]].item() for p in range(start, tokens.shape[1])])
            assert result["target_logprob"].values[row].item() == pytest.approx(mean, abs=1e-5), site
        moved = whole["target_logprob"][:, 0] - whole["target_logprob_clean"]
        assert float(abs(moved).max()) > 1e-4, site


def plain_patch(
    model: Any, tokens: torch.Tensor, site: str, layer: int, source: torch.Tensor, index: tuple[Any, ...]
) -> torch.Tensor:
    """Logits with an activation written by a plain hook."""
    name, resid = hook_name(site, layer), []

    def write(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[index] = source[index]
        return x

    def as_sum(x: torch.Tensor, hook: Any) -> torch.Tensor:
        """The bridge's hook at resid_mid is on a branch: its two summands are set instead."""
        x = x.clone()
        x[index] = source[index] - resid[0][index]
        return x

    hooks = [(name, write)]
    if site == "resid_mid" and hasattr(model, "original_model"):
        hooks = [
            (hook_name("resid_pre", layer), lambda x, hook: resid.append(x)),
            (hook_name("attn_out", layer), as_sum),
        ]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("family", HOOKED_FAMILIES)
def test_a_donor_on_the_other_backend_gives_the_same(tiny_model: Any, other_model: Any, family: str) -> None:
    hooked, bridge = tiny_model(family, "hooked"), tiny_model(family, "bridge")
    seqs = ragged()
    for site in sites_of(bridge, family, "bridge"):
        same = ml.patch_activations(bridge, seqs, donor=hooked, site=site, over="layer", **QUIET)
        base = same["target_logprob_clean"]
        assert float(abs(same["target_logprob"] - base).max()) < 1e-5, site
        found = [
            ml.patch_activations(m, seqs, donor=other_model(family, b), site=site, layers=[1], **QUIET)
            for m, b in ((bridge, "bridge"), (bridge, "hooked"), (hooked, "bridge"))
        ]
        for other in found[1:]:
            a, b = (r["target_logprob"].values for r in (found[0], other))
            assert np.allclose(a, b, atol=1e-5, equal_nan=True), site


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_an_equal_donor_leaves_nothing_to_normalize_by(
    tiny_model: Any, tiny_folder: Any, engine: str
) -> None:
    """The unchanged run and the donor's may be computed in two ways, whose rounding is no difference."""
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    copy = ml.load_model(tiny_folder("llama_gqa"), backend="bridge", device=dev())
    for donor in (model, copy):
        found = ml.patch_activations(model, seqs, donor=donor, layers=[0], engine=engine, **QUIET)
        for name in ("target_logprob", "exact_match"):
            assert np.array_equal(found[f"{name}_clean"], found[f"{name}_corrupt"])
        assert bool(found["normalized_effect"].isnull().all())


def test_directions_name_the_run_that_recalls(tiny_model: Any, other_model: Any) -> None:
    model, donor, seqs = tiny_model("llama", "bridge"), other_model("llama", "bridge"), ragged()
    own, theirs = (ml.measure(m, seqs)["target_logprob"] for m in (model, donor))
    noising = ml.patch_activations(model, seqs, donor=donor, over="layer", site="resid_post", **QUIET)
    denoising = ml.patch_activations(
        model, seqs, donor=donor, over="layer", site="resid_post", direction="denoising", **QUIET
    )
    assert noising.settings["direction"] == "noising"
    assert noising.settings["corruption"] == "none"
    assert np.allclose(noising["target_logprob_clean"], own, atol=1e-6)
    assert np.allclose(noising["target_logprob_corrupt"], theirs, atol=1e-6)
    assert np.allclose(denoising["target_logprob_corrupt"], own, atol=1e-6)
    assert np.allclose(denoising["target_logprob_clean"], theirs, atol=1e-6)
    assert np.array_equal(noising["target_logprob"], denoising["target_logprob"])
    assert "is restored: the model's target log-prob exceeds the donor's by" in reading(noising)
    assert "is restored: the donor's target log-prob exceeds the model's by" in reading(denoising)
    left = noising["normalized_effect"] + denoising["normalized_effect"]
    assert np.allclose(left, 1, atol=1e-4)
    donor_says = noising.settings["donor"]
    assert donor_says["fingerprint"] != model_fingerprint(model)
    assert donor_says["fingerprint"] == model_fingerprint(donor)


def test_corrupt_sequences_and_a_donor(tiny_model: Any, other_model: Any) -> None:
    """The donor's activations on the clean sequences, in the model's run on the corrupt ones."""
    model, donor, clean = tiny_model("gpt_neox", "bridge"), other_model("gpt_neox", "bridge"), ragged()
    dirty = corrupted(clean)
    own = ml.patch_activations(model, clean, dirty, donor=model, **QUIET)
    plain = ml.patch_activations(model, clean, dirty, **QUIET)
    for name in plain.metrics:
        assert own[name].equals(plain[name]), name
    both = ml.patch_activations(model, clean, dirty, donor=donor, over="layer", layers=[0], **QUIET)
    assert np.allclose(both["target_logprob_clean"], ml.measure(donor, clean)["target_logprob"], atol=1e-6)
    assert np.allclose(both["target_logprob_corrupt"], ml.measure(model, dirty)["target_logprob"], atol=1e-6)
    edits = ml.edits.activation_patches(model, clean, donor=donor, over="layer", layers=[0])
    found = ml.sweep(model, dirty, edits, engine="reference", **QUIET)["target_logprob"]
    assert np.allclose(both["target_logprob"], found, atol=1e-5)
    edit = ml.Intervention("halved", [("blocks.0.hook_resid_pre", lambda x, hook: x / 2)])
    with pytest.raises(OptionError, match="donor= does not go with an intervention"):
        ml.patch_activations(model, clean, edit, donor=donor)
    with pytest.raises(SequenceError, match="give corrupt"):
        ml.patch_activations(model, clean)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_ablation_by_a_donor(tiny_model: Any, other_model: Any, family: str, backend: str) -> None:
    """Heads, MLPs and neurons: bit for bit nothing from itself, and as patched from another model."""
    model, donor, seqs = tiny_model(family, backend), other_model(family, backend), ragged()
    some: dict[str, Any] = {"layers": [1], **QUIET}

    def ablated(source: Any, **more: Any) -> list[ml.Result]:
        how: dict[str, Any] = {"mode": "donor", "donor": source, **some, **more}
        return [
            ml.ablate_heads(model, seqs, **how),
            ml.ablate_mlps(model, seqs, **how),
            ml.knock_out_neurons(model, seqs, top_k=[3], windows=1, **how),
        ]

    for positions in ("all", "last_prompt"):
        for result in ablated(model, positions=positions):
            assert not result.effect("target_logprob").any(), (result.kind, positions)
    heads, mlps, neurons = ablated(donor)
    patched = ml.patch_activations(model, seqs, donor=donor, site="z", over="head", **some)
    assert np.allclose(heads["target_logprob"], patched["target_logprob"], atol=1e-6)
    patched = ml.patch_activations(model, seqs, donor=donor, site="mlp_out", over="layer", **some)
    assert np.allclose(mlps["target_logprob"], patched["target_logprob"], atol=1e-6)

    assert neurons.settings["donor"]["fingerprint"] == model_fingerprint(donor)
    found = ml.instruments.dominant_neurons(model, seqs, 3, **some)["neuron"].values[:, 0]
    name = hook_name("mlp_post", 1)
    with torch.no_grad():
        _, cache = donor.run_with_cache(seqs.tokens, names_filter=[name])

    def cut(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        for row, own in enumerate(found):
            x[row, :, own] = cache[name][row, :, own]
        return x

    edit = ml.Intervention("by hand", [(name, cut)])
    want = ml.sweep(model, seqs, [edit], engine="reference", **QUIET)["target_logprob"][:, 0]
    assert np.allclose(neurons["target_logprob"].values.ravel(), want, atol=1e-5)


def test_gradients_estimate_a_donors_ablation(tiny_model: Any, other_model: Any) -> None:
    """Integrated gradients of a layer sum to the effect of the donor's whole layer."""
    model, donor, seqs = tiny_model("olmo", "bridge"), other_model("olmo", "bridge"), ragged()
    how: dict[str, Any] = {"mode": "donor", "donor": donor, "layers": [2], **QUIET}
    found = ml.instruments.attribute_ablation(model, seqs, site="mlp_out", steps=64, **how)
    exact = ml.ablate_mlps(model, seqs, **how)
    assert np.allclose(found.effect("target_logprob"), exact.effect("target_logprob"), atol=0.02)


def test_options_of_a_donor(tiny_model: Any, other_model: Any) -> None:
    model, donor, seqs = tiny_model("gpt_neox", "bridge"), other_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="mode='donor' needs the model"):
        ml.ablate_heads(model, seqs, mode="donor")
    with pytest.raises(OptionError, match="mode='zero' does not use a donor"):
        ml.ablate_mlps(model, seqs, mode="zero", donor=donor)


def test_a_sweep_with_another_donor_is_not_continued(
    tiny_model: Any, other_model: Any, tmp_path: Any
) -> None:
    model, donor, seqs = tiny_model("gpt_neox", "bridge"), other_model("gpt_neox", "bridge"), ragged()
    how: dict[str, Any] = {"mode": "donor", "layers": [1], "out": tmp_path, **QUIET}
    first = ml.ablate_heads(model, seqs, donor=donor, **how)
    again = ml.ablate_heads(model, seqs, donor=donor, **how)
    assert again["target_logprob"].equals(first["target_logprob"])
    names = [str(donor_settings(one)["donor"]["model"])[-20:] for one in (donor, model)]
    told = rf"the interventions; donor model was '.*{names[0]}' and is '.*{names[1]}'; donor fingerprint was"
    with pytest.raises(OtherRunError, match=told):
        ml.ablate_heads(model, seqs, donor=model, **how)
    assert ml.load_result(tmp_path / "result.nc").settings["donor"]["fingerprint"] == model_fingerprint(donor)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_another_unembedding(tiny_model: Any, other_model: Any, family: str, backend: str) -> None:
    model, donor, seqs = tiny_model(family, backend), other_model(family, backend), ragged()
    plain, own = (ml.decode_residual(model, seqs, donor=d, **QUIET) for d in (None, model))
    for name in plain.metrics:
        assert own[name].equals(plain[name]), name
    found = ml.decode_residual(model, seqs, donor=donor, **QUIET)
    row, layer = 2, 1
    tokens, start = torch.tensor([seqs.rows()[row]]), int(seqs.prefix_len[row])
    name = hook_name("resid_post", layer)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[name])
        logits = ml.Trunk(donor).unembed(cache[name])[0]
    n = int(seqs.n_targets[row])
    want = [float(logits[start + i - 1].softmax(-1)[tokens[0, start + i]]) for i in range(n)]
    assert found["probability"].values[row, layer, :n] == pytest.approx(want, abs=1e-5)
    assert found.settings["donor"]["fingerprint"] == model_fingerprint(donor)


def test_donors_that_do_not_fit(tiny_model: Any, tmp_path: Any) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()

    def made(name: str, family: str = "llama", **overrides: Any) -> Any:
        tokenizer = overrides.pop("tokenizer", True)
        folder = write_tiny(family, tmp_path / name, tokenizer=tokenizer, **overrides)
        return ml.load_model(folder, backend="bridge", device=dev())

    cases: list[tuple[str, dict[str, Any], str]] = [
        ("layers", {"num_hidden_layers": 2}, "has 2 layers and .* has 3"),
        ("heads", {"num_attention_heads": 2}, "has 2 heads per layer and .* has 4"),
        ("kv", {"num_key_value_heads": 2}, "has 2 key-value heads per layer and .* has 4"),
        ("neurons", {"intermediate_size": 48}, "has 48 neurons per layer and .* has 64"),
        ("family", {"family": "olmo"}, "has OlmoForCausalLM as its architecture and .* LlamaForCausalLM"),
    ]
    for name, facts, message in cases:
        with pytest.raises(DonorError, match=message):
            ml.patch_activations(model, seqs, donor=made(name, **facts))
    small = made("vocabulary", tokenizer=False, vocab_size=D_VOCAB - 1, pad_token_id=0)
    with pytest.raises(DonorError, match=f"has {D_VOCAB - 1} token ids and .* has {D_VOCAB}"):
        ml.decode_residual(model, seqs, donor=small)
    with pytest.raises(VocabularyError):
        ml.patch_activations(model, ml.SequenceSet.from_tokens([[1, 2, D_VOCAB - 1, 3]], 2), donor=small)
    short = made("context", max_position_embeddings=16)
    with pytest.raises(SequenceError, match="16"):
        ml.ablate_heads(model, seqs, mode="donor", donor=short)


def test_other_tokens(tiny_model: Any, tmp_path: Any) -> None:
    model = tiny_model("llama", "bridge")

    def renamed(names: dict[str, str]) -> Any:
        folder = write_tiny("llama", tmp_path / "-".join(names.values()))
        text = (folder / "tokenizer.json").read_text()
        for old, new in names.items():
            text = text.replace(f'"{old}":', f'"{new}":')
        (folder / "tokenizer.json").write_text(text)
        return ml.load_model(folder, backend="bridge", device=dev())

    swapped = renamed({"w3": "w_", "w4": "w3", "w_": "w4"})
    with pytest.raises(DonorError, match=r"the token 'w3' is 4 for the donor .* and 3 for"):
        check_donor(model, swapped)
    with pytest.raises(DonorError, match=r"the id 7 is 'new' for the donor .* and 'w7' for"):
        check_donor(model, renamed({"w7": "new"}))
    folder = write_tiny("llama", tmp_path / "more", vocab_size=D_VOCAB + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["of-a-fine-tune"])
    tokenizer.save_pretrained(folder)
    more = ml.load_model(folder, backend="bridge", device=dev())
    assert len(tokenizer.get_vocab()) == D_VOCAB + 1
    check_donor(model, more)
    check_donor(more, model)


def test_the_donors_precision_may_differ(tiny_model: Any, tiny_folder: Any) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    half = ml.load_model(tiny_folder("llama"), backend="bridge", dtype="bfloat16", device=dev())
    found = ml.patch_activations(model, seqs, donor=half, over="layer", **QUIET)
    wide = ml.patch_activations(half, seqs, donor=model, over="layer", check_dtype=False, **QUIET)
    assert found.data.attrs["dtype"] == "float32"
    assert found.settings["donor"]["dtype"] == "bfloat16"
    assert 0 < float(abs(found["target_logprob"] - found["target_logprob_clean"]).max()) < 0.5
    assert 0 < float(abs(wide["target_logprob"] - wide["target_logprob_clean"]).max()) < 0.5
    decoded = ml.decode_residual(half, seqs, donor=model, **QUIET)
    plain = ml.decode_residual(model, seqs, **QUIET)
    assert float(abs(decoded["probability"] - plain["probability"]).max()) < 0.2


@pytest.mark.parametrize("family", ["gpt_neox", "llama_gqa", "olmo2"])
def test_paths_from_a_donor(tiny_model: Any, other_model: Any, family: str) -> None:
    """From itself a path carries nothing; without MLPs in between, the direct effect is the head's own."""
    model, donor, seqs = tiny_model(family, "bridge"), other_model(family, "bridge"), ragged()
    some: dict[str, Any] = {"senders": [(1, 2), (2, 1)], **QUIET}
    own = ml.patch_paths(model, seqs, donor=model, **some)
    assert float(abs(own.effect("target_logprob")).max()) < 1e-5
    found = ml.patch_paths(model, seqs, donor=donor, **some)
    assert found.settings["donor"]["fingerprint"] == model_fingerprint(donor)
    last = ml.patch_activations(model, seqs, donor=donor, site="z", over="head", layers=[2], **QUIET)
    path = found["target_logprob"].sel(layer=2, head=1)
    assert np.allclose(path, last["target_logprob"].sel(layer=2, head=1), atol=1e-5)
    assert float(abs(found.effect("target_logprob").sel(layer=1, head=2)).max()) > 1e-4


@pytest.mark.parametrize("path", ["site", "embedding"])
def test_gradients_estimate_patches_from_a_donor(tiny_model: Any, other_model: Any, path: str) -> None:
    """Integrated gradients are complete: over a layer they sum to the exact patch of the whole layer."""
    model, donor, seqs = tiny_model("olmo", "bridge"), other_model("olmo", "bridge"), ragged()
    layer = 0 if path == "embedding" else 2
    how: dict[str, Any] = {"donor": donor, "over": "layer", "layers": [layer], **QUIET}
    found = ml.attribute_gradients(model, seqs, method="integrated_gradients", path=path, steps=128, **how)
    exact = ml.patch_activations(model, seqs, **how)
    assert np.allclose(found.effect("target_logprob"), exact.effect("target_logprob"), atol=0.05)
    for name in ("target_logprob_clean", "target_logprob_corrupt"):
        assert np.allclose(found[name], exact[name], atol=1e-6)
    none = ml.attribute_gradients(model, seqs, donor=model, over="layer", **QUIET)
    assert float(abs(none.effect("target_logprob")).max()) < 1e-5


@pytest.mark.parametrize(
    ("instrument", "options"),
    [
        ("patching", {"site": "z", "over": "head"}),
        ("neuron_patching", {}),
        ("head_ablation", {"mode": "donor"}),
        ("neuron_ablation", {"mode": "donor"}),
    ],
)
def test_screens_of_a_donor(
    tiny_model: Any, other_model: Any, instrument: str, options: dict[str, Any]
) -> None:
    """Both ways of writing a donor's head or neuron verify the same effects."""
    model, donor, seqs = tiny_model("llama", "bridge"), other_model("llama", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, seqs, instrument=instrument, donor=donor, top_k=3, n_random=2, layers=[1], **options, **QUIET
    )
    assert found.exact.settings["donor"]["fingerprint"] == model_fingerprint(donor)
    site, part = ("mlp_post", "neuron") if "neuron" in instrument else ("z", "head")
    row = found.table.iloc[0]
    name = hook_name(site, 1)
    with torch.no_grad():
        _, cache = donor.run_with_cache(seqs.tokens, names_filter=[name])

    def write(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, :, int(row[part])] = cache[name][:, :, int(row[part])]
        return x

    edit = ml.Intervention("by hand", [(name, write)])
    want = ml.sweep(model, seqs, [edit], engine="reference", **QUIET).effect("target_logprob").mean()
    assert row["exact"] == pytest.approx(float(want), abs=1e-5)
