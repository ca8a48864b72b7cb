"""The command `memlens run idioms`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from memlens.errors import OptionError, SourceNotFoundError
from memlens.files import parsing
from memlens.options import options_class
from memlens.recall.criteria.options import CriteriaOptions
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.plans import NOTE, PlanTable, plan_works
from memlens.studies.registry import STUDIES, Call, Study

if TYPE_CHECKING:
    from memlens.sequences.set import SequenceSet
    from memlens.studies.pilot import Pilot
    from memlens.studies.plans import Works
    from memlens.sweeps.interventions import Intervention

_ZOO = {
    "idioms": "zoo:expressions",
    "text": "zoo:heldout",
    "facts": "zoo:facts",
    "identifiers": "zoo:identifiers",
}
_LONGEST_PROMPT = 22  # tokens; the longest prompt of the zoo's lists has 21


@options_class
class IdiomInputs:
    """Expressions, and what they are compared with."""

    idioms: str = "zoo"
    """The idiom file (a column idiom), other prompts and targets, or zoo."""
    text: str | None = None
    """Natural text for controls and lens: .txt, or a source of sequences."""
    facts: str | None = None
    """Cloze statements: LAMA-style .jsonl."""
    identifiers: str | None = None
    """Table with the columns label and identifier."""
    reference: list[str] = Field(default_factory=list)
    """Models that the recall criteria ask."""
    reference_text: Path | None = None
    """Text file whose word n-grams are a reference too."""
    lens: Path | None = None
    """Folder of a tuned lens."""
    train_lens: bool | None = None
    """Train a tuned lens on the text (default: for the zoo only; slow for large models)."""
    limit: PositiveInt | None = None
    """Read at most this many rows."""
    controls: bool = True
    """Knock out random and norm-matched neurons for comparison."""

    @property
    def _zoo(self) -> bool:
        return self.idioms == "zoo"

    def read(self, call: Call) -> dict[str, Any]:
        """Load the model and every source; the zoo has its own text, facts and identifiers."""
        if self.reference_text is not None and str(self.reference_text) == self.text:
            raise OptionError(
                f"--text and --reference-text are both {self.text}: n-grams that know the controls but not "
                "the items say nothing about the items; count them in another text."
            )
        model = call.load()
        given = {name: _read(name, source, model, self.limit) for name, source in self._sources().items()}
        return {
            "model": model,
            "sequences": given.pop("idioms"),
            **given,
            "references": [
                *(call.load(name) for name in self.reference),
                *ngram_references(model, self.reference_text, zoo=self._zoo),
            ],
            "lens": self.lens,
            "train_lens": self._zoo if self.train_lens is None else self.train_lens,
            "options": self._options(call.options),
        }

    def plan(self, call: Call) -> PlanTable:
        """Count the knock-out grid."""
        model = call.load()
        items = _read("idioms", self._sources()["idioms"], model, self.limit)
        return plan_works(
            model, idiom_works(model, items, self._options(call.options)), NOTE, calibrate=False, on=call.on
        )

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot:
        """Return a small run: few items of each kind, and few updates of the lens."""
        given = self.read(call)  # first, so that what it imports counts as in a run
        from memlens.studies.pilot import Pilot, sizes_of
        from memlens.studies.running import at_most

        items = {name: given[name] for name in ("sequences", "facts", "identifiers") if name in given}
        whole = {name: len(seqs) for name, seqs in items.items()}
        pilot = Pilot.of({**whole, **sizes_of(call.options, sizes)}, number)
        few = {name: at_most(seqs, pilot.sizes[name], 0) for name, seqs in items.items()}
        return pilot.giving({**given, **few, "options": pilot.options(given["options"])})

    def _sources(self) -> dict[str, str]:
        own = _ZOO if self._zoo else {"idioms": self.idioms}
        given = {name: getattr(self, name) for name in ("text", "facts", "identifiers")}
        return {**own, **{name: source for name, source in given.items() if source}}

    def _options(self, options: IdiomOptions) -> IdiomOptions:
        if not self.controls:
            options = replace(options, selections=("dominant",))
        if options.criteria is None:
            return options
        return replace(options, criteria=criteria_options(options.criteria, options.seed, zoo=self._zoo))


def criteria_options(options: CriteriaOptions, seed: int, *, zoo: bool) -> CriteriaOptions:
    """Return how the criteria are tested; planted items of the zoo's corpus are lines of their own."""
    options = replace(options, seed=seed)
    if not zoo:
        return options
    kinds = ("neutral_contexts", "shifted_contexts")
    contexts: dict[str, Any] = {kind: tuple(f"{lead}\n" for lead in getattr(options, kind)) for kind in kinds}
    # A part of a planted expression has two targets by construction: a probability of 0.5 does not count.
    return replace(options, part_threshold=0.5, **contexts)


