"""The command line: `memlens --help`."""

from __future__ import annotations

from memlens.cli.commands import app, main

__all__ = ["app", "main"]
