"""Searches that led to a setting; nothing in the documentation's tables depends on them."""