def ngram_references(model: Any, text: Path | None, *, zoo: bool) -> list[Any]:
    """Return n-gram references: of a text file, and for the zoo's lists of the corpus that holds them."""
    import memlens as ml
    from memlens.organisms.training.zoo import zoo_corpus

    found = []
    if text is not None:
        if not text.is_file():
            raise SourceNotFoundError(f"there is no text file {text}: give the path of one.")
        with parsing(text, advice="save it as UTF-8"):
            lines = text.read_text(encoding="utf-8").splitlines()
        found.append(ml.recall.NgramReference(lines))
    if zoo:
        corpus = zoo_corpus(str(getattr(model.tokenizer, "name_or_path", "")))
        found.append(
            ml.recall.NgramReference(
                corpus.rows, order=_LONGEST_PROMPT, tokenizer=corpus.tokenizer, name="training corpus"
            )
        )
    return found


def _read(name: str, source: str, model: Any, limit: int | None) -> Any:
    import memlens as ml
    from memlens.sequences.natural import text_windows

    if name != "text":
        return ml.load_sequences(source, model, limit=limit)
    if source.endswith(".txt"):
        return text_windows(model.tokenizer, source, model=model)
    return ml.load_sequences(source, model, prefix_len=1, on_short="drop", on_eos="keep")


def idiom_works(model: Any, items: SequenceSet, options: IdiomOptions) -> Works:
    """Return the knock-out grid of the idiom study: k by window by first layer by choice of neurons."""
    from memlens.forward.read_weights import value_vectors
    from memlens.instruments.ablate.neurons import knock_out_sizes
    from memlens.studies.comparative.plan import counted_edit

    n_layers, width = len(model.blocks), int(value_vectors(model, 0).shape[0])
    works: dict[str, tuple[SequenceSet, Sequence[Intervention]]] = {}
    for word, keep in (("dominant", False), ("all other", True)):
        if not options.knock_out or (keep and not options.non_top):
            continue
        ks, windows = knock_out_sizes(n_layers, width, options.top_k, options.windows, keep=keep)
        edits = [
            counted_edit("mlp_post", range(first, first + window), number)
            for window in windows
            for first in range(n_layers - window + 1)
            for number in range(len(ks))
        ]
        works[f"knock out {word} neurons"] = (items[: options.max_items], edits)
        if not keep and len(options.selections) > 1:
            chosen = edits * (len(options.selections) - 1) * options.n_draws
            works["the same, chosen otherwise"] = (items[: options.max_controls], chosen)
    return works


STUDIES.add(
    "idioms",
    Study(
        run="memlens.studies.idioms.study:study_idioms",
        options=IdiomOptions,
        inputs=IdiomInputs,
        help="Study how fixed expressions (and facts, and identifiers) are recalled, layer by layer.",
        example="memlens run idioms --model zoo/pythia-s --out my-idioms",
        alone="only the knock-outs of this study are sweeps, and every process would train the lens and "
        "count the text again for its share of them",
        sizes=("max_items", "max_controls", "max_others", "control_n", "lens_steps"),
        scales={
            "": "sequences",
            "training the tuned lens": "lens_steps",
            "reading": "",
            "report": "",
        },
    ),
)
