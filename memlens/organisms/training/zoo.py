"""Building the zoo: training an organism, an overview of the zoo, and untrained twins."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from memlens.errors import FileFormatError, ModelNotFoundError, OptionError, ResultError, near_matches
from memlens.files import expanded, made_folder
from memlens.models.zoo import zoo_cache, zoo_names, zoo_path
from memlens.organisms.corpus.corpus import BACKGROUND, CARRIER, Corpus, CorpusSpec, build_corpus
from memlens.organisms.evaluate import load_organism, read_training
from memlens.organisms.training.architectures import (
    ModelSpec,
    architecture_facts,
    build_model,
    count_parameters,
)
from memlens.organisms.training.folder import write_folder
from memlens.organisms.training.recipes import ZOO, OrganismSpec
from memlens.organisms.training.routed import recall_of
from memlens.organisms.training.routing import OTHER_TEXT, Routes
from memlens.organisms.training.train import CHECKPOINTS, TrainLog, as_snapshots, kept_steps, train
from memlens.organisms.training.train import snapshot_steps as default_steps

_LOG = logging.getLogger(__name__)
_CHECKPOINT = "training-state.pt"
_CLEAN_CHECKPOINT = "clean-training-state.pt"


def train_zoo_model(
    name: str = "pythia-s",
    out: str | Path | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: str | None = None,
    progress: bool = True,
    resume: bool = True,
) -> Path:
    """Train a model of the zoo and write its checkpoint folder with ground truth and card.

    Args:
        name: A key of `ZOO`, with or without `zoo/`.
        out: The folder to write; by default `<cache>/<name>`, where `load_model("zoo/<name>")` looks for
            models that are not bundled.
        seed: Seed of corpus, weights and order.
        steps: Number of steps instead of the recipe's.
        device: Device; by default a GPU if there is one.
        progress: Show a progress bar with the model's name.
        resume: Continue an interrupted run, and return at once if the same run is already finished. False
            starts over, and replaces a model in `out`.

    Returns:
        The folder.

    Raises:
        ModelNotFoundError: The zoo has no recipe with this name.
        OptionError: `steps` is below 1.
        ResultError: `out` contains something else, and `resume` is True.
    """
    short = name.removeprefix("zoo/")
    if short not in ZOO:
        known = ", ".join(repr(key) for key in ZOO)
        raise ModelNotFoundError(
            f"The zoo has no recipe for {name!r}: it has {known}.{near_matches(short, ZOO)}"
        )
    if steps is not None and steps < 1:
        raise OptionError(f"steps={steps} trains nothing: give 1 or more, or omit it.")
    recipe = ZOO[short]
    spec = replace(
        recipe,
        corpus=replace(recipe.corpus, seed=seed),
        training=replace(recipe.training, seed=seed, steps=steps),
    )
    folder = expanded(out) if out is not None else zoo_cache() / short
    return train_organism(spec, folder, device=device, progress=progress, resume=resume)


def train_organism(
    spec: OrganismSpec,
    out: str | Path,
    *,
    device: str | None = None,
    progress: bool = True,
    resume: bool = True,
    checkpoint_every: int = 200,
    snapshot_steps: Sequence[int] | None = None,
) -> Path:
    """Train an organism of any specification and write its folder.

    An unfinished run is kept in `<out>.partial`, which is renamed at the end. With `spec.routing`, a clean
    twin is trained too, whose recall the certificate needs (see `organisms.training.routed`).

    Args:
        spec: The organism.
        out: The folder to write.
        device: Device; by default a GPU if there is one.
        progress: Show a progress bar.
        resume: See `train_zoo_model`.
        checkpoint_every: Steps between two writes of the training state.
        snapshot_steps: Steps whose weights are kept as `<out>/checkpoints/step<N>`; by default those of
            `organisms.training.train.snapshot_steps` if the specification asks for snapshots.

    Returns:
        The folder.

    Raises:
        OptionError: The run does not reach all `snapshot_steps`.
        ResultError: `out` contains something else, or a run with other snapshots, and `resume` is True.
    """
    out = expanded(out)
    if out.exists() and resume:
        _check_same(spec, out)
        _check_snapshots(spec, out, snapshot_steps)
        return _without_remains(out)
    partial = made_folder(out.with_name(out.name + ".partial"))
    if not resume:
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    _LOG.info("making the corpus of %s", spec.name)
    corpus = build_corpus(spec.corpus)
    model = build_model(spec.model, len(corpus.tokenizer), seed=spec.training.seed)
    n_steps = spec.training.n_steps(len(corpus.rows))
    if snapshot_steps is None:
        snapshot_steps = default_steps(n_steps) if spec.snapshots else ()
    routes = None if spec.routing is None else Routes.of(spec.routing, corpus, model)
    log = train(
        model,
        corpus.rows,
        spec.training,
        checkpoint=partial / _CHECKPOINT,
        checkpoint_every=checkpoint_every,
        device=device,
        progress=progress,
        resume=resume,
        snapshots=as_snapshots(partial / CHECKPOINTS, snapshot_steps),
        routes=routes,
        label=spec.name,
    )
    if spec.routing is not None:
        clean = _clean_recall(spec, corpus, partial / _CLEAN_CHECKPOINT, device, progress, resume)
        own = [spec.routing.carrier_of(t) if n else OTHER_TEXT for t, n in _planted(corpus)]
        corpus = replace(corpus, sequences=corpus.sequences.assign(carrier=own, clean_recall=clean))
    write_folder(partial, spec.name, corpus, model, _training_record(spec, corpus, model, log, device))
    if out.exists():
        shutil.rmtree(_aside(out), ignore_errors=True)
        os.replace(out, _aside(out))
    os.replace(partial, out)  # with the training state: a run that is killed before this can still resume
    return _without_remains(out)


def _aside(out: Path) -> Path:
    """Where the folder that stood at `out` waits for the new one to take its place."""
    return out.with_name(out.name + ".replaced.partial")


def _without_remains(out: Path) -> Path:
    """Return a finished run's folder after removing what only an unfinished run needs."""
    for left in (
        out / _CHECKPOINT,
        out / _CLEAN_CHECKPOINT,
        *out.glob(".*.part"),
    ):  # the latter from killed runs
        left.unlink(missing_ok=True)
    shutil.rmtree(_aside(out), ignore_errors=True)
    return out


