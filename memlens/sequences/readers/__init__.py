"""Readers: one per file format or source."""
