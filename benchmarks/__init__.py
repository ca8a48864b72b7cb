"""Both sides of every comparison on the same weights, tokens and threads: `python -m benchmarks.run`."""
