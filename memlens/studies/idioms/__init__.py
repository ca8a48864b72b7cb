"""The idioms study (arXiv 2210.03588)."""
