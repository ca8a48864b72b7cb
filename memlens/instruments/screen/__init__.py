"""Gradients as a filter before exact effects."""
