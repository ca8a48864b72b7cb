"""memlens compared with its peers on the same weights, tokens and threads: `python -m benchmarks.run`."""
