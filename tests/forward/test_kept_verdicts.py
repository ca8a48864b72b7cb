"""A large model is checked once: what that spares, what makes it another model, and what is never kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

import memlens as ml
import memlens.models.load as loading
from memlens.cli.app import app
from memlens.errors import ModelLoadError, NonFiniteError, OptionError, SiteError
from memlens.forward.check import at_load, identity, kept
from memlens.forward.check.kept import KeptVerdicts, Verdict
from memlens.forward.check.table import Check, ModelCheck
from memlens.forward.hooks import hook_name, resolve_hook
from memlens.models.load import load_model
from memlens.models.names import Source, has_hooked_transformer
from tests.devices import dev
from tests.models.hub_cache import put_in_cache
from tests.tiny import tiny_huggingface_model, write_tiny

STEPS = ("record_reference", "check_finite_weights", "check_model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of memlens, in which verdicts on small models are kept too."""
    monkeypatch.setattr(kept, "LEAST_WEIGHTS", 0)
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checks"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of checks at load, as they are taken."""
    taken: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        step = getattr(at_load, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            taken.append(name)
            return step(*args, **kwargs)

        return note

    for name in STEPS:
        monkeypatch.setattr(at_load, name, noted(name))
    return taken


@pytest.fixture
def load(cache: Path, steps: list[str], tmp_path: Path) -> Callable[..., tuple[Any, bool]]:
    """Load a folder's model, by default that of a tiny Llama; also return whether it was checked."""
    made = write_tiny("llama", tmp_path / "llama", tokenizer=False)

    def call(name: Any = made, **options: Any) -> tuple[Any, bool]:
        steps.clear()
        model = load_model(name, device=dev(), **options)
        assert steps in ([], [*STEPS])
        return model, bool(steps)

    return call


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_the_second_load_takes_the_verdict_of_the_first(
    backend: str, load: Callable[..., tuple[Any, bool]], cache: Path, tmp_path: Path
) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    folder = write_tiny("olmo2", tmp_path / "olmo2", tokenizer=False)
    first, was_checked = load(folder, backend=backend)
    assert was_checked
    (file,) = cache.iterdir()
    second, was_checked = load(folder, backend=backend)
    assert not was_checked
    (before, now) = (ml.check_model(model) for model in (first, second))
    logits, kept_logits = before.checks[0], now.checks[0]
    assert (logits.status, logits.difference, logits.allowed) == (
        kept_logits.status,
        kept_logits.difference,
        kept_logits.allowed,
    )
    day = json.loads(file.read_text())["date"]
    assert kept_logits.note == f"against Hugging Face's, when it was first loaded ({day})"
    assert [check.status for check in before.checks] == [check.status for check in now.checks]
    with torch.no_grad():
        next(second.parameters())[0, 0] += 1
    assert ml.check_model(second).checks[0].status == "not compared"


def test_sites_that_were_refused_are_refused_again(
    load: Callable[..., tuple[Any, bool]], cache: Path
) -> None:
    load()
    (file,) = cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"refused": ["q"]}))
    model, was_checked = load()
    assert not was_checked
    with pytest.raises(SiteError, match="does not do what its name claims"):
        resolve_hook(model, hook_name("q", 1))
    resolve_hook(model, hook_name("v", 1))
    found = ModelCheck("m", "float32", (Check("logits", "ok", 1e-6, 1e-3), Check("site q", "refused", 0.5)))
    assert Verdict.of(found).refused == ("q",)


def test_always_checks(load: Callable[..., tuple[Any, bool]]) -> None:
    assert load()[1]
    assert load(check_weights="always")[1]
    assert not load()[1]
    with pytest.raises(OptionError, match="give True, False or 'always'"):
        load(check_weights="never")


def test_the_command_checks_in_full(
    load: Callable[..., tuple[Any, bool]],
    steps: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load()
    steps.clear()
    app(
        ["check", str(tmp_path / "llama"), "--device", dev()],
        exit_on_error=False,
        result_action="return_value",
    )
    assert steps == [*STEPS]
    assert "when it was loaded" in capsys.readouterr().out


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *, date_kept: bool) -> None:
    file = folder / "model.safetensors"
    before, weights = file.stat(), load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    if date_kept:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


def _add_to_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1


def test_an_edit_of_one_weight_is_noticed_although_size_and_date_stay(
    load: Callable[..., tuple[Any, bool]], tmp_path: Path
) -> None:
    load()
    _rewrite(tmp_path / "llama", _add_to_one, date_kept=True)
    assert load()[1]
    assert not load()[1]


def test_weights_that_are_not_finite_are_found_although_a_verdict_is_kept(
    load: Callable[..., tuple[Any, bool]], tmp_path: Path
) -> None:
    load()
    _rewrite(tmp_path / "llama", lambda w: w["model.norm.weight"].fill_(torch.nan), date_kept=True)
    with pytest.raises(NonFiniteError):
        load()


