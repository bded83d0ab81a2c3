"""Benchmarks of KV caches."""
