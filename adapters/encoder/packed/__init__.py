"""Towers without a batch: all images of a forward stand in one sequence, and attention is told where each ends."""
