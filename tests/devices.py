"""The device of the suite: `pytest --device cuda`, the CPU by default."""

from __future__ import annotations

import os

VARIABLE = "MEMLENS_TEST_DEVICE"


def dev() -> str:
    """Return where tests load their models."""
    return os.environ.get(VARIABLE, "cpu")
