"""The localizers that memlens compares, one module per idea."""
