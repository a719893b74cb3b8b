"""Measurements: the same work, the same weights, the same threads, side by side, kept as data."""
