"""How a model's layers run: hooks, trunk, blocks as functions, weights, activations, metrics."""
