"""Detectors: what in a model tells recalled sequences from matched ones, beyond known confounds."""
