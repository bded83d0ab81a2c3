"""Benchmarks of denoisers."""
