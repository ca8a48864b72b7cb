"""How a model's blocks run: hooks, trunk, blocks as functions, weights, activations, metrics."""
