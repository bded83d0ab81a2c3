"""Denoisers: what methods that reduce tokens around sub-layers are made of."""
