"""Measures one model: each part is saved when it is done, and a saved part is not computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from memlens.errors import MemlensError, ResultError
from memlens.files import parsing, read_json, reason_of, replacing, write_json
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.noise import perturb_residual
from memlens.models.provenance import describe
from memlens.models.zoo import is_zoo_name
from memlens.organisms.training.architectures import untrained_like
from memlens.recall.compression import prompt_compression
from memlens.recall.corpus.duplicates import token_counts
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.results.groups import join_groups
from memlens.results.result import Result
from memlens.sequences.readers.sources import load_array
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.studies.comparative.analyze.frequency import token_frequencies
from memlens.studies.comparative.analyze.rates import join_steps
from memlens.studies.comparative.config import StudyModel, per_domain, read_domains
from memlens.studies.comparative.options import CONTROL, MEMORIZED, UNTRAINED, ComparativeOptions, Measure
from memlens.studies.comparative.store import SavedModel, folder_name
from memlens.studies.running import StudyDirectory, at_most

_GROUPED = ("max_examined", "unmemorized_below", "seed")
_NOISE = ("alphas", "noise_layer", "noise_site", "noise_positions", "noise_scale", "noise_draws")
_USES: dict[str, tuple[str, ...]] = {
    "groups": _GROUPED,
    "compression": ("compression", "compression_budget", "max_compressed", "seed"),
    "decoding": (*_GROUPED, "untrained"),
    "noise": (*_NOISE, "noise_per_domain", "seed"),
    "recovery": (*_GROUPED, "untrained", *_NOISE, "similarity_at"),
    "heads": ("head_mode", "heads_per_domain", "untrained", "seed"),
}
"""The options that a part depends on, besides model and sequences."""

_METRICS = {
    "noise": ("exact_match", "matching_prefix", "target_accuracy"),
    "recovery": ("target_logprob", "exact_match"),
    "heads": ("target_logprob", "target_accuracy", "exact_match"),
}


def measure_model(
    entry: StudyModel,
    sources: Mapping[str, Any] | str | SequenceSet,
    root: str | Path,
    options: ComparativeOptions,
    folder: StudyDirectory | Steps,
    *,
    progress: bool = True,
) -> SavedModel:
    """Measure a model and return its folder; parts saved from the same model and options are kept.

    A part that fails is recorded in the study's folder and does not stop the others.

    Args:
        entry: The model.
        sources: See `read_domains`.
        root: The folder of all models' folders.
        options: See `ComparativeOptions`.
        folder: The study's folder, or another place for failures.
        progress: Show progress bars.

    Raises:
        MemlensError: The model or its sequences cannot be loaded, or cannot be scored.
    """
    work = _Measures(entry, sources, Path(root), options, progress)
    work.make("recall")
    wanted = {*options.measures} - {"recall"}
    wanted |= {"groups"} if wanted & {"decoding", "recovery"} else set()
    for part in get_args(Measure):
        if part in wanted:
            folder.step(f"{entry.label}: {part}", partial(work.make, part))
    return SavedModel(work.path)


class Steps:
    """Runs the steps of one model where there is no study's folder, and keeps what failed.

    Attributes:
        failures: Messages by step.
    """

    failures: dict[str, str]

    def __init__(self) -> None:
        self.failures = {}

    def step(self, name: str, work: Callable[[], Any]) -> None:
        """Run a step; if it fails for any reason, record that."""
        try:
            work()
        except Exception as error:
            self.failures[name] = str(error) if isinstance(error, MemlensError) else reason_of(error)


class ModelsJob:
    """The models of a study as parts: each is measured by one process.

    The file of a part says where the model's folder is, and what failed.

    Args:
        entries: The models.
        sources: See `read_domains`.
        root: The folder of all models' folders.
        options: See `ComparativeOptions`.
    """

    folder: Path
    sources: Any
    options: ComparativeOptions
    entries: dict[str, StudyModel]

    def __init__(
        self, entries: Sequence[StudyModel], sources: Any, root: Path, options: ComparativeOptions
    ) -> None:
        self.sources, self.options, self.folder = sources, options, root.absolute()
        key = fingerprint([str(sources) if isinstance(sources, str) else sources, options])
        self.entries = {
            folder_name(entry.label, fingerprint([entry.settings(), key])): entry for entry in entries
        }

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.measured.json"

    def done(self, part: str) -> bool:
        """Whether a model was measured."""
        return self._path(part).exists()

    def work(self, part: str) -> None:
        """Measure a model and write the part's file."""
        entry, steps, found = self.entries[part], Steps(), []

        def measured() -> None:
            saved = measure_model(entry, self.sources, self.folder, self.options, steps, progress=False)
            found.append(saved.path.name)

        steps.step(entry.label, measured)
        write_json(self._path(part), {"folders": found, "failures": steps.failures})

    def take(self, part: str) -> tuple[list[SavedModel], dict[str, str]]:
        """Return the model that was measured, if it was, and what failed; the part's file is removed."""
        content = read_json(self._path(part), kind=ResultError)
        self._path(part).unlink()
        return [SavedModel(self.folder / name) for name in content["folders"]], content["failures"]

    def forget(self) -> None:
        """Remove the files of all parts, so that models that have changed are measured anew."""
        for part in self.entries:
            self._path(part).unlink(missing_ok=True)


