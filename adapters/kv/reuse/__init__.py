"""Caches that are used again: kept in files, made of chunks that were computed apart."""
