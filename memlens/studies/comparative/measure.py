"""Measures one model: each part is saved when it is done, and a saved part is not computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import MemlensError
from memlens.files import replacing
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.noise import perturb_residual
from memlens.models.load import load_model
from memlens.models.provenance import describe
from memlens.models.zoo import is_zoo_name
from memlens.organisms.training.architectures import untrained_like
from memlens.recall.compression import prompt_compression
from memlens.recall.corpus.duplicates import token_counts
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.results.groups import join_groups
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint, model_fingerprint, sequences_fingerprint
from memlens.studies.comparative.analyze.frequency import token_frequencies
from memlens.studies.comparative.analyze.rates import join_steps
from memlens.studies.comparative.config import StudyModel, per_domain, read_domains
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.store import ModelStore, SavedModel, folder_name
from memlens.studies.running import StudyDirectory, at_most


def loaded(entry: StudyModel) -> Any:
    """Return the model of an entry, as given or loaded now."""
    if entry.model is not None:
        return entry.model
    return load_model(
        entry.name, backend=entry.backend, revision=entry.revision, checkpoint_step=entry.checkpoint_step,
        dtype=entry.dtype, device=entry.device,
    )  # fmt: skip


def facts_of(model: Any, entry: StudyModel) -> dict[str, Any]:
    """Return what is recorded of a model: its identity, sizes, and the fingerprint of its weights."""
    described, trunk = describe(model), Trunk(model)
    return {
        **described,
        "label": entry.label,
        "family": entry.family_of(described),
        "corpus": entry.corpus_of,
        "control": entry.is_control,
        "n_layers": trunk.n_layers,
        "n_heads": trunk.n_heads,
        "fingerprint": model_fingerprint(model),
        "entry": entry.settings(),
    }


MEMORIZED, CONTROL, UNTRAINED = "memorized", "matched control", "untrained twin"

_GROUPED = ("max_examined", "unmemorized_below", "seed")
_USES: dict[str, tuple[str, ...]] = {
    "recall": (),
    "groups": _GROUPED,
    "frequency": (),
    "compression": ("compression", "compression_budget", "max_compressed", "seed"),
    "decoding": (*_GROUPED, "untrained"),
    "noise": (
        "alphas", "noise_layer", "noise_site", "noise_positions", "noise_scale", "noise_draws",
        "noise_per_domain", "seed",
    ),
    "recovery": (
        *_GROUPED, "untrained", "alphas", "noise_layer", "noise_site", "noise_positions", "noise_scale",
        "noise_draws", "similarity_at",
    ),
    "heads": ("head_mode", "heads_per_domain", "untrained", "seed"),
    "training": (),
}  # fmt: skip
"""The options that a part depends on, besides model and sequences."""

_METRICS = {
    "noise": ("exact_match", "matching_prefix", "target_accuracy"),
    "recovery": ("target_logprob", "exact_match"),
    "heads": ("target_logprob", "target_accuracy", "exact_match"),
}

_SWEPT = ("noise", "heads")


def measure_model(
    entry: StudyModel,
    sources: Mapping[str, Any] | str | SequenceSet,
    root: str | Path,
    options: ComparativeOptions,
    folder: StudyDirectory,
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
        folder: The study's folder, for failures.
        progress: Show progress bars.

    Raises:
        MemlensError: The model or its sequences cannot be loaded, or cannot be scored.
    """
    return _Measures(entry, sources, Path(root), options, progress).run(folder)