def test_each_thing_on_which_the_verdict_depends_makes_another_key(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny("llama", tmp_path / "llama", tokenizer=False)
    options = {"backend": "bridge", "dtype": torch.float32, "process_weights": False}

    def key(place: Path = folder, changes: Any = (), seed: int = 0, **config: Any) -> str:
        hf_model = tiny_huggingface_model("llama", seed=seed)
        for name, value in config.items():
            setattr(hf_model.config, name, value)
        source = Source("a model", str(place), local=True)
        found = KeptVerdicts.about(hf_model, source, options | dict(changes), begun=time.time())
        assert found is not None
        assert found.folder == cache
        return found.key

    first = key()
    assert key() == first
    found = {
        "seed": key(seed=1),
        "config": key(rms_norm_eps=1e-5),
        "attention": key(_attn_implementation="eager"),
        "backend": key(changes={"backend": "hooked"}),
        "dtype": key(changes={"dtype": torch.bfloat16}),
        "process_weights": key(changes={"process_weights": True}),
        "place": key(write_tiny("llama", tmp_path / "copy", tokenizer=False)),
    }

    def under(name: str, *patch: Any) -> None:
        with monkeypatch.context() as context:
            context.setattr(*patch)
            found[name] = key()

    versions = identity.version
    for package in ("memlens", "torch", "transformers", "transformer_lens"):
        under(package, identity, "version", lambda n, p=package: versions(n) + ".1" * (n == p))
    under("python", sys, "version", "4.0")
    under("hardware", identity.torch.backends.cpu, "get_cpu_capability", lambda: "none")
    under("class", nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias) * 1)
    under("function", nn.functional, "softmax", lambda *args, **kwargs: torch.softmax(*args, **kwargs))
    modeling = sys.modules[type(tiny_huggingface_model("llama")).__module__]
    under("imported", modeling, "apply_rotary_pos_emb", lambda q, k, *more: (q, k))
    under("memlens' own", ml.Trunk, "run", lambda self, resid, *more: resid)
    under("precision", torch, "get_float32_matmul_precision", lambda: "medium")  # which cannot be set back
    torch.set_default_dtype(torch.float64)
    try:
        found["default dtype"] = key()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["autocast"] = key()
    os.utime(folder / "model.safetensors")
    found["date"] = key()
    assert first not in found.values()
    alike = [name for name in found if [*found.values()].count(found[name]) > 1]
    assert alike == []
    assert key() == found["date"]


