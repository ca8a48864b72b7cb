"""Tuned lenses: the identity, files of both layouts, training, and what decoding does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import (
    FileFormatError,
    NonFiniteError,
    OptionError,
    ResultError,
    SequenceError,
    SourceNotFoundError,
    WriteError,
)
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.decoding import STATISTICS, compare_to_final, portions
from tests.devices import dev
from tests.small import CASES, ragged
from tests.tiny import D_VOCAB

VARIABLES = (*STATISTICS, "first_promotion", "stable_promotion", "boost", "promotion_share")


def random_lens(n_layers: int = 3, d_model: int = 32, scale: float = 0.1, **facts: Any) -> ml.lens.TunedLens:
    generator = torch.Generator().manual_seed(3)
    weight = scale * torch.randn(n_layers, d_model, d_model, generator=generator)
    return ml.lens.TunedLens(weight, scale * torch.randn(n_layers, d_model, generator=generator), facts)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_identity_translators_are_the_logit_lens(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    lens = ml.lens.TunedLens.identity(len(model.blocks), 32)
    plain = ml.decode_residual(model, seqs, progress=False)
    tuned = ml.decode_residual(model, seqs, lens=lens, progress=False)
    for name in VARIABLES:
        assert np.array_equal(plain[name], tuned[name], equal_nan=True)
    assert plain.settings["lens"].startswith("logit lens")
    assert tuned.settings["lens"].startswith("tuned lens")
    assert tuned.settings["lens_fingerprint"] == lens.fingerprint != random_lens().fingerprint


def test_a_tuned_layer_by_hand(tiny_model: Any) -> None:
    """The output of block l is the input of block l + 1, so translator l + 1 reads it; the last has none."""
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    lens = random_lens(4)
    data = ml.decode_residual(model, seqs, lens=lens, progress=False).data
    plain = ml.decode_residual(model, seqs, progress=False).data
    row, t = 1, 2
    position = int(seqs.prefix_len[row]) + t
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens)
        h = cache["blocks.1.hook_resid_post"][row, position - 1]
        assert torch.equal(h, cache["blocks.2.hook_resid_pre"][row, position - 1])
        hf = model.original_model
        moved = h + lens.weight[2] @ h + lens.bias[2]
        logp = hf.lm_head(hf.transformer.ln_f(moved[None, None]))[0, 0].log_softmax(-1)
        final = model(seqs.tokens)[row, position - 1].log_softmax(-1)
    cell = data.isel(sequence=row, target=t).sel(layer=1)
    target = seqs.tokens[row, position]
    assert float(cell.probability) == pytest.approx(logp[target].exp().item(), abs=1e-6)
    assert int(cell["rank"]) == int((logp > logp[target]).sum())
    assert float(cell.entropy) == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
    want = torch.nn.functional.kl_div(logp, final, log_target=True, reduction="sum").item()
    assert float(cell.kl_to_final) == pytest.approx(want, abs=1e-5)
    last = {"layer": -1}
    assert np.array_equal(data.probability.isel(last), plain.probability.isel(last), equal_nan=True)
    assert float(abs(data.probability - plain.probability).isel(layer=0).max()) > 1e-3


def test_other_streams_are_read_by_the_logit_lens(tiny_model: Any) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    lens, streams = random_lens(), ("mlp_out", "resid_post", "attn_out")
    tuned = ml.decode_residual(model, seqs, lens=lens, streams=streams, progress=False)
    plain = ml.decode_residual(model, seqs, streams=streams, progress=False)
    alone = ml.decode_residual(model, seqs, lens=lens, progress=False)
    for stream in ("mlp_out", "attn_out"):
        a, b = tuned["probability"].sel(stream=stream), plain["probability"].sel(stream=stream)
        assert np.allclose(a, b, atol=1e-6, equal_nan=True)
    own = tuned["probability"].sel(stream="resid_post")
    assert np.allclose(own, alone["probability"], atol=1e-6, equal_nan=True)
    assert tuned.settings["other_streams"].startswith("logit lens")
    with pytest.raises(OptionError, match="nothing that a tuned lens reads"):
        ml.decode_residual(model, seqs, lens=lens, streams=("attn_out",))


def test_statistics_do_not_depend_on_portions(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Trunk(tiny_model("gpt_neox", "bridge"))
    generator = torch.Generator().manual_seed(0)
    resid, final = torch.randn(23, 4, 32, generator=generator), torch.randn(23, 32, generator=generator)
    ids = torch.randint(0, D_VOCAB, (23,), generator=generator)
    whole = compare_to_final(trunk, resid, final, ids)
    monkeypatch.setattr("memlens.instruments.decode.decoding._CACHE_BYTES", {"cpu": 1})
    monkeypatch.setitem(portions.__defaults__[0], "cpu", 3 * 5 * 4 * D_VOCAB)
    assert [s.stop - s.start for s in portions(trunk, 23, 5)] == [3] * 7 + [2]
    assert torch.allclose(whole, compare_to_final(trunk, resid, final, ids), atol=1e-5)
    itself = compare_to_final(trunk, final[:, None], final, ids)
    assert float(itself[..., STATISTICS.index("kl_to_final")].max()) == 0
    assert torch.allclose(itself, compare_to_final(trunk, final[:, None], final, ids, 0), atol=1e-6)


@pytest.mark.parametrize("layout", ["memlens", "published"])
def test_files_come_back(tmp_path: Path, layout: str) -> None:
    lens = random_lens(base_model="EleutherAI/pythia-70m", revision="step3000", note={"a": [1]})
    folder = lens.save(tmp_path / "lens", layout=layout)
    found = ml.lens.TunedLens.load(folder)
    assert torch.equal(found.weight, lens.weight)
    assert torch.equal(found.bias, lens.bias)
    assert found.fingerprint == lens.fingerprint
    assert found.facts["base_model"] == "EleutherAI/pythia-70m"
    assert found.facts["revision"] == "step3000"
    assert ("note" in found.facts) == (layout == "memlens")
    assert torch.equal(ml.lens.TunedLens.load(next(folder.iterdir())).weight, lens.weight)
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def published(folder: Path, state: dict[str, Any], **config: Any) -> Path:
    """A folder as the tuned-lens library writes it: the state dict of a list of linear layers."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "params.pt")
    plain = {"base_model_name_or_path": "gpt2", "d_model": 8, "num_hidden_layers": 2, "bias": True}
    (folder / "config.json").write_text(json.dumps({**plain, "unembed_hash": "x", **config}))
    return folder


