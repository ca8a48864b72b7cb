"""What breaks when attention mixes nothing: bypass, sets of layers, bounds, serving."""
