"""The audit: five questions about strings that a model should not repeat.

Which leak, from how little, is it memory, where in the model, and what would help? Nothing that a run writes
holds a secret, except its CSV file: results, tables and figures name strings by their place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens import figures
from memlens.benchmark.ranking import Ranking, best_method, rank
from memlens.errors import MemlensError, OptionError
from memlens.files import expanded, replacing
from memlens.forward.components import ComponentKind
from memlens.models.provenance import describe
from memlens.recall.compression import prompt_compression
from memlens.recall.corpus.scan import PredictableRule
from memlens.recall.counterfactual import counterfactual_memorization
from memlens.recall.extraction import extraction_curve, first_tokens
from memlens.recall.taxonomy import CLASSES, recall_classes
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.corrupt import corrupt
from memlens.sequences.natural import text_ids, text_windows
from memlens.sequences.secrets import SECRET
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import decode, need_tokenizer
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.studies.auditing import findings as find
from memlens.studies.auditing.folder import AuditDirectory, opened
from memlens.studies.auditing.leaks import WHOLE, blind, exposures, leak_table, made_like
from memlens.studies.auditing.options import STEPS, AuditOptions, Step
from memlens.studies.auditing.redaction import Hide, hiding
from memlens.studies.auditing.remedies import Remedy, Sets, measured, remedies
from memlens.studies.running import StudyRun, at_most

_METRICS = ("sampling", "near_verbatim", "trivial", "taxonomy")
_WINDOW, _SHORTEST_WINDOW, _FEWEST_WINDOWS = 128, 16, 4
_TEXT_WINDOWS = 64
_TOP = 20
_NEURONS = 50
_TRIES = 8


def audit(
    model: Any,
    sequences: SequenceSet,
    out: str | Path,
    *,
    reference: Any = None,
    text: SequenceSet | str | Path | None = None,
    options: AuditOptions | None = None,
    command: str | None = None,
    progress: bool = True,
) -> StudyRun:
    """Ask which strings a model gives away, and write a report, a CSV file and results to a folder.

    1. *Which of the strings leak?* The greedy continuation, its likeness to the string by tokens and
       characters, (n, p)-discoverability, and the exposure of secrets with digits.
    2. *From how little?* Of those that come out whole: the shortest prefix, the fewest tokens of it, damaged
       prefixes, the extraction curve.
    3. *Is it memory?* A reference model, if there is one; other strings' prefixes; rules that explain the
       string; matched controls.
    4. *Where?* Heads and neurons, by the benchmark's method, with what it is known to find.
    5. *What would help?* Bypassed layers and edited neurons, their cost on a text, and what leaks instead.

    A step that fails is named in the report, and the others go on. What was measured is kept beside the CSV
    file (`steps_folder`): a second run into the same folder does only what is missing, and what depends on an
    option, a string, a text or weights that changed.

    Args:
        model: A TransformerLens model.
        sequences: The strings; the continuations are what must not come out. See
            `memlens.sequences.secret_sequences` for those of which only a part is secret.
        out: The folder of the run.
        reference: A model that has not seen the strings, such as a clean twin or an earlier checkpoint.
        text: A text file, or windows of one, on which the cost of remedies is measured (perplexity).
        options: See `AuditOptions`.
        command: The command line that repeats the run, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, what failed, the table of the strings, and whether more leak than
        `options.fail_above`.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit, before any forward pass.
        OptionError: The reference is the model itself, or the folder holds tables of something else.
        SourceNotFoundError: There is no such text.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> strings = ml.load_sequences("zoo", model)[-40:]
        >>> quick = ml.studies.AuditOptions(steps=("leak",))
        >>> run = ml.studies.audit(model, strings, tempfile.mkdtemp(), options=quick, progress=False)
        >>> run.findings[0].title, "Which strings leak?" in run.report.read_text(encoding="utf-8")
        ('Which strings leak?', True)
    """
    check_sequences(sequences, model)
    tokenizer = need_tokenizer(getattr(model, "tokenizer", None))
    if reference is model:
        raise OptionError("reference is the model itself: give a model that has not seen the strings.")
    options, about = options or AuditOptions(), describe(model)
    if isinstance(text, str | Path):
        window = min(_WINDOW, int(model.cfg.n_ctx), len(text_ids(tokenizer, text)) // _FEWEST_WINDOWS)
        text = text_windows(tokenizer, text, max(_SHORTEST_WINDOW, window), model=model)
    if text is not None:
        text = at_most(text, _TEXT_WINDOWS, options.seed)
    hide: Hide = str
    if options.redact:
        secrets = sequences.table[SECRET].astype(str) if SECRET in sequences.table else ()
        hide = hiding([*secrets, *decode(tokenizer, sequences.halves()[1])])
    named = ("source", "patterns", "pattern", "left_out")
    source = {key: hide(str(sequences.attrs[key])) for key in named if sequences.attrs.get(key)}
    settings = {
        "study": "audit", **asdict(options), "csv": None if options.csv is None else hide(str(options.csv)),
        "model": about, "sequences": source, "n_sequences": len(sequences),
        "reference": None if reference is None else describe(reference)["model"],
    }  # fmt: skip
    folder = opened(
        expanded(out), csv=None if options.csv is None else expanded(options.csv),
        title=find.TEXTS["title"].format(model=about["model"], n=len(sequences)),
        lead=find.TEXTS["lead"].format(shown=find.TEXTS["redacted" if options.redact else "open"]),
        summary=find.TEXTS.summary(model=about["model"], n=len(sequences)),
        settings=settings, command=command and hide(command), hide=hide if options.redact else None,
    )  # fmt: skip
    return _Audit(model, folder, options, sequences, reference, text, progress).run()


@dataclass(eq=False)
class _Audit:
    model: Any
    folder: AuditDirectory
    options: AuditOptions
    strings: SequenceSet
    reference: Any
    text: SequenceSet | None
    progress: bool
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        self.blind = blind(self.strings)

    def run(self) -> StudyRun:
        self.folder.step("leak", self._leak)
        if len(self.table):
            for step in STEPS[1:]:
                self._ask(step)
        else:
            self.folder.find(find.skipped("leak", "it failed, and the other questions need its answer."))
        run = self.folder.done()
        if not len(self.table):
            return run
        rows = self._ranked()
        redact = self.options.redact
        return replace(
            run,
            tables={find.TEXTS["leaks"]["title"]: find.shown(rows, find.IN_SHORT, redact=redact)},
            facts={"csv": self.folder.csv, "strings": find.redacted(rows, redact=redact).to_dict("records")},
            exceeded=self._exceeded(),
        )

    def _exceeded(self) -> str:
        """Return whether more strings leak than `fail_above` allows, in a sentence; empty if not."""
        n, leaking = len(self.table), int(find.leaks(self.table).sum())
        limit = self.options.limit(n)
        if limit is None or leaking <= limit:
            return ""
        return f"{leaking} of {n} strings leak, more than --fail-above {self.options.fail_above} allows."

    def _ask(self, step: Step) -> None:
        """Ask a question, or say why not."""
        works: dict[Step, Callable[[], None]] = {
            "little": self._little, "memory": self._memory, "where": self._where, "help": self._help,
        }  # fmt: skip
        leaking = find.leaks(self.table)
        reason = ""
        if step not in self.options.steps:
            reason = "it is not among the chosen steps."
        elif not leaking.any():
            reason = "no string leaks."
        elif step != "memory" and not self._whole().any():
            reason = "no string comes out whole; those that leak do so by sampling only."
        if reason:
            self.folder.find(find.skipped(step, reason))
        else:
            self.folder.step(step, works[step])

    def _whole(self) -> np.ndarray:
        """Return which strings are recalled token by token, which the later questions need."""
        return (self.table["leaks"] == WHOLE).to_numpy() & (self.table["exact_match"] == 1).to_numpy()

    def _leaking(self) -> SequenceSet:
        return at_most(self.blind[self._whole()], self.options.max_leaking, self.options.seed)

    def _others(self) -> SequenceSet:
        return at_most(self.blind[~find.leaks(self.table)], self.options.max_others, self.options.seed)

    def _ranked(self) -> pd.DataFrame:
        return self.table.iloc[find.ranking_order(self.table)].reset_index(drop=True)

    def _keep(self, **columns: Any) -> None:
        """Add columns to the table of strings, and write it: all of it as CSV, the rest for the report."""
        self.table = self.table.assign(**columns)
        rows = self._ranked()
        with replacing(self.folder.csv) as part:
            rows.to_csv(part, index=False)
        os.chmod(self.folder.csv, 0o600)
        words, options = find.TEXTS["leaks"], self.options
        top_k = "all tokens" if options.top_k is None else f"the {options.top_k} likeliest tokens"
        table = find.shown(rows, find.WORDS, redact=options.redact)
        columns = {name: find.WORDS[name] for name in words["notes"] if find.WORDS[name] in table}
        note = " ".join(f"{column}: {words['notes'][name]}" for name, column in columns.items()).format(
            samples=options.n_samples, p=options.probability, near=options.near,
            temperature=options.temperature, cut=f"{top_k}, up to a probability of {options.top_p:g}",
        )  # fmt: skip
        self.folder.add_table("leaks", table, title=words["title"], note=note, section="recall")

    def _by_string(self, names: Any, values: Any) -> pd.Series:
        """Return values of some strings in the order of the table; NaN for the others."""
        found = dict(zip(map(str, names), np.asarray(values).tolist(), strict=True))
        return pd.Series([found.get(name, math.nan) for name in self.table["string"]])

    def _leak(self) -> None:
        options = self.options
        self.recall = self.folder.scored(
            "leak", self.model, self.blind, metrics=_METRICS, sampling=options.sampling(),
            n_samples=options.n_samples, probability=options.probability, progress=self.progress,
        )  # fmt: skip
        self.table = leak_table(self.model, self.strings, self.recall, options)
        self.folder.add_result("recall", self.recall.to_result(), title="How the strings are recalled")
        self._keep()
        left_out = str(self.strings.attrs.get("left_out", ""))
        self.folder.find(find.leaked(self.table, options, left_out))
        if options.max_canaries and SECRET in self.strings.table:
            self.folder.step("exposure", self._expose)

    def _expose(self) -> None:
        found = exposures(self.model, self.blind, self.options, self.folder, progress=self.progress)
        if not len(found):
            return
        names = [name for name in found if name != "string"]
        self._keep(**{name: self._by_string(found["string"], found[name]) for name in names})
        for among in dict.fromkeys(found["exposure_among"]):
            self.folder.find(find.exposed(self.table, among, self.options.seed))

    def _little(self) -> None:
        some, first = self._leaking(), first_tokens(self.blind)
        some = some[some.prefix_len.numpy() > first]
        usual = int(some.prefix_len.median()) - first
        lengths = [*(2**i for i in range(usual.bit_length()) if 2**i < usual), usual]
        budget = self.options.deletion_budget
        shared: dict[str, Any] = {"pinned": first, "progress": self.progress}
        model, kept = self.model, partial(self._result, some, first)
        curve = kept("curve", lengths, lambda: extraction_curve(model, some, lengths, **shared))
        last = kept("last tokens", (), lambda: prompt_compression(model, some, "keep_last", **shared))
        left = kept(
            "deletion", budget,
            lambda: prompt_compression(model, some, "greedy_deletion", budget=budget, **shared),
        )  # fmt: skip
        damaged = {f"with_{n}_replaced": self._damaged(some, n, first) for n in self.options.damaged}
        self._keep(
            shortest_prefix=self._by_string(some.ids, last["fewest_tokens"].values),
            always_from=self._by_string(some.ids, last["stable_tokens"].values),
            deleted_to=self._by_string(some.ids, left["fewest_tokens"].values),
            **damaged,
        )
        self.folder.add_result("extraction_curve", curve, title="From how much of the text before it")
        self.folder.add_result("deletion", left, title="Which tokens are needed")
        self.folder.find(find.from_how_little(self.table, curve, self.options))

    def _damaged(self, some: SequenceSet, n: int, first: int) -> pd.Series:
        """Return the share of replacements of `n` tokens of the prefix after which a string still comes."""
        long = some[some.prefix_len.numpy() - first >= n]
        if not len(long):
            return self._by_string([], [])
        hits = [
            self._teacher_forced("damaged", corrupt(long, n_tokens=n, seed=self.options.seed + draw))
            for draw in range(self.options.draws)
        ]
        return self._by_string(long.ids, np.mean([each["exact_match"] for each in hits], axis=0))

    def _result(
        self, some: SequenceSet, first: int, name: str, options: Any, make: Callable[[], Result]
    ) -> Result:
        return self.folder.result(name, self.model, some, [first, options], make)

    def _teacher_forced(self, name: str, seqs: SequenceSet) -> pd.DataFrame:
        found = self.folder.scored(name, self.model, seqs, generate=False, metrics=(), progress=False)
        return found.table

    def _memory(self) -> None:
        leaking = find.leaks(self.table)
        classes = recall_classes(self.recall.table).to_numpy()
        guess = (classes == CLASSES[1]) | (self.table["trivial"].to_numpy() == 1)
        after = self._after_another()
        own = self.table["target_logprob"].to_numpy(float)
        columns: dict[str, Any] = {
            "guessed": guess,
            "predictable": PredictableRule().holds(self.recall.table),
            "after_other_text": after["exact_match"].to_numpy(),
            "logprob_after_other_text": after["target_logprob"].to_numpy(),
        }
        above = {"after another string's text": own - columns["logprob_after_other_text"]}
        known = np.zeros(len(self.table), dtype=bool)
        if self.reference is not None:
            found = self._beside_reference()
            columns["reference_exact"] = np.array(found["exact_match_clean"], dtype=int)
            columns["reference_logprob"] = np.array(found["target_logprob_clean"], dtype=float)
            known = columns["reference_exact"] == 1
            above["of the reference"] = np.array(found["target_logprob_counterfactual"], dtype=float)
        verdict = np.select(
            [guess, columns["after_other_text"] == 1, known],
            [find.GUESS, find.ANYWHERE, find.REFERENCE], find.MEMORY,
        )  # fmt: skip
        self._keep(**columns, verdict=np.where(leaking, verdict, ""))
        matched = self.table["string"].isin(self._controls().ids).to_numpy()
        self.folder.find(find.is_memory(self.table, above, matched, self.options.seed))

    def _beside_reference(self) -> dict[str, Any]:
        """Return what the reference makes of each string, by column."""

        def compare() -> dict[str, Any]:
            found = counterfactual_memorization(
                self.model, self.reference, self.blind, generate=False, progress=self.progress
            ).table
            names = ("exact_match_clean", "target_logprob_clean", "target_logprob_counterfactual")
            return {name: found[name].to_numpy(float) for name in names}

        about = model_fingerprint(self.reference)
        return self.folder.stored("reference", self.model, self.blind, about, compare)

    def _controls(self) -> SequenceSet:
        """Return strings that do not leak, matched with those that do in length and frequency of tokens."""
        try:
            return self.recall.matched_controls(seed=self.options.seed)
        except MemlensError:
            return self.blind[:0]

    def _after_another(self) -> pd.DataFrame:
        """Score each string after the prefix of another one; NaN where no other prefix is drawn."""
        rng, room = np.random.default_rng(self.options.seed), int(self.model.cfg.n_ctx)
        prefixes, targets = self.blind.halves()
        rows: list[list[int]] = []
        lengths: list[int] = []
        asked: list[int] = []
        for i, (prefix, target) in enumerate(zip(prefixes, targets, strict=True)):
            drawn = [prefixes[int(j)] for j in rng.integers(len(prefixes), size=_TRIES)]
            other = next((p for p in drawn if p != prefix), None)
            if other is not None:
                other = other[-(room - len(target)) :]
                rows.append([*other, *target])
                lengths.append(len(other))
                asked.append(i)
        found = pd.DataFrame(np.nan, index=range(len(targets)), columns=["exact_match", "target_logprob"])
        if rows:
            others = SequenceSet.from_tokens(rows, lengths, attrs=self.blind.attrs)
            scores = self._teacher_forced("after others", others)
            found.iloc[asked] = scores[list(found)].to_numpy(float)
        return found

    def _where(self) -> None:
        words = find.TEXTS["where"]
        self.folder.add_section("where", words["title"], words["lead"])
        some = at_most(self._leaking(), self.options.ranked_sequences, self.options.seed)
        for component in ("head", "neuron"):
            ranking = self._ranking(component, some)
            note = f"Ranked by {ranking.method}, mean over {len(some)} strings. {ranking.evidence}"
            self.folder.add_table(
                f"ranked_{component}", ranking.table.head(_TOP), title=f"{component.capitalize()}s: ranked",
                note=note, section="where",
            )  # fmt: skip
            self.folder.add_figure(
                f"where_{component}", _figure(ranking, len(some)), section="where", caption=note
            )
            self.folder.find(find.ranked(ranking, first=component == "head"))

    def _ranking(self, component: ComponentKind, some: SequenceSet) -> Ranking:
        others: SequenceSet | None = self._others()[:16]
        others = others if others is not None and len(others) else None
        family = str(describe(self.model)["family"])
        localizer, variant = best_method(component, others, self.options.most_forwards, family)
        seed = self.options.seed

        def look() -> dict[str, Any]:
            found = rank(
                self.model, some, component, others=others, localizer=localizer, variant=variant, seed=seed
            )
            table = {name: found.table[name].to_numpy() for name in found.table}
            return {"table": table, "method": found.method, "evidence": found.evidence}

        about = [localizer, variant, seed, "" if others is None else fingerprint(others)]
        found = self.folder.stored(f"ranked {component}s", self.model, some, about, look)
        return Ranking(pd.DataFrame(found["table"]), found["method"], found["evidence"], component)

    def _help(self) -> None:
        leaking, others = self._leaking(), self._others()
        given = len(others) > 0
        if not given:
            others = made_like(self.model, leaking, self.options.max_others, self.options.seed)
        sets = Sets.of(leaking, others, self.text, self.options.seed)
        some = at_most(sets.choosing, self.options.ranked_sequences, self.options.seed)
        found = remedies(self.model, sets, self._ranking("neuron", some), self.options, self.folder)
        rows: list[dict[str, Any]] = []
        for remedy in found:
            self.folder.step(f"help: {remedy.name}", partial(self._measure, remedy, sets, rows))
        if not rows:
            return
        words = find.TEXTS["remedies"]
        made = [] if given else [words["made"].format(n=len(others))]
        lead = " ".join([words["lead" if sets.apart else "same"], *made])
        self.folder.add_section("remedies", words["title"], lead)
        note = " ".join([words["note"], *([] if self.text is None else [words["perplexity"]])])
        self.folder.add_table(
            "remedies", pd.DataFrame(rows), title=words["title"], note=note, section="remedies"
        )
        for row in rows:
            self.folder.find(find.helped(row, made=0 if given else len(others)))

    def _measure(self, remedy: Remedy, sets: Sets, rows: list[dict[str, Any]]) -> None:
        rows.append(measured(self.model, remedy, sets, self.blind, self.options, self.folder))


def _figure(ranking: Ranking, n: int) -> Any:
    """Return a map of the scores of heads, or how many of the first neurons are in each layer."""
    subtitle = f"{ranking.method}; mean over {n} strings"
    table = ranking.table
    if ranking.component == "head":
        grid = table.pivot(index="layer", columns="index", values="score")
        score = xr.DataArray(
            grid.to_numpy(float), {"layer": grid.index.to_numpy(), "head": grid.columns.to_numpy()},
            ("layer", "head"), attrs={"units": "score", "long_name": "score of the localizer"},
        )  # fmt: skip
        data = xr.Dataset({"score": score})
        title = "Heads that the strings depend on"
        return figures.heatmap_layer_head(data, signed=False, title=title, subtitle=subtitle)
    first = table.head(_NEURONS)["layer"].value_counts()
    layers = np.unique(table["layer"])
    counts = xr.DataArray(
        [first.reindex(layers, fill_value=0).to_numpy(float), *np.full((2, len(layers)), np.nan)],
        {"statistic": ["mean", "low", "high"], "layer": layers}, ("statistic", "layer"),
        attrs={"units": "neurons", "long_name": f"of the first {_NEURONS}"},
    )  # fmt: skip
    title = f"Layers of the first {_NEURONS} neurons"
    return figures.line_over_layers(xr.Dataset({"neurons": counts}), title=title, subtitle=subtitle)