def test_an_edit_of_memlens_own_source_makes_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> str:
        return identity.process_facts(torch.device("cpu"))["source"]

    shipped = source()
    for folder in ("forward", "models"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "forward" / "a.py"
    file.write_text("BOUND = 1\n")
    monkeypatch.setattr(identity.memlens, "__file__", str(tmp_path / "__init__.py"))
    first = source()
    file.write_text("BOUND = 2\n")
    assert len({shipped, first, source()}) == 3


def test_nothing_is_kept_where_files_do_not_tell_what_the_model_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny("llama", tmp_path / "llama", tokenizer=False)
    now = time.time()

    def about(hf_model: Any = None, begun: float = now, **source: Any) -> KeptVerdicts | None:
        place = Source("a model", **{"location": str(folder), "local": True} | source)
        return KeptVerdicts.about(hf_model or tiny_huggingface_model("llama"), place, {}, begun=begun)

    assert about() is not None
    assert about(begun=now - 60) is None  # a file that was written since
    assert about(untrained=True) is None
    assert about(location=str(tmp_path)) is None  # no weights there
    assert about(location="nobody/nothing", local=False) is None
    adapted: Any = tiny_huggingface_model("llama")
    adapted._hf_peft_config_loaded = True
    assert about(adapted) is None
    with monkeypatch.context() as context:
        context.setattr(type(tiny_huggingface_model("llama")), "__module__", "transformers_modules.own")
        assert about() is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert about() is None
    finally:
        handle.remove()
    with torch.device("cpu"):
        assert about() is None
    monkeypatch.setattr(kept, "LEAST_WEIGHTS", 10**7)
    assert about() is None


def test_a_model_given_in_memory_or_without_checks_leaves_nothing(
    load: Callable[..., tuple[Any, bool]], cache: Path, steps: list[str]
) -> None:
    load_model(tiny_huggingface_model("llama"))  # type: ignore[arg-type]
    assert steps == [*STEPS]
    load(check_weights=False)
    assert steps == []
    assert not cache.exists()


def _lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    build = loading.build_bridge

    def lossy(*args: Any, **kwargs: Any) -> Any:
        bridge = build(*args, **kwargs)
        bridge.blocks[2].attn.o.original_component.weight.data[:, :4] = 0
        return bridge

    monkeypatch.setattr(loading, "build_bridge", lossy)


def test_a_failure_is_never_kept(
    load: Callable[..., tuple[Any, bool]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        _lossy(context)
        for _ in range(2):
            with pytest.raises(ModelLoadError, match="logits, first in layer 2"):
                load()
    assert not cache.exists()
    assert load()[1]


def test_a_verdict_does_not_serve_a_model_that_is_built_otherwise(
    load: Callable[..., tuple[Any, bool]], cache: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    with monkeypatch.context() as context:
        _lossy(context)
        with pytest.raises(ModelLoadError, match="logits, first in layer 2"):
            load()
    with monkeypatch.context() as context:  # a class of TransformerLens, replaced in memory alone
        context.setattr(GeneralizedComponent, "new", lambda self: None, raising=False)
        assert load()[1]
        assert len([*cache.iterdir()]) == 2
    assert not load()[1]


def test_a_model_that_comes_out_in_many_forms_is_checked_each_time(cache: Path) -> None:
    verdicts = KeptVerdicts(cache, "key")
    right = Verdict("m", "2026-11-28", 1e-6, 1e-3, "note", ())
    for n in range(6):
        verdicts.keep(str(n), right)
        assert len([*cache.iterdir()]) == min(n + 1, 4)
        assert verdicts.read() == ({str(state): right for state in range(n + 1)} if n < 3 else {})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"difference": "small"}',
        '{"model": "m", "date": "d", "difference": 2.0, "allowed": 1.0, "note": "", "refused": []}',
        '{"model": "m", "date": "d", "difference": NaN, "allowed": 1.0, "note": "", "refused": []}',
        '{"model": "m", "date": "d", "difference": 0.0, "allowed": 1.0, "note": "", "refused": ["x"]}',
    ],
)
def test_a_damaged_or_foreign_file_is_no_verdict(content: str, cache: Path) -> None:
    verdicts = KeptVerdicts(cache, "key")
    right = Verdict("m", "2026-11-28", 1e-6, 1e-3, "against Hugging Face's", ("q",))
    verdicts.keep("state", right)
    assert verdicts.read() == {"state": right}
    (cache / "key-state.json").write_text(content)
    assert verdicts.read() == {}
    verdicts.keep("state", right)
    assert verdicts.read() == {"state": right}


def test_a_damaged_verdict_is_replaced(load: Callable[..., tuple[Any, bool]], cache: Path) -> None:
    load()
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert load()[1]
    assert not load()[1]


def test_a_cache_that_is_no_folder_is_not_used(
    load: Callable[..., tuple[Any, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/nothing"):
        monkeypatch.setenv("MEMLENS_CACHE", str(place))
        assert [load()[1], load()[1]] == [True, True]
    monkeypatch.delenv("MEMLENS_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert load()[1]


def test_many_may_keep_the_same_verdict_at_once(cache: Path) -> None:
    verdicts = KeptVerdicts(cache, "key")
    right = Verdict("m", "2026-11-28", 1e-6, 1e-3, "note", ())

    def keep_and_read(_: int) -> dict[str, Verdict]:
        verdicts.keep("state", right)
        return verdicts.read()

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(keep_and_read, range(64))]
    assert found == [{"state": right}] * 64
    assert [file.name for file in cache.iterdir()] == ["key-state.json"]


def test_a_model_of_the_hub_is_known_by_the_files_in_its_cache(
    load: Callable[..., tuple[Any, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = put_in_cache(tmp_path / "hub", "openlm-research/open_llama_3b", "llama")
    assert load("openlm-research/open_llama_3b")[1]
    assert not load("openlm-research/open_llama_3b")[1]
    _rewrite(snapshot, _add_to_one, date_kept=True)
    assert load("openlm-research/open_llama_3b")[1]


@pytest.mark.slow
def test_another_process_takes_the_verdict(cache: Path, tmp_path: Path) -> None:
    """Digests must not depend on the order of sets, on addresses, or on what else was imported."""
    folder = write_tiny("llama", tmp_path / "llama", tokenizer=False)
    program = (
        "import importlib, sys\n"
        "for module in sys.argv[4:]: importlib.import_module(module)\n"
        "from memlens.forward.check import at_load, kept\n"
        "from memlens.models.load import load_model\n"
        "kept.LEAST_WEIGHTS = 0\n"
        "if sys.argv[3] == 'kept': at_load.record_reference = None\n"
        "load_model(sys.argv[1], device=sys.argv[2])\n"
    )
    for seed, more in (("7", ["first"]), ("8", ["kept", "memlens.instruments.detect.separation"])):
        command = [sys.executable, "-c", program, str(folder), dev(), *more]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert len([*cache.iterdir()]) == 1
