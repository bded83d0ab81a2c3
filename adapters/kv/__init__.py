"""KV caches of transformers' language models: cache layers, attention and mask functions, and the host record."""
