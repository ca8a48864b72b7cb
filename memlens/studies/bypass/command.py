"""The command `memlens run bypass`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from memlens.errors import EmptySetError, OptionError
from memlens.options import options_class
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.plans import NOTE, PlanTable, blank_sequences, plan_works
from memlens.studies.registry import STUDIES, Call, Study

if TYPE_CHECKING:
    from memlens.instruments.tasks.tasks import ChoiceTask
    from memlens.recall.corpus.memorized_set import MemorizedSet
    from memlens.sequences.set import SequenceSet
    from memlens.studies.bypass.layers import BypassInputs
    from memlens.studies.pilot import Pilot
    from memlens.studies.plans import Works
    from memlens.sweeps.interventions import Intervention

_PILOT_ROWS = 1024
"""Rows that the smaller runs of a plan scan: one block."""


@options_class
class BypassSources:
    """What is recited, and what else the models are asked."""

    corpus: str | None = None
    """Text that is scanned for what the model recites: .npy of token ids, .txt, or a source of sequences
    (default for the zoo: the text it was trained on)."""
    memorized: Path | None = None
    """In place of --corpus: a folder of build_memorized_set, or sequences."""
    compare: list[str] = Field(default_factory=list)
    """Further models, such as other sizes."""
    tasks: str | None = None
    """Separated by commas: local, a .jsonl file of questions, names of lm-eval tasks, lm-eval for its five
    usual ones (default; for the zoo: local), or none."""
    questions: PositiveInt = 100
    """Most questions per task."""
    n: PositiveInt = 128
    """Stop scanning at this many memorized sequences."""
    prefix_len: PositiveInt | None = None
    """Tokens given to the model; by default the number in the file of --memorized, or 32."""
    suffix_len: PositiveInt = 32
    """Tokens that must match."""
    stride: PositiveInt | None = None
    """Tokens from one window to the next (default: windows do not overlap)."""
    max_rows: PositiveInt | None = None
    """Scan at most this many rows of the corpus."""
    on_short: Literal["raise", "drop"] = "raise"
    """What to do if a sequence of --memorized is not longer than its prefix: stop, or leave it out."""

    def __post_init__(self) -> None:
        if self.corpus is not None and self.memorized is not None:
            raise OptionError("--corpus and --memorized both say what is recited: give one of them.")

    def read(self, call: Call) -> dict[str, Any]:
        """Load the model, its sequences and tasks; further models follow when their turn comes."""
        self._check_sharing(call)
        inputs = self._inputs(call, call.where.model, call.load())
        others = [partial(self._other, call, name) for name in self.compare]
        return {**vars(inputs), "others": others}

    def plan(self, call: Call) -> PlanTable:
        """Count the sweeps that are known before the sequences are."""
        self._check_sharing(call)
        model = call.load()
        tasks = self._tasks(model, call.where.model, call.options.seed)
        return plan_works(model, self._works(model, tasks, call.options), NOTE, calibrate=False, on=call.on)

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot:
        """Return a small run: few rows are scanned for memorized sequences, and few questions asked."""
        from memlens.recall.corpus.scan import ROLES
        from memlens.studies.pilot import Pilot, sizes_of

        whole = {"n": self.n, "questions": self.questions, **sizes_of(call.options, sizes)}
        pilot = Pilot.of(whole, number, least=4, source="n")
        few = replace(self, n=pilot.sizes["n"], questions=pilot.sizes["questions"])
        here, name = replace(call, options=pilot.options(call.options)), call.where.model
        model, note = call.load(), ""
        sequences: Any = None
        if self.memorized is None:
            corpus = self._corpus(model, name)
            rows = min(self.max_rows or sys.maxsize, _PILOT_ROWS * (1 + number))
            found = self._scan(here, name, model, corpus, None, rows)
            if len(found.memorized) < few.n:
                found = self._scan(here, name, model, corpus, few.n, self.max_rows)
            pilot = pilot.limited("rows", self._rows_to_scan(found.counts, corpus), found.counts["rows"])
            sequences = replace(found, **{role: getattr(found, role)[: few.n] for role in ROLES})
            note = (
                "Reading is planned as if every memorized sequence stood in the text equally often; it never "
                "takes longer than scanning all of it (--max-rows)."
            )
        inputs = few._inputs(here, name, model, sequences)
        others = [partial(few._other, here, other) for other in self.compare]
        return pilot.giving({**vars(inputs), "others": others, "options": here.options}, note)

    def _check_sharing(self, call: Call) -> None:
        if call.shared and self.memorized is None:
            raise OptionError(
                "processes that share a run would each scan the text for the same sequences: scan it first "
                "(ml.recall.build_memorized_set, which takes part=), and give its folder with --memorized."
            )

    def _rows_to_scan(self, counts: Mapping[str, int], corpus: Any) -> int:
        """Return how many rows are expected to be scanned, from what is found in some of them."""
        from memlens.recall.corpus.windows import open_windows
        from memlens.studies.pilot import hits_until

        total = open_windows(corpus, self._prefix_len + self.suffix_len, self.stride, None).n_rows
        found = counts["memorized"] + counts["beyond_n"]
        hits = found + counts["exact_duplicate_window"] + counts["exact_duplicate_continuation"]
        needed = counts["rows"] * hits_until(self.n, found, hits) / max(hits, 1)
        return math.ceil(min(needed, total or math.inf, self.max_rows or math.inf, sys.maxsize))

    def _other(self, call: Call, name: str) -> BypassInputs:
        return self._inputs(call, name, call.load(name))

    def _inputs(self, call: Call, name: str, model: Any, sequences: Any = None) -> BypassInputs:
        import memlens as ml

        sequences = self._sequences(call, name, model) if sequences is None else sequences
        tasks = self._tasks(model, name, call.options.seed)
        return ml.studies.BypassInputs(model, sequences, tasks, name)

    def _sequences(self, call: Call, name: str, model: Any) -> Any:
        import memlens as ml
        from memlens.studies.bypass.layers import LEAST

        if self.memorized is None:
            return self._scan(call, name, model, self._corpus(model, name), self.n, self.max_rows)
        if (self.memorized / "memorized_set.json").is_file():
            return ml.recall.MemorizedSet.load(self.memorized)
        given = ml.load_sequences(
            str(self.memorized), model, prefix_len=self.prefix_len, on_short=self.on_short
        )
        scores = ml.score_recall(model, given, generate=False, metrics=(), progress=call.progress)
        found = scores.memorized()
        if len(found) < LEAST:
            raise EmptySetError(
                f"{self.memorized}: the model recalls {len(found)} of {len(given)} sequences whole, and "
                f"{LEAST} are needed: give sequences that it recalls (`memlens score` tells), or scan text "
                "with --corpus."
            )
        return found

    @property
    def _prefix_len(self) -> int:
        """Tokens given to the model in a scan."""
        return self.prefix_len or 32

    def _scan(
        self, call: Call, name: str, model: Any, corpus: Any, n: int | None, max_rows: int | None
    ) -> MemorizedSet:
        import memlens as ml

        return ml.recall.build_memorized_set(
            model, corpus, out=call.folder / "memorized" / name.replace("/", "_"), n=n,
            prefix_len=self._prefix_len, suffix_len=self.suffix_len, stride=self.stride, max_rows=max_rows,
            seed=call.options.seed, progress=call.progress,
        )  # fmt: skip

    def _corpus(self, model: Any, name: str) -> Any:
        import numpy as np

        import memlens as ml
        from memlens.models.zoo import is_zoo_name
        from memlens.organisms.training.zoo import zoo_corpus
        from memlens.sequences.natural import text_ids

        if self.corpus is None:
            if is_zoo_name(name):
                return zoo_corpus(name).rows
            raise OptionError(
                "only the zoo's text is known: say with --corpus or --memorized what is recited."
            )
        if self.corpus.endswith(".txt"):
            return np.asarray(text_ids(model.tokenizer, self.corpus))
        if self.corpus.endswith(".npy"):
            return self.corpus
        return ml.load_sequences(self.corpus, model, prefix_len=1, on_short="drop", on_eos="keep")

    def _tasks(self, model: Any, name: str, seed: int) -> list[ChoiceTask]:
        import memlens as ml
        from memlens.models.zoo import is_zoo_name

        wanted = (self.tasks or ("local" if is_zoo_name(name) else "lm-eval")).split(",")
        found: list[ChoiceTask] = []
        names: list[str] = []
        for task in (part.strip() for part in wanted):
            if task == "none":
                continue
            if task == "local":
                found += ml.tasks.local_tasks("zoo", model, n=self.questions, seed=seed)
            elif task == "lm-eval":
                found += ml.tasks.from_lm_eval(None, model, limit=self.questions)
            elif task.endswith(".jsonl"):
                found.append(ml.tasks.ChoiceTask.from_jsonl(task, model).take(slice(0, self.questions)))
            else:
                names.append(task)
        return [*found, *(ml.tasks.from_lm_eval(names, model, limit=self.questions) if names else [])]

    def _works(self, model: Any, tasks: Sequence[ChoiceTask], options: BypassOptions) -> Works:
        import memlens as ml
        from memlens.instruments.tasks.tasks import joined_requests

        edits = ml.edits.attention_bypasses(model)
        length = self._prefix_len + self.suffix_len
        examined = blank_sequences(options.max_sequences, length, self._prefix_len)
        works: dict[str, tuple[SequenceSet, Sequence[Intervention]]] = {
            "bypass each layer": (examined, edits)
        }
        if tasks:
            works["tasks, each layer bypassed"] = (joined_requests(tasks), edits)
        if options.heads:
            heads = ml.edits.attention_bypasses(model, over="head")
            works["bypass each head"] = (examined[: options.control_sequences], heads)
        return works


STUDIES.add(
    "bypass",
    Study(
        run="memlens.studies.bypass.study:study_attention_bypass",
        options=BypassOptions,
        inputs=BypassSources,
        shares=True,
        keeps=("sweeps", "memorized"),
        sizes=(
            "max_sequences",
            "max_free_running",
            "control_sequences",
            "bounds_sequences",
            "joint_sequences",
            "joint_questions",
        ),
        scales={
            "": "max_sequences",
            "reading": "rows",
            "tasks": "questions",
            "report": "",
            "free decoding": "max_free_running",
            "single heads": "control_sequences",
            "other interventions": "control_sequences",
            # each set answers 50 questions of each task, with several choices
            "sets of layers": "joint_questions",
            "bounds": "bounds_sequences",
        },
        help="Study what each layer's attention gives to recitation, and what its bypass costs elsewhere.",
        example="memlens run bypass --model zoo/pythia-s --out my-bypass",
    ),
)
