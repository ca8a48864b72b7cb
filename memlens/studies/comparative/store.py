"""What is saved of each model: one folder per model, one file per measure, each computed once.

The folder's name ends in the model's fingerprint, and `model.json` says of each measure what it was made from
(a key of sequences and options), so that a changed model, set or option is computed anew and nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import ResultError
from memlens.recall.scores import RecallScores
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.store.keyed_folder import read_manifest, write_manifest

_VERSION = 1
"""Of the format of `model.json`."""


class ModelStore:
    """The folder of one model, to write to.

    Args:
        folder: The folder; made where it is missing.
        facts: What is known of the model; replaces earlier facts.

    Raises:
        ResultError: `model.json` is damaged.
    """

    path: Path

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        old = _read(self.path) if (self.path / "model.json").exists() else {"parts": {}}
        self._content = {"facts": dict(facts), "parts": old["parts"]}
        self._write()

    def done(self, part: str, key: str) -> bool:
        """Whether the folder holds a part made from the same key."""
        return self._content["parts"].get(part, {}).get("key") == key

    def make(
        self, part: str, key: str, work: Callable[[], str | None], options: Mapping[str, Any] | None = None
    ) -> None:
        """Compute a part unless the folder holds it.

        Args:
            part: Its name.
            key: Digest of what it is made from.
            work: Computes and saves it; returns why there is nothing to save, if so.
            options: The options it depends on, for the record.
        """
        if self.done(part, key):
            return
        self._content["parts"].pop(part, None)
        start = time.perf_counter()
        note = work()
        seconds = round(time.perf_counter() - start, 2)
        made = {"key": key, "seconds": seconds, "note": note or "", "options": dict(options or {})}
        self._content["parts"][part] = made
        self._write()

    def _write(self) -> None:
        write_manifest(self.path / "model.json", "comparative", _VERSION, self._content)


@dataclass(frozen=True, eq=False)
class SavedModel:
    """The folder of one model, to read from.

    Attributes:
        path: The folder.
        facts: `label`, `family`, `corpus`, `control`, `n_params`, `n_layers`, `n_heads`, `fingerprint`, and
            what `memlens.models.provenance.describe` gives.
        parts: By name: `key`, `seconds`, `note` (why a part is empty), `options` (it depends on).
    """

    path: Path
    facts: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> SavedModel:
        """Open a folder written by `ModelStore`.

        Raises:
            ResultError: It does not hold a model, or is damaged.
        """
        content = _read(Path(folder))
        return cls(Path(folder), content["facts"], content["parts"])

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return str(self.facts["label"])

    @property
    def family(self) -> str:
        """Its family."""
        return str(self.facts["family"])

    @property
    def control(self) -> bool:
        """Whether the model is outside the families."""
        return bool(self.facts["control"])

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
        return pd.read_parquet(self.path / "groups.parquet")

    def result(self, part: str) -> Result:
        """Return a part that is a result."""
        return load_result(self.path / f"{part}.nc")


def saved_models(folder: str | Path) -> list[SavedModel]:
    """Return all models that are saved in a folder, sorted by label.

    Of different weights with one name, those measured last are taken.

    Raises:
        ResultError: One of them is damaged.
    """
    files = sorted(Path(folder).glob("*/model.json"), key=lambda file: file.stat().st_mtime)
    found = {model.label: model for model in (SavedModel.open(file.parent) for file in files)}
    return sorted(found.values(), key=lambda model: model.label)


def folder_name(label: str, fingerprint: str) -> str:
    """Return a model's folder name.

    >>> folder_name("zoo/pythia-s", "0123456789abcdef")
    'zoo-pythia-s-01234567'
    """
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', label).strip('-.') or 'model'}-{fingerprint[:8]}"


def _read(folder: Path) -> dict[str, Any]:
    content = read_manifest(folder / "model.json", "comparative", _VERSION)
    if not isinstance(content.get("facts"), dict) or not isinstance(content.get("parts"), dict):
        raise ResultError(f"{folder / 'model.json'} is damaged: delete the folder to compute it anew.")
    return content
