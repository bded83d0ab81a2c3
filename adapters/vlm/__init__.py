"""Vision-language models of transformers, and language models whose later layers run on fewer tokens."""
