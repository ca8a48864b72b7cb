"""The parts of `check_model`: bounds, reports and notes, on numbers made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memlens as ml
from memlens.errors import ModelLoadError
from memlens.forward.check import comparison, sites
from memlens.forward.check.comparison import compared
from memlens.forward.check.kinds import kinds_of_layers
from memlens.forward.check.model import _trunk, check_model
from memlens.forward.check.reference import Reference, probe_tokens, record_reference
from memlens.forward.check.table import Check, ModelCheck
from memlens.forward.hooks import SITES, hook_name
from tests.devices import dev
from tests.tiny import random_tokens

DTYPES = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (1e-3, 1e-4),
    torch.bfloat16: (0.04, 0.02),
    torch.float16: (0.01, 0.005),
}
"""The documented bounds: over the whole depth, and where both sides run on the same modules."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 4, 5, 16, 100])
def test_bounds_grow_with_the_root_of_the_depth_in_16_bits(dtype: torch.dtype, depth: int) -> None:
    whole, same = DTYPES[dtype]
    x = torch.randn(3, 50).to(dtype)
    growth = math.sqrt(max(1, depth / 4)) if dtype.itemsize == 2 else 1
    assert compared("x", x, x, comparison.TOLERANCE, depth=depth).allowed == pytest.approx(whole * growth)
    assert compared("x", x, x, comparison.SAME).allowed == pytest.approx(same)
    others = {torch.float32: 0.5}  # a type without a bound has that of float32
    assert compared("x", x, x, others, depth=4).allowed == 0.5


def test_differences_are_root_mean_squares_relative_to_the_centered_reference() -> None:
    b = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 6.0, 6.0]]) + 100
    a = b + torch.tensor([[0.1, -0.1, 0.1, -0.1], [0.3, 0.3, -0.3, -0.3]])
    centered = torch.tensor([[-3.0, -1.0, 1.0, 3.0], [-2.0, -2.0, 2.0, 2.0]])
    expected = math.sqrt((4 * 0.01 + 4 * 0.09) / 8) / math.sqrt(float(centered.square().mean()))
    for bound, status in ((expected * 1.001, "ok"), (expected * 0.999, "failed")):
        found = compared("it", a, b, {torch.float32: bound}, "a note")
        assert found.difference == pytest.approx(expected, rel=1e-4)
        assert (found.name, found.status, found.allowed, found.note) == ("it", status, bound, "a note")
    assert compared("", b, b, {torch.float32: 0.0}).status == "ok"  # no more than allowed
    assert compared("", a * math.nan, b, {torch.float32: 9.0}).status == "failed"
    assert compared("", a * math.nan, b, {torch.float32: 9.0}).difference == math.inf
    flat = torch.ones(2, 3)  # a reference without spread has a size all the same
    assert compared("", flat + 1e-9, flat, {torch.float32: 1.0}).difference < math.inf
    found = compared("x", a, b[:, :3], {torch.float32: 1.0})
    assert (found.status, found.note, found.allowed) == ("failed", "shape (2, 4), not (2, 3)", 1.0)
    assert math.isnan(found.difference)


CHECKS = (
    Check("logits", "ok", 1.2e-5, 1e-3, note="against another"),
    Check("site q", "refused", 0.5, 1e-4, 2, "does something else"),
    Check("site z", "absent", note="is not there"),
)


