"""Stores, one file each: in what form the rows of a cache are held."""

from __future__ import annotations

from tokred.kv.stores.flat import Flat
from tokred.kv.stores.grouped import Grouped
from tokred.kv.stores.half import Half
from tokred.kv.stores.kivi import KIVI
from tokred.kv.stores.mikv import MiKV
from tokred.kv.stores.mustafar import Mustafar
from tokred.kv.stores.nsnquant import NSNQuant
from tokred.kv.stores.offload import Offloaded
from tokred.kv.stores.rectangle import Rectangle
from tokred.kv.stores.rotated import Oscar, Turbo
from tokred.kv.stores.shadow import ShadowKV
from tokred.kv.stores.store import ABILITIES, Query, Shelf, Store
from tokred.kv.stores.tight import Tight
from tokred.kv.stores.tokenbutler import TokenButler
from tokred.kv.stores.tokenselect import TokenSelect
from tokred.kv.stores.zones import Zones

__all__ = [
    "ABILITIES",
    "KIVI",
    "Flat",
    "Grouped",
    "Half",
    "MiKV",
    "Mustafar",
    "NSNQuant",
    "Offloaded",
    "Oscar",
    "Query",
    "Rectangle",
    "ShadowKV",
    "Shelf",
    "Store",
    "Tight",
    "TokenButler",
    "TokenSelect",
    "Turbo",
    "Zones",
]
