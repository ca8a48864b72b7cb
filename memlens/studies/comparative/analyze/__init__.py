"""Numbers from what was measured; pure functions."""
