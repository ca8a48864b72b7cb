"""What a model loses if attention mixes nothing: bypass, sets of layers, bounds, serving."""
