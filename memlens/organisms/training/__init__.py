"""Architectures, recipes, training, and the checkpoint folder that comes out."""
