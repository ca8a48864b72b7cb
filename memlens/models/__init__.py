"""How a model comes in: names, families, files, the two backends, adapters; the zoo's checkpoints."""

from __future__ import annotations
