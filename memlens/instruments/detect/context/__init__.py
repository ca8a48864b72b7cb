"""In context or in weights: a continuation recalled from its prefix, or copied from earlier in the prompt."""
