"""Secrets in text: where e-mail addresses, phone numbers and keys stand, and sequences that end in one.

Only the secret is the target; what stands before it is the prefix. The text is tokenized as a whole, and the
targets are the tokens that overlap the secret's characters, from the first to the last of them. A token that
also holds a neighboring character (the space before a word, a full stop that is glued to it) is a target as a
whole; tokens after the secret are cut off.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, EmptySetError, OptionError, SequenceError, check_option
from memlens.models.bos import expects_bos
from memlens.sequences.readers.drafts import Draft, PrependBos, find_column, listing
from memlens.sequences.readers.load import load_sequences, settle
from memlens.sequences.set import SequenceSet, unique_ids
from memlens.sequences.tokenizing import Tokenizer, need_tokenizer

SECRET = "secret"
"""The usual column of secrets."""
MARKED = "marked"
"""The kind of a secret that a column marks and whose form is of no built-in kind."""
CONTEXT = 128
"""Most tokens before a secret by default."""
_ENTROPY = 3.5
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{4})")


def _is_phone(text: str) -> bool:
    """Return whether a run of groups of digits has as many digits as a phone number, and is not a date."""
    return 7 <= sum(map(str.isdigit, text)) <= 15 and not _DATE.fullmatch(text)


def _is_iban(text: str) -> bool:
    """Return whether the two check digits of an account number are right (ISO 13616)."""
    plain = "".join(text.split())
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(sign, 36)) for sign in moved)) % 97 == 1


def _is_key(text: str) -> bool:
    """Return whether a run of signs has digits, letters, and the spread of a random text."""
    shares = [count / len(text) for count in Counter(text).values()]
    entropy = -sum(share * math.log2(share) for share in shares)
    least = _ENTROPY if len(set(text)) > 16 else 3.0  # at most 4 bits in hexadecimal
    return entropy >= least and any(map(str.isdigit, text)) and any(map(str.isalpha, text))


@dataclass(frozen=True)
class SecretPattern:
    """A kind of secret that is found by its form.

    Attributes:
        expression: A regular expression for candidates.
        holds: Whether a candidate is one.
        meaning: What it finds, in a few words.
    """

    expression: re.Pattern[str]
    holds: Callable[[str], bool]
    meaning: str


SECRET_PATTERNS: Mapping[str, SecretPattern] = MappingProxyType(
    {
        "email": SecretPattern(
            re.compile(r"(?<![\w.%+-])[\w.%+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}(?![\w-])"),
            lambda _: True,
            "e-mail addresses",
        ),
        "iban": SecretPattern(
            re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
            _is_iban,
            "international bank account numbers with right check digits",
        ),
        "key": SecretPattern(
            re.compile(r"(?<![\w+/-])[A-Za-z0-9_+/-]{20,}={0,2}(?![\w+/=-])"),
            _is_key,
            "key-like strings: 20 or more signs without a space, random as a password",
        ),
        "phone": SecretPattern(
            re.compile(
                r"(?<![\w.@-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?"
                r"\d{1,5}(?:[ .-]?\d{2,5}){1,4}(?![\w@])"
            ),
            _is_phone,
            "phone numbers of 7 to 15 digits",
        ),
    }
)  # fmt: skip
"""The built-in kinds, by name. Where two kinds find the same place, the first one of this order counts."""


@dataclass(frozen=True)
class Secret:
    """A place in a text.

    Attributes:
        kind: A key of `SECRET_PATTERNS`, "pattern" for an expression of the caller, or "marked" for a text of
            another form that a column gives.
        start: Its first character.
        end: The character after its last one.
    """

    kind: str
    start: int
    end: int


def find_secrets(text: str, patterns: Sequence[str] = (), pattern: str | None = None) -> list[Secret]:
    r"""Return the secrets in a text, in order; none overlaps another.

    Args:
        text: Any text.
        patterns: Names of built-in kinds, keys of `SECRET_PATTERNS`.
        pattern: A regular expression; its group `secret`, or else its first group, is the secret if it has
            one. Its matches take precedence over those of `patterns`.

    Raises:
        OptionError: An unknown kind, or an expression that cannot be compiled.

    >>> found = find_secrets("Write to ada@lovelace.org or call +44 20 7946 0958.", ["phone", "email"])
    >>> [(secret.kind, secret.start, secret.end) for secret in found]
    [('email', 9, 25), ('phone', 34, 50)]
    >>> find_secrets("PIN 4711", pattern=r"PIN (\d+)")
    [Secret(kind='pattern', start=4, end=8)]
    """
    for name in patterns:
        check_option("patterns", name, list(SECRET_PATTERNS))
    taken = np.zeros(len(text), dtype=bool)
    found: list[Secret] = []
    for secret in _candidates(text, patterns, pattern):
        if secret.start < secret.end and not taken[secret.start : secret.end].any():
            taken[secret.start : secret.end] = True
            found.append(secret)
    return sorted(found, key=lambda secret: secret.start)


def _candidates(text: str, patterns: Sequence[str], pattern: str | None) -> Iterator[Secret]:
    if pattern is not None:
        expression = compiled(pattern)
        group: str | int = "secret" if "secret" in expression.groupindex else min(expression.groups, 1)
        for match in expression.finditer(text):
            yield Secret("pattern", *match.span(group))
    for name, known in SECRET_PATTERNS.items():
        if name in patterns:
            for match in known.expression.finditer(text):
                if known.holds(match.group()):
                    yield Secret(name, *match.span())


def compiled(pattern: str) -> re.Pattern[str]:
    """Return a regular expression.

    Raises:
        OptionError: It cannot be compiled.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"pattern is not a regular expression: {error}.") from None


