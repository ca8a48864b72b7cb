"""What is saved of each model: one folder per model, one file per measure, each computed once.

The folder's name ends in the model's fingerprint, and `model.json` says of each measure what it was made from
(a key of sequences and options), so that a changed model, set or option is computed anew and nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import ResultError
from memlens.files import expanded, made_folder, parsing
from memlens.recall.scores import RecallScores
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.sequences.parquet import read_table
from memlens.store.keyed_folder import read_manifest, write_manifest

_FORMAT = ("comparative", 1)
"""The format of `model.json`, and its version."""


class SavedModel:
    """The folder of one model.

    Args:
        path: The folder.
        facts: What is known of the model, to begin or to go on with its folder; None reads what the folder
            says.

    Attributes:
        path: The folder.
        facts: `label`, `family`, `corpus`, `control`, `n_params`, `n_layers`, `n_heads`, `fingerprint`, and
            what `memlens.models.provenance.describe` gives.
        parts: By name: `key`, `seconds`, `note` (why a part is empty), `options` (it depends on).
        label: The model's name in tables.
        family: Its family.
        control: Whether the model is outside the families.
        size: Its number of parameters; 0 where that is not recorded.

    Raises:
        ResultError: The folder does not hold a model, or is damaged.
    """

    path: Path
    facts: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    label: str
    family: str
    control: bool
    size: int

    def __init__(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        self.path = expanded(path)
        self._manifest = self.path / "model.json"
        content = {"facts": facts, "parts": {}}
        if facts is None or self._manifest.exists():
            content = read_manifest(self._manifest, *_FORMAT)
        with parsing(self._manifest, ResultError, "delete the folder to compute it anew"):
            self.facts, self.parts = dict(facts or content["facts"]), {**content["parts"]}
            self.label, self.family = str(self.facts["label"]), str(self.facts["family"])
            self.control, self.size = bool(self.facts["control"]), int(self.facts.get("n_params", 0))
        if facts is not None:
            made_folder(self.path)
            self._write()

    def make(
        self, part: str, key: str, work: Callable[[], str | None], options: Mapping[str, Any] | None = None
    ) -> None:
        """Compute a part unless the folder holds one made from the same key.

        Args:
            part: Its name.
            key: Digest of what it is made from.
            work: Computes and saves it; returns why there is nothing to save, if so.
            options: The options it depends on, for the record.
        """
        if self.parts.get(part, {}).get("key") == key:
            return
        self.parts.pop(part, None)
        start = time.perf_counter()
        note = work()
        seconds = round(time.perf_counter() - start, 2)
        self.parts[part] = {
            "key": key,
            "seconds": seconds,
            "note": note or "",
            "options": dict(options or {}),
        }
        self._write()

    def _write(self) -> None:
        write_manifest(self._manifest, *_FORMAT, {"facts": self.facts, "parts": self.parts})

    def has(self, part: str) -> bool:
        """Whether a part was measured and is not empty."""
        return part in self.parts and not self.parts[part]["note"]

    @cached_property
    def recall(self) -> RecallScores:
        """Its recall scores."""
        return RecallScores.load(self.path / "recall.parquet")

    @cached_property
    def groups(self) -> pd.DataFrame:
        """Which sequences were examined: `id`, `group`, `matched_to`."""
        return read_table(self.path / "groups.parquet")[0]

    def result(self, part: str) -> Result:
        """Return a part that is a result."""
        return load_result(self.path / f"{part}.nc")


def saved_models(folder: str | Path) -> list[SavedModel]:
    """Return all models that are saved in a folder, sorted by label.

    Of different weights with one name, those measured last are taken.

    Raises:
        ResultError: One of them is damaged.
    """
    files = sorted(expanded(folder).glob("*/model.json"), key=lambda file: file.stat().st_mtime)
    found = {model.label: model for model in (SavedModel(file.parent) for file in files)}
    return sorted(found.values(), key=lambda model: model.label)


def folder_name(label: str, fingerprint: str) -> str:
    """Return a model's folder name.

    >>> folder_name("zoo/pythia-s", "0123456789abcdef")
    'zoo-pythia-s-01234567'
    """
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', label).strip('-.') or 'model'}-{fingerprint[:8]}"
