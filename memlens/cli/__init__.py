"""The command line: `memlens --help`."""

from __future__ import annotations

from memlens.cli.app import app, main

__all__ = ["app", "main"]
