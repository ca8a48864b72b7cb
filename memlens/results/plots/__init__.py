"""From a result to its figure."""
