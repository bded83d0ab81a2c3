"""Benchmarks of tokred: one file per scenario, and ``zoo``, the real weights and data they run on."""
