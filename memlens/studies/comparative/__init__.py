"""The comparative study (arXiv 2603.21658)."""
