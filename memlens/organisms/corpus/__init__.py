"""The synthetic corpus and what is planted in it."""
