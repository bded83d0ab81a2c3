"""Streams: a model with vision that sees frames one by one, and is asked about what it remembers of them."""