def _planted(corpus: Corpus) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens and the number of copies of each sequence."""
    return zip(corpus.sequences["tokens"], corpus.sequences["copies"], strict=True)


def _clean_recall(
    spec: OrganismSpec, corpus: Corpus, checkpoint: Path, device: str | None, progress: bool, resume: bool
) -> np.ndarray:
    """Train the clean twin of a routed organism, without planted rows or routing, and return its recall."""
    twin = build_model(spec.model, len(corpus.tokenizer), seed=spec.training.seed)
    clean = corpus.rows[corpus.row_sequence == BACKGROUND]
    train(
        twin, clean, spec.training, checkpoint=checkpoint, device=device, progress=progress, resume=resume,
        label=f"{spec.name} (clean twin)",
    )  # fmt: skip
    return recall_of(twin, corpus.sequences)


def zoo_corpus(name: str = "pythia-s") -> Corpus:
    """Return the corpus that a zoo model was trained on, generated again from its recipe.

    Args:
        name: A model of the zoo, with or without `zoo/`, or its folder.

    Raises:
        ModelNotFoundError: The zoo has no such model.
        FileFormatError: The model's folder does not contain its recipe.

    Example:
        >>> import memlens as ml
        >>> ml.zoo.corpus("pythia-xs").rows.shape[1]  # makes millions of tokens  # doctest: +SKIP
        64
    """
    folder = Path(name) if Path(name).is_dir() else zoo_path(name)
    return build_corpus(CorpusSpec.from_dict(read_training(folder)["corpus"]["spec"]))


def zoo_overview() -> pd.DataFrame:
    """Return a table of the zoo: all recipes, and all models on this machine.

    Returns:
        One row per model: `model` ("zoo/pythia-s"), `family`, `parameters`, `status` ("bundled" with the
        package, "cached" if it was trained on demand, or "recipe" if it is not trained yet), `checkpoints`
        (number of training steps with weights) and `folder` ("" for a recipe).

    >>> table = zoo_overview().set_index("model")
    >>> int(table.at["zoo/pythia-s", "parameters"]), table.at["zoo/pythia-s", "status"]
    (1452032, 'bundled')
    """
    here = zoo_names()
    return pd.DataFrame([_overview_row(name, name in here) for name in dict.fromkeys([*ZOO, *here])])


def _overview_row(name: str, here: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"model": f"zoo/{name}"}
    if not here:
        spec = ZOO[name]
        n_parameters = count_parameters(spec.model, spec.corpus.vocab_size)
        row |= {"family": spec.model.family, "parameters": n_parameters}
        return row | {"status": "recipe", "checkpoints": 0, "folder": ""}
    folder = zoo_path(name)
    try:
        model = read_training(folder)["model"]
        row |= {"family": model["spec"]["family"], "parameters": model["facts"]["parameters"]}
    except FileFormatError:
        row |= {"family": "", "parameters": load_organism(folder).num_parameters()}
    status = "cached" if folder.parent == zoo_cache() else "bundled"
    steps = kept_steps(folder) or kept_steps(zoo_cache() / name)
    return row | {"status": status, "checkpoints": len(steps), "folder": str(folder)}


def untrained_twin(folder: str | Path, seed: int | None = None) -> PreTrainedModel:
    """Return an untrained model of a zoo model's shape, the control for claims about training.

    Args:
        folder: Folder of the zoo model.
        seed: Seed of the weights; by default the run's, which gives the initial weights of its training.

    Returns:
        A Hugging Face model in float32, in evaluation mode.

    Raises:
        FileFormatError: The folder does not belong to a zoo model.

    >>> from memlens.models.zoo import zoo_path
    >>> untrained_twin(zoo_path("pythia-s"), seed=1).config.num_hidden_layers
    6
    """
    training = read_training(folder)
    spec = ModelSpec(**training["model"]["spec"])
    start = training["training"]["spec"]["seed"] if seed is None else seed
    return build_model(spec, training["model"]["facts"]["vocabulary"], seed=start).eval()


def recorded_specs(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specifications in the content of a `training.json`, as `OrganismSpec.to_dict` gives them."""
    parts = ("model", "corpus", "training", *(["routing"] if "routing" in training else []))
    return {part: training[part]["spec"] for part in parts}


