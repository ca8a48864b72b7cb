"""The attention-bypass study (arXiv 2501.05078)."""
