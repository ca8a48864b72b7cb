"""Gradients as a filter, exact effects after it."""
