"""Intervals, comparisons and trade-offs: numpy and xarray only."""
