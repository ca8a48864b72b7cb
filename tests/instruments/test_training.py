"""A memory over training, by component: every number against plain patches, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, OptionError, SiteError
from memlens.results.kinds import reading
from memlens.results.statistics.training import training_events
from tests.devices import dev
from tests.small import ragged
from tests.tiny import D_VOCAB, write_tiny

QUIET: dict[str, Any] = {"progress": False}
follow = ml.instruments.memory_over_training
STEPS = (1, 4, 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with three training steps, which are other seeds; the last is the model itself."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny("llama", folder, seed=9)
    for step in STEPS:
        write_tiny("llama", folder / "checkpoints" / f"step{step}", seed=step)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    return ml.load_model(run, backend="bridge", device=dev())


@pytest.fixture(scope="module")
def recalled(model: Any) -> ml.SequenceSet:
    """Sequences that the model itself continued, so that it recalls them exactly."""
    rows = ragged()
    with torch.no_grad():
        own = []
        for row, n in zip(rows.rows(), rows.prefix_len.tolist(), strict=True):
            tokens = torch.tensor([row[:n]])
            for _ in range(4):
                best = model(tokens)[0, -1, : D_VOCAB - 1].argmax()
                tokens = torch.cat([tokens, best[None, None]], 1)
            own.append(tokens[0].tolist())
    return ml.SequenceSet.from_tokens(own, rows.prefix_len)


@pytest.mark.parametrize("over", ["layer", "head"])
def test_each_step_is_two_patchings(run: Path, model: Any, recalled: ml.SequenceSet, over: str) -> None:
    site = "z" if over == "head" else "mlp_out"
    found = follow(model, recalled, name=run, site=site, over=over, **QUIET)
    assert found["step"].values.tolist() == list(STEPS)
    for step in STEPS:
        other = ml.load_model(run, checkpoint_step=step, backend="bridge", device=dev())
        here = found.data.sel(step=step)
        scores = ml.measure(other, recalled)
        assert here["target_logprob"].values == pytest.approx(scores["target_logprob"], abs=1e-6)
        assert (here["exact_match"].values == scores["exact_match"]).all()
        for name, target, donor in (("into_model", model, other), ("into_checkpoint", other, model)):
            want = ml.patch_activations(target, recalled, donor=donor, site=site, over=over, **QUIET)
            assert np.allclose(here[name], want["target_logprob"], atol=1e-6)
            change = found.effect(name).sel(step=step)
            assert np.allclose(change, want.effect("target_logprob"), atol=1e-6)
        assert found.settings["checkpoints"][str(step)]["revision"] == f"step{step}"


def test_the_model_itself_at_a_step_changes_nothing(model: Any, recalled: ml.SequenceSet) -> None:
    loaded: list[int] = []

    def late() -> Any:
        loaded.append(1)
        return model

    found = follow(model, recalled, checkpoints={7: model, 3: late}, site="attn_out", **QUIET)
    assert loaded == [1]
    assert found["step"].values.tolist() == [3, 7]
    for name in ("into_model", "into_checkpoint"):
        assert not found.effect(name).any()
    assert (found["first"] == 3).all()
    assert (found["last"] == 1).all()


def test_birth_and_loss(run: Path, model: Any, recalled: ml.SequenceSet) -> None:
    other = ml.load_model(run, checkpoint_step=4, backend="bridge", device=dev())
    steps = {1: other, 2: model, 3: other, 4: model}
    found = follow(model, recalled, checkpoints=steps, layers=[0], **QUIET)
    hits = found["exact_match"].values == 1
    assert hits[:, [1, 3]].all()
    assert not hits[:, [0, 2]].all()
    events = training_events(hits, np.array([1, 2, 3, 4]))
    for name in events:
        assert (found[name].values == events[name].to_numpy(float)).all()
    born = ~hits[:, 0]
    assert (found["first"].values == np.where(born, 2, 1)).all()
    assert (found["forgotten"].values == born).all()
    assert (found["relearned"].values == born).all()


def test_kept_drawn_and_read(run: Path, model: Any, recalled: ml.SequenceSet, tmp_path: Path) -> None:
    found = follow(model, recalled, name=run, out=tmp_path, **QUIET)
    assert ml.load_result(tmp_path / "result.nc").data.identical(found.data)
    assert (tmp_path / "step4" / "denoising" / "result.nc").exists()
    again = follow(model, recalled, name=run, out=tmp_path, **QUIET)
    assert again["into_checkpoint"].equals(found["into_checkpoint"])
    assert f"of {len(recalled)} sequences are recalled at some step" in reading(found)
    figure: Any = found.plot()
    means = found.effect("into_model").mean("sequence").transpose("layer", "step")
    assert np.allclose(figure.data[0].z, means)
    assert found.plot("exact_match").data
    heads = follow(model, recalled, name=run, checkpoints=[1, 4], site="z", over="head", **QUIET)
    figure = heads.plot("into_model", step=4)
    means = heads.effect("into_model").sel(step=4).mean("sequence")
    assert np.allclose(figure.data[0].z, means)
    with pytest.raises(SiteError, match="step=5"):
        heads.plot(step=5)
    with pytest.raises(OptionError, match="group="):
        found.plot(group="copies")


def test_bad_input(model: Any, recalled: ml.SequenceSet) -> None:
    with pytest.raises(EmptySetError, match="no checkpoints"):
        follow(model, recalled, checkpoints=[])
    for wrong in (5, {"a": model}, {1: "a name"}):
        with pytest.raises(OptionError, match="checkpoints"):
            follow(model, recalled, checkpoints=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EmptySetError, match=r"of 'zoo/pythia-s': give models by step.*memlens zoo train"):
        follow(model, recalled, name="zoo/pythia-s")
    with pytest.raises(OptionError, match="over='position'"):
        follow(model, recalled, over="position")
    with pytest.raises(OptionError, match="per_token"):
        follow(model, recalled, per_token=True)