class _Measures:
    """Computes the parts of one model: each method named after a part saves it, or says why it cannot."""

    def __init__(
        self, entry: StudyModel, sources: Any, root: Path, options: ComparativeOptions, progress: bool
    ) -> None:
        self.entry, self.options, self.progress = entry, options, progress
        self.model = entry.load()
        self.seqs = read_domains(sources, self.model, options)
        described, trunk, weights = describe(self.model), Trunk(self.model), model_fingerprint(self.model)
        facts = {
            **described,
            "label": entry.label,
            "family": entry.family_of(described),
            "corpus": entry.corpus_of,
            "control": entry.is_control,
            "n_layers": trunk.n_layers,
            "n_heads": trunk.n_heads,
            "fingerprint": weights,
            "entry": entry.settings(),
        }
        self.path = root / folder_name(entry.label, weights)
        self.saved = SavedModel(self.path, facts)
        self.on = fingerprint(self.seqs)

    def make(self, part: str) -> None:
        chosen: dict[str, Any] = {name: getattr(self.options, name) for name in _USES.get(part, ())}
        if part == "training":
            chosen["checkpoints"] = self.entry.checkpoints
        if part in ("frequency", "groups", "decoding", "recovery"):
            chosen["counts"] = self.entry.counts
        self.key = fingerprint([part, self.on, sorted(chosen.items()), _METRICS.get(part, ())])
        self.saved.make(part, self.key, getattr(self, part), chosen)
        shutil.rmtree(self.sweep(part), ignore_errors=True)  # a finished sweep needs no parts to resume from

    def sweep(self, part: str) -> Path:
        """Return the folder that keeps a sweep's finished parts until the sweep is done."""
        return self.path / "sweeps" / f"{part}-{self.key[:8]}"

    @cached_property
    def twin(self) -> Any:
        return untrained_like(self.model, seed=self.options.seed)

    # ---- the parts ---------------------------------------------------------------------------------------

    def recall(self) -> None:
        scores = score_recall(self.model, self.seqs, metrics=(), progress=self.progress)
        scores.save(self.path / "recall.parquet")

    def groups(self) -> str | None:
        memorized = self.saved.recall.memorized()
        chosen = at_most(memorized, self.options.max_examined, self.options.seed)
        groups = pd.DataFrame({"id": chosen.ids, "group": MEMORIZED, "matched_to": ""})
        note = None
        if len(chosen):
            try:
                controls = self.saved.recall.matched_controls(
                    seed=self.options.seed, below=self.options.unmemorized_below,
                    token_counts=self._counts()[0],
                )  # fmt: skip
                found = controls.table.loc[controls.table["matched_to"].isin(chosen.ids)]
                groups = pd.concat([groups, found[["id", "matched_to"]].assign(group=CONTROL)])
            except MemlensError as error:  # all sequences are memorized: continue without controls
                note = None if len(chosen) > 1 else str(error)
        if len(chosen) < 2:
            note = f"{len(memorized)} memorized sequences: too few to examine"
        with replacing(self.path / "groups.parquet") as part:
            groups.reset_index(drop=True).to_parquet(part)
        return note

    def frequency(self) -> None:
        token_frequencies(self.seqs, *self._counts()).save(self.path / "frequency.nc")

    def _counts(self) -> tuple[np.ndarray, str]:
        """Return how often each token occurs, and where that was counted."""
        given, size = self.entry.counts, int(self.model.cfg.d_vocab)
        if given is None and is_zoo_name(self.entry.name):
            try:
                return token_counts(self.entry.name, vocab_size=size), f"the corpus of {self.entry.name}"
            except MemlensError:
                given = None
        if given is not None and given.endswith(".npy"):
            with parsing(given, advice="give one count per token id"):
                counts = load_array(Path(given))
                if counts.ndim != 1 or counts.dtype.kind not in "iu":
                    raise ValueError(f"it holds {counts.dtype} of shape {counts.shape}")
                return np.pad(counts, (0, max(0, size - len(counts)))), Path(given).name
        if given is not None:
            return token_counts(given, vocab_size=size, progress=self.progress), given
        tokens = self.seqs.tokens.numpy()[self.seqs.mask.numpy()]
        return np.bincount(tokens, minlength=size), "the scored sequences themselves"

    def compression(self) -> str | None:
        memorized = self.saved.recall.memorized()
        if not len(memorized):
            return "no memorized sequence to compress"
        chosen = at_most(memorized, self.options.max_compressed, self.options.seed)
        result = prompt_compression(
            self.model, chosen, self.options.compression, budget=self.options.compression_budget,
            progress=self.progress,
        )  # fmt: skip
        result.save(self.path / "compression.nc")
        return None

    def decoding(self) -> str | None:
        return self._of_groups("decoding", partial(decode_residual, progress=self.progress))

    def recovery(self) -> str | None:
        return self._of_groups("recovery", partial(self._perturb, similarity_at=self.options.similarity_at))

    def _of_groups(self, part: str, work: Callable[[Any, SequenceSet], Result]) -> str | None:
        """Measure memorized sequences and their matched controls, and the former on the twin."""
        place, chosen = {name: i for i, name in enumerate(self.seqs.ids)}, self.saved.groups
        groups = {
            name: self.seqs[[place[i] for i in chosen.loc[chosen["group"] == name, "id"]]]
            for name in (MEMORIZED, CONTROL)
        }
        if len(groups[MEMORIZED]) < 2:
            return f"{len(groups[MEMORIZED])} memorized sequences: too few to examine"
        results = {name: work(self.model, seqs) for name, seqs in groups.items() if len(seqs)}
        if self.options.untrained:
            results[UNTRAINED] = work(self.twin, groups[MEMORIZED])
        data = join_groups(results).data.drop_vars("token", errors="ignore")  # the recall table has the text
        Result(data).save(self.path / f"{part}.nc")
        return None

    def _perturb(self, model: Any, seqs: SequenceSet, part: str = "recovery", **options: Any) -> Result:
        o = self.options
        return perturb_residual(
            model, seqs, metrics=_METRICS[part], alphas=o.alphas, layer=o.noise_layer, site=o.noise_site,
            positions=o.noise_positions, scale=o.noise_scale, n_draws=o.noise_draws, seed=o.seed,
            progress=self.progress, **options,
        )  # fmt: skip

    def noise(self) -> None:
        seqs = per_domain(self.seqs, self.options.noise_per_domain, self.options.seed)
        result = self._perturb(self.model, seqs, "noise", recovery=False, out=self.sweep("noise"))
        result.save(self.path / "noise.nc")

    def heads(self) -> str | None:
        options, memorized = self.options, self.saved.recall.memorized()
        chosen = per_domain(memorized, options.heads_per_domain, options.seed)
        if not len(chosen):
            return "no memorized sequence to ablate heads for"
        bare = self.seqs[[i for i, name in enumerate(self.seqs.ids) if name in set(chosen.ids)]]
        ablate = partial(
            ablate_heads, mode=options.head_mode, seed=options.seed, metrics=_METRICS["heads"],
            progress=self.progress,
        )  # fmt: skip
        ablate(self.model, bare, out=self.sweep("heads")).save(self.path / "heads.nc")
        (self.path / "heads_untrained.nc").unlink(missing_ok=True)
        if options.untrained:
            few = at_most(bare, options.max_examined, options.seed)
            ablate(self.twin, few).save(self.path / "heads_untrained.nc")
        return None

    def training(self) -> str | None:
        if not self.entry.checkpoints:
            return "no checkpoints were given"
        tables = {}
        for step in sorted(set(self.entry.checkpoints)):
            file = self.path / "steps" / f"{step}-{self.key[:8]}.parquet"
            if not file.exists():
                model = replace(self.entry, model=None, revision=None, checkpoint_step=step).load()
                score_recall(model, self.seqs, generate=False, metrics=(), progress=self.progress).save(file)
            tables[step] = RecallScores.load(file).table
        join_steps(tables).save(self.path / "training.nc")
        return None
