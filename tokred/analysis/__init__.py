"""Analysis: what tokens contribute, what a method will do to a model, pictures of what became of tokens."""
