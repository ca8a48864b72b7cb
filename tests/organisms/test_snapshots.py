from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import memlens as ml
from memlens.errors import ModelNotFoundError, OptionError, ResultError
from memlens.models.names import checkpoint_steps
from memlens.models.provenance import describe
from memlens.models.zoo import zoo_path
from memlens.organisms.evaluate import load_organism
from memlens.organisms.training import zoo
from memlens.organisms.training.architectures import build_model
from memlens.organisms.training.train import Snapshots, kept_steps, snapshot_steps, train
from memlens.organisms.training.zoo import train_organism
from tests.devices import dev
from tests.organisms.conftest import TINY, TINY_CORPUS
from tests.organisms.test_train import ROWS, SPEC, equal, fresh, run

STEPS = (0, 3, 6, 12)


def same_halves(folder: Path, model: PreTrainedModel) -> bool:
    """Whether a checkpoint holds a model's weights rounded to float16."""
    kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    pairs = zip(kept.parameters(), model.parameters(), strict=True)
    return all(torch.equal(a, b.half()) for a, b in pairs)


@pytest.fixture(scope="module")
def with_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny organism, trained with snapshots, in the zoo's cache."""
    root = tmp_path_factory.mktemp("cache") / "zoo"
    return train_organism(TINY, root / "tiny", device=dev(), progress=False, snapshot_steps=STEPS)


def test_keeping_weights_changes_nothing_about_the_training(tiny_organism: Path, with_steps: Path) -> None:
    without, kept = (load_file(f / "model.safetensors") for f in (tiny_organism, with_steps))
    assert all(torch.equal(without[name], kept[name]) for name in without)
    plain, watched = fresh(), fresh()
    log = run(plain)
    snapshots = Snapshots(with_steps.parent / "bare", tuple(range(len(log.losses) + 1)))
    assert run(watched, snapshots=snapshots).losses == log.losses
    assert equal(plain, watched)


def test_a_step_s_weights_are_those_of_a_run_that_ends_there(tmp_path: Path) -> None:
    run(fresh(), snapshots=Snapshots(tmp_path, (0, 4)))
    model = fresh()
    for step, stop in ((0, 0), (4, 4)):
        train(model, ROWS, SPEC, device=dev(), progress=False, stop_after=stop, checkpoint=tmp_path / "s.pt")
        assert same_halves(tmp_path / f"step{step}", model)
    assert not list(tmp_path.glob("*.partial"))


def test_the_first_and_the_last_step_are_the_untrained_and_the_finished_model(with_steps: Path) -> None:
    assert kept_steps(with_steps) == list(STEPS)
    start = build_model(TINY.model, TINY_CORPUS.vocab_size, seed=0)
    assert same_halves(with_steps / "checkpoints" / "step0", start)
    assert same_halves(with_steps / "checkpoints" / "step12", load_organism(with_steps))
    assert not same_halves(with_steps / "checkpoints" / "step6", load_organism(with_steps))


def test_steps_load_by_number_with_the_model_s_tokenizer(
    with_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLENS_CACHE", str(with_steps.parent.parent))
    model = ml.load_model("zoo/tiny", checkpoint_step=3, device=dev())
    assert describe(model)["revision"] == "step3"
    assert checkpoint_steps("zoo/tiny") == checkpoint_steps(with_steps) == list(STEPS)
    kept = load_file(with_steps / "checkpoints" / "step3" / "model.safetensors")["embed_out.weight"].float()
    assert torch.equal(model.W_U.T if hasattr(model, "W_U") else model.unembed.W_U.T, kept)
    assert ml.load_sequences("zoo", model).attrs["source"] == "zoo/tiny"
    by_path = ml.load_model(with_steps, revision="step3", device=dev())
    assert torch.equal(by_path.W_U, model.W_U)
    with pytest.raises(ModelNotFoundError, match="no checkpoint step4: it has those of steps 0, 3, 6, 12"):
        ml.load_model("zoo/tiny", checkpoint_step=4)
    with pytest.raises(OptionError, match="contradict"):
        ml.load_model("zoo/tiny", checkpoint_step=3, revision="step3")


def test_a_bundled_model_takes_its_steps_from_the_cache_if_the_run_was_the_same(
    with_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    cached = tmp_path / "zoo" / "pythia-xs"
    shutil.copytree(with_steps, cached)
    assert checkpoint_steps("zoo/pythia-xs") == []  # it is another run's
    shutil.copy(zoo_path("pythia-xs") / "training.json", cached)
    assert checkpoint_steps("zoo/pythia-xs") == list(STEPS)
    assert ml.load_model("zoo/pythia-xs", checkpoint_step=6, device=dev()).cfg.d_model == TINY.model.d_model
    assert ml.load_model("zoo/pythia-xs", device=dev()).cfg.d_model == 40


def test_a_model_without_steps_says_how_to_have_them(
    tiny_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    with pytest.raises(OptionError, match="holds a single checkpoint"):
        ml.load_model(tiny_organism, checkpoint_step=3)
    with pytest.raises(OptionError, match="after `memlens zoo train pythia-s`"):
        ml.load_model("zoo/pythia-s", checkpoint_step=3)


def test_a_run_interrupted_keeps_the_same_steps(
    with_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_whole = zoo.train

    def stopped(*args: object, **options: object) -> None:
        train_whole(*args, **options, stop_after=5)
        raise KeyboardInterrupt

    out = tmp_path / "tiny"
    monkeypatch.setattr(zoo, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_organism(TINY, out, device=dev(), progress=False, snapshot_steps=STEPS)
    monkeypatch.undo()
    train_organism(TINY, out, device=dev(), progress=False, snapshot_steps=STEPS)
    for step in STEPS:
        a, b = (f / "checkpoints" / f"step{step}" / "model.safetensors" for f in (out, with_steps))
        assert a.read_bytes() == b.read_bytes()


def test_starting_over_leaves_no_weights_of_the_run_before(tmp_path: Path) -> None:
    (tmp_path / "tiny.partial" / "checkpoints" / "step5").mkdir(parents=True)
    options = {"device": "cpu", "progress": False, "resume": False}
    out = train_organism(TINY, tmp_path / "tiny", snapshot_steps=(1,), **options)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step1"]
    assert "in float16, after 1 steps" in (out / "README.md").read_text()


def test_steps_that_are_lost_or_never_come_are_refused(tiny_organism: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "progress": False}
    with pytest.raises(OptionError, match="step 99"):
        train(fresh(), ROWS, SPEC, snapshots=Snapshots(tmp_path, (99,)), **options)
    run(fresh(), checkpoint=tmp_path / "state.pt", stop_after=5)
    with pytest.raises(ResultError, match="is at step 5 and did not keep the weights of step 2"):
        run(fresh(), checkpoint=tmp_path / "state.pt", snapshots=Snapshots(tmp_path, (2, 8)))
    with pytest.raises(ResultError, match="without its weights of step 3"):
        train_organism(TINY, tiny_organism, snapshot_steps=(3,), **options)
    with pytest.raises(ResultError, match="without its weights of step 0"):
        train_organism(replace(TINY, snapshots=True), tiny_organism, **options)


def test_steps_double_and_then_are_even() -> None:
    steps = snapshot_steps(2562)
    assert (steps[0], steps[-1], len(steps)) == (0, 2562, 17)
    late = steps[-10:]
    assert max(b - a for a, b in pairwise(late)) <= 257
    assert all(b == 2 * a for a, b in pairwise(steps[1:8]))