def test_published_files_are_linear_layers(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])
    lens = ml.lens.TunedLens.load(published(tmp_path / "a", layers.half().state_dict()))
    h = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.allclose(lens.translate(h, 0), h + layers.float()[1](h), atol=1e-6)
        assert torch.allclose(lens.translate(h, -1), h + layers[0](h), atol=1e-6)
    assert torch.equal(lens.translate(h, 1), h)
    bare = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(2)])
    assert not ml.lens.TunedLens.load(published(tmp_path / "b", bare.state_dict(), bias=False)).bias.any()


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_damaged_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)]).state_dict()
    cases = [
        ({**state, "2.weight": torch.zeros(8, 8)}, {}, r"2\.weight"),
        ({**state, "0.weight": torch.zeros(8, 7)}, {}, r"\(8, 7\)"),
        ({**state, "0.bias": torch.full((8,), torch.nan)}, {}, "NaN"),
        (state, {"num_hidden_layers": 3}, "3 layers"),
        (state, {"d_model": 9}, r"\(9, 9\)"),
        (state, {"d_model": None}, "d_model=None"),
        ({**state, "0.bias": "text"}, {}, "not named tensors"),
        ({"x": _Code()}, {}, "cannot be read as plain tensors"),
    ]
    for i, (content, config, words) in enumerate(cases):
        folder = published(tmp_path / str(i), content, **config)
        with pytest.raises(FileFormatError, match=words):
            ml.lens.TunedLens.load(folder)
    assert capsys.readouterr().out == ""
    (published(tmp_path / "cut", state) / "params.pt").write_bytes(b"PK")
    (published(tmp_path / "text", state) / "config.json").write_text("{")
    (published(tmp_path / "half", state) / "config.json").unlink()
    for name, words in {"cut": "is damaged", "text": "is damaged", "half": "is not a tuned lens"}.items():
        with pytest.raises(FileFormatError, match=words):
            ml.lens.TunedLens.load(tmp_path / name)
    with pytest.raises(SourceNotFoundError, match="no tuned lens at"):
        ml.lens.TunedLens.load(tmp_path / "missing")


