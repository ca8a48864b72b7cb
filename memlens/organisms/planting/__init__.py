"""Planting a memory into known components of any model, so that the right answer is known."""
