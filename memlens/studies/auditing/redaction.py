"""What a report shows of a secret: its first and last character at most."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from memlens.errors import ColumnError, MemlensError, OptionError, SourceNotFoundError

Hide = Callable[[str], str]
"""Returns a text without what is secret in it."""

_PIECE = 5
_ENDS_FROM = 8
_PROSE = 64
"""A longer string is taken for prose, whose shorter pieces are ordinary words."""
_PROSE_PIECE = 12
_QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*\1(?!\w)|\d{5,}""", re.DOTALL)
_HIDDEN = "[hidden]"
_ENCODINGS = ("'utf-8'", "'ascii'")


def masked(secret: str) -> str:
    """Return a secret as reports show it: its first and last character and how many are hidden.

    Of fewer than 8 characters none is shown: two digits of six would be a third of the secret.

    >>> masked("ada@lovelace.org"), masked("471147")
    ('a[14 hidden]g', '[6 hidden]')
    """
    plain = secret.strip()
    if len(plain) < _ENDS_FROM:
        return f"[{len(plain)} hidden]"
    return f"{plain[0]}[{len(plain) - 2} hidden]{plain[-1]}"


def hiding(secrets: Iterable[str]) -> Hide:
    """Return a function that removes every piece of the secrets from a text.

    A piece has 5 characters or more; of a string of over 64 characters, 12, since shorter pieces of prose are
    words of any text.

    >>> hiding(["ada@lovelace.org"])("no token of 'ce.org' is like lovelace@ada")
    "no token of '[hidden]' is like [hidden]@ada"
    """
    pieces: dict[int, set[str]] = {_PIECE: set(), _PROSE_PIECE: set()}
    for secret in map(str.strip, secrets):
        size = _PIECE if len(secret) <= _PROSE else _PROSE_PIECE
        pieces[size].update(secret[i : i + size] for i in range(len(secret) - size + 1))

    def hide(text: str) -> str:
        secret = np.zeros(len(text) + 1, dtype=bool)
        for size, known in pieces.items():
            for i in range(len(text) - size + 1):
                if text[i : i + size] in known:
                    secret[i : i + size] = True
        edges = np.flatnonzero(np.diff(secret.astype(int), prepend=0))
        shown = text
        for start, end in reversed(list(zip(edges[::2], edges[1::2], strict=True))):
            shown = shown[:start] + _HIDDEN + shown[end:]
        return shown

    return hide


def without_quotes(message: str) -> str:
    """Return a message without what it quotes, and without numbers of five digits or more.

    >>> without_quotes("row 3 of the model's file is 'ada@lovelace.org': give text")
    "row 3 of the model's file is [hidden]: give text"
    """
    return _QUOTED.sub(lambda quoted: quoted[0] if quoted[0] in _ENCODINGS else _HIDDEN, message)


@contextmanager
def quiet_reading(on: bool) -> Iterator[None]:
    """Let no error or warning quote what was read.

    Errors about columns, options and missing files stay as they are: they quote names.

    Args:
        on: Off, nothing is changed.
    """
    if not on:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (ColumnError, OptionError, SourceNotFoundError):
            raise
        except MemlensError as error:
            raise type(error)(without_quotes(str(error))) from None
    for warning in caught:
        warnings.warn(without_quotes(str(warning.message)), warning.category, stacklevel=3)
