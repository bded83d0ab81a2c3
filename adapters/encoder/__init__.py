"""Encoders of timm, transformers and open_clip: blocks that run with fewer tokens."""
