"""Activations that instruments read: where they are taken, of which rows, and their means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, SequenceError, SiteError
from memlens.forward.batches import make_batches
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import (
    ActivationSource,
    FunctionalPass,
    captured_at_targets,
    mean_activations,
    run_capturing,
)
from memlens.forward.exclusive import computation, kept_of
from memlens.forward.hooks import has_site, hook_name
from memlens.sweeps.contexts import in_dtype
from tests.devices import dev
from tests.small import corrupted, ragged
from tests.tiny import D_VOCAB, random_tokens

MID, LAST, Z = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("olmo2", "bridge")


@torch.no_grad()
def run(model: Any, row: list[int], name: str) -> torch.Tensor:
    """The activation of one sequence alone, `[pos, …]`."""
    return model.run_with_cache(torch.tensor([row]), names_filter=[name])[1][name][0]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_activations_are_those_where_targets_are_predicted(model: Any, cached: bool, batch_size: int) -> None:
    seqs = ragged()
    cache = model.run_with_cache(seqs.tokens)[1] if cached else None
    parts = list(
        captured_at_targets(
            ml.Trunk(model), seqs, [Z, MID], cache=cache, batch_size=batch_size, progress=False
        )
    )
    assert [len(part.final) for part in parts] == [
        min(batch_size, len(seqs) - start) for start in range(0, len(seqs), batch_size)
    ]
    rows = [(part, i) for part in parts for i in range(len(part.final))]
    for (part, i), tokens, prefix in zip(rows, seqs.rows(), seqs.prefix_len.tolist(), strict=True):
        assert list(part.acts) == [Z, MID]
        n = len(tokens) - prefix
        assert part.targets.mask[i].tolist() == [k < n for k in range(part.targets.mask.shape[1])]
        assert part.targets.ids[i, :n].tolist() == tokens[prefix:]
        for name, found in ((Z, part.acts[Z]), (MID, part.acts[MID]), (LAST, part.final)):
            wanted = run(model, tokens, name)[prefix - 1 : -1]
            torch.testing.assert_close(found[i, :n], wanted, rtol=1e-4, atol=1e-5)


def test_the_last_layer_s_output_may_be_asked_for_and_a_cache_must_fit(model: Any) -> None:
    seqs, trunk = ragged(), ml.Trunk(model)
    cache = model.run_with_cache(seqs.tokens, names_filter=[MID, LAST])[1]
    (part,) = captured_at_targets(trunk, seqs, [LAST], cache=cache, progress=False)
    assert torch.equal(part.acts[LAST], part.final)
    with pytest.raises(SiteError, match=rf"the cache has no '{Z}'"):
        next(captured_at_targets(trunk, seqs, [Z], cache=cache, progress=False))
    for wrong in (seqs[:3], ml.load_sequences(np.ones((4, 21), dtype=int), prefix_len=5)):
        with pytest.raises(SequenceError, match=r"has the shape \(4, 20, 32\) and the set \(\d, 2\d\)"):
            next(captured_at_targets(trunk, wrong, [MID], cache=cache, progress=False))
    longer = {name: torch.cat([value, value], 1) for name, value in cache.items()}
    (part,) = captured_at_targets(trunk, seqs, [MID], cache=longer, progress=False)
    assert len(part.final) == 4
    with pytest.raises(EmptySetError):
        next(captured_at_targets(trunk, seqs[:0], [MID], progress=False))


def test_a_source_gives_each_sequence_the_row_that_is_named_repeated_to_its_length(model: Any) -> None:
    seqs, source = ragged(), corrupted(ragged(3))[[2, 0, 1]]
    rows = torch.tensor([1, 2, 0, 1])
    store = ActivationSource(model, source, [MID, Z], rows)
    for batch, _ in make_batches(seqs, 3, CPU):
        found = store.of(batch)
        assert list(found) == [MID, Z]
        for i, number in enumerate(batch.rows.tolist()):
            tokens = source.rows()[rows[number]]
            places = torch.arange(batch.tokens.shape[1]) % len(tokens)
            for name in (MID, Z):
                wanted = run(model, tokens, name)[places]
                torch.testing.assert_close(found[name][i], wanted, rtol=1e-4, atol=1e-5)
    own = ActivationSource(model, seqs, [MID])
    ((batch, _),) = make_batches(seqs, 2, CPU, rows=[3, 1])
    torch.testing.assert_close(own.of(batch)[MID][1, :17], run(model, seqs.rows()[1], MID))


def test_a_source_is_run_under_an_intervention_and_once_in_a_computation(model: Any) -> None:
    seqs, seen = ragged(2), list[list[int]]()

    def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(list(x.shape))
        return 2 * x

    edit = ml.Intervention("double", [("blocks.0.hook_mlp_out", double)])
    under = ActivationSource(model, seqs, [MID], under=edit)
    plain = ActivationSource(model, seqs, [MID, "blocks.0.hook_mlp_out", "blocks.0.attn.hook_pattern"])
    ((batch, _),) = make_batches(seqs, 2, CPU)
    acts = plain.of(batch)
    wanted = acts[MID] + acts["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(under.of(batch)[MID], wanted, rtol=1e-4, atol=1e-5)
    assert acts["blocks.0.attn.hook_pattern"].shape == (2, 4, 20, 20)
    assert len(seen) == 1
    with computation(model):
        first = under.of(batch)
        assert under.of(batch) is first
        assert len(seen) == 2
        ((other, _),) = make_batches(seqs, 2, CPU, rows=[1, 0])
        torch.testing.assert_close(under.of(other)[MID][1, :20], first[MID][0])
        assert len(seen) == 3
    assert set(under.__getstate__()) == set(vars(under))
    assert not under.__getstate__()["_store"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_over_all_real_positions_of_all_sequences(dtype: torch.dtype, tiny_folder: Any) -> None:
    """Summed in double precision: 16 bits would lose most of what thousands of positions add."""
    model = ml.load_model(tiny_folder("olmo2"), backend="bridge", device=dev(), dtype=dtype)
    rows = [torch.randint(0, D_VOCAB - 1, (8 + n % 5,)).tolist() for n in range(90)]
    seqs = ml.load_sequences(rows, prefix_len=3)
    found = mean_activations(model, seqs, [MID, Z], batch_size=1)
    for name in (MID, Z):
        wanted = torch.cat([run(model, row, name) for row in rows]).double().mean(0).to(dtype)
        assert found[name].dtype == dtype
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    together = mean_activations(model, seqs, [MID], batch_size=32)[MID]
    torch.testing.assert_close(
        together, found[MID], rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


CAPTURED = ("resid_pre", "resid_mid", "resid_post", "v", "z", "attn_out", "mlp_out")


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "hooked"), ("llama_gqa", "bridge"), ("olmo2", "bridge")]
)
@torch.no_grad()
def test_the_pass_by_functions_is_the_model_s(tiny_model: Any, family: str, backend: str) -> None:
    model, tokens = tiny_model(family, backend), random_tokens(3, 24)
    trunk = ml.Trunk(model)
    names = [hook_name(site, layer) for site in CAPTURED if has_site(model, site) for layer in (0, 2)]
    by = FunctionalPass.of(trunk, tokens, names)
    assert by is not None
    (final, acts), (want, wanted) = by.run(tokens, names), run_capturing(trunk, tokens, names)
    torch.testing.assert_close(final, want, rtol=1e-4, atol=1e-5)
    for name in names:
        torch.testing.assert_close(acts[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert FunctionalPass.of(trunk, tokens, [*names, "blocks.0.attn.hook_q"]) is None  # nothing gives it
    with model.hooks(fwd_hooks=[(names[0], lambda x, hook: 2 * x)]):
        assert FunctionalPass.of(trunk, tokens, names) is None


@torch.no_grad()
def test_a_pass_is_compared_once_and_a_model_it_does_not_equal_runs_itself(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ml.load_model(tiny_folder("olmo2"), backend="bridge", device=dev())  # no test has compared it yet
    trunk, tokens = ml.Trunk(model), random_tokens(2, 12)
    plain, ran = FunctionalBlocks.run, []

    def look(self: Any, layer: int, *rest: Any, **traced: Any) -> torch.Tensor:
        ran.append(layer)
        return plain(self, layer, *rest, **traced)

    monkeypatch.setattr(FunctionalBlocks, "run", look)
    with computation(model):
        known = FunctionalPass.of(trunk, tokens, [Z])
        assert known is not None
        assert ran
        ran.clear()
        assert FunctionalPass.of(trunk, tokens[:, :9], [Z]) is not None
        assert known.of_model(trunk, tokens, [Z]) is known
        assert not ran
        assert known.of_model(trunk, random_tokens(2, 13), [Z]) is not known  # longer than what was compared
        assert ran
    monkeypatch.setattr(FunctionalBlocks, "run", lambda *args, **traced: plain(*args, **traced) * (1 + 1e-3))
    assert FunctionalPass.of(trunk, tokens, [Z]) is None


@torch.no_grad()
def test_a_pass_is_made_once_in_a_computation_and_keeps_what_short_sequences_end_with(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("gpt_neox", "bridge"), random_tokens(2, 12)
    trunk = ml.Trunk(model)
    with computation(model):
        by = FunctionalPass.of(trunk, tokens, [Z])
        assert by is not None
        final, acts = by.run(tokens, [Z])
        assert FunctionalPass.of(trunk, tokens[:, :9], []) is by
        other = by.run(tokens.flip(0), [])[0]
        with monkeypatch.context() as patch:
            patch.delattr(FunctionalBlocks, "run")
            assert by.run(tokens, [])[0] is final
        torch.testing.assert_close(other, final.flip(0))
        torch.testing.assert_close(by.run(tokens, [Z])[1][Z], acts[Z])
        monkeypatch.setattr(by, "_free", final.nbytes - 1)
        assert by.run(tokens + 1, [])[0] is not by.run(tokens + 1, [])[0]
    with computation(model):
        assert FunctionalPass.of(trunk, tokens, [Z]) is not by  # weights may have changed since


@torch.no_grad()
def test_a_pass_in_another_dtype_ends_with_it(tiny_model: Any) -> None:
    model, tokens = tiny_model("gpt_neox", "bridge"), random_tokens(2, 12)
    with computation(model):
        plain = FunctionalPass.of(ml.Trunk(model), tokens, [Z])
        assert plain is not None
        with in_dtype(model, torch.float64):
            wide = FunctionalPass.of(ml.Trunk(model), tokens, [Z])
            assert wide is not None
            assert wide.run(tokens, [])[0].dtype == torch.float64
        assert not kept_of(model)  # the cast weights would stay in memory
        again = FunctionalPass.of(ml.Trunk(model), tokens, [Z])
        assert again is not None
        assert torch.equal(again.run(tokens, [])[0], plain.run(tokens, [])[0])