def overlapping_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return the first token that overlaps some characters, and the one after the last that does.

    Args:
        offsets: The characters of each token, as a tokenizer's `return_offsets_mapping` gives them.
        start: The first character.
        end: The character after the last one.

    >>> overlapping_tokens([(0, 3), (3, 7), (7, 9), (9, 12)], 4, 8)
    (1, 3)
    >>> overlapping_tokens([(0, 3), (3, 7)], 3, 7)
    (1, 2)
    """
    places = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
    return (places[0], places[-1] + 1) if places else (0, 0)


def secret_sequences(
    source: Any,
    model: Any,
    *,
    column: str | None = None,
    text_column: str | None = None,
    pattern: str | None = None,
    patterns: Sequence[str] = (),
    context: int = CONTEXT,
    unique: bool = False,
    prepend_bos: PrependBos = "auto",
    split: str = "train",
    limit: int | None = None,
) -> SequenceSet:
    """Return a sequence for each secret in texts or a corpus: what stands before it, and it as the target.

    The targets are the tokens that overlap the secret's characters when the text is tokenized as a whole. A
    secret with nothing before it, or longer than the model's context, is left out.

    Args:
        source: Whatever `load_sequences` reads; rows of token ids are decoded.
        model: A TransformerLens model, with a tokenizer that knows the characters of its tokens.
        column: The column of secrets, each of which stands in its row's text; "secret" by default where there
            is no pattern.
        text_column: The column of texts, where it has none of the usual names.
        pattern: A regular expression; see `find_secrets`.
        patterns: Built-in kinds, keys of `SECRET_PATTERNS`.
        context: Most tokens before the secret; fewer where the model's context leaves fewer.
        unique: Keep the first occurrence of each secret only, and count all of them in the column `copies`.
        prepend_bos: As of `load_sequences`.
        split: As of `load_sequences`.
        limit: Read at most this many rows.

    Returns:
        The set; its table has the columns of the source and `row` (place among the rows read, from 0),
        `kind`, `secret` (its characters), and `text` up to the secret's end. The attributes `n_left_out` and
        `left_out` say what is missing.

    Raises:
        ColumnError: There is no such column.
        EmptySetError: No secret is found, or none can be a target.
        OptionError: An unknown kind, a wrong expression, or a context of no token.
        SequenceError: The tokenizer does not know which characters its tokens stand for.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = secret_sequences(["Call Ada at 020 7946 0958 today."], model, patterns=["phone"])
        >>> seqs.table["secret"].tolist(), seqs.n_targets.tolist()
        (['020 7946 0958'], [13])
    """
    if context < 1:
        raise OptionError(f"context={context}: give the number of tokens before a secret, at least 1.")
    tokenizer = need_tokenizer(getattr(model, "tokenizer", None))
    if not getattr(tokenizer, "is_fast", False):
        raise SequenceError(
            "this tokenizer does not know which characters its tokens stand for (it is not a fast one): give "
            "prompts and continuations in columns of their own."
        )
    read = read_texts(source, tokenizer, split=split, limit=limit, text_column=text_column)
    table, origin = read.table, str(read.attrs.get("source", "texts"))
    if pattern is None and not patterns:
        name = find_column(table, column, (SECRET,))
        if name is None:
            raise ColumnError(
                f"there is no column {SECRET!r}: {listing(table)}; name one, or give a pattern."
            )
        places = _in_column(table["text"].tolist(), table[name].tolist())
        table = table.drop(columns=[SECRET], errors="ignore")
    else:
        places = [
            (row, s) for row, text in enumerate(table["text"]) for s in find_secrets(text, patterns, pattern)
        ]
    found = pd.DataFrame(
        [(row, secret.kind, secret.start, secret.end) for row, secret in places],
        columns=["row", "kind", "start", "end"],
    )
    if not len(table):
        raise EmptySetError(f"{origin} has no rows: give at least one text.")
    if not len(found):
        raise EmptySetError(f"no secret is found in the {len(table)} rows of {origin}: is the pattern right?")
    return _Cutter(model, tokenizer, context, prepend_bos).cut(table, found, unique, origin)


def read_texts(
    source: Any,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    limit: int | None = None,
    **columns: Any,
) -> SequenceSet:
    """Read any source as whole texts, in the column `text`; rows of fewer than two tokens are left out.

    Args:
        source: Whatever `load_sequences` reads.
        tokenizer: Of the model.
        split: As of `load_sequences`.
        limit: Likewise.
        **columns: Names of columns, likewise (`text_column`, …).
    """
    return load_sequences(
        source, tokenizer=tokenizer, prefix_len=1, on_short="drop", on_eos="keep", split=split, limit=limit,
        **columns,
    )  # fmt: skip


def _in_column(texts: Sequence[str], secrets: Sequence[Any]) -> list[tuple[int, Secret]]:
    """Return where each row's secret stands in its text; at its last place, if there are several."""
    found = []
    for row, (text, value) in enumerate(zip(texts, secrets, strict=True)):
        secret = "" if value is None or value != value else str(value).strip()
        start = text.rfind(secret) if secret else -1
        if start >= 0:
            found.append((row, Secret(_kind(secret), start, start + len(secret))))
    return found


