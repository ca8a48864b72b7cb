"""A public set of sequences by name: `ml.load_sequences("example:proverbs", model)` reads it from the hub."""

from __future__ import annotations

from memlens.sequences.named import register_named_sets

register_named_sets("""
example:proverbs:
  title: proverbs of many languages
  made_for: Which proverbs does a model know by heart?
  kind: texts
  hub: example/proverbs
  home: https://example.org/proverbs
  license: CC0-1.0
  cite: example2026
  parts:
    train: {rows: 1200}
""")
