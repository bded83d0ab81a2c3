"""Stores, one file each: in what form the rows of a cache are held."""

from __future__ import annotations

from tokred.kv.stores.flat import Flat
from tokred.kv.stores.half import Half
from tokred.kv.stores.rectangle import Rectangle
from tokred.kv.stores.store import ABILITIES, Query, Shelf, Store

__all__ = ["ABILITIES", "Flat", "Half", "Query", "Rectangle", "Shelf", "Store"]