def _kind(secret: str) -> str:
    """Return which built-in kind a whole text is of, or "marked"."""
    for name, known in SECRET_PATTERNS.items():
        if known.expression.fullmatch(secret) and known.holds(secret):
            return name
    return MARKED


@dataclass(frozen=True)
class _Cutter:
    """Cuts tokenized texts at their secrets."""

    model: Any
    tokenizer: Tokenizer
    context: int
    prepend_bos: PrependBos

    def cut(self, table: pd.DataFrame, found: pd.DataFrame, unique: bool, origin: str) -> SequenceSet:
        """Return a sequence for each row of `found`, which has `row`, `kind`, `start` and `end`."""
        texts, used = table["text"].tolist(), found["row"].unique().tolist()
        encoded = self.tokenizer(
            [texts[row] for row in used], add_special_tokens=False, return_offsets_mapping=True
        )
        place = {row: i for i, row in enumerate(used)}
        bos = expects_bos(self.model, self.tokenizer) if self.prepend_bos == "auto" else self.prepend_bos
        room = int(self.model.cfg.n_ctx) - int(bos)
        rows: list[list[int]] = []
        prefix_len: list[int] = []
        reasons: list[str] = []
        for row, start, end in found[["row", "start", "end"]].itertuples(index=False):
            ids = encoded["input_ids"][place[row]]
            first, last = overlapping_tokens(encoded["offset_mapping"][place[row]], start, end)
            before = min(first, self.context, room - (last - first))
            least = 0 if bos else 1
            reason = "with nothing before it" if first == last or first < least else ""
            reasons.append(reason or ("longer than the model's context" if before < least else ""))
            if not reasons[-1]:
                rows.append(ids[first - before : last])
                prefix_len.append(before)
        left_out = Counter({"without a secret": len(table) - len(used)}) + Counter(filter(None, reasons))
        said = "; ".join(f"{n} {reason}" for reason, n in left_out.items())
        if not rows:
            raise EmptySetError(f"no secret of {origin} can be a target: {said}.")
        facts = _facts(table, found[[not reason for reason in reasons]])
        if unique:
            facts["copies"] = facts.groupby("secret")["secret"].transform("size")
            facts = facts.loc[~facts["secret"].duplicated()]
            rows, prefix_len = ([values[i] for i in facts.index] for values in (rows, prefix_len))
        attrs: dict[str, Any] = {"n_left_out": left_out.total(), "left_out": said}
        draft = Draft(rows, np.array(prefix_len, dtype=np.int64), facts.reset_index(drop=True), attrs, True)
        return settle(
            draft, self.model, self.tokenizer, origin, prepend_bos=self.prepend_bos, name=None, on_eos="keep"
        )


def _facts(table: pd.DataFrame, found: Any) -> pd.DataFrame:
    """Return the source's columns for each secret, with `row`, `kind`, `secret`, and `text` up to its end."""
    facts = table.iloc[found["row"]].reset_index(drop=True)
    places = list(zip(facts["text"], found["start"], found["end"], strict=True))
    return facts.assign(
        id=unique_ids(facts["id"].tolist()),
        row=found["row"].to_numpy(),
        kind=found["kind"].to_numpy(),
        secret=[text[start:end] for text, start, end in places],
        text=[text[:end] for text, _, end in places],
    )