def test_a_report_is_a_table_with_a_verdict() -> None:
    found = ModelCheck("a/model", "float32", CHECKS)
    assert found.ok
    assert found.failures == []
    found.raise_if_failed()
    assert repr(found) == (
        "a/model (float32): ok\n"
        "check   status   difference  layer  note\n"
        "logits  ok       1.2e-05            against another\n"
        "site q  refused  5.0e-01     2      does something else\n"
        "site z  absent                      is not there"
    )
    assert found._repr_html_().startswith("<h4>a/model (float32): ok</h4><table")
    table = found.to_frame()
    assert list(table) == ["name", "status", "difference", "allowed", "layer", "note"]
    assert table["name"].tolist() == ["logits", "site q", "site z"]
    escaped = ModelCheck("<b>", "float32", CHECKS)._repr_html_()
    assert escaped.startswith("<h4>&lt;b&gt; (float32): ok</h4>")


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        (
            Check("logits", "failed", 0.1234, 0.04, 3, "differs"),
            "'a/model' in bfloat16 fails the check of its logits, first in layer 3: "
            "differs by 0.12 (allowed: 0.04). ",
        ),
        (
            Check("trunk", "failed", note="has another shape"),
            "'a/model' in bfloat16 fails the check of its trunk: has another shape. ",
        ),
        (Check("trunk", "failed", 2.0, 1.0, 0, "x"), "its trunk, first in layer 0: x by 2 (allowed: 1). "),
    ],
)
def test_the_first_failure_is_an_error(failed: Check, message: str) -> None:
    found = ModelCheck("a/model", "bfloat16", (*CHECKS, failed, Check("later", "failed")))
    assert not found.ok
    assert [check.name for check in found.failures] == [failed.name, "later"]
    with pytest.raises(ModelLoadError) as raised:
        found.raise_if_failed()
    assert message in str(raised.value)
    assert str(raised.value).endswith(
        "Numbers from it would be wrong, so it is refused; try the other backend."
    )
    assert "(bfloat16): 2 failed" in repr(found)
    assert "(bfloat16): failed</h4>" in found._repr_html_()


def test_probe_tokens_are_fixed_and_spread_over_the_vocabulary() -> None:
    for vocab, n_ctx, length in (
        (50_000, 64, 12),
        (50_000, None, 12),
        (100, 5, 5),
        (7, 12, 12),
        (100, 11, 11),
    ):
        tokens = probe_tokens(vocab, n_ctx)
        assert tokens.shape == (2, length)
        assert tokens.tolist() == probe_tokens(vocab, n_ctx).tolist()
        assert int(tokens.max()) < vocab
        assert int(tokens.min()) >= 0
        assert len(tokens.unique()) == min(2 * length, vocab)
    spread = probe_tokens(50_000, None).flatten().sort().values
    assert int(spread[0]) < 10_000 < 40_000 < int(spread[-1])
    assert 0 not in probe_tokens(50_000, None)  # not an id with a meaning of its own


class Block(nn.Module):
    def __init__(
        self, layer: int, *, width: int = 4, window: int | None = None, inner: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, width), inner()
        self.layer, self.name = layer, f"blocks.{layer}.attn"
        self.window = -1 if window is None else window


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ([{}, {}, {}, {}], [0, 3]),
        ([{}], [0]),
        ([{}, {"window": 4}, {"window": 4}, {}], [0, 1, 3]),
        ([{}, {}, {"width": 5}, {}, {}], [0, 2, 4]),
        ([{}, {"inner": nn.GELU}, {"inner": nn.GELU}, {"inner": nn.GELU}], [0, 1, 3]),
        ([{"window": 1}, {"window": 2}, {"window": 3}], [0, 1, 2]),
    ],
)
def test_layers_are_of_one_kind_if_they_differ_by_their_number_alone(
    changes: list[Any], kinds: list[int]
) -> None:
    model = SimpleNamespace(blocks=[Block(n, **change) for n, change in enumerate(changes)])
    assert kinds_of_layers(model) == kinds


