"""Weights as sites: transplants, edits, checkpoints of edited models, and what a mitigation must answer."""
