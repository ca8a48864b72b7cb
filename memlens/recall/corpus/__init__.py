"""Finding memorized sequences in a corpus."""
