"""The main job: where does this model recall these sequences?

Score, decode, attribute, ablate, bypass, patch. Every effect is compared with that on matched controls that
the model does not recall, depth with an untrained twin, and every site is chosen on one half of the sequences
and reported on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.benchmark.ranking import best_method, rank
from memlens.benchmark.recommend import ABLATIONS, PLURALS, ranked_by
from memlens.errors import MemlensError
from memlens.explorer.measuring import ABLATION_MODES, ExploreOptions, explore_sequences
from memlens.explorer.page import READING, caption_of, explorer_payload
from memlens.forward.components import COMPONENT_KINDS, ComponentKind
from memlens.instruments.ablate.heads import ablate_heads
from memlens.instruments.bypass.bypass import bypass_attention
from memlens.instruments.decode.decoding import decode_residual
from memlens.instruments.decode.logit_attribution import attribute_logits
from memlens.instruments.donors import check_donor
from memlens.instruments.patch.patching import patch_activations
from memlens.models.load import load_model
from memlens.models.provenance import describe
from memlens.organisms.training.architectures import untrained_like
from memlens.recall.scores import RecallScores
from memlens.report.model import FigureRequest
from memlens.results.groups import join_groups
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint
from memlens.store.sharing import Part, parse_part
from memlens.studies.localization import findings as find
from memlens.studies.localization.findings import CONTROL, MEMORIZED, UNTRAINED
from memlens.studies.localization.options import LocalizeOptions
from memlens.studies.running import (
    StudyDirectory,
    StudyRun,
    at_most,
    last_of_all,
    matched_with,
    unfinished_together,
)

MOST_OTHERS = 16
"""Most matched controls that rankings are compared with."""
_RANKED = 20
"""Components that the report shows of each ranking."""


def localize(
    model: Any,
    sequences: SequenceSet,
    out: str | Path,
    *,
    options: LocalizeOptions | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
    part: Part | None = None,
    executor: Any = None,
) -> StudyRun:
    """Find where a model recalls sequences, and write results and report to a folder.

    Args:
        model: A TransformerLens model.
        sequences: What it may have memorized.
        out: The folder; results are saved there one by one. A second call with the same arguments resumes the
            sweeps where they stopped.
        options: See `LocalizeOptions`.
        title: Heading of the report.
        command: The command line that repeats the run, for the report.
        progress: Show progress bars.
        part: Only a share of the sweeps' parts, as for `sweep`; the worker that finishes last writes the
            report.
        executor: Do the sweeps on the workers of an executor, as for `sweep`.

    Returns:
        The report's path, the findings, and what failed.

    Raises:
        UnfinishedError: With `part`: this share is done, and parts of others are missing.
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit, before any forward pass.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> run = ml.localize(model, ml.load_sequences("zoo", model), tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    if part is not None:
        parse_part(part)
    check_sequences(sequences, model)
    options, about = options or LocalizeOptions(), describe(model)
    donor = None if options.donor is None else _loaded_like(model, options.donor)
    if donor is not None:
        check_donor(model, donor, sequences, sites=["z"])
    settings = {"study": "localize", **asdict(options), "model": about, "sequences": dict(sequences.attrs)}
    title = title or find.TEXTS["title"].format(model=about["model"], n=len(sequences))
    summary = find.TEXTS.summary(model=about["model"], n=len(sequences))
    about_run: dict[str, Any] = {
        "title": title,
        "summary": summary,
        "settings": settings,
        "command": command,
    }

    def study(**sharing: Any) -> _Localization:
        folder = StudyDirectory(out, **about_run, fresh="part" not in sharing)
        folder.sharing = {name: value for name, value in sharing.items() if value is not None}
        return _Localization(model, folder, options, progress, donor)

    if part is None:
        return study(executor=executor).run(sequences)
    study(part=part).share(sequences)
    with last_of_all(out):
        return study().run(sequences)


def _loaded_like(model: Any, name: str) -> Any:
    """Load another model, on the same device and in the same precision."""
    return load_model(name, dtype=model.cfg.dtype, device=next(model.parameters()).device)


@dataclass(eq=False)
class _Localization:
    model: Any
    folder: StudyDirectory
    options: LocalizeOptions
    progress: bool
    donor: Any = None

    def run(self, seqs: SequenceSet) -> StudyRun:
        with self.folder.timed("recall"):
            recall = self._scored(seqs)
            memorized = recall.memorized()
            self._keep_recall(recall, enough=len(memorized) > 1)
        if len(memorized) < 2:
            return self.folder.done()
        memorized = at_most(memorized, self.options.max_sequences, self.options.seed)
        groups = self._groups(recall, memorized)
        for name, work in (
            ("decoding", partial(self._decode, recall)),
            ("head ablation", self._ablate),
            ("attention bypass", self._bypass),
            ("activation patching", self._patch),
            *([] if self.donor is None else [("patching from the donor", self._patch_from_donor)]),
            ("logit attribution", self._attribute),
            ("rankings", self._rank),
            ("explorer", self._explore),
        ):
            self.folder.step(name, partial(work, groups))
        return self.folder.done()

    def share(self, seqs: SequenceSet) -> None:
        """Do a share of the sweeps only; raises `UnfinishedError` while parts of others are missing."""
        memorized = self._scored(seqs).memorized()
        if len(memorized) < 2:
            return
        groups = self._groups(
            self._scored(seqs), at_most(memorized, self.options.max_sequences, self.options.seed)
        )
        with unfinished_together() as attempt:
            for sweeps in (
                self._ablations,
                self._bypasses,
                lambda groups: self._patched(groups)[0],
                *([] if self.donor is None else [self._from_donor]),
            ):
                with attempt():
                    sweeps(groups)

    def _scored(self, seqs: SequenceSet) -> RecallScores:
        return self.folder.scored("recall", self.model, seqs, progress=self.progress)

    def _keep_recall(self, recall: RecallScores, *, enough: bool) -> None:
        recall.save(self.folder.path / "recall.parquet")
        self.folder.add_result("recall", recall.to_result(), title="What is recalled")
        summary = recall.summary().astype({"group": str})
        self.folder.add_table("recall_summary", summary, title="Recall, by group")
        self.folder.find(find.recalled(recall, enough=enough))

    def _groups(self, recall: RecallScores, memorized: SequenceSet) -> dict[str, SequenceSet]:
        try:
            controls = recall.matched_controls(seed=self.options.seed)
        except MemlensError as error:
            self.folder.failed("matched controls", error)
            return {MEMORIZED: memorized}
        return {MEMORIZED: memorized, CONTROL: matched_with(memorized, controls)}

    def _decode(self, recall: RecallScores, groups: Mapping[str, SequenceSet]) -> None:
        everything = {**groups, "all not recalled": recall.unmemorized(1.0)}
        decoded = {
            name: decode_residual(self.model, seqs, progress=self.progress)
            for name, seqs in everything.items()
            if len(seqs)
        }
        self._save("residual_decoding", "How the prediction unfolds over layers", decoded, one_sequence=True)
        self.folder.find(find.promoted(decoded, self.options.seed))

    def _ablations(self, groups: Mapping[str, SequenceSet]) -> dict[str, Result]:
        donor = self.donor if self.options.head_mode == "donor" else None
        work = partial(
            ablate_heads, self.model, mode=self.options.head_mode, seed=self.options.seed, donor=donor
        )
        return self._kept("heads", {name: partial(work, seqs) for name, seqs in groups.items()})

    def _ablate(self, groups: Mapping[str, SequenceSet]) -> None:
        mode, results = self.options.head_mode, self._ablations(groups)
        self._save("head_ablation", "Which heads matter", results)
        self.folder.find(find.strongest_head(results, self.options.seed))
        table = find.head_table(results, self.options.seed)
        note = ranked_by(ABLATIONS.get(mode, f"{mode} ablation"), "head", self._family)
        self.folder.add_table("heads", table, title="The heads that matter most for recall", note=note)

    @property
    def _family(self) -> str:
        return str(describe(self.model)["family"])

    def _rank(self, groups: Mapping[str, SequenceSet]) -> None:
        """Rank components by the benchmark's recommended method, or the best one that is not too costly."""
        seqs = at_most(groups[MEMORIZED], self.options.ranked_sequences, self.options.seed)
        controls = groups.get(CONTROL)
        others = None if controls is None else at_most(controls, MOST_OTHERS, self.options.seed)
        self.folder.add_section("rankings", find.TEXTS["rankings"]["title"], find.TEXTS["rankings"]["lead"])
        for component in COMPONENT_KINDS:
            found = self._best_ranking(component, seqs, others)
            words = PLURALS[component]
            note = f"Ranked by {found['method']}, mean over {len(seqs)} sequences. {found['evidence']}"
            name, top = f"ranked_{component}", pd.DataFrame(found["top"])
            if component.startswith("layer"):
                top = top.drop(columns="index")  # of the one MLP or attention of a layer, always 0
            self.folder.add_table(
                name, top, title=f"{words[0].upper()}{words[1:]}: ranked", note=note, section="rankings"
            )

    def _best_ranking(
        self, component: ComponentKind, seqs: SequenceSet, others: SequenceSet | None
    ) -> dict[str, Any]:
        localizer, variant = best_method(component, others, self.options.most_forwards, self._family)

        def look() -> dict[str, Any]:
            found = rank(
                self.model, seqs, component, others=others, localizer=localizer, variant=variant,
                seed=self.options.seed,
            )  # fmt: skip
            top = found.table.head(_RANKED).to_dict("list")
            return {"method": found.method, "evidence": found.evidence, "top": top}

        compared = "" if others is None else fingerprint(others)
        about = [component, localizer, variant, self.options.seed, compared]
        return self.folder.stored(f"ranked_{component}", self.model, seqs, about, look)

    def _bypasses(self, groups: Mapping[str, SequenceSet]) -> dict[str, Result]:
        places = [(name, self.model, seqs) for name, seqs in groups.items()]
        if self.options.untrained_control:
            twin = untrained_like(self.model, seed=self.options.seed)
            places.append((UNTRAINED, twin, groups[MEMORIZED]))
        mode = self.options.bypass_mode
        works = {name: partial(bypass_attention, model, seqs, mode=mode) for name, model, seqs in places}
        return self._kept("bypass", works)

    def _bypass(self, groups: Mapping[str, SequenceSet]) -> None:
        results = self._bypasses(groups)
        self._save("attention_bypass", "Which layer's attention matters", results)
        self.folder.find(find.bypassed_layer(results, self.options.seed))

    def _patched(self, groups: Mapping[str, SequenceSet]) -> tuple[dict[str, Result], dict[str, np.ndarray]]:
        """Results by group, and the position of the corrupted token in each sequence."""
        place = self.options.corrupted_position
        works: dict[str, Callable[..., Result]] = {}
        corrupted: dict[str, np.ndarray] = {}
        for name, seqs in groups.items():
            usable = seqs[np.flatnonzero(seqs.prefix_len.numpy() >= -place)]
            clean = at_most(usable, self.options.max_patched, self.options.seed)
            dirty = corrupt(clean, "replace_token", positions=[place], seed=self.options.seed)
            corrupted[name] = clean.prefix_len.numpy() + place
            patch = partial(patch_activations, self.model, clean, dirty, site=self.options.patch_site)
            works[name] = partial(patch, positions=self._positions(clean, corrupted[name]))
        return self._kept("patching", works), corrupted

    def _patch(self, groups: Mapping[str, SequenceSet]) -> None:
        results, corrupted = self._patched(groups)
        self._save("activation_patching", "Where the cue is", results, one_sequence=True)
        self.folder.find(find.restoring_layer(results, corrupted[MEMORIZED], self.options.seed))

    def _from_donor(self, groups: Mapping[str, SequenceSet]) -> dict[str, Result]:
        patch = partial(patch_activations, self.model, donor=self.donor, site="z", over="head")
        return self._kept("donor", {name: partial(patch, seqs) for name, seqs in groups.items()})

    def _patch_from_donor(self, groups: Mapping[str, SequenceSet]) -> None:
        results = self._from_donor(groups)
        self._save("donor_patching", f"Heads taken from {self.options.donor}", results)

    def _positions(self, seqs: SequenceSet, always: np.ndarray) -> list[int]:
        """At most `max_positions` positions, spread evenly from the first changed one, and `always`."""
        first, last = int(always.min()), int(seqs.lengths.max()) - 2
        number = min(last - first + 1, self.options.max_positions)
        return np.union1d(np.linspace(first, last, number).round().astype(int), always).tolist()

    def _attribute(self, groups: Mapping[str, SequenceSet]) -> None:
        for name, seqs in groups.items():
            result = attribute_logits(self.model, seqs, progress=self.progress)
            title = f"What writes the target's logit: {name}"
            self.folder.add_result(f"logit_attribution_{name}", result, title=title)

    def _kept(self, what: str, works: Mapping[str, Callable[..., Result]]) -> dict[str, Result]:
        """Run a sweep on each group."""
        return self.folder.kept_each(
            {
                group: (f"{what}_{group}", partial(work, progress=self.progress))
                for group, work in works.items()
            }
        )

    def _explore(self, groups: Mapping[str, SequenceSet]) -> None:
        counts = {MEMORIZED: self.options.explored_memorized, CONTROL: self.options.explored_controls}
        chosen = [
            some.with_table(some.table.assign(group=name))
            for name, seqs in groups.items()
            if len(some := at_most(seqs, counts[name], self.options.seed))
        ]
        if not chosen:
            return
        mode = self.options.head_mode
        options = ExploreOptions(
            # A resampled head needs another sequence's tokens at the same places, and a donor's head that
            # model's run: free decoding has neither.
            ablation="mean_of_other_heads" if mode == "donor" or mode not in ABLATION_MODES else mode,
            bypass=self.options.bypass_mode,
        )
        seqs = reduce(SequenceSet.concat, chosen)

        def look() -> dict[str, Any]:
            found = explore_sequences(self.model, seqs, options, progress=self.progress)
            return {"payload": explorer_payload(found), "caption": caption_of(found)}

        shown = self.folder.stored("explorer", self.model, seqs, options, look)
        lead = "A few of the sequences, drawn by chance from those above, one at a time."
        self.folder.add_section("explorer", "Look at single sequences", lead)
        self.folder.add_explorer(
            "explorer", shown["payload"], section="explorer", reading=READING, caption=shown["caption"]
        )

    def _save(
        self, name: str, title: str, results: Mapping[str, Result], *, one_sequence: bool = False
    ) -> None:
        """Save the groups as one result, with a figure that shows them side by side."""
        words = "\n\n".join(f"{group.capitalize()}: {reading(result)}" for group, result in results.items())
        figures = [FigureRequest({"group": "group"}, reading=words)]
        if one_sequence:
            first = str(results[MEMORIZED]["sequence"].values[0])
            figures.append(FigureRequest({"sequence": first}))
        self.folder.add_result(name, join_groups(results), title=title, figures=figures)
