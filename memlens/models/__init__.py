"""How a model comes in, and how its blocks are run."""

from __future__ import annotations
