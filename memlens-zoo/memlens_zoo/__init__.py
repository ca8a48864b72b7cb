"""Checkpoints of memlens' zoo: one folder per model, found by `memlens.load_model("zoo/<name>")`."""
