"""Encoders: what methods that reduce tokens inside transformer blocks are made of."""
