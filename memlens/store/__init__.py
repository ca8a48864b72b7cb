"""Runs on disk: fingerprints and keyed folders that resume."""
