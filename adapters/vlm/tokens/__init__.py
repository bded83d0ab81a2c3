"""Visual tokens of one forward, one by one: whose each is, and what becomes of its rows in the caches of layers."""