def test_a_model_that_memlens_did_not_load_is_not_compared(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"), backend="bridge", device=dev())
    logits = check_model(model, layers=[0]).checks[0]
    assert (logits.name, logits.status) == ("logits", "ok")
    assert logits.note.endswith("against Hugging Face's, when it was loaded")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    logits = check_model(model, layers=[0]).checks[0]
    assert (logits.status, logits.note) == ("not compared", "the model has been changed since it was loaded")
    unchecked = ml.load_model(tiny_folder("llama"), backend="bridge", device=dev(), check_weights=False)
    logits = check_model(unchecked, layers=[0]).checks[0]
    assert (logits.status, logits.note) == ("not compared", "not loaded by memlens, or unchecked")


@torch.no_grad()
def test_the_first_layer_that_differs_from_the_reference_is_named(tiny_model: Any) -> None:
    model = tiny_model("llama", "bridge")
    tokens = probe_tokens(100, 64)
    names = [f"blocks.{n}.hook_resid_pre" for n in range(3)]
    logits, cache = model.run_with_cache(tokens, names_filter=names)
    resid = [cache[name] for name in names]
    wrong = logits * 1.1

    def layer(given: list[torch.Tensor]) -> tuple[int | None, str]:
        found = comparison.against_huggingface(model, Reference(tokens, given, wrong), cache, logits)
        assert found.status == "failed"
        return found.layer, found.note

    begins = "differs from Hugging Face's model"
    assert layer(resid) == (2, f"{begins} after the last layer's input")
    assert layer([resid[0] * 1.1, *resid[1:]]) == (0, f"{begins} in its embedding")
    assert layer([resid[0], resid[1] * 1.1, resid[2]]) == (0, begins)
    assert layer([resid[0], resid[1], resid[2] * 1.1]) == (1, begins)
    assert layer([]) == (2, f"{begins} after the last layer's input")
    right = comparison.against_huggingface(model, Reference(tokens, resid, logits), cache, logits)
    assert (right.status, right.layer, right.note) == ("ok", None, "against Hugging Face's")
    assert right.allowed == 1e-3


@torch.no_grad()
def test_a_processed_model_is_compared_by_log_probabilities(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, logits = tiny_model("llama", "bridge"), torch.randn(2, 12, 20)
    shifted = Reference(random_tokens(2, 12), [], logits + torch.randn(2, 12, 1))
    assert comparison.against_huggingface(model, shifted, {}, logits).status == "failed"
    monkeypatch.setattr(comparison, "describe", lambda model: {"processed_weights": True})
    found = comparison.against_huggingface(model, shifted, {}, logits)
    assert (found.status, found.note) == ("ok", "log-probabilities against Hugging Face's")


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.02), (torch.float32, 1e-3)])
def test_what_a_layer_adds_is_compared_beyond_rounding(dtype: torch.dtype, allowed: float) -> None:
    """A trunk, or the model's own pass, whose layer 1 adds a little too much to what the reference says."""
    resid = [torch.full((1, 2, 4), 8.0, dtype=dtype)]
    for step in (1.0, 2.0, 4.0):
        resid.append(resid[-1] + step)
    right = Check("logits", "ok", 0.0, 1.0)
    added = 2 + torch.finfo(dtype).eps * 11 / allowed  # from 9 to 11, and the rounding of what is added to

    def trunk(share: float) -> Any:
        def run(start: torch.Tensor, layer: int, stop: int) -> torch.Tensor:
            assert stop == layer + 1
            return resid[stop].double() + share * allowed * added * (layer == 1)

        return SimpleNamespace(device=torch.device("cpu"), run=run)

    def made(share: float) -> dict[int, torch.Tensor]:
        return {n: trunk(share).run(resid[n], n, n + 1) for n in range(3)}

    for by, own in ((trunk(0.99), {}), (None, made(0.99)), (trunk(9), made(0.99)), (trunk(0.99), made(9))):
        assert comparison.by_layer(by, resid, own, right) is right
    assert comparison.by_layer(None, resid, {}, right) is right  # nothing to compare with
    for by, own in ((trunk(1.01), {}), (None, made(1.01)), (trunk(1.01), made(math.nan))):
        found = comparison.by_layer(by, resid, own, right)
        assert (found.name, found.status, found.layer, found.allowed) == ("logits", "failed", 1, allowed)
        assert found.difference == pytest.approx(1.01 * allowed, rel=1e-3)
        assert found.note == "what the layer adds to the residual differs from Hugging Face's model"


def test_the_worst_layer_is_shown_for_each_site() -> None:
    order = ["absent", "ok", "ignored", "refused", "failed"]
    assert sorted(sites._BADNESS, key=sites._BADNESS.__getitem__) == order
    assert len(set(sites._BADNESS.values())) == 5


def test_zeros_are_written_into_their_rows_and_the_activation_is_kept() -> None:
    store: dict[str, torch.Tensor] = {}
    x = torch.ones(6, 2)
    out = sites._zeroed(slice(2, 4), 6, "a", store)(x, None)
    assert out.sum(1).tolist() == [2, 2, 0, 0, 2, 2]
    assert x.sum() == 12  # not in place
    assert store["a"] is out
    experts = sites._zeroed(slice(2, 4), 5, "b", store)(x, None)
    assert experts.sum() == 12  # another first axis: nothing is written
    assert store["b"] is experts