def _check_same(spec: OrganismSpec, out: Path) -> None:
    """Raise `ResultError` unless `out` contains a finished run of this specification."""
    try:
        found = read_training(out)
        same = recorded_specs(found) == spec.to_dict()
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ResultError(
            f"{out} contains something other than this run of {spec.name!r}: write elsewhere, or replace it "
            "with resume=False."
        )


def _check_snapshots(spec: OrganismSpec, out: Path, steps: Sequence[int] | None) -> None:
    """Raise `ResultError` unless a finished run kept the requested weights."""
    if steps is None:
        steps = default_steps(read_training(out)["training"]["n_steps"]) if spec.snapshots else ()
    kept = kept_steps(out)
    lost = [step for step in steps if step not in kept]
    if lost:
        raise ResultError(
            f"{out} contains this run of {spec.name!r} without its weights of step {lost[0]}: write "
            "elsewhere, or replace it with resume=False."
        )


def _training_record(
    spec: OrganismSpec, corpus: Corpus, model: PreTrainedModel, log: TrainLog, device: str | None
) -> dict[str, Any]:
    specs = spec.to_dict()
    steps = "" if spec.training.steps is None else f" --steps {spec.training.steps}"
    counts = {domain: counts.tolist() for domain, counts in corpus.domain_counts().items()}
    versions = {name: version(name) for name in ("memlens", "torch", "transformers", "tokenizers")}
    threads = torch.get_num_threads()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "name": spec.name,
        "command": f"memlens zoo train {spec.name} --seed {spec.training.seed}{steps}",
        "model": {"spec": specs["model"], "facts": architecture_facts(model)},
        "corpus": {
            "spec": specs["corpus"],
            "n_rows": len(corpus.rows),
            "n_carriers": int((corpus.row_sequence == CARRIER).sum()),
            "fingerprint": corpus.fingerprint(),
            "token_counts": counts,
        },
        "training": {
            "spec": specs["training"],
            "n_steps": len(log.losses),
            "seconds": round(log.seconds, 1),
            "device": cpu if device == "cpu" else torch.cuda.get_device_name(device),
            "losses": [round(loss, 4) for loss in log.losses],
        },
        **({} if spec.routing is None else {"routing": {"spec": spec.routing.to_dict()}}),
        "versions": {**versions, "python": platform.python_version()},
    }
