"""Policies for the KV caches of language models, one file each."""