class Recorded(nn.Module):
    """Stands in for a model of transformers, and keeps how it was called."""

    def __init__(self, config: Any, states: Any) -> None:
        super().__init__()
        self.weight, self.config, self.states = nn.Parameter(torch.ones(1)), config, states
        self.calls: list[Any] = []
        self.attention: list[str] = []

    def set_attn_implementation(self, name: str) -> None:
        self.attention.append(name)

    def forward(self, **given: Any) -> Any:
        tokens = given.pop("input_ids")
        self.calls.append((tokens, given, self.training, self.attention[-1]))
        return SimpleNamespace(logits=self.weight * tokens[..., None], **self.states)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_reference_is_one_plain_pass_over_the_probe_tokens(wrapped: bool) -> None:
    text: Any = SimpleNamespace(vocab_size=50, max_position_embeddings=7, _attn_implementation="sdpa")
    config = SimpleNamespace(vocab_size=9, get_text_config=lambda: text) if wrapped else text
    states = [torch.full((2, 7, 3), float(n), requires_grad=True) for n in range(3)]
    model = Recorded(config, {"hidden_states": tuple(states)}).train()
    found = record_reference(model, "any")
    ((tokens, given, training, attention),) = model.calls
    assert tokens.tolist() == found.tokens.tolist() == probe_tokens(50, 7).tolist()
    assert given == {"output_hidden_states": True, "use_cache": False}
    assert (training, attention) == (False, "eager")
    assert (model.training, model.attention) == (True, ["eager", "sdpa"])
    assert [float(state.mean()) for state in found.resid] == [0, 1]  # the last is behind the final norm
    assert found.logits.tolist() == tokens[..., None].tolist()
    assert not any(state.requires_grad for state in (*found.resid, found.logits))
    without = Recorded(SimpleNamespace(vocab_size=50), {})
    found = record_reference(without, "any")
    assert (found.resid, found.tokens.shape, without.attention) == ([], (2, 12), ["eager"])


