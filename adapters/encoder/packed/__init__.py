"""Towers without a batch: all images of a forward stand in one sequence of rows, and attention is told where each ends."""