def test_own_files_that_do_not_belong_together(tmp_path: Path) -> None:
    random_lens().save(tmp_path / "a")
    random_lens(scale=0.2).save(tmp_path / "b")
    (tmp_path / "a/lens.json").replace(tmp_path / "b/lens.json")
    with pytest.raises(FileFormatError, match=r"not the file that lens\.json describes"):
        ml.lens.TunedLens.load(tmp_path / "b")
    (tmp_path / "b/lens.safetensors").write_bytes(b"cut")
    with pytest.raises(FileFormatError, match="damaged"):
        ml.lens.TunedLens.load(tmp_path / "b")
    with pytest.raises(OptionError, match="layout='pickle'"):
        random_lens().save(tmp_path / "c", layout="pickle")


def test_a_lens_of_another_model_is_refused(tiny_model: Any, tiny_folder: Any, tmp_path: Path) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    for lens in (random_lens(4), random_lens(d_model=16)):
        with pytest.raises(ResultError, match="load the lens that was trained on this model"):
            ml.decode_residual(model, seqs, lens=lens)
    with pytest.raises(ResultError, match="process_weights=True"):
        ml.decode_residual(model, seqs, lens=random_lens(processed_weights=True))
    with pytest.raises(SourceNotFoundError, match="or 'logit'"):
        ml.decode_residual(model, seqs, lens="tuned")
    folder = random_lens().save(tmp_path / "lens", layout="published")
    found = ml.decode_residual(model, seqs, lens=folder, progress=False)
    assert found.settings["lens_fingerprint"] == random_lens().fingerprint
    with pytest.raises(OptionError, match="do not fit"):
        ml.lens.TunedLens(torch.zeros(2, 4, 4), torch.zeros(3, 4))
    with pytest.raises(ResultError, match="no held-out divergence"):
        random_lens().heldout_kl()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_brings_early_layers_near_the_end(optimizer: str) -> None:
    model = ml.load_model("zoo/pythia-s")
    rows = ml.load_sequences("zoo", model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lens = ml.lens.train_tuned_lens(
        model, rows, steps=25, batch_size=8, optimizer=optimizer, max_holdout=16, progress=False
    )
    table = lens.heldout_kl().set_index("layer")
    assert table.index.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    gain = table["logit_lens"] / table["tuned_lens"]
    assert (gain.loc[0:4] > 1.3).all()
    assert gain.loc[-1] > 1.7
    assert table.loc[5, ["logit_lens", "tuned_lens"]].tolist() == [0, 0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    held = rows[:8]
    plain = ml.decode_residual(model, held, progress=False)["kl_to_final"].mean(("sequence", "target"))
    tuned = ml.decode_residual(model, held, lens=lens, progress=False)["kl_to_final"]
    assert bool((tuned.mean(("sequence", "target")) < plain)[:-1].all())


def test_heldout_divergence_is_that_of_decoding(tiny_model: Any) -> None:
    """The same number from `decode_residual` where the only tokens are those that predict targets."""
    model = tiny_model("llama", "bridge")
    rows = np.random.default_rng(0).integers(0, 100, (2, 12))
    lens = ml.lens.train_tuned_lens(model, rows, steps=1, batch_size=1, holdout=0.5, progress=False)
    first = torch.randperm(2, generator=torch.Generator().manual_seed(0))[0]
    seqs = ml.SequenceSet.from_tokens([[*rows[first].tolist(), 0]], 1)
    table = lens.heldout_kl().set_index("layer")
    for name, used in (("logit_lens", "logit"), ("tuned_lens", lens)):
        kl = ml.decode_residual(model, seqs, lens=used, progress=False)["kl_to_final"]
        assert np.allclose(kl.mean(("sequence", "target")), table.loc[0:, name], atol=1e-5)
    assert (table["n_tokens"] == 12).all()


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "hooked"), ("olmo2", "bridge")])
def test_a_step_follows_the_gradient(tiny_model: Any, family: str, backend: str) -> None:
    """One step of plain SGD against autograd through the whole expression, the model's own softmax too."""
    model = tiny_model(family, backend)
    rows = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    options = {"steps": 1, "batch_size": 1, "lr": 0.5, "momentum": 0.5, "clip": 1e9, "holdout": 0.5}
    lens = ml.lens.train_tuned_lens(model, rows, progress=False, **options)
    used = torch.randperm(2, generator=torch.Generator().manual_seed(0))[1]
    with torch.no_grad():
        logits, cache = model.run_with_cache(rows[used][None])
    weight = torch.zeros(len(model.blocks), 32, 32, requires_grad=True)
    loss = torch.zeros(())
    for i in range(len(model.blocks)):
        h = cache[f"blocks.{i}.hook_resid_pre"][0]
        out = model.unembed(model.ln_final((h + h @ weight[i].T)[None]))
        loss = loss + torch.nn.functional.kl_div(
            out.log_softmax(-1)[0], logits[0].log_softmax(-1), log_target=True, reduction="batchmean"
        )
    (slope,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(lens.weight, -0.5 * 0.5 * 1.5 * slope, atol=1e-5, rtol=1e-4)


def test_training_is_a_function_of_its_seed(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    lenses = [
        ml.lens.train_tuned_lens(model, seqs, steps=3, batch_size=2, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert lenses[0].fingerprint == lenses[1].fingerprint != lenses[2].fingerprint
    assert lenses[0].facts["training"]["steps"] == 3
    assert lenses[0].facts["training"]["n_sequences"] == 3


def test_bad_training_is_told_before_it_runs(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    for options, words in (
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"steps": 0}, "steps=0"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ):
        with pytest.raises(OptionError, match=words):
            ml.lens.train_tuned_lens(model, seqs, **options)
    with pytest.raises(SequenceError, match="two or more"):
        ml.lens.train_tuned_lens(model, seqs[:1])
    with pytest.raises(SequenceError, match="token id 5000"):
        ml.lens.train_tuned_lens(model, [[1, 5000], [1, 2]])
    with pytest.raises(NonFiniteError, match="smaller lr"):
        ml.lens.train_tuned_lens(model, seqs, lr=1e38, clip=1e38, steps=9, progress=False)


def test_sixteen_bits(tiny_folder: Any) -> None:
    """Translators stay in float32, and the last layer stays exact."""
    model = ml.load_model(tiny_folder("llama"), dtype="bfloat16", device=dev())
    lens = ml.lens.train_tuned_lens(model, ragged(), steps=3, batch_size=2, progress=False)
    assert lens.weight.dtype == torch.float32
    assert float(lens.weight[1].abs().max()) > 0
    data = ml.decode_residual(model, ragged(), lens=lens, progress=False).data
    assert float(data.kl_to_final.isel(layer=-1).max()) == 0
    assert float(data.predicted_rank.isel(layer=-1).max()) == 0


@pytest.mark.parametrize("layout", ["memlens", "published"])
def test_a_failed_save_keeps_the_old_lens(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = random_lens(), random_lens(scale=0.2)
    folder = old.save(tmp_path / "lens", layout=layout)
    for place, error in (("write_json", KeyboardInterrupt), (
        "save_file" if layout == "memlens" else "torch.save", RuntimeError("No space left")
    )):  # fmt: skip

        def fail(*_: object, error: Any = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"memlens.instruments.decode.lens.{place}", fail)
            with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else WriteError):
                new.save(folder, layout=layout)
        assert ml.lens.TunedLens.load(folder).fingerprint == old.fingerprint
    new.save(folder, layout=layout)
    assert ml.lens.TunedLens.load(folder).fingerprint == new.fingerprint