def off_by(x: torch.Tensor, share: float) -> torch.Tensor:
    """Another tensor, whose difference as `compared` measures it is `share`."""
    return x + share * (x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("checked", [[0, 1, 2], [0, 1]])
def test_embedding_layers_and_unembedding_are_compared_each(checked: list[int]) -> None:
    tokens, logits = random_tokens(2, 5), torch.randn(2, 5, 9)
    names = [*(hook_name("resid_pre", n) for n in range(3)), hook_name("resid_post", 2)]
    resid = {name: torch.randn(2, 5, 4) for name in names}
    outputs = [resid[name] for name in names[1:]]

    def check(**errors: float) -> Check:
        def run(start: torch.Tensor, first: int) -> torch.Tensor:
            assert (first, start is resid[names[2]]) == (2, True)
            return resid[names[3]]

        def unembed(final: torch.Tensor) -> torch.Tensor:
            torch.testing.assert_close(final, last[:, -3:])
            return off_by(logits[:, -3:], errors.get("unembed", 0))

        runs = [
            sites.LayerRun(n, off_by(outputs[n], errors.get(f"layer_{n}", 0)), {}, {}, {}) for n in checked
        ]
        last = runs[-1].out if checked[-1] == 2 else resid[names[3]]
        embedded = off_by(resid[names[0]], errors.get("embed", 0))
        trunk = SimpleNamespace(n_layers=3, embed=lambda given: embedded, run=run, unembed=unembed)
        found, final = _trunk(trunk, tokens, resid, logits, runs)  # type: ignore[arg-type]
        if found.status == "ok":
            assert torch.equal(final, last)
        assert found.name == "trunk"
        return found

    begins = "embed, layers and unembed together are not the model's own forward pass"
    behind = ": what follows the last layer (norm, unembedding, scaling of the logits) differs"
    failures: dict[str, tuple[int | None, str]] = {
        "embed": (0, f"{begins}: the embedding differs"),
        **{f"layer_{n}": (n, begins) for n in checked},
        "unembed": (None, begins + behind),
    }
    for place, (layer, note) in failures.items():
        slight = check(**dict.fromkeys(failures, 2e-5) | {place: 8e-5})
        assert (slight.status, slight.layer, slight.note) == ("ok", None, "")
        assert slight.difference == pytest.approx(8e-5, rel=0.02)  # the largest
        found = check(**{place: 5e-4})
        assert (found.status, found.layer, found.note) == ("failed", layer, note)
        assert found.difference == pytest.approx(5e-4, rel=0.02)
    del resid[names[1]]  # a model that does not show what layer 1 gets
    assert check(layer_0=5e-4).status == "ok"


@pytest.mark.parametrize("parallel", [True, False])
def test_what_a_zero_at_each_site_must_do(parallel: bool) -> None:
    def activations() -> dict[str, torch.Tensor]:
        return {site: torch.randn(2, 3, 4, 4) for site in SITES}

    plain, run = activations(), activations()
    named = [{hook_name(site, 1): x for site, x in each.items()} for each in (plain, run)]
    trunk: Any = SimpleNamespace(parallel=parallel)
    found = {site: claim(named[1]) for site, claim in sites._claims(trunk, 1, named[0])}

    def constant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x[0, 0].expand(2, 3, 4, 4)  # the same at every position of every sequence

    nothing = torch.zeros(2, 3, 4, 4)
    by_place = run["pattern"], run["pattern"][[0, 0]]
    wanted = {
        "resid_pre": constant(run["attn_out"] + run["mlp_out"]),
        "resid_mid": constant(run["mlp_out"]),
        "attn_out": (run["resid_mid"], plain["resid_pre"]),
        "mlp_out": (run["resid_post"], plain["resid_mid"]),
        "q": by_place,
        "k": by_place,
        "v": (run["z"], nothing),
        "pattern": (run["z"], nothing),
        "z": constant(run["attn_out"]),
        "mlp_post": constant(run["mlp_out"]),
    }
    if parallel:  # both parts read the residual before the layer
        wanted["attn_out"] = (run["resid_post"] - plain["mlp_out"], plain["resid_pre"])
        wanted["mlp_out"] = (run["resid_post"], plain["resid_pre"] + plain["attn_out"])
    assert found.keys() == wanted.keys()
    for site, pair in wanted.items():
        torch.testing.assert_close(found[site], pair)


@torch.no_grad()
def test_each_layer_runs_once_with_a_zero_at_each_site(tiny_model: Any) -> None:
    model = tiny_model("llama", "bridge")
    _, resid = model.run_with_cache(probe_tokens(100, 64)[:, :5])
    trunk = ml.Trunk(model)
    runs = sites.layer_runs(trunk, resid, [2, 0])
    assert [run.layer for run in runs] == [2, 0]
    for run in runs:
        assert run.names == {site: hook_name(site, run.layer) for site in SITES}
        torch.testing.assert_close(run.out, resid[hook_name("resid_post", run.layer)])
        assert [(rows.start, rows.stop) for rows in run.rows.values()] == [
            (2 * n, 2 * n + 2) for n in range(1, len(SITES) + 1)
        ]
        for site, name in run.names.items():
            zero = run.store[name].flatten(1).abs().amax(1) == 0
            assert zero[run.rows[site]].all()
            assert not zero[:2].any()
            torch.testing.assert_close(run.store[name][:2], resid[name])
    first = {name: value[:1] for name, value in resid.items()}
    (alone,) = sites.layer_runs(trunk, first, [1])  # a single row, joined by itself from end to beginning
    start = first[hook_name("resid_pre", 1)]
    torch.testing.assert_close(alone.out, trunk.run(torch.cat([start, start[:, [4, 3, 2, 1, 0]]]), 1, 2))
    assert {check.status for check in sites.check_sites(trunk, [alone])} == {"ok"}
    checks = sites.check_sites(trunk, runs)
    assert [check.name for check in checks] == [f"site {site}" for site, _ in sites._claims(trunk, 0, {})]
    assert {check.status for check in checks} == {"ok"}
    few = sites.LayerRun(0, run.out, run.names, run.rows, run.store | {run.names["z"]: torch.ones(3, 5)})
    absent = {check.name: check for check in sites.check_sites(trunk, [few])}["site z"]
    assert (absent.status, absent.note) == ("absent", "does not have one row per sequence")
    without = {site: name for site, name in run.names.items() if site != "z"}
    found = sites.check_sites(trunk, [sites.LayerRun(0, run.out, without, run.rows, run.store)])
    absent = {check.name: check for check in found}["site z"]
    assert (absent.status, absent.note) == ("absent", "the model does not have this hook")
    (worst,) = [c for c in sites.check_sites(trunk, [few, runs[0]]) if c.name == "site z"]
    assert worst.status == "ok"  # which is worse than nothing
