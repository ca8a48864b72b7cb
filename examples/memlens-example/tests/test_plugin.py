"""Every module of this package is imported by memlens and adds something."""

from __future__ import annotations

from memlens.registry import load_plugins


def test_every_module_adds_something() -> None:
    """As `memlens plugins` shows."""
    mine = [plugin for plugin in load_plugins() if plugin.package.startswith("memlens-example ")]
    assert mine, "memlens-example is not installed: pip install -e ."
    for plugin in mine:
        assert plugin.error == ""
        assert plugin.adds, f"{plugin.module} registers nothing"
