"""transformers: language models with layers of experts, whose routers' choice may be changed."""
