"""`MemorizedSet`: the sequences of a corpus that a model recites, and controls for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from pydantic import TypeAdapter

from memlens.errors import FileFormatError, SourceNotFoundError
from memlens.files import expanded, finish_replacing, parsing, read_json, replacing_files, write_json
from memlens.recall.corpus.scan import ROLES, Kept
from memlens.recall.matching import match_controls
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import tokenizer_attrs

_FILE = "memorized_set.json"
_FORMAT = "memlens memorized set 1"
_BALANCE = ["controls", "covariate", "before", "after"]
_COUNTS = (
    *("rows", "rows_too_short", "windows", "end_of_text", "exact_match", "not_exact"),
    *("memorized", "beyond_n", "exact_trivial", "exact_duplicate_window", "exact_duplicate_continuation"),
    *("unmemorized_found", "predictable_found", "between", "pool_full", "pool_trivial"),
    *("pool_duplicate_window", "pool_duplicate_continuation", "unmemorized", "predictable"),
)


@dataclass(frozen=True, eq=False)
class MemorizedSet:
    """What a scan of a corpus found: memorized sequences and two sets of controls, all disjoint.

    Attributes:
        memorized: Windows whose continuation greedy decoding gives, in the order in which they were found.
        unmemorized: One control for each of them (`matched_to`), of the same length and similar token
            frequency, with less than a given share of its tokens correct.
        predictable: The same for windows that the model predicts well without reciting them (see
            `PredictableRule`), also matched on `target_logprob`.
        counts: How many windows were kept or left out, and why. `windows` = `end_of_text` + `exact_match` +
            `not_exact`; `exact_match` = `memorized` + `beyond_n` (in the last block) + `exact_trivial` +
            `exact_duplicate_window` + `exact_duplicate_continuation`; `not_exact` = `unmemorized_found` +
            `predictable_found` (candidates) + `between` (neither) + `pool_full` (more candidates than wanted)
            + `pool_trivial` + `pool_duplicate_window` + `pool_duplicate_continuation`. `rows` and
            `rows_too_short` are rows of the source; `unmemorized` and `predictable` the sizes of the sets.
        settings: The parameters of the scan, the model's facts, and what the numbers were computed with.
        matching: What `balance` returns.
    """

    memorized: SequenceSet
    unmemorized: SequenceSet
    predictable: SequenceSet
    counts: Mapping[str, int]
    settings: Mapping[str, Any]
    matching: pd.DataFrame = field(default_factory=pd.DataFrame)

    def balance(self) -> pd.DataFrame:
        """Return how well the controls match.

        Standardized mean differences, memorized less control, of each covariate: against all candidates
        (`before`) and against the chosen ones (`after`); under 0.1 in size is commonly called balanced. No
        candidate is as probable as a memorized sequence, so `target_logprob` is matched only in part; the
        table shows how closely.

        Returns:
            Columns `controls` ("unmemorized" or "predictable"), `covariate`, `before`, `after`.
        """
        return self.matching.copy()

    def save(self, folder: str | Path) -> Path:
        """Write a parquet file of each set and `memorized_set.json`, and return the folder.

        They replace an older set together: it stays until all of the new one is written.

        Raises:
            WriteError: A file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "counts": dict(self.counts),
            "settings": dict(self.settings),
            "balance": self.matching.to_dict(orient="records"),
        }
        with replacing_files(folder) as part:
            for role in ROLES:
                getattr(self, role).to_parquet(part / f"{role}.parquet")
            write_json(part / _FILE, content)
        return expanded(folder)

    @classmethod
    def load(cls, folder: str | Path) -> MemorizedSet:
        """Read what `save` wrote.

        Raises:
            SourceNotFoundError: The folder contains no memorized set (or a scan that is not finished).
            FileFormatError: A file is damaged.
        """
        path = finish_replacing(folder) / _FILE
        if not path.is_file():
            raise SourceNotFoundError(f"there is no {path}: the set was not saved, or its scan not finished")
        with parsing(path):
            content = read_json(path)
            if (found := content["format"]) != _FORMAT:
                raise FileFormatError(f"{path} has the format {found!r}, not {_FORMAT!r}")
            facts = {
                "counts": TypeAdapter(dict[str, int]).validate_python(content["counts"]),
                "settings": TypeAdapter(dict[str, Any]).validate_python(content["settings"]),
            }
            matching = pd.DataFrame(content["balance"], columns=_BALANCE)
            matching = matching.astype({"before": float, "after": float})  # NaN is null in the file
        sets = {role: SequenceSet.from_parquet(path.parent / f"{role}.parquet") for role in ROLES}
        return cls(**sets, **facts, matching=matching)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, role))} {role}" for role in ROLES)
        windows, model = self.counts.get("windows", 0), self.settings.get("model", "a model")
        return f"MemorizedSet({sizes}; {windows} windows scanned with {model})"

    def _repr_html_(self) -> str:
        counts = pd.DataFrame({"windows": self.counts}).to_html()
        return f"<p><b>{escape(repr(self))}</b></p>{counts}{self.matching.to_html(index=False)}"


def assemble_sets(
    model: Any, kept: Kept, token_counts: Int[np.ndarray, "vocab"], settings: Mapping[str, Any]
) -> MemorizedSet:
    """Make the sets from what a scan kept: the first n memorized windows, and their controls.

    Args:
        model: The model; its tokenizer decodes the texts.
        kept: What `choose` kept.
        token_counts: How often each id occurs in the corpus.
        settings: What the sets and the result record.
    """
    length = settings["prefix_len"] + settings["suffix_len"]
    empty = SequenceSet.from_tokens(np.zeros((0, length), np.int64), settings["prefix_len"])
    sets: dict[str, SequenceSet] = dict.fromkeys(ROLES, empty)
    tables = [pd.DataFrame(columns=_BALANCE)]
    memorized = kept.candidates("memorized")
    if memorized is None:
        warnings.warn(f"none of {kept.counts['windows']} windows is memorized: no set is made", stacklevel=3)
    else:
        sets["memorized"] = memorized[: settings["n"]]
        for role, also in (("unmemorized", ()), ("predictable", ("target_logprob",))):
            pool = kept.candidates(role)
            if pool is not None and len(pool):
                matching = match_controls(
                    sets["memorized"], pool, token_counts, n_per=1, seed=settings["seed"], also=also
                )
                sets[role] = matching.controls
                balance = matching.balance.reset_index().assign(controls=role)
                tables.append(balance.reindex(columns=_BALANCE))
    counts = {**kept.counts, **{role: len(seqs) for role, seqs in sets.items()}}
    counts["beyond_n"] = kept.counts["memorized_found"] - counts["memorized"]
    balance = pd.concat(tables[1:] or tables, ignore_index=True)
    finished = {role: _finished(model, seqs, {**settings, "role": role}) for role, seqs in sets.items()}
    return MemorizedSet(
        **finished,
        counts={name: int(counts.get(name, 0)) for name in _COUNTS},
        settings=dict(settings),
        matching=balance,
    )


def _finished(model: Any, seqs: SequenceSet, settings: Mapping[str, Any]) -> SequenceSet:
    """Add texts, and the attributes that describe a set."""
    attrs = {name: value for name, value in settings.items() if value is not None}
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        attrs = {**tokenizer_attrs(tokenizer), **attrs}
        texts = tokenizer.batch_decode(seqs.rows()) if len(seqs) else []
        seqs = seqs.with_table(seqs.table.assign(text=texts))
    return seqs.with_attrs(**attrs, prepend_bos=False)