class _Measures:
    def __init__(
        self, entry: StudyModel, sources: Any, root: Path, options: ComparativeOptions, progress: bool
    ) -> None:
        self.entry, self.options, self.progress = entry, options, progress
        self.model = loaded(entry)
        self.seqs = read_domains(sources, self.model, options)
        self.facts = facts_of(self.model, entry)
        self.path = root / folder_name(entry.label, str(self.facts["fingerprint"]))
        self.store = ModelStore(self.path, self.facts)
        self.on = sequences_fingerprint(self.seqs)

    def run(self, folder: StudyDirectory) -> SavedModel:
        self._make("recall", self._recall)
        works: dict[str, Callable[[], str | None]] = {
            "groups": self._groups, "frequency": self._frequency, "compression": self._compression,
            "decoding": self._decoding, "noise": self._noise, "recovery": self._recovery,
            "heads": self._heads, "training": self._training,
        }  # fmt: skip
        wanted = {"recall", *self.options.measures}
        wanted |= {"groups"} if wanted & {"decoding", "recovery"} else set()
        for part, work in works.items():
            if part in wanted:
                folder.step(
                    f"{self.entry.label}: {part}", lambda part=part, work=work: self._make(part, work)
                )
        return SavedModel.open(self.path)

    def _make(self, part: str, work: Callable[[], str | None]) -> None:
        chosen: dict[str, Any] = {name: getattr(self.options, name) for name in _USES[part]}
        if part == "training":
            chosen["checkpoints"] = self.entry.checkpoints
        if part in ("frequency", "groups", "decoding", "recovery"):
            chosen["counts"] = self.entry.counts
        self.key = fingerprint([part, self.on, sorted(chosen.items()), _METRICS.get(part, ())])
        self.store.make(part, self.key, work, chosen)
        if part in _SWEPT:  # a finished sweep needs no parts to resume from
            shutil.rmtree(self._sweep(part), ignore_errors=True)

    def _sweep(self, part: str) -> Path:
        """Return the folder that keeps a sweep's finished parts until the sweep is done."""
        return self.path / "sweeps" / f"{part}-{self.key[:8]}"

    # ---- the parts ---------------------------------------------------------------------------------------

    def _recall(self) -> None:
        recall = score_recall(self.model, self.seqs, metrics=(), progress=self.progress)
        recall.save(self.path / "recall.parquet")

    @cached_property
    def recall(self) -> RecallScores:
        return RecallScores.load(self.path / "recall.parquet")

    def _groups(self) -> str | None:
        memorized = self.recall.memorized()
        chosen = at_most(memorized, self.options.max_examined, self.options.seed)
        rows = [pd.DataFrame({"id": chosen.ids, "group": MEMORIZED, "matched_to": ""})]
        note = None
        if len(chosen):
            try:
                counts, _ = self._counts()
                controls = self.recall.matched_controls(
                    seed=self.options.seed, below=self.options.unmemorized_below, token_counts=counts
                )
                wanted = controls.table["matched_to"].isin(chosen.ids).to_numpy()
                table = controls.table[wanted]
                rows.append(
                    pd.DataFrame({"id": table["id"], "group": CONTROL, "matched_to": table["matched_to"]})
                )
            except MemlensError as error:  # all sequences are memorized: continue without controls
                note = None if len(chosen) > 1 else str(error)
        if len(chosen) < 2:
            note = f"{len(memorized)} memorized sequences: too few to examine"
        with replacing(self.path / "groups.parquet") as part:
            pd.concat(rows, ignore_index=True).to_parquet(part)
        return note

    def _chosen(self, group: str) -> SequenceSet:
        table = pd.read_parquet(self.path / "groups.parquet")
        ids = table.loc[table["group"] == group, "id"].tolist()
        place = {name: i for i, name in enumerate(self.seqs.ids)}
        return self.seqs[[place[name] for name in ids]] if ids else self.seqs[[]]

    def _frequency(self) -> None:
        counts, counted_in = self._counts()
        token_frequencies(self.seqs, counts, counted_in).save(self.path / "frequency.nc")

    def _counts(self) -> tuple[np.ndarray, str]:
        given, size = self.entry.counts, int(self.model.cfg.d_vocab)
        if given is None and is_zoo_name(self.entry.name):
            try:
                return token_counts(self.entry.name, vocab_size=size), f"the corpus of {self.entry.name}"
            except MemlensError:
                given = None
        if given is not None and given.endswith(".npy"):
            counts = np.load(given, allow_pickle=False)
            return np.pad(counts, (0, max(0, size - len(counts)))), Path(given).name
        if given is not None:
            return token_counts(given, vocab_size=size, progress=self.progress), given
        tokens = self.seqs.tokens.numpy()[self.seqs.mask.numpy()]
        return np.bincount(tokens, minlength=size), "the scored sequences themselves"

    def _compression(self) -> str | None:
        memorized = self.recall.memorized()
        if not len(memorized):
            return "no memorized sequence to compress"
        chosen = at_most(memorized, self.options.max_compressed, self.options.seed)
        result = prompt_compression(
            self.model, chosen, self.options.compression, budget=self.options.compression_budget,
            progress=self.progress,
        )  # fmt: skip
        result.save(self.path / "compression.nc")
        return None

    def _decoding(self) -> str | None:
        return self._of_groups(
            "decoding", lambda model, seqs: decode_residual(model, seqs, progress=self.progress)
        )

    def _recovery(self) -> str | None:
        options = {**self._noise_options(), "similarity_at": self.options.similarity_at}
        return self._of_groups(
            "recovery",
            lambda model, seqs: perturb_residual(model, seqs, metrics=_METRICS["recovery"], **options),
        )

    def _of_groups(self, part: str, work: Callable[[Any, SequenceSet], Result]) -> str | None:
        """Measure memorized sequences and their matched controls, and the former on the twin."""
        groups = {name: self._chosen(name) for name in (MEMORIZED, CONTROL)}
        if len(groups[MEMORIZED]) < 2:
            return f"{len(groups[MEMORIZED])} memorized sequences: too few to examine"
        results = {name: work(self.model, seqs) for name, seqs in groups.items() if len(seqs)}
        if self.options.untrained:
            results[UNTRAINED] = work(self.twin, groups[MEMORIZED])
        _without_tokens(join_groups(results)).save(self.path / f"{part}.nc")
        return None

    @cached_property
    def twin(self) -> Any:
        return untrained_like(self.model, seed=self.options.seed)

    def _noise_options(self) -> dict[str, Any]:
        o = self.options
        return {
            "alphas": o.alphas, "layer": o.noise_layer, "site": o.noise_site, "positions": o.noise_positions,
            "scale": o.noise_scale, "n_draws": o.noise_draws, "seed": o.seed, "progress": self.progress,
        }  # fmt: skip

    def _noise(self) -> None:
        seqs = per_domain(self.seqs, self.options.noise_per_domain, self.options.seed)
        result = perturb_residual(
            self.model, seqs, metrics=_METRICS["noise"], recovery=False,
            out=self._sweep("noise"), **self._noise_options(),
        )  # fmt: skip
        result.save(self.path / "noise.nc")

    def _heads(self) -> str | None:
        memorized = per_domain(self.recall.memorized(), self.options.heads_per_domain, self.options.seed)
        if not len(memorized):
            return "no memorized sequence to ablate heads for"
        bare = self.seqs[[i for i, name in enumerate(self.seqs.ids) if name in set(memorized.ids)]]
        options: dict[str, Any] = {
            "mode": self.options.head_mode, "seed": self.options.seed, "progress": self.progress,
            "metrics": _METRICS["heads"],
        }  # fmt: skip
        ablate_heads(self.model, bare, out=self._sweep("heads"), **options).save(self.path / "heads.nc")
        (self.path / "heads_untrained.nc").unlink(missing_ok=True)
        if self.options.untrained:
            few = at_most(bare, self.options.max_examined, self.options.seed)
            ablate_heads(self.twin, few, **options).save(self.path / "heads_untrained.nc")
        return None

    def _training(self) -> str | None:
        if not self.entry.checkpoints:
            return "no checkpoints were given"
        tables = {}
        for step in sorted(set(self.entry.checkpoints)):
            file = self.path / "steps" / f"{step}-{self.key[:8]}.parquet"
            if not file.exists():
                model = load_model(
                    self.entry.name, checkpoint_step=step, backend=self.entry.backend,
                    dtype=self.entry.dtype, device=self.entry.device,
                )  # fmt: skip
                score_recall(model, self.seqs, generate=False, metrics=(), progress=self.progress).save(file)
            tables[step] = RecallScores.load(file).table
        join_steps(tables).save(self.path / "training.nc")
        return None


def _without_tokens(result: Result) -> Result:
    """Drop the targets' text, which the recall table holds."""
    return Result(result.data.drop_vars("token", errors="ignore"))
