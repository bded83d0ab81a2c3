"""Tools of several methods that choose visual tokens: greedy choice, clusters, transport, tiles, budgets."""
