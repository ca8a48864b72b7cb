"""Project URLs from the address of the repository, which stands once, in `pyproject.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectUrls(MetadataHookInterface):
    """Fill `[project.urls]`; empty as long as there is no address."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the metadata's `urls`."""
        settings = tomllib.loads(Path(self.root, "pyproject.toml").read_text(encoding="utf-8"))
        address = settings["tool"]["memlens"]["repository"].rstrip("/")
        metadata["urls"] = {
            name: f"{address}{path}"
            for name, path in (
                ("Repository", ""), ("Issues", "/issues"), ("Changelog", "/blob/main/CHANGELOG.md")
            )
            if address
        }  # fmt: skip
