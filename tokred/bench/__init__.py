"""Measuring: models, data, arms, times, results and plots; the demo."""
