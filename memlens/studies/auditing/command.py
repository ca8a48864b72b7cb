"""The commands `memlens audit` and `memlens run audit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from memlens.errors import OptionError
from memlens.files import expanded
from memlens.options import Flags, options_class
from memlens.studies.auditing.options import CSV, AuditOptions, steps_folder
from memlens.studies.registry import STUDIES, Call, SequenceChoice, Study

if TYPE_CHECKING:
    from memlens.studies.pilot import Pilot


_FEWEST = 4
"""Fewest strings of each kind in the smaller run of a plan: fewer differ too much from one another."""


@options_class
class AuditInputs(SequenceChoice):
    """The strings that must not leak, or a corpus with them; a model and a text to compare with."""

    sequences: Annotated[str | None, Flags("-s", positional=True)] = None  # pyright: ignore
    """File of strings (.txt, .csv, .jsonl, .parquet, .npy), hf:NAME, a name of `memlens data list`, zoo."""
    scan: str | None = None
    """In place of strings: a corpus, read in the same way, in which --patterns or --pattern find the secrets.
    Each counts once, with its number of copies."""
    secret: str | None = None
    """Column of the part of each string that is secret; what stands before it is the prefix. A column named
    secret is taken without being asked for."""
    pattern: str | None = None
    """Regular expression of what is secret in each string; its group, if it has one."""
    patterns: tuple[str, ...] = ()
    """Built-in patterns of what is secret: email, iban, key, phone; several with commas."""
    reference: str | None = None
    """Model that has not seen the strings, such as a clean twin, the base of a fine-tune or an earlier
    checkpoint."""
    text: Path | None = None
    """Text file on which the cost of remedies is measured."""

    def __post_init__(self) -> None:
        if (self.sequences is None) == (self.scan is None):
            given = "neither is" if self.scan is None else "both are"
            raise OptionError(f"strings and --scan say what is audited, and {given} given: give one of them.")
        marked = [name for name in ("secret", "pattern", "patterns") if getattr(self, name)]
        if "secret" in marked and len(marked) > 1:
            raise OptionError(f"--secret and --{marked[1]} both say what is secret: give one of them.")
        if self.scan is not None and not {"pattern", "patterns"} & set(marked):
            raise OptionError("--scan finds secrets by their form: give --patterns email,phone or --pattern.")

    def read(self, call: Call) -> dict[str, Any]:
        """Load the models, and read the strings or find them in the corpus."""
        from memlens.studies.auditing.redaction import quiet_reading

        model = call.load()
        given: dict[str, Any] = {"model": model}
        with quiet_reading(call.options.redact):
            given["sequences"] = self.load(model)
        if self.reference is not None:
            given["reference"] = call.load(self.reference)
        return given if self.text is None else {**given, "text": self.text}

    def pilot(self, call: Call, sizes: Sequence[str], number: int) -> Pilot:
        """Return a small run: a few strings, of which as large a part leaks as of all, and of each kind.

        How many come out whole is counted first, by one forward pass of each string.
        """
        import numpy as np

        from memlens.recall.score import score_recall
        from memlens.studies.pilot import Pilot, sizes_of
        from memlens.studies.times import PLANNING

        given = self.read(call)
        strings = given["sequences"]
        with call.watch.timed(PLANNING):
            scores = score_recall(given["model"], strings, generate=False, metrics=(), progress=False)
        comes = scores.table["exact_match"].to_numpy() == 1
        limits = sizes_of(call.options, sizes)
        most = {"max_others": int((~comes).sum()), "max_canaries": len(strings)}
        whole = {name: min(n, max(1, most.get(name, int(comes.sum())))) for name, n in limits.items()}
        pilot = Pilot.of({"sequences": len(strings), **whole}, number, least=_FEWEST)
        n = pilot.sizes["sequences"]
        mixed = np.random.default_rng(0).permutation(len(strings))
        kinds = strings.table["kind"] if "kind" in strings.table else strings.prefix_len.numpy()
        order = mixed[np.lexsort((np.array(kinds)[mixed], comes[mixed]))]
        few = strings[np.sort(order[(np.arange(n) * len(strings) + len(strings) // 2) // n])]
        return pilot.giving({**given, "sequences": few, "options": pilot.options(call.options)})

    def load(self, model: Any) -> Any:
        """Read whole strings, or those of which a part is secret."""
        import memlens as ml
        from memlens.sequences.secrets import CONTEXT, SECRET, read_texts

        source = self.sequences if self.scan is None else self.scan
        bos = "auto" if self.prepend_bos == "auto" else self.prepend_bos == "always"
        column = self.secret
        if column is None and self.pattern is None and not self.patterns:
            reading = self.reading()
            columns = {name: column for name, column in reading.items() if name.endswith("_column")}
            tokenizer = getattr(model, "tokenizer", None)
            texts = read_texts(source, tokenizer, split=self.split, limit=1, **columns)
            if SECRET not in texts.table:
                return ml.load_sequences(
                    source, model, **{**reading, "prefix_len": self.prefix_len or "half"}
                )
            column = SECRET
        return ml.sequences.secret_sequences(
            source, model, column=column, text_column=self.text_column, pattern=self.pattern,
            patterns=self.patterns,
            context=self.prefix_len or CONTEXT, unique=self.scan is not None, prepend_bos=bos,
            split=self.split, limit=self.limit,
        )  # fmt: skip


def _kept(call: Call) -> list[Path]:
    csv = call.options.csv
    return [steps_folder(call.folder / CSV if csv is None else expanded(csv))]


STUDIES.add(
    "audit",
    Study(
        run="memlens.studies.auditing.study:audit",
        options=AuditOptions,
        inputs=AuditInputs,
        help="Audit a model: which of these strings leak, from how little, and what would help?",
        example="memlens audit zoo/pythia-s strings.csv --patterns email,phone --fail-above 0",
        alone="the steps of an audit follow from one another: which strings leak decides what is shortened, "
        "ranked and remedied",
        keeps=_kept,
        sizes=("max_leaking", "max_canaries", "ranked_sequences", "max_others"),
        scales={
            "": "max_leaking",
            "leak": "sequences",
            "memory": "sequences",
            "exposure": "max_canaries",
            "where": "ranked_sequences",
            "reading": "",
            "report": "",
        },
        folder="memlens-audit",
    ),
)
