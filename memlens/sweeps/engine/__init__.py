"""The engine: exact and fast. Nothing outside `memlens.sweeps` imports from here."""
