"""Runs on disk: fingerprints, keyed folders that resume, parts, claims and executors."""
