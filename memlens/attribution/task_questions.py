"""Questions with choices, before they are tokenized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlens.errors import FileFormatError, SourceNotFoundError

__all__ = ["Question", "read_records"]


@dataclass(frozen=True)
class Question:
    """A question before it is tokenized.

    Attributes:
        contexts: What is given, one for each choice.
        continuations: What is scored, one for each choice.
        gold: The right choices' numbers.
        characters: Length of each choice, by which `accuracy_norm` divides.
        name: Of the question, unique in its task.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: tuple[int, ...]
    characters: tuple[int, ...]
    name: str

    @classmethod
    def of(cls, record: Mapping[str, Any], name: str, delimiter: str = " ") -> Question:
        """Return the question of a record.

        Args:
            record: `context` (a text, or one for each choice), `choices` (texts), `gold` (the right one's
                number, or several; may be left out where there is one choice).
            name: Of the question.
            delimiter: What stands between context and choice; it does not count as a character.

        Raises:
            FileFormatError: A field is missing or of another kind, or `gold` names no choice.
        """
        for field in ("context", "choices"):
            if field not in record:
                raise FileFormatError(f"{name} has no {field!r}: a question needs context, choices and gold.")
        choices, context = record["choices"], record["context"]
        if not isinstance(choices, list | tuple) or not choices or not all(map(_is_text, choices)):
            raise FileFormatError(f"{name}: choices={choices!r} is no list of texts.")
        contexts = [context] * len(choices) if isinstance(context, str) else context
        if not isinstance(contexts, list | tuple) or len(contexts) != len(choices):
            raise FileFormatError(f"{name}: context={context!r} is no text, nor one text for each choice.")
        gold = record.get("gold", 0 if len(choices) == 1 else None)
        numbers = list(gold) if isinstance(gold, list | tuple) else [gold]
        if not numbers or not all(type(n) is int and 0 <= n < len(choices) for n in numbers):
            raise FileFormatError(
                f"{name}: gold={gold!r} is no choice: give a number from 0 to {len(choices) - 1}."
            )
        return cls(
            tuple(contexts),
            tuple(f"{delimiter}{choice}" for choice in choices),
            tuple(numbers),
            tuple(map(len, choices)),
            name,
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one a line, each checked to be a question.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: A line is no record, or no question; names the line.
    """
    if not path.is_file():
        raise SourceNotFoundError(f"there is no file {path}: a task is one record a line, as JSON.")
    records = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"{path}, line {number} is not JSON: {error.msg}.") from error
        if not isinstance(record, dict):
            raise FileFormatError(f"{path}, line {number} is no record but {line.strip()[:40]!r}.")
        Question.of(record, f"{path}, line {number}")
        records.append(record)
    return records
