"""Damaged and malicious files for every reader: `python -m tests.hostile` counts what they lead to."""
