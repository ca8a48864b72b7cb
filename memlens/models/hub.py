"""The Hugging Face hub, or at once its cache where the hub does not answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session

_SECONDS = 5.0
"""How long the hub may take to answer."""


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[None]:
    """Let the hub's clients read their caches at once, as in offline mode, where the hub does not answer.

    On their own they ask several times for every file, which takes minutes.

    Args:
        name: What is read: a name on the hub; for a path that exists, nothing is asked and changed.
    """
    if Path(name).exists() or is_offline_mode() or hub_answers():
        yield
        return
    switches: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    held = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(switches, held, strict=True):
            module.HF_HUB_OFFLINE = value


def hub_answers() -> bool:
    """Return whether the hub may be asked (not in offline mode) and answers; it is asked once a minute."""
    return not is_offline_mode() and _answers(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # each client library has its own errors
        return False
    return True
